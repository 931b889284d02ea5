//! Requests made up from the OpenAPI document: no endpoint answers that the server is at fault, nor with anything that the
//! document does not say.

use std::fs;
use std::process::Command;

use quorumfs_tests::environment::tool;
use quorumfs_tests::{Cluster, Random, Sandbox};

/// Statuses that tell a fault of the server, but for those that the document explains: a method that is not served (501),
/// a node or leader that does not answer (503), a full disk (507).
const CONFIGURATION: &str = r#"
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 501, 503, 507]
"#;
/// What an answer must be. (Not that every request outside the schema is refused: a query parameter too many does no
/// harm.)
const CHECKS: &str =
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
/// Seconds of made-up requests.
const LIMIT_S: &str = "60";

#[test]
fn made_up_requests_are_answered_as_the_document_says() {
    let Some(program) = tool("schemathesis") else {
        return;
    };
    let sandbox = Sandbox::light("openapi");
    let mut random = Random::announced();
    let secret = sandbox.path("secret");
    fs::write(&secret, "the cluster's own secret").expect("write the secret");
    let secret = secret.to_str().expect("UTF-8");
    let cluster = Cluster::builder(&sandbox)
        .arguments(&["--secret-file", secret])
        .start();
    let configuration = sandbox.path("schemathesis.toml");
    fs::write(&configuration, CONFIGURATION).expect("write the configuration");
    let run = |what: &[&str], seed: u64| {
        let output = Command::new("timeout")
            .args(["-k", "5", "300"])
            .arg(&program)
            .arg("--config-file")
            .arg(&configuration)
            .args([
                "--no-color",
                "run",
                "--seed",
                &seed.to_string(),
                "--max-time",
                LIMIT_S,
                "--request-timeout",
                "20",
                "--warnings",
                "off",
            ])
            .args([
                "--checks",
                CHECKS,
                "--header",
                "Authorization: Bearer the cluster's own secret",
            ])
            .args(what)
            .arg(format!("http://{}/openapi.json", cluster.http(2).address()))
            .current_dir(sandbox.path(""))
            .output()
            .expect("run schemathesis");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{what:?}: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        for line in said
            .lines()
            .filter(|line| line.contains("test cases:") || line.contains("generated"))
        {
            eprintln!("measured: {}", line.trim());
        }
    };
    let seed = random.number() % (1 << 32);
    // Taking out members that chance names would leave nothing to ask the rest of.
    run(&["--exclude-path", "/membership/remove"], seed);
    cluster.wait_at_rest();
    run(
        &[
            "--include-path",
            "/membership/remove",
            "--phases",
            "examples,coverage",
        ],
        seed,
    );
    for slot in cluster.slots() {
        assert!(cluster.ended(slot).is_none(), "node {slot} has ended");
    }
}
