//! What the nodes and the mounts count, and what they tell about it.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use quorumfs_tests::environment::{tool, wait_for};
use quorumfs_tests::{Cluster, Sandbox, posix};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);

fn metrics(cluster: &Cluster<'_>, slot: usize) -> Value {
    cluster.http(slot).get("/metrics").expect(&[200]).json()
}

/// `[count, failures, bytes]` of one kind of operation.
fn operation(report: &Value, origin: &str, kind: &str) -> [u64; 3] {
    let rows = report["operations"].as_array().expect("a list");
    let row = rows
        .iter()
        .find(|row| row["origin"] == origin && row["kind"] == kind);
    row.map_or([0; 3], |row| {
        ["count", "failures", "bytes"].map(|field| row[field].as_u64().expect("a number"))
    })
}

fn http_row<'a>(report: &'a Value, endpoint: &str) -> &'a Value {
    let rows = report["http"].as_array().expect("a list");
    let row = rows.iter().find(|row| row["endpoint"] == endpoint);
    row.unwrap_or_else(|| panic!("no {endpoint} in {rows:?}"))
}

fn status_count(row: &Value, class: &str) -> u64 {
    let classes = row["statuses"].as_array().expect("a list");
    let found = classes.iter().find(|status| status["class"] == class);
    found.expect("every class is there")["count"]
        .as_u64()
        .expect("a number")
}

#[track_caller]
fn assert_in_order(latency: &Value, what: &str) {
    let figures = ["p50_us", "p90_us", "p99_us", "max_us"].map(|q| latency[q].as_u64().expect("a number"));
    assert!(figures.is_sorted(), "{what}: {latency}");
    assert!(
        figures[3] < 60_000_000,
        "{what}: nothing takes a minute: {latency}"
    );
}

fn statistics(root: &Path) -> Value {
    let value = posix::get_xattr(root, "user.quorumfs.statistics").expect("getxattr");
    serde_json::from_slice(&value).expect("the statistics are JSON")
}

fn verb(statistics: &Value, verb: &str) -> [u64; 3] {
    let rows = statistics["verbs"].as_array().expect("a list");
    let row = rows.iter().find(|row| row["verb"] == verb);
    row.map_or([0; 3], |row| {
        ["count", "failures", "bytes"].map(|field| row[field].as_u64().expect("a number"))
    })
}

