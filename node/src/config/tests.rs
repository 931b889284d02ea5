//! Valid configurations, and the messages for invalid ones.

use super::*;

fn resolve(args: &[&str]) -> Result<Config, String> {
    let settings =
        Settings::try_parse_from(["quorumfs-node"].iter().chain(args)).map_err(|e| e.to_string())?;
    settings.resolve().map_err(|e| e.to_string())
}

const GOOD: [&str; 8] = [
    "--slot",
    "2",
    "--members",
    "127.0.0.1:3030,127.0.0.1:3031,127.0.0.1:3032",
    "--http",
    "127.0.0.1:8082",
    "--data",
    "/d",
];

#[test]
fn a_whole_set_is_taken() {
    let config = resolve(&GOOD).unwrap();
    assert_eq!(config.grpc, "127.0.0.1:3031");
    assert_eq!(config.listen_http, "127.0.0.1:8082".parse().unwrap());
}

#[test]
fn errors_name_the_field_and_what_would_be_right() {
    let with = |at: usize, value: &'static str| {
        let mut args = GOOD;
        args[at] = value;
        resolve(&args).unwrap_err()
    };
    assert!(with(1, "4").contains("--slot: 4 is not a place"));
    assert!(with(1, "0").contains("from 1 to 3"));
    assert!(with(3, "127.0.0.1:3030,127.0.0.1:3031").contains("1, 3, 5 or 7"));
    assert!(with(3, "127.0.0.1:3030,127.0.0.1:3030,127.0.0.1:3032").contains("named twice"));
    assert!(with(3, "nonsense").contains("HOST:PORT"));
    let idle = [&GOOD[..], &["--scrub-mib-per-s", "0"]].concat();
    assert!(
        resolve(&idle)
            .unwrap_err()
            .contains("'--scrub-mib-per-s <MIB>': 0 is not from 1 to 100000")
    );
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    let with_secret = [&GOOD[..], &["--secret-file", secret.to_str().unwrap()]].concat();
    assert!(resolve(&with_secret).unwrap_err().contains("--secret-file"));
    std::fs::write(&secret, "too short\n").unwrap();
    assert!(resolve(&with_secret).unwrap_err().contains("less than 16 bytes"));
    std::fs::write(&secret, "0123456789abcdef\n").unwrap();
    let secret = resolve(&with_secret).unwrap().secret.unwrap();
    assert!(secret.is(b"0123456789abcdef") && !secret.is(b"0123456789abcdee"));
    assert!(with(5, "0.0.0.0:8082").contains("insecure-plaintext"));
    assert!(resolve(&GOOD[..6]).unwrap_err().contains("--data is not set"));
    assert!(resolve(&["--nonsense"]).unwrap_err().contains("--nonsense"));
}

#[test]
fn ntp_servers_have_a_port_or_get_one() {
    let with = |servers: &str| {
        let args: Vec<&str> = GOOD.into_iter().chain(["--ntp", servers]).collect();
        resolve(&args).map(|config| config.ntp)
    };
    assert_eq!(resolve(&GOOD).unwrap().ntp, ["pool.ntp.org:123"]);
    assert_eq!(with("none").unwrap(), [""; 0]);
    assert_eq!(
        with("a, 10.0.0.1:1123,::1,[::1],[::1]:99").unwrap(),
        ["a:123", "10.0.0.1:1123", "[::1]:123", "[::1]:123", "[::1]:99"]
    );
    assert!(
        with("a,none:x")
            .unwrap_err()
            .contains("--ntp: \"none:x\" is not HOST")
    );
    assert!(with("").unwrap_err().contains("--ntp"));
    assert!(with(&"a,".repeat(9)).unwrap_err().contains("1 to 8"));
    let args: Vec<&str> = GOOD.into_iter().chain(["--probe-interval-ms", "5"]).collect();
    assert!(
        resolve(&args)
            .unwrap_err()
            .contains("'--probe-interval-ms <MS>': 5 is not from 100 to 600000")
    );
}

#[test]
fn flags_are_stronger_than_the_file_and_unknown_fields_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("node.toml");
    std::fs::write(
        &file,
        "slot = 1\nhttp = \"127.0.0.1:8081\"\ndata = \"/from-file\"\nntp = [\"a\", \"b:9\"]\n",
    )
    .unwrap();
    let file_name = file.to_str().unwrap();
    let config = resolve(&[
        "--config",
        file_name,
        "--members",
        "127.0.0.1:3030",
        "--data",
        "/from-flag",
    ])
    .unwrap();
    assert_eq!((config.slot, config.data.to_str().unwrap()), (1, "/from-flag"));
    assert_eq!(config.ntp, ["a:123", "b:9"]);
    for (text, wrong) in [
        ("slott = 1\n", "slott"),
        ("slot = 1\nscrub-mib-per-s = 0\n", "0 is not from 1 to 100000"),
        ("slot = 1\nlog = 7\n", "log"),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = resolve(&["--config", file_name]).unwrap_err();
        let line = format!("line {}", text.lines().count());
        for part in [file_name, &line, wrong] {
            assert!(error.contains(part), "{error}");
        }
    }
}
