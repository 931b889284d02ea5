//! The sweeper in whole clusters: what nobody names goes, what a slow writer will still name stays.

use std::time::{Duration, Instant};

use quorumfs_proto::call::ClientResponse;
use quorumfs_proto::command::{Command, IfExists, NewInode, NewKind, Operation, Privileges, Target};
use quorumfs_proto::{Extent, InodeNumber, Name, NewChunk, OperationResult};
use quorumfs_tests::environment::wait_for;
use quorumfs_tests::healing::{ask, content_folder, disk_bytes, number};
use quorumfs_tests::wire_client::WireClient;
use quorumfs_tests::{Cluster, Sandbox};

const CHUNK_BYTES: usize = 1 << 20;
/// Node 1 looks over what it holds once an hour, the others every second.
const LAZY: usize = 1;

/// Makes a file and names `chunk` as its content, in the session's commands `sequence` and the one after it; from then on
/// the session names no chunk below `low_water` any more.
fn name_it(client: &WireClient, chunk: &NewChunk, name: &str, sequence: u64, low_water: u64) {
    let create = Operation::Create {
        parent: Target::Inode(InodeNumber::ROOT),
        name: Name::new(bytes::Bytes::copy_from_slice(name.as_bytes())).expect("a valid name"),
        inode: NewInode {
            kind: NewKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
        },
        existing: IfExists::Refuse,
    };
    let reply = client.mutate(&client.operation(0, sequence, create));
    let ClientResponse::Outcome(Ok(outcome)) = reply else {
        panic!("create: {reply:?}")
    };
    let OperationResult::Entry { inode, .. } = outcome.results[0] else {
        panic!("create: {outcome:?}")
    };
    let append = Operation::Append {
        inode: Target::Inode(inode),
        extents: vec![Extent {
            file_offset: 0,
            length: chunk.length,
            chunk: chunk.id,
            chunk_offset: 0,
        }],
        privileges: Privileges::Keep,
    };
    let command = Command {
        chunks: vec![chunk.clone()],
        operations: vec![append],
    };
    let mut mutation = client.mutation(0, sequence + 1, command);
    mutation.chunk_low_water = low_water;
    let reply = client.mutate(&mutation);
    assert!(matches!(reply, ClientResponse::Outcome(Ok(_))), "{reply:?}");
}

#[test]
fn what_a_slow_writer_has_put_stays_until_its_session_has_ended() {
    let sandbox = Sandbox::light("sweep");
    let secret = sandbox.path("secret");
    std::fs::write(&secret, "the cluster's own secret").expect("write the secret");
    let secret = secret.to_str().expect("UTF-8");
    let mut builder = Cluster::builder(&sandbox).arguments(&["--secret-file", secret]);
    for slot in 1..=3 {
        let interval = if slot == LAZY { "3600" } else { "1" };
        builder = builder.variable(slot, "QUORUMFS_SWEEP_INTERVAL_S", interval);
    }
    let cluster = builder.start();
    let held = |slot: usize| number(&ask(&cluster, slot, "/recovery/status"), "held_chunks");
    let all_hold = |count: u64| cluster.slots().all(|slot| held(slot) == count);
    let client = WireClient::connect(&cluster.members());
    let content: Vec<u8> = (0..CHUNK_BYTES).map(|n| (n * 7 % 251) as u8).collect();
    let chunks: Vec<NewChunk> = (1..=5)
        .map(|counter| client.put_chunk(counter, &content))
        .collect();
    wait_for("all have all copies", Duration::from_secs(10), || all_hold(5));

    // Many passes later all is there, and nobody may delete it: it may still be named.
    let passes = Instant::now();
    let known = ("authorization", "Bearer the cluster's own secret");
    let delete = |slot: usize, chunk: &NewChunk| {
        let path = format!("/delete-content/{}", chunk.id);
        cluster.http(slot).post_with(&path, &[known], "")
    };
    while passes.elapsed() < Duration::from_secs(6) {
        assert!(all_hold(5), "a chunk that may still be named is gone");
        std::thread::sleep(Duration::from_millis(200));
    }
    let refused = delete(2, &chunks[0]).expect(&[409]);
    assert!(refused.text().contains("still may"), "{}", refused.text());
    name_it(&client, &chunks[0], "late", 1, 0);
    for slot in cluster.slots() {
        let reply = cluster.http(slot).get("/upload/late").expect(&[200]);
        assert!(reply.body == content, "node {slot} serves what was named late");
    }

    // The session lives and has moved past two that it did not name: they are freed, and what it may still name stays.
    let disk_before = disk_bytes(&content_folder(&cluster, 2));
    name_it(&client, &chunks[3], "later", 3, 4);
    let others_hold = |count: u64| held(2) == count && held(3) == count;
    wait_for(
        "the others free what can be named no more",
        Duration::from_secs(20),
        || others_hold(3),
    );
    let passes = Instant::now();
    while passes.elapsed() < Duration::from_secs(4) {
        assert!(others_hold(3), "a chunk that may still be named is gone");
        std::thread::sleep(Duration::from_millis(200));
    }

    // The session ends: what it did not name is freed by those that look, and by hand on the one that does not.
    client.close();
    wait_for(
        "the others free what nobody names",
        Duration::from_secs(20),
        || others_hold(2),
    );
    // A chunk is forgotten before its hole is punched.
    wait_for(
        "the space of three chunks comes back",
        Duration::from_secs(20),
        || {
            let freed = disk_before.saturating_sub(disk_bytes(&content_folder(&cluster, 2)));
            freed >= 3 * CHUNK_BYTES as u64
        },
    );
    assert_eq!(held(LAZY), 5);
    for chunk in [&chunks[1], &chunks[2], &chunks[4]] {
        let reply = delete(LAZY, chunk).expect(&[200]);
        let deleted: serde_json::Value = reply.json();
        assert!(
            number(&deleted, "freed_bytes") > CHUNK_BYTES as u64 / 2,
            "{deleted}"
        );
        delete(LAZY, chunk).expect(&[404]);
    }
    let named = delete(LAZY, &chunks[0]).expect(&[409]);
    assert!(named.text().contains("files refer"), "{}", named.text());
    assert_eq!(held(LAZY), 2);
    for name in ["late", "later"] {
        for slot in cluster.slots() {
            let reply = cluster.http(slot).get(&format!("/upload/{name}")).expect(&[200]);
            assert!(reply.body == content, "node {slot} serves {name}");
        }
    }
}