#[test]
fn metrics_count_what_mounts_and_http_clients_did() {
    const FILES: u64 = 20;
    const BYTES: usize = 3 << 20;
    let sandbox = Sandbox::light("metrics-counts");
    let cluster = Cluster::builder(&sandbox)
        .arguments(&["--metrics-summary-s", "1"])
        .start();
    let mount = cluster.mount();
    let leader = cluster.leader();
    let before = metrics(&cluster, leader);
    assert_eq!(before["is_leader"], true);

    for number in 0..FILES {
        fs::create_dir(mount.path(format!("d{number}"))).expect("mkdir");
        fs::write(mount.path(format!("f{number}")), b"small").expect("write");
    }
    fs::write(mount.path("large"), vec![7; BYTES]).expect("write");
    fs::rename(mount.path("f0"), mount.path("renamed")).expect("rename");
    fs::remove_file(mount.path("f1")).expect("unlink");
    fs::remove_dir(mount.path("d1")).expect("rmdir");
    std::os::unix::fs::symlink("f2", mount.path("pointer")).expect("symlink");
    fs::hard_link(mount.path("f2"), mount.path("again")).expect("link");
    assert!(fs::remove_dir(mount.path("f3")).is_err());
    assert!(fs::create_dir(mount.path("d2")).is_err());

    // Over HTTP, through the leader, so that its requests are all counted there.
    let http = cluster.http(leader);
    for number in 0..FILES {
        http.post(&format!("/upload/rest/{number}"), vec![number as u8; 1000])
            .expect(&[201]);
        let read = http.get(&format!("/upload/rest/{number}")).expect(&[200]);
        assert_eq!(read.body.len(), 1000);
    }
    for number in 0..5 {
        http.get(&format!("/download/missing/{number}")).expect(&[404]);
    }
    http.delete("/upload/rest/0").expect(&[204]);
    http.delete("/upload/rest/0").expect(&[404]);
    http.get("/nothing/here").expect(&[404]);

    let report = metrics(&cluster, leader);
    let counted = |origin: &str, kind: &str| {
        let (now, then) = (operation(&report, origin, kind), operation(&before, origin, kind));
        [now[0] - then[0], now[1] - then[1], now[2] - then[2]]
    };
    assert_eq!(counted("mount", "create")[..2], [FILES + 1, 0]);
    let [count, failures, _] = counted("mount", "mkdir");
    assert!(count >= FILES, "{count}");
    assert!(failures <= 1, "only d2 was there: {failures}");
    assert_eq!(counted("mount", "rename")[..2], [1, 0]);
    assert_eq!(counted("mount", "delete")[..2], [1, 0]);
    assert_eq!(counted("mount", "symlink")[..2], [1, 0]);
    assert_eq!(counted("mount", "link")[..2], [1, 0]);
    let [_, _, written] = counted("mount", "write");
    assert_eq!(written, FILES * 5 + BYTES as u64);
    let [chunks, _, brought] = counted("mount", "put_chunk");
    assert!(
        chunks >= 3 && brought == BYTES as u64,
        "{chunks} chunks, {brought} bytes"
    );
    assert_eq!(counted("rest", "delete")[..2], [1, 0]);
    assert_eq!(
        counted("rest", "link")[..2],
        [FILES, 0],
        "uploads appear by a link"
    );
    assert_eq!(counted("rest", "write")[2], FILES * 1000);
    let [_, missed, _] = counted("rest", "lookup");
    assert!(missed >= 6, "what is missing is not found: {missed}");

    let uploads = http_row(&report, "upload");
    assert_eq!(
        (uploads["count"].as_u64(), status_count(uploads, "2xx")),
        (Some(FILES), FILES)
    );
    assert_eq!(uploads["bytes"].as_u64(), Some(FILES * 1000));
    let downloads = http_row(&report, "download");
    assert_eq!(status_count(downloads, "2xx"), FILES);
    assert_eq!(status_count(downloads, "4xx"), 5);
    assert_eq!(downloads["failures"].as_u64(), Some(5));
    let deletes = http_row(&report, "delete");
    assert_eq!(
        (status_count(deletes, "2xx"), status_count(deletes, "4xx")),
        (1, 1)
    );
    assert_eq!(status_count(http_row(&report, "other"), "4xx"), 1);

    for row in report["operations"].as_array().expect("a list") {
        assert_in_order(&row["latency"], &row["kind"].to_string());
        let rate = row["success_rate"].as_f64().expect("a number");
        assert!((0.0..=1.0).contains(&rate), "{row}");
    }
    let replication = &report["replication"];
    assert_eq!(replication["copies"], 3);
    assert_eq!(replication["quorum"], 2);
    assert_in_order(&replication["time_to_quorum"], "quorum");
    wait_for("every chunk is on all nodes, and counted", SOON, || {
        let report = metrics(&cluster, leader);
        let factor = report["replication"]["overhead_factor"].as_f64();
        report["replication"]["time_to_all"]["max_us"].as_u64() > Some(0)
            && factor.is_some_and(|factor| (2.9..=3.01).contains(&factor))
    });
    let raft = &report["raft"];
    assert_eq!(raft["role"], "leader");
    assert!(raft["commits"].as_u64() >= Some(4 * FILES), "{raft}");
    assert!(raft["entries_per_flush"].as_f64() >= Some(1.0), "{raft}");
    assert!(raft["flush_latency"]["max_us"].as_u64() > Some(0), "{raft}");
    assert_in_order(&raft["commit_latency"], "commit");
    assert!(report["throughput"]["operations_per_s"].as_f64() > Some(1.0));
    assert!(report["space"]["available_bytes"].as_u64() > Some(0));
    cluster.wait_log(leader, &["summary of operations"], SOON);

    let follower = cluster.followers()[0];
    let report = metrics(&cluster, follower);
    assert_eq!(report["is_leader"], false);
    assert_eq!(report["leader_slot"].as_u64(), Some(leader as u64));
    assert_eq!(
        operation(&report, "mount", "mkdir")[0],
        0,
        "the leader counts what clients ask"
    );
    assert!(report["raft"]["entries_applied"].as_u64() >= Some(4 * FILES));
}

