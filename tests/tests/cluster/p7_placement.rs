//! P7: in a cluster of more than three nodes each chunk lies on three of them; it stays so when nodes fail, come back and
//! leave, and everything can be read through every node all the while.

use std::time::{Duration, Instant};

use quorumfs_tests::healing::{SeededFile, ask, assert_served, content_folder, disk_bytes, number, upload};
use quorumfs_tests::{Cluster, Random, Sandbox};

const LIMIT: Duration = Duration::from_secs(60);
/// Half of them ride inside commands.
fn lengths() -> impl Iterator<Item = u64> {
    (0..60).map(|n| if n % 2 == 0 { 300_000 } else { 9_000 })
}

/// Waits until each chunk lies on exactly `copies` of the running nodes; answers how many each of them holds.
#[track_caller]
fn wait_copies(cluster: &Cluster, copies: u64) -> Vec<u64> {
    let start = Instant::now();
    loop {
        cluster.wait_at_rest();
        let all: Vec<_> = cluster
            .running()
            .into_iter()
            .map(|slot| cluster.recovery_status(slot).expect("recovery status"))
            .collect();
        let held: Vec<u64> = all.iter().map(|status| status.held_chunks).collect();
        if held.iter().sum::<u64>() == copies * all[0].named_chunks
            && all.iter().all(|status| status.copies == copies)
        {
            return held;
        }
        assert!(start.elapsed() < LIMIT, "no {copies} copies of each: {all:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn set_replicas(cluster: &Cluster, slot: usize, replicas: u64) {
    let reply = cluster
        .http(slot)
        .post("/membership/replicas", format!(r#"{{"replicas": {replicas}}}"#))
        .expect(&[200]);
    let view: serde_json::Value = reply.json();
    assert_eq!(view["replicas"], replicas);
}

#[test]
fn p7_each_chunk_lies_on_three_of_five_whatever_fails_or_leaves() {
    let sandbox = Sandbox::heavy("p7-placement");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).nodes(5).start();
    let mut files = upload(&cluster, 1, "first", lengths(), &mut random);
    let held = wait_copies(&cluster, 3);
    let named = cluster.recovery_status(1).expect("recovery status").named_chunks;
    assert!(
        held.iter().all(|chunks| *chunks > named / 3 && *chunks < named),
        "each holds a part of {named}: {held:?}"
    );
    cluster
        .slots()
        .for_each(|slot| assert_served(&cluster, slot, &files));

    // Any two may go: everything is served, and what is written meanwhile has its three copies.
    let (leader, followers) = (cluster.leader(), cluster.followers());
    let gone = [leader, followers[1]];
    gone.iter().for_each(|slot| cluster.kill(*slot));
    let left = cluster.running()[0];
    assert_served(&cluster, left, &files);
    let start = Instant::now();
    let more = upload(&cluster, left, "second", lengths(), &mut random);
    eprintln!(
        "measured: {} files with two of five nodes gone: {:?}",
        more.len(),
        start.elapsed()
    );
    assert_served(&cluster, left, &more);
    files.extend(more);
    gone.iter().for_each(|slot| cluster.start_node(*slot));
    cluster.wait_ready();
    let start = Instant::now();
    wait_copies(&cluster, 3);
    eprintln!(
        "measured: three copies of each, and no more, after {:?}",
        start.elapsed()
    );
    cluster
        .slots()
        .for_each(|slot| assert_served(&cluster, slot, &files));
    mount_and_verify(&cluster, &files);

    // The number of copies is a setting.
    let disks = || -> u64 {
        cluster
            .slots()
            .map(|slot| disk_bytes(&content_folder(&cluster, slot)))
            .sum()
    };
    set_replicas(&cluster, 2, 5);
    wait_copies(&cluster, 5);
    let on_five = disks();
    set_replicas(&cluster, 3, 1);
    wait_copies(&cluster, 3);
    eprintln!(
        "measured: {on_five} bytes of disk with 5 copies, {} with 3",
        disks()
    );
    assert!(disks() < on_five);

    // Two leave: the three that stay hold everything.
    cluster
        .http(4)
        .post("/membership/remove", r#"{"slots": [1, 2]}"#)
        .expect(&[200]);
    cluster.wait_voters(&[3, 4, 5], LIMIT);
    for slot in [1, 2] {
        cluster.terminate(slot);
    }
    set_replicas(&cluster, 3, 3);
    wait_copies(&cluster, 3);
    [3, 4, 5]
        .into_iter()
        .for_each(|slot| assert_served(&cluster, slot, &files));
}

/// What a mount reads, and that every copy that should be there is good.
fn mount_and_verify(cluster: &Cluster, files: &[SeededFile]) {
    let mount = cluster.mount();
    for (name, seed, length) in files {
        let file = std::fs::File::open(mount.path(name)).expect("open");
        quorumfs_tests::random::Content::new(*seed, *length).assert_equals(file, name);
    }
    let body = format!(r#"{{"file_path": "/{}"}}"#, files[0].0);
    let verdict: serde_json::Value = cluster.http(5).post("/repair/verify", body).expect(&[200]).json();
    assert_eq!(verdict["state"], "healthy", "{verdict:#}");
    for chunk in verdict["chunks"].as_array().expect("chunks") {
        let copies = chunk["copies"].as_array().expect("copies");
        let count = |state: &str| copies.iter().filter(|copy| copy["state"] == state).count();
        assert_eq!((count("healthy"), count("elsewhere")), (3, 2), "{chunk:#}");
    }
    mount.unmount();
}

#[test]
fn replicas_that_cannot_be_are_refused_in_words() {
    let sandbox = Sandbox::light("p7-replicas-refused");
    let cluster = Cluster::start(&sandbox);
    for (body, says) in [
        (r#"{"replicas": 0}"#, "must be 1 to 9"),
        (r#"{"replicas": 10}"#, "must be 1 to 9"),
        (r#"{"replicas": "many"}"#, "the body is not valid"),
        ("{}", "the body is not valid"),
    ] {
        let reply = cluster.http(2).post("/membership/replicas", body).expect(&[400]);
        assert!(reply.text().contains(says), "{body}: {}", reply.text());
    }
    assert_eq!(number(&ask(&cluster, 1, "/membership"), "replicas"), 3);
}
