//! Files over HTTP, through every node, and the same files in the mount.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use quorumfs_tests::environment::wait_for;
use quorumfs_tests::http::Http;
use quorumfs_tests::{Cluster, Random, Sandbox};
use serde_json::Value;

/// The paths in a listing.
fn paths(listing: &[Value]) -> Vec<String> {
    listing
        .iter()
        .map(|entry| entry["path"].as_str().expect("each has a path").to_string())
        .collect()
}

fn list(http: &Http, query: &str) -> Vec<Value> {
    http.get(&format!("/files{query}")).expect(&[200]).json()
}

#[test]
fn rest_any_node_takes_what_any_node_serves() {
    let sandbox = Sandbox::light("rest-any-node");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    assert_eq!(
        cluster.http(2).get("/files").expect(&[200]).text().trim(),
        "[]",
        "an empty cluster lists an empty array"
    );
    for writer in cluster.slots() {
        for length in [0usize, 1, 4096, 100_000, (5 << 20) + 7] {
            let content = random.bytes(length);
            let path = format!("from/{writer}/{length}.bin");
            cluster
                .http(writer)
                .post(&format!("/upload/{path}"), content.clone())
                .expect(&[201]);
            for reader in cluster.slots() {
                let reply = cluster
                    .http(reader)
                    .get(&format!("/upload/{path}"))
                    .expect(&[200]);
                assert!(reply.body == content, "{path} from node {reader}");
                assert_eq!(
                    reply.header("content-length"),
                    Some(length.to_string().as_str()),
                    "{path}"
                );
            }
            assert!(
                fs::read(mount.path(&path)).expect("read") == content,
                "{path} in the mount"
            );
        }
    }
    // The other way round.
    let content = random.bytes(3_000_000);
    fs::create_dir(mount.path("made")).expect("mkdir");
    fs::write(mount.path("made/by mount"), &content).expect("write");
    for reader in cluster.slots() {
        assert!(
            cluster
                .http(reader)
                .get("/upload/made/by%20mount")
                .expect(&[200])
                .body
                == content
        );
    }
    // An upload replaces; a delete is seen everywhere.
    cluster
        .http(2)
        .post("/upload/made/by%20mount", "replaced")
        .expect(&[201]);
    assert_eq!(fs::read(mount.path("made/by mount")).expect("read"), b"replaced");
    cluster.http(3).delete("/upload/made/by%20mount").expect(&[204]);
    assert!(!mount.path("made/by mount").exists());
    for slot in cluster.slots() {
        cluster.http(slot).get("/upload/made/by%20mount").expect(&[404]);
        cluster
            .http(slot)
            .delete("/upload/made/by%20mount")
            .expect(&[404]);
    }
    mount.unmount();
}

#[test]
fn rest_downloads_have_lengths_tags_and_ranges() {
    let sandbox = Sandbox::light("rest-ranges");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let content = random.bytes(3_500_000);
    cluster
        .http(1)
        .post("/upload/file", content.clone())
        .expect(&[201]);
    let last = content.len() - 1;
    for slot in cluster.slots() {
        let http = cluster.http(slot);
        let head = http.head("/upload/file").expect(&[200]);
        assert_eq!(head.header("content-length"), Some("3500000"));
        assert!(head.body.is_empty());
        let tag = head.header("etag").expect("an ETag").to_string();
        assert_eq!(
            http.get("/upload/file").expect(&[200]).header("etag"),
            Some(tag.as_str())
        );
        http.get_with("/upload/file", ("If-None-Match", &tag))
            .expect(&[304]);
        for (range, from, to) in [
            ("bytes=0-0".to_string(), 0, 0),
            ("bytes=1000000-1100000".to_string(), 1_000_000, 1_100_000),
            ("bytes=3499990-".to_string(), 3_499_990, last),
            ("bytes=-5".to_string(), last - 4, last),
            ("bytes=3499999-9999999".to_string(), last, last),
        ] {
            let reply = http.get_with("/upload/file", ("Range", &range)).expect(&[206]);
            assert!(reply.body == content[from..=to], "node {slot}: {range}");
            let expected = format!("bytes {from}-{to}/3500000");
            assert_eq!(reply.header("content-range"), Some(expected.as_str()), "{range}");
        }
        let reply = http
            .get_with("/upload/file", ("Range", "bytes=3500000-"))
            .expect(&[416]);
        assert_eq!(reply.header("content-range"), Some("bytes */3500000"));
    }
    let tag = cluster
        .http(1)
        .head("/upload/file")
        .header("etag")
        .map(str::to_string);
    cluster.http(2).post("/upload/file", content).expect(&[201]);
    let new = cluster
        .http(3)
        .head("/upload/file")
        .header("etag")
        .map(str::to_string);
    assert_ne!(tag, new, "a file that was replaced has another tag");
}