#[test]
fn metrics_prometheus_reads_them() {
    let sandbox = Sandbox::light("metrics-prometheus");
    let cluster = Cluster::start(&sandbox);
    let leader = cluster.leader();
    let http = cluster.http(leader);
    for number in 0..5 {
        http.post(&format!("/upload/{number}"), vec![1; 100_000])
            .expect(&[201]);
        http.get(&format!("/upload/{number}")).expect(&[200]);
    }
    let reply = http.get("/metrics?format=prometheus").expect(&[200]);
    let by_header = http.get_with("/metrics", ("accept", "text/plain")).expect(&[200]);
    for reply in [&reply, &by_header] {
        let kind = reply.header("content-type").expect("it has a type");
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    }
    http.get("/metrics?format=xml").expect(&[400]);
    let text = reply.text();
    let samples = parse(&text);
    let value = |sample: &str| {
        let found = samples.iter().find(|(name, _)| name == sample);
        found.unwrap_or_else(|| panic!("no {sample} in\n{text}")).1
    };
    assert_eq!(value("quorumfs_raft_is_leader"), 1.0);
    assert_eq!(value("quorumfs_raft_voters"), 3.0);
    assert_eq!(
        value("quorumfs_http_requests_total{endpoint=\"upload\",status=\"2xx\"}"),
        5.0
    );
    assert_eq!(
        value("quorumfs_operations_total{kind=\"link\",origin=\"rest\"}"),
        5.0
    );
    assert!(value("quorumfs_replication_quorum_duration_seconds_count") >= 5.0);
    promtool(&text);
}

/// A strict reader of the exposition format: every sample belongs to a family that was announced with HELP and TYPE,
/// names and labels are well formed, no sample is twice, buckets rise to their count.
fn parse(text: &str) -> Vec<(String, f64)> {
    let is_name = |name: &str| {
        name.starts_with("quorumfs_") && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let (mut samples, mut helped, mut family) = (Vec::new(), String::new(), (String::new(), String::new()));
    let mut families = std::collections::BTreeSet::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').expect("HELP has words");
            assert!(is_name(name) && !words.is_empty(), "{line}");
            helped = name.to_string();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("TYPE has a type");
            assert_eq!(name, helped, "HELP comes before TYPE");
            assert!(families.insert(name.to_string()), "{name} is announced twice");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            family = (name.to_string(), kind.to_string());
        } else {
            assert!(!line.starts_with('#') && !line.is_empty(), "{line:?}");
            let (sample, value) = line.rsplit_once(' ').expect("a sample has a value");
            let value: f64 = value.parse().unwrap_or_else(|e| panic!("{line}: {e}"));
            let name = sample.split('{').next().expect("it has a name");
            let suffix = name
                .strip_prefix(&family.0)
                .unwrap_or_else(|| panic!("{line} in {family:?}"));
            let suffixes: &[&str] = match family.1.as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            assert!(suffixes.contains(&suffix), "{line} in {family:?}");
            if let Some(labels) = sample.strip_prefix(name).filter(|labels| !labels.is_empty()) {
                let inside = labels.strip_prefix('{').and_then(|l| l.strip_suffix("\"}"));
                let inside = inside.unwrap_or_else(|| panic!("{line}"));
                for label in inside.split("\",") {
                    let (name, _) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
                    assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{line}");
                }
            }
            samples.push((sample.to_string(), value));
        }
    }
    let mut names: Vec<&str> = samples.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count, "a sample is there twice");
    let mut last: Option<(String, f64)> = None;
    for (name, value) in &samples {
        let Some((series, _)) = name.split_once("le=\"") else {
            last = None;
            continue;
        };
        if let Some((before, low)) = &last
            && before == series
        {
            assert!(value >= low, "{name} falls");
        }
        last = Some((series.to_string(), *value));
    }
    samples
}

/// `promtool check metrics`; the strict reader has been content already.
fn promtool(text: &str) {
    let Some(program) = tool("promtool") else { return };
    let mut process = Command::new(program)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run promtool");
    let mut input = process.stdin.take().expect("it was asked for");
    input.write_all(text.as_bytes()).expect("write to promtool");
    drop(input);
    let output = process.wait_with_output().expect("run promtool");
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.trim().is_empty(),
        "promtool: {said}"
    );
    println!("promtool is content");
}

