//! What goes wrong in operation is answered with a clear message; nothing is lost, nothing panics (every sandbox
//! looks for panics in the logs of its processes).

use std::fs::{self, File};
use std::io::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use quorumfs_tests::environment::{binary, wait_for};
use quorumfs_tests::http::Http;
use quorumfs_tests::mount::is_mounted;
use quorumfs_tests::process::{ManagedProcess, read_log};
use quorumfs_tests::{Cluster, Sandbox};

/// A mistake on the command line is told at once.
const TOLD_WITHIN: Duration = Duration::from_secs(20);

/// Runs `command`, which must fail soon. Answers what it said.
#[track_caller]
fn fails(sandbox: &Sandbox, what: &str, command: Command) -> String {
    let log = sandbox.log_path(&what.replace(' ', "-"));
    let mut process = ManagedProcess::start(what, command, &log);
    let status = process
        .wait(TOLD_WITHIN)
        .unwrap_or_else(|| panic!("{what}: still runs after {TOLD_WITHIN:?}"));
    let said: String = read_log(&log)
        .lines()
        .filter(|line| !line.starts_with("--- test:"))
        .map(|l| format!("{l}\n"))
        .collect();
    assert_failed(what, status, &said);
    said
}

#[track_caller]
fn assert_failed(what: &str, status: ExitStatus, said: &str) {
    assert!(
        status.code().is_some_and(|code| code != 0),
        "{what}: ended with {status}: {said}"
    );
    assert!(!said.trim().is_empty(), "{what}: said nothing");
}

#[track_caller]
fn assert_says(said: &str, words: &[&str]) {
    let lower = said.to_lowercase();
    assert!(
        words.iter().any(|word| lower.contains(&word.to_lowercase())),
        "none of {words:?} in: {said}"
    );
}

fn with(mut command: Command, arguments: &[&str]) -> Command {
    command.args(arguments);
    command
}

#[test]
fn node_flags_that_cannot_be_are_named() {
    let sandbox = Sandbox::light("bad-node-flags");
    let cluster = Cluster::builder(&sandbox).build();
    let said = fails(&sandbox, "unknown flag", with(cluster.command(1), &["--bogus"]));
    assert_says(&said, &["--bogus"]);
    let node = |arguments: &[&str]| {
        let mut command = Command::new(binary("quorumfs-node"));
        command.args(arguments).arg("--data").arg(sandbox.path("data"));
        command
    };
    let members = cluster.members();
    let http = cluster.http(1).address();
    for (what, arguments, words) in [
        (
            "slot 0",
            vec!["--slot", "0", "--members", &members, "--http", http],
            vec!["slot"],
        ),
        (
            "slot 4 of 3",
            vec!["--slot", "4", "--members", &members, "--http", http],
            vec!["slot"],
        ),
        (
            "slot in words",
            vec!["--slot", "one", "--members", &members, "--http", http],
            vec!["slot"],
        ),
        ("no members", vec!["--slot", "1", "--http", http], vec!["members"]),
        (
            "member without port",
            vec!["--slot", "1", "--members", "127.0.0.1", "--http", http],
            vec!["members", "127.0.0.1"],
        ),
        (
            "port 99999",
            vec!["--slot", "1", "--members", "127.0.0.1:99999", "--http", http],
            vec!["99999"],
        ),
        (
            "one member twice",
            vec![
                "--slot",
                "1",
                "--members",
                "127.0.0.1:3,127.0.0.1:3,127.0.0.1:4",
                "--http",
                http,
            ],
            vec!["127.0.0.1:3", "twice"],
        ),
    ] {
        assert_says(&fails(&sandbox, what, node(&arguments)), &words);
    }
    let file = sandbox.path("file");
    fs::write(&file, "not a folder").expect("write");
    let mut command = Command::new(binary("quorumfs-node"));
    command
        .args(["--slot", "1", "--members", &members, "--http", http, "--data"])
        .arg(&file);
    assert_says(
        &fails(&sandbox, "data is a file", command),
        &[file.to_str().expect("UTF-8")],
    );
}

#[test]
fn ports_in_use_are_named() {
    let sandbox = Sandbox::light("bad-ports");
    let cluster = Cluster::builder(&sandbox).build();
    for (what, address) in [
        ("gRPC port in use", cluster.grpc_address(1)),
        ("HTTP port in use", cluster.http(1).address()),
    ] {
        let _taken = TcpListener::bind(address).expect("take the port");
        let said = fails(&sandbox, what, cluster.command(1));
        assert_says(&said, &[address]);
        assert_says(&said, &["in use"]);
    }
}