#[test]
fn rest_lists_are_recursive_sorted_and_paged() {
    let sandbox = Sandbox::light("rest-list");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let mut expected = Vec::new();
    for directory in ["a", "a/b", "a-b", "c/d/e", "z"] {
        fs::create_dir_all(mount.path(directory)).expect("mkdir");
        for name in ["1", "10", "2", "é", "with space"] {
            fs::write(mount.path(directory).join(name), name).expect("write");
            expected.push(format!("{directory}/{name}"));
        }
    }
    fs::create_dir(mount.path("empty")).expect("mkdir");
    expected.sort();
    for slot in cluster.slots() {
        let http = cluster.http(slot);
        let all = list(http, "");
        assert_eq!(paths(&all), expected, "node {slot}");
        assert!(all.iter().all(|entry| entry["size"].is_u64()));
        let mut paged = Vec::new();
        let mut query = "?limit=7".to_string();
        loop {
            let reply = http.get(&format!("/files{query}")).expect(&[200]);
            let page: Vec<Value> = reply.json();
            assert!(page.len() <= 7);
            paged.extend(paths(&page));
            match reply.header("x-next-after") {
                Some(after) => query = format!("?limit=7&after={after}"),
                None => break,
            }
        }
        assert_eq!(paged, expected, "node {slot}, page by page");
        let below: Vec<String> = expected
            .iter()
            .filter(|path| path.starts_with("a/"))
            .cloned()
            .collect();
        assert_eq!(paths(&list(http, "?prefix=a/")), below);
        assert!(list(http, "?prefix=nothing").is_empty());
    }
    mount.unmount();
}

#[test]
fn rest_takes_names_that_are_bytes() {
    let sandbox = Sandbox::light("rest-names");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    cluster
        .http(1)
        .post("/upload/%FF%FEname/%25%20%3F%23", "bytes")
        .expect(&[201]);
    let directory = mount.path(std::ffi::OsStr::from_bytes(b"\xff\xfename"));
    assert_eq!(fs::read(directory.join("% ?#")).expect("read"), b"bytes");
    let long = "n".repeat(255);
    cluster
        .http(2)
        .post(&format!("/upload/{long}"), "long")
        .expect(&[201]);
    assert_eq!(fs::read(mount.path(&long)).expect("read"), b"long");
    assert_eq!(list(cluster.http(3), "").len(), 2);
    mount.unmount();
}

#[test]
fn rest_an_upload_that_breaks_off_leaves_nothing() {
    use std::io::Write as _;
    let sandbox = Sandbox::light("rest-broken-upload");
    let cluster = Cluster::start(&sandbox);
    cluster.http(1).post("/upload/kept", "as it was").expect(&[201]);
    for path in ["kept", "new"] {
        let mut stream = std::net::TcpStream::connect(cluster.http(2).address()).expect("connect");
        let head = format!("POST /upload/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n");
        stream.write_all(head.as_bytes()).expect("send");
        stream.write_all(&vec![1; 2_000_000]).expect("send");
        drop(stream);
    }
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(
        cluster.http(3).get("/upload/kept").expect(&[200]).text(),
        "as it was"
    );
    cluster.http(3).get("/upload/new").expect(&[404]);
}

#[test]
fn rest_status_tells_who_leads_and_whether_it_can_write() {
    let sandbox = Sandbox::light("rest-status");
    let cluster = Cluster::start(&sandbox);
    // A follower may still be reading its log when the leader and another can write.
    wait_for("every node can write", Duration::from_secs(30), || {
        let mut slots = cluster.slots();
        slots.all(|slot| cluster.status(slot).is_ok_and(|status| status.writable))
    });
    let leader = cluster.leader();
    let mut ids = Vec::new();
    for slot in cluster.slots() {
        let status = cluster.status(slot).expect("status");
        assert_eq!(status.node.slot, slot);
        assert_eq!(status.leader.as_ref().map(|leader| leader.slot), Some(leader));
        assert!(status.writable && status.reason.is_none(), "{status:?}");
        assert_eq!(status.role, if slot == leader { "leader" } else { "follower" });
        ids.push(status.cluster_id.expect("a cluster has an id"));
    }
    assert!(ids.iter().all(|id| *id == ids[0] && id.len() == 32), "{ids:?}");
}

