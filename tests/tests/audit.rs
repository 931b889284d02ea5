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

    // What was applied goes to disk a little later.
    let wrong = cluster.followers()[0];
    wait_for("the name is on disk", LIMIT, || {
        std::thread::sleep(Duration::from_secs(1));
        cluster.terminate(wrong);
        let forgotten = forget_name(
            &cluster.data_folder(wrong).join("metadata.redb"),
            "file-to-forget",
        );
        cluster.start_node(wrong);
        forgotten
    });
    cluster.wait_ready();
    let incarnation = || {
        let members = cluster.membership(cluster.leader()).expect("membership");
        let member = members.into_iter().find(|member| member.slot == wrong);
        member.map(|member| member.incarnation)
    };
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
