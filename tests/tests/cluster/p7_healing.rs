//! P7: a missing or lagging node is noticed and made whole without an administrator.

use std::fs;
use std::time::Duration;

use quorumfs_tests::random::Content;
use quorumfs_tests::{Cluster, Random, Sandbox, posix};

#[test]
fn p7_a_node_that_was_away_gets_the_content_it_missed() {
    let sandbox = Sandbox::light("p7-away");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let away = cluster.followers()[0];
    cluster.kill(away);
    let mount = cluster.mount();
    let files: Vec<(String, u64, u64)> = (0..40)
        .map(|n| (format!("file-{n}"), random.number(), random.below(2 << 20)))
        .collect();
    for (name, seed, length) in &files {
        let mut file = fs::File::create(mount.path(name)).expect("create");
        std::io::copy(&mut Content::new(*seed, *length), &mut file).expect("write");
    }
    mount.unmount();
    cluster.start_node(away);
    cluster.wait_at_rest();
    // It really has everything: it serves with one that is not the one that led.
    let gone = cluster.leader();
    let gone = if gone == away {
        cluster.followers()[0]
    } else {
        gone
    };
    cluster.kill(gone);
    cluster.leader();
    for (name, seed, length) in &files {
        let path = format!("/upload/{name}");
        Content::new(*seed, *length)
            .assert_equals(&cluster.http(away).get(&path).expect(&[200]).body[..], name);
    }
}

#[test]
fn p7_a_node_that_missed_the_purged_log_catches_up_by_snapshot() {
    let sandbox = Sandbox::heavy("p7-snapshot");
    let cluster = Cluster::start(&sandbox);
    let away = cluster.followers()[0];
    cluster.kill(away);
    let mount = cluster.mount();
    // Many commands with inline content: more than any log keeps for a node that is away.
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let mount = &mount;
            scope.spawn(move || {
                let folder = mount.path(format!("{thread}"));
                fs::create_dir(&folder).expect("mkdir");
                let content = vec![thread as u8; 30_000];
                for number in 0..quorumfs_tests::scaled(8_000) / 8 {
                    fs::write(folder.join(format!("{number}")), &content).expect("write");
                }
            });
        }
    });
    mount.unmount();
    // A restart makes the others flush what they have and drop the log before it.
    for slot in cluster.running() {
        cluster.restart(slot);
        cluster.leader();
    }
    cluster.start_node(away);
    cluster.wait_at_rest();
    let other = cluster
        .running()
        .into_iter()
        .find(|slot| *slot != away)
        .expect("three run");
    cluster.kill(other);
    cluster.leader();
    let mount = cluster.mount();
    posix::drop_caches();
    for thread in 0..8u8 {
        let folder = mount.path(format!("{thread}"));
        let count = fs::read_dir(&folder).expect("list").count() as u64;
        assert_eq!(count, quorumfs_tests::scaled(8_000) / 8);
        for number in (0..count).step_by(17) {
            let content = fs::read(folder.join(format!("{number}"))).expect("read");
            assert!(content == vec![thread; 30_000], "{thread}/{number}");
        }
    }
    mount.unmount();
}

#[test]
fn p7_a_wiped_node_never_votes_while_the_majority_is_lost_and_says_so() {
    let sandbox = Sandbox::light("p7-wiped");
    let cluster = Cluster::start(&sandbox);
    cluster.http(1).post("/upload/file", "kept").expect(&[201]);
    let [wiped, away] = cluster.followers()[..] else {
        panic!("two followers")
    };
    cluster.kill(wiped);
    cluster.kill(away);
    fs::remove_dir_all(cluster.data_folder(wiped)).expect("wipe the data folder");
    cluster.start_node(wiped);
    // The wiped node and the one that is left are no quorum: what the third acknowledged could be forgotten.
    std::thread::sleep(Duration::from_secs(6));
    for slot in cluster.running() {
        if let Ok(status) = cluster.status(slot) {
            assert!(
                !status.writable,
                "node {slot} found a quorum with the wiped one: {status:?}"
            );
        }
    }
    cluster.wait_log(wiped, &["does not vote"], Duration::from_secs(10));
    cluster.start_node(away);
    cluster.wait_voters(&[1, 2, 3], Duration::from_secs(30));
    for slot in cluster.slots() {
        assert_eq!(
            cluster.http(slot).get("/upload/file").expect(&[200]).text(),
            "kept"
        );
    }
}