#[test]
fn rest_a_cluster_of_one_node_works_too() {
    let sandbox = Sandbox::light("rest-single");
    let cluster = Cluster::builder(&sandbox).nodes(1).start();
    let mount = cluster.mount();
    fs::write(mount.path("file"), "alone").expect("write");
    assert_eq!(cluster.http(1).get("/upload/file").expect(&[200]).text(), "alone");
    cluster.restart(1);
    cluster.wait_ready();
    assert_eq!(fs::read(mount.path("file")).expect("read"), b"alone");
    mount.unmount();
}

/// How long a small answer may take on a loaded machine; less than a request waits for its turn.
const SMALL_LIMIT: Duration = Duration::from_secs(8);

/// Says `text` and then nothing more, and reads nothing.
fn says(http: &Http, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(http.address()).expect("connect");
    stream.write_all(text.as_bytes()).expect("send");
    stream
}

/// Small calls, each in time.
fn assert_small_calls(http: &Http) {
    for path in [
        "/download/small",
        "/healthz",
        "/status",
        "/metrics",
        "/files?limit=1",
        "/health/status",
    ] {
        let began = Instant::now();
        http.get(path).expect(&[200]);
        assert!(began.elapsed() < SMALL_LIMIT, "{path} took {:?}", began.elapsed());
    }
    let began = Instant::now();
    http.post("/upload/small", "hello").expect(&[201]);
    assert!(began.elapsed() < SMALL_LIMIT, "{:?}", began.elapsed());
}

#[test]
fn rest_clients_that_do_not_read_hold_up_nobody() {
    const CLIENTS: usize = 66;
    let sandbox = Sandbox::light("rest-slow-readers");
    let cluster = Cluster::builder(&sandbox).nodes(1).start();
    let http = cluster.http(1);
    http.post("/upload/large", vec![7; 24 << 20]).expect(&[201]);
    http.post("/upload/small", "hello").expect(&[201]);
    let _stalled: Vec<TcpStream> = (0..CLIENTS)
        .map(|_| says(http, "GET /download/large HTTP/1.1\r\nhost: x\r\n\r\n"))
        .collect();
    std::thread::sleep(Duration::from_secs(1));
    assert_small_calls(http);
    // One that reads is served, for those that do not give way.
    assert_eq!(http.get("/download/large").expect(&[200]).body.len(), 24 << 20);
}

#[test]
fn rest_uploads_that_stall_hold_up_nobody() {
    const CLIENTS: usize = 80;
    let sandbox = Sandbox::light("rest-stalled-uploads");
    let cluster = Cluster::builder(&sandbox).nodes(1).start();
    let http = cluster.http(1);
    http.post("/upload/small", "hello").expect(&[201]);
    let begun = "x".repeat(100 << 10);
    let _stalled: Vec<TcpStream> = (0..CLIENTS)
        .map(|n| {
            says(
                http,
                &format!(
                    "PUT /upload/stalled-{n} HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n{begun}"
                ),
            )
        })
        .collect();
    std::thread::sleep(Duration::from_secs(1));
    assert_small_calls(http);
    http.post("/upload/large", vec![7; 5 << 20]).expect(&[201]);
    assert_eq!(list(http, "").len(), 2, "what stalls is not there");
}

#[test]
fn rest_connections_that_say_nothing_hold_up_nobody() {
    const CONNECTIONS: usize = 1100;
    let sandbox = Sandbox::light("rest-idle");
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(files).expect("getrlimit");
    nix::sys::resource::setrlimit(files, most, most).expect("setrlimit");
    let cluster = Cluster::builder(&sandbox).nodes(1).start();
    let http = cluster.http(1);
    http.post("/upload/small", "hello").expect(&[201]);
    let _idle: Vec<TcpStream> = (0..CONNECTIONS).map(|_| says(http, "")).collect();
    assert_small_calls(http);
}
