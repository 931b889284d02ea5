//! P7: a node whose metadata is not what the log makes of it is found out by the others, and makes it anew.

use std::path::Path;
use std::time::Duration;

use quorumfs_tests::damage::open_metadata;
use quorumfs_tests::environment::wait_for;
use quorumfs_tests::healing::assert_same_metadata;
use quorumfs_tests::{Cluster, Sandbox};
use redb::{ReadableDatabase as _, ReadableTable as _};

const LIMIT: Duration = Duration::from_secs(60);
const DIRENTS: redb::TableDefinition<&[u8], &[u8]> = redb::TableDefinition::new("dirents");

/// Takes a row out of a node's names, as no apply would. False: it is not on disk yet.
fn forget_name(database: &Path, name: &str) -> bool {
    let database = open_metadata(database);
    let is_it = |key: &[u8]| key.ends_with(name.as_bytes());
    let found = {
        let transaction = database.begin_read().expect("read");
        let table = transaction.open_table(DIRENTS).expect("names");
        let mut rows = table.iter().expect("rows");
        rows.find_map(|row| {
            let key = row.expect("a row").0.value().to_vec();
            is_it(&key).then_some(key)
        })
    };
    let Some(key) = found else { return false };
    let transaction = database.begin_write().expect("write");
    {
        let mut table = transaction.open_table(DIRENTS).expect("names");
        table.remove(&key[..]).expect("remove").expect("it was there");
    }
    transaction.commit().expect("commit");
    true
}

/// Restarts a node without a row of its names.
fn make_wrong(cluster: &Cluster, slot: usize, name: &str) {
    // What was applied goes to disk two seconds later.
    wait_for("the name is on disk", LIMIT, || {
        std::thread::sleep(Duration::from_secs(4));
        cluster.terminate(slot);
        let forgotten = forget_name(&cluster.data_folder(slot).join("metadata.redb"), name);
        cluster.start_node(slot);
        forgotten
    });
    cluster.wait_ready();
}

fn incarnation_of(cluster: &Cluster, slot: usize) -> Option<String> {
    let members = cluster.membership(cluster.leader()).expect("membership");
    let member = members.into_iter().find(|member| member.slot == slot);
    member.map(|member| member.incarnation)
}

#[test]
fn p7_a_node_with_other_metadata_than_the_majority_makes_it_anew() {
    let sandbox = Sandbox::light("audit");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    for n in 0..50 {
        std::fs::write(mount.path(format!("file-{n}")), format!("content {n}")).expect("write");
    }
    std::fs::write(mount.path("file-to-forget"), vec![7; 100_000]).expect("write");
    assert_same_metadata(&cluster);

    let wrong = cluster.followers()[0];
    make_wrong(&cluster, wrong, "file-to-forget");
    let incarnation = || incarnation_of(&cluster, wrong);
    let before = incarnation();
    let other = wrong % 3 + 1;
    cluster.http(other).post("/repair/audit", "").expect(&[202]);
    cluster.wait_log(wrong, &["differs from that of a majority"], LIMIT);
    wait_for("it takes part as a new incarnation", LIMIT, || {
        incarnation() != before
    });
    cluster.wait_voters(&[1, 2, 3], LIMIT);
    cluster.wait_at_rest();
    assert_same_metadata(&cluster);
    let recovery = cluster.recovery_status(wrong).expect("recovery status");
    assert_eq!(recovery.fetched_chunks, 0, "it kept its content: {recovery:?}");
    // It counts again: with it and one other everything is there.
    cluster.kill(other);
    assert_eq!(
        std::fs::read(mount.path("file-to-forget")).expect("read"),
        vec![7; 100_000]
    );
    mount.unmount();
}

#[test]
fn p7_a_leader_with_other_metadata_is_found_soon_and_hands_on_before_it_begins_anew() {
    const LEADERS_MAX: usize = 20;
    // An audit follows a change of leader by half a minute, for all that a busy machine adds.
    const FOUND_LIMIT: Duration = Duration::from_secs(120);
    let sandbox = Sandbox::light("audit-leader");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    std::fs::write(mount.path("file-to-forget"), vec![7; 100_000]).expect("write");
    let wrong = cluster.followers()[0];
    make_wrong(&cluster, wrong, "file-to-forget");
    let before = incarnation_of(&cluster, wrong);
    let mut leaders = Vec::new();
    loop {
        let leader = cluster.leader();
        if leader == wrong {
            break;
        }
        leaders.push(leader);
        assert!(
            leaders.len() < LEADERS_MAX,
            "node {wrong} never leads: {leaders:?}"
        );
        // Another one leads before this one is back: a leader that starts again at once may go on leading.
        cluster.kill(leader);
        cluster.leader();
        cluster.start_node(leader);
        cluster.wait_ready();
    }
    // Nobody asks for an audit.
    cluster.wait_log(wrong, &["differs from that of a majority"], FOUND_LIMIT);
    wait_for("it takes part as a new incarnation", LIMIT, || {
        incarnation_of(&cluster, wrong) != before
    });
    let log = cluster.log(wrong);
    let hands_on = log.find("is about to be set aside: handing leadership on");
    let begins_anew = log.find("it was set aside, and the node takes part as a new one");
    assert!(
        hands_on.is_some() && hands_on < begins_anew,
        "{hands_on:?}, {begins_anew:?}"
    );
    cluster.wait_voters(&[1, 2, 3], LIMIT);
    cluster.wait_at_rest();
    assert_same_metadata(&cluster);
    assert_eq!(
        std::fs::read(mount.path("file-to-forget")).expect("read"),
        vec![7; 100_000]
    );
    mount.unmount();
}

/// As a node notes what an audit has found, before it does anything else about it.
fn note_contradicted(cluster: &Cluster, slot: usize) {
    let path = cluster.data_folder(slot).join("identity.toml");
    let text = std::fs::read_to_string(&path).expect("read the identity");
    std::fs::write(&path, format!("contradicted_at = 9\n{text}")).expect("note it");
}

#[test]
fn p3_what_a_majority_contradicted_is_not_served_after_a_restart() {
    let sandbox = Sandbox::light("audit-restart");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    std::fs::write(mount.path("file-to-forget"), vec![7; 100_000]).expect("write");
    let wrong = cluster.followers()[0];
    make_wrong(&cluster, wrong, "file-to-forget");
    cluster.wait_at_rest();
    let before = incarnation_of(&cluster, wrong);

    // With one other it is a majority, and nobody can let it go.
    let absent = cluster.slots().find(|slot| *slot != wrong).expect("another");
    let other = 6 - wrong - absent;
    cluster.kill_all();
    note_contradicted(&cluster, wrong);
    cluster.start_node(wrong);
    cluster.start_node(other);
    for round in 0..2 {
        assert_eq!(
            std::fs::read(mount.path("file-to-forget")).expect("read"),
            vec![7; 100_000]
        );
        std::fs::write(mount.path(format!("round-{round}")), "it votes").expect("write");
        assert_eq!(cluster.leader(), other);
        let status: serde_json::Value = cluster.http(wrong).get("/status").expect(&[200]).json();
        let reason = status["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("differs from that of a majority"), "{status}");
        cluster.restart(other);
        cluster.wait_log(wrong, &["until a majority is intact without it"], LIMIT);
    }

    cluster.start_node(absent);
    wait_for("it takes part as a new incarnation", LIMIT, || {
        incarnation_of(&cluster, wrong) != before
    });
    cluster.wait_voters(&[1, 2, 3], LIMIT);
    cluster.wait_at_rest();
    assert_same_metadata(&cluster);
    mount.unmount();
}