#[test]
fn a_data_folder_is_used_by_its_own_slot_and_by_one_process_only() {
    let sandbox = Sandbox::light("bad-slot");
    let cluster = Cluster::start(&sandbox);
    cluster.kill(3);
    // Slot 3 with the folder of slot 2, which runs; then with that of slot 2 when it does not run.
    let mut command = Command::new(binary("quorumfs-node"));
    let members = cluster.members();
    let arguments = [
        "--slot",
        "3",
        "--members",
        &members,
        "--http",
        cluster.http(3).address(),
        "--data",
    ];
    command.args(arguments).arg(cluster.data_folder(2));
    let said = fails(&sandbox, "folder in use", command);
    assert_says(&said, &["in use", "lock", "another process", "slot"]);
    cluster.kill(2);
    let mut command = Command::new(binary("quorumfs-node"));
    command.args(arguments).arg(cluster.data_folder(2));
    let said = fails(&sandbox, "folder of another slot", command);
    assert_says(&said, &["slot 2"]);
    cluster.start_node(2);
    cluster.start_node(3);
    cluster.wait_ready();
}

#[test]
fn a_data_folder_of_another_cluster_is_refused() {
    let sandbox = Sandbox::light("bad-cluster");
    let ours = Cluster::start(&sandbox);
    ours.http(1).post("/upload/ours", "ours").expect(&[201]);
    let foreign = {
        let other = Cluster::builder(&sandbox).name("other").start();
        other.http(1).post("/upload/theirs", "theirs").expect(&[201]);
        other.wait_at_rest();
        other.kill_all();
        other.data_folder(3).to_path_buf()
    };
    ours.kill(3);
    let (own, aside) = (ours.data_folder(3).to_path_buf(), sandbox.path("aside"));
    fs::rename(&own, &aside).expect("put the own folder aside");
    fs::rename(&foreign, &own).expect("put the foreign folder there");
    ours.start_node(3);
    let line = ours.wait_log(
        3,
        &[
            "another cluster",
            "other cluster",
            "cluster id",
            "belongs to cluster",
        ],
        Duration::from_secs(30),
    );
    eprintln!("said: {line}");
    // It has not joined: with it and one other there is no quorum.
    ours.kill(2);
    std::thread::sleep(Duration::from_secs(3));
    let reply = ours.http(1).post("/upload/file", "x").expect(&[503]);
    assert!(!reply.text().is_empty());
    ours.start_node(2);
    if ours.ended(3).is_none() {
        ours.kill(3);
    } else {
        ours.wait_ended(3, TOLD_WITHIN);
    }
    fs::remove_dir_all(&own).expect("remove the foreign folder");
    fs::rename(&aside, &own).expect("put the own folder back");
    ours.start_node(3);
    ours.wait_ready();
    assert_eq!(ours.http(3).get("/upload/ours").expect(&[200]).text(), "ours");
    ours.http(3).get("/upload/theirs").expect(&[404]);
}

#[test]
fn rest_refuses_paths_that_cannot_be() {
    let sandbox = Sandbox::light("bad-rest-paths");
    let cluster = Cluster::start(&sandbox);
    let http = cluster.http(2);
    let long = "n".repeat(256);
    for bad in [
        "..", "a/../b", "%2e%2e/b", "a/%2E%2E", ".", "a/./b", "a//b", "a/", "a%00b", "a%2Fb", "a%2fb", &long,
        "a%zz", "%",
    ] {
        for method in ["POST", "GET", "DELETE"] {
            let (status, body) = http.raw(method, format!("/upload/{bad}").as_bytes());
            assert_eq!(status, 400, "{method} {bad}: {body}");
            assert!(!body.trim().is_empty(), "{method} {bad}: says nothing");
        }
    }
    for missing in ["/upload/missing", "/upload/missing/deeper"] {
        assert_eq!(http.raw("GET", missing.as_bytes()).0, 404);
        assert_eq!(http.raw("DELETE", missing.as_bytes()).0, 404);
    }
    assert_eq!(http.raw("GET", b"/no/such/endpoint").0, 404);
    assert_eq!(
        http.get("/files").expect(&[200]).text().trim(),
        "[]",
        "nothing was made"
    );
    // What is in the way is told, and stays.
    http.post("/upload/file", "content").expect(&[201]);
    http.post("/upload/directory/file", "content").expect(&[201]);
    http.post("/upload/file/below", "x").expect(&[409]);
    http.post("/upload/directory", "x").expect(&[409]);
    http.delete("/upload/directory").expect(&[409]);
    assert_eq!(http.get("/upload/file").expect(&[200]).text(), "content");
}

