//! P7: a node whose metadata is damaged on its disk, a row or the file, makes it anew, by itself, as a new incarnation and
//! with the content that it has; and nobody takes one incarnation for another.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use quorumfs_proto::ClusterId;
use quorumfs_tests::damage::open_metadata;
use quorumfs_tests::environment::wait_for;
use quorumfs_tests::healing::assert_same_metadata;
use quorumfs_tests::{Cluster, Sandbox};
use quorumfs_wire as wire;
use quorumfs_wire::peer_client::PeerClient;
use redb::ReadableTable as _;

const LIMIT: Duration = Duration::from_secs(60);

/// Changes a bit of the row's checksum. False: it is not on disk yet.
fn damage_row(database: &Path, table: &str, is_it: impl Fn(&[u8]) -> bool) -> bool {
    let database = open_metadata(database);
    let definition: redb::TableDefinition<&[u8], &[u8]> = redb::TableDefinition::new(table);
    let transaction = database.begin_write().expect("write");
    let damaged = {
        let mut table = transaction.open_table(definition).expect("table");
        let row = table.iter().expect("rows").find_map(|row| {
            let (key, value) = row.expect("a row");
            is_it(key.value()).then(|| (key.value().to_vec(), value.value().to_vec()))
        });
        row.map(|(key, mut value)| {
            *value.last_mut().expect("a checksum") ^= 1;
            table.insert(&key[..], &value[..]).expect("insert");
        })
    };
    transaction.commit().expect("commit");
    damaged.is_some()
}

fn incarnation(cluster: &Cluster, slot: usize) -> Option<String> {
    let members = cluster.membership(cluster.leader()).expect("membership");
    let member = members.into_iter().find(|member| member.slot == slot);
    member.map(|member| member.incarnation)
}

/// The node in `slot` finds out while `meanwhile` goes on, and is a voter again under a new incarnation.
fn assert_made_anew(cluster: &Cluster, slot: usize, before: Option<String>) {
    cluster.wait_log(slot, &["the metadata was set aside", "it was set aside"], LIMIT);
    wait_for("it takes part as a new incarnation", LIMIT, || {
        incarnation(cluster, slot) != before
    });
    cluster.wait_voters(&[1, 2, 3], LIMIT);
    cluster.wait_at_rest();
    assert_same_metadata(cluster);
    let recovery = cluster.recovery_status(slot).expect("recovery status");
    assert_eq!(recovery.fetched_chunks, 0, "it kept its content: {recovery:?}");
}

#[test]
fn p7_a_node_with_damaged_metadata_makes_it_anew() {
    let sandbox = Sandbox::light("damaged-metadata");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let content = vec![7; 100_000];
    std::fs::write(mount.path("file"), &content).expect("write");
    let inode = mount.path("file").metadata().expect("stat").ino();
    assert_same_metadata(&cluster);
    let followers = cluster.followers();
    let database = |slot: usize| cluster.data_folder(slot).join("metadata.redb");

    // A row that is needed to open it.
    let slot = followers[0];
    let before = incarnation(&cluster, slot);
    cluster.terminate(slot);
    assert!(damage_row(&database(slot), "meta", |key| key == b"state"));
    cluster.start_node(slot);
    assert_made_anew(&cluster, slot, before);

    // One that is needed when a command that names it is applied.
    let slot = followers[1];
    let before = incarnation(&cluster, slot);
    wait_for("the inode is on disk", LIMIT, || {
        std::thread::sleep(Duration::from_secs(1));
        cluster.terminate(slot);
        let damaged = damage_row(&database(slot), "inodes", |key| key == inode.to_be_bytes());
        cluster.start_node(slot);
        damaged
    });
    cluster.wait_ready();
    let permissions = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(mount.path("file"), permissions).expect("chmod");
    assert_made_anew(&cluster, slot, before);

    // The file itself.
    let slot = followers[0];
    let before = incarnation(&cluster, slot);
    cluster.terminate(slot);
    let bytes = std::fs::metadata(database(slot)).expect("look").len();
    std::fs::write(database(slot), vec![0; bytes as usize]).expect("overwrite");
    cluster.start_node(slot);
    assert_made_anew(&cluster, slot, before);

    assert_eq!(std::fs::read(mount.path("file")).expect("read"), content);
    assert_eq!(mount.path("file").metadata().expect("stat").mode() & 0o777, 0o600);
    mount.unmount();
}

#[test]
fn p7_a_question_for_another_incarnation_is_refused() {
    let sandbox = Sandbox::light("addressed");
    let cluster = Cluster::start(&sandbox);
    let address = format!("http://{}", cluster.grpc_address(1));
    let runtime = tokio::runtime::Runtime::new().expect("start a runtime");
    runtime.block_on(async {
        let mut peer = PeerClient::connect(address).await.expect("connect");
        let hello = peer.hello(wire::HelloRequest::default()).await.expect("hello");
        let hello = hello.into_inner();
        let own = hello.node.expect("it says who it is");
        let cluster_id = ClusterId::from_bytes(&hello.cluster_id)
            .expect("16 bytes")
            .to_string();
        let name = |incarnation: u64| format!("{}@{incarnation:016x}", own.slot);
        let asked = |node: Option<String>| {
            let mut request = tonic::Request::new(wire::HeldChunksRequest::default());
            let metadata = request.metadata_mut();
            metadata.insert("quorumfs-cluster", cluster_id.parse().expect("a value"));
            if let Some(node) = node {
                metadata.insert("quorumfs-node", node.parse().expect("a value"));
            }
            request
        };
        // Nodes of an earlier version do not say whom they mean.
        for meant in [None, Some(name(own.incarnation))] {
            peer.held_chunks(asked(meant)).await.expect("an answer");
        }
        let other = Some(name(own.incarnation.wrapping_add(1)));
        let refused = peer.held_chunks(asked(other)).await.expect_err("not it");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    });
}
