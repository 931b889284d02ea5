//! `durability=fsync` preserves the order of closes and of later changes.

use std::sync::Arc;
use std::time::Duration;

use quorumfs_proto::Operation;
use quorumfs_proto::command::{NewInode, NewKind, Target};

use super::support::{
    MIB, ROOT, close, contents, create, mount, mount_with, pattern, read_write, without_commits_by_age, write,
};
use crate::{Durability, FsOptions};
use quorumfs_memory::MemoryCluster;

#[tokio::test]
async fn queued_closes_are_committed_in_order_and_before_later_changes() {
    let cluster = MemoryCluster::new();
    let options = FsOptions {
        durability: Durability::Fsync,
        ..without_commits_by_age()
    };
    let fs = mount_with(&cluster, 1, options);
    let (data, data_handle) = create(&fs, "data").await;
    let (done, done_handle) = create(&fs, "done").await;
    let slow = cluster.put_gate.write().await;
    write(&fs, data_handle, 0, &pattern(3 * MIB as usize, 1)).await;
    close(&fs, data_handle).await;
    write(&fs, done_handle, 0, b"done").await;
    close(&fs, done_handle).await;
    // Written again while the first commit waits: the second close has its own place.
    let again = fs.open(data, read_write()).await.unwrap().handle;
    write(&fs, again, 0, b"again").await;
    close(&fs, again).await;
    let directory = tokio::spawn({
        let fs = Arc::clone(&fs);
        async move {
            let inode = NewInode {
                kind: NewKind::Directory,
                mode: 0o755,
                uid: 0,
                gid: 0,
            };
            fs.make_node(ROOT, b"directory", inode).await
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!directory.is_finished(), "it overtakes earlier closes");
    let other = mount(&cluster, 2);
    assert_eq!(other.lookup(ROOT, b"done").await.unwrap().size, 0);
    drop(slow);
    directory.await.unwrap().unwrap();
    let order: Vec<&str> = cluster
        .commands
        .lock()
        .iter()
        .skip(2)
        .map(|command| match &command.operations[0] {
            Operation::Write { inode, .. } if *inode == Target::Inode(done) => "done",
            Operation::Write { .. } => "data",
            Operation::Create { .. } => "directory",
            _ => "other",
        })
        .collect();
    assert_eq!(order, ["data", "done", "data", "directory"]);
    assert_eq!(contents(&other, "done").await, b"done");
    assert!(contents(&other, "data").await.starts_with(b"again"));
}