#[test]
fn without_a_quorum_rest_says_503_and_why_within_its_timeout() {
    let sandbox = Sandbox::light("bad-no-quorum");
    let cluster = Cluster::start(&sandbox);
    cluster.http(1).post("/upload/file", "content").expect(&[201]);
    let left = cluster.leader();
    for slot in cluster.followers() {
        cluster.kill(slot);
    }
    let http = cluster.http(left);
    wait_for(
        "the node says that it cannot write",
        Duration::from_secs(15),
        || {
            cluster.status(left).is_ok_and(|status| {
                !status.writable && status.reason.is_some_and(|reason| !reason.is_empty())
            })
        },
    );
    type Request = (&'static str, fn(&Http) -> (u16, String));
    // What is given up may still be done later, so the file that is looked at in the end is none of these.
    let requests: [Request; 4] = [
        ("POST", |http| http.raw("POST", b"/upload/new")),
        ("GET", |http| http.raw("GET", b"/upload/file")),
        ("DELETE", |http| http.raw("DELETE", b"/upload/other")),
        ("list", |http| http.raw("GET", b"/files")),
    ];
    for (what, request) in requests {
        let start = Instant::now();
        let (status, body) = request(http);
        assert_eq!(status, 503, "{what}: {body}");
        assert!(body.len() > 10, "{what}: the reason is told, not {body:?}");
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what}: after {:?}",
            start.elapsed()
        );
    }
    for slot in cluster.slots().filter(|slot| *slot != left) {
        cluster.start_node(slot);
    }
    cluster.wait_ready();
    assert_eq!(http.get("/upload/file").expect(&[200]).text(), "content");
}

#[test]
fn mount_points_that_cannot_be_are_named() {
    let sandbox = Sandbox::light("bad-mount-points");
    let cluster = Cluster::start(&sandbox);
    let mount = |place: &Path| {
        let mut command = Command::new(binary("quorumfs-mount"));
        command.arg(cluster.members()).arg(place);
        command
    };
    let missing = sandbox.path("missing");
    let said = fails(&sandbox, "missing mount point", mount(&missing));
    assert_says(&said, &[missing.to_str().expect("UTF-8")]);
    assert_says(&said, &["no such", "not exist", "not found"]);
    let file = sandbox.path("file");
    fs::write(&file, "").expect("write");
    let said = fails(&sandbox, "mount point is a file", mount(&file));
    assert_says(&said, &["not a directory", "is no directory"]);
    let busy = cluster.mount();
    let said = fails(&sandbox, "mount point in use", mount(busy.directory()));
    assert_says(&said, &["already", "busy", "in use"]);
    assert!(is_mounted(busy.directory()), "the mount that was there still is");
    fs::write(busy.path("file"), "works").expect("write");
    for (what, arguments) in [
        ("unknown mount flag", &["--bogus"][..]),
        ("unknown mount option", &["-o", "bogus"]),
    ] {
        let said = fails(
            &sandbox,
            what,
            with(mount(&sandbox.make_folder("mnt")), arguments),
        );
        assert_says(&said, &["bogus"]);
    }
    for spec in ["", "127.0.0.1", "127.0.0.1:notaport", "127.0.0.1:3030:relative"] {
        let mut command = Command::new(binary("quorumfs-mount"));
        command.arg(spec).arg(sandbox.make_folder("mnt"));
        fails(
            &sandbox,
            &format!("mount of {spec:?}").replace(['"', ':', '.'], "_"),
            command,
        );
    }
    busy.unmount();
}

#[test]
fn a_sigterm_ends_a_node_in_order() {
    let sandbox = Sandbox::light("bad-sigterm");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let mut file = File::create(mount.path("file")).expect("create");
    file.write_all(b"before").expect("write");
    for slot in cluster.slots() {
        assert!(
            cluster.terminate(slot).success(),
            "node {slot}: {}",
            cluster.log(slot)
        );
        cluster.start_node(slot);
        cluster.wait_ready();
        writeln!(file, "after node {slot}").expect("write");
        file.sync_all().expect("fsync");
    }
    drop(file);
    mount.unmount();
}