#[test]
fn metrics_tradeoffs_tell_measured_from_estimated() {
    let sandbox = Sandbox::light("metrics-tradeoffs");
    let cluster = Cluster::start(&sandbox);
    let leader = cluster.leader();
    let http = cluster.http(leader);
    let young: Value = http.get("/metrics/tradeoffs").expect(&[200]).json();
    assert_eq!(young["present"]["chunk_write"]["source"], "unknown");
    for number in 0..30 {
        http.post(&format!("/upload/{number}"), vec![1; 200_000])
            .expect(&[201]);
        http.get(&format!("/upload/{number}")).expect(&[200]);
    }
    let analysis: Value = http.get("/metrics/tradeoffs").expect(&[200]).json();
    let present = &analysis["present"];
    assert_eq!(
        (&present["copies"], &present["quorum"]),
        (&Value::from(3), &Value::from(2))
    );
    assert_eq!(present["tolerates"]["lost_for_ever"], 1);
    assert_eq!(present["small_write"]["source"], "measured");
    let micros = |setting: &Value, what: &str| setting[what]["p50_us"].as_u64().expect("known by now");
    assert!(micros(present, "small_write") > 0);
    let alternatives = analysis["alternatives"].as_array().expect("a list");
    for wanted in [5, 7] {
        let setting = alternatives.iter().find(|setting| setting["nodes"] == wanted);
        let setting = setting.unwrap_or_else(|| panic!("no {wanted} nodes"));
        assert_eq!(setting["small_write"]["source"], "estimated");
        assert!(micros(setting, "small_write") > 0);
        // Three copies, but a majority of the nodes at the least.
        let copies = f64::from((wanted / 2 + 1).max(3));
        assert_eq!(setting["space_factor"]["value"].as_f64(), Some(copies));
        assert_eq!(setting["tolerates"]["down_for_writes"], wanted / 2);
    }
    let unflushed = alternatives.iter().find(|setting| setting["flush"] == false);
    let unflushed = unflushed.expect("there is one without flushes");
    assert!(micros(unflushed, "small_write") <= micros(present, "small_write"));
    for advice in analysis["advice"].as_array().expect("a list") {
        for part in ["wish", "change", "gain", "cost"] {
            assert!(
                advice[part].as_str().is_some_and(|text| !text.is_empty()),
                "{advice}"
            );
        }
    }
}

#[test]
fn metrics_of_a_mount_are_told_by_it_and_by_the_leader() {
    const FILES: u64 = 12;
    let sandbox = Sandbox::light("metrics-mount");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let bytes = vec![9; 300_000];
    for number in 0..FILES {
        fs::write(mount.path(number.to_string()), &bytes).expect("write");
    }
    for number in 0..FILES {
        assert!(fs::read(mount.path(number.to_string())).expect("read") == bytes);
    }
    assert!(fs::metadata(mount.path("missing")).is_err());
    let told = statistics(mount.directory());
    assert_eq!(verb(&told, "create")[..2], [FILES, 0]);
    assert_eq!(verb(&told, "write")[2], FILES * 300_000);
    assert!(verb(&told, "lookup")[1] >= 1, "missing was not found");
    for row in told["verbs"].as_array().expect("a list") {
        assert_in_order(&row["latency"], &row["verb"].to_string());
    }
    // Not listed, so that `cp -a` and tar do not take it along.
    let listed = posix::list_xattrs(mount.directory()).expect("listxattr");
    assert!(listed.is_empty(), "{listed:?}");

    let leader = cluster.leader();
    wait_for("the leader shows the mount's own words", SOON, || {
        let report = metrics(&cluster, leader);
        let rows = report["mounts"].as_array().expect("a list").clone();
        let directory = mount.directory().display().to_string();
        rows.len() == 1
            && rows[0]["description"]
                .as_str()
                .is_some_and(|text| text.contains(&directory))
            && verb(&rows[0]["statistics"], "create")[0] == FILES
    });
    mount.unmount();
    wait_for("a mount that is gone is not shown", SOON, || {
        metrics(&cluster, leader)["mounts"]
            .as_array()
            .is_some_and(Vec::is_empty)
    });
}

#[test]
fn metrics_openapi_describes_what_is_served() {
    let sandbox = Sandbox::light("metrics-openapi");
    let cluster = Cluster::builder(&sandbox).nodes(1).start();
    let http = cluster.http(1);
    let document: Value = http.get("/openapi.json").expect(&[200]).json();
    assert!(
        document["openapi"]
            .as_str()
            .is_some_and(|version| version.starts_with("3."))
    );
    http.post("/upload/x", "content").expect(&[201]);
    let paths = document["paths"].as_object().expect("an object");
    for (path, methods) in paths {
        assert!(
            methods.as_object().is_some_and(|methods| !methods.is_empty()),
            "{path}"
        );
        if methods.get("get").is_some() {
            let asked = path.replace("{path}", "x");
            let status = http.get(&asked).status;
            let described = &methods["get"]["responses"][status.to_string()];
            assert!(described.is_object(), "GET {asked}: {status} is not described");
        }
    }
    let codes = &document["components"]["schemas"]["ErrorBody"]["properties"];
    for field in ["code", "message", "hint"] {
        assert!(codes[field].is_object(), "{codes}");
    }
    let missing: Value = http.get("/upload/missing").expect(&[404]).json();
    assert_eq!(missing["code"], "not_found");
}
