//! Both parts of an append are one command, whatever else must be committed between them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_proto::{InodeNumber, Operation};

use super::support::{
    MIB, contents, create, mount, mount_with, without_commits_by_age, write, written_operations,
};
use crate::{Durability, Filesystem, FsOptions, Handle, OpenFlags};
use quorumfs_memory::{Connection, MemoryCluster};

/// The kernel sends the second part sooner; a test that was delayed for longer is inconclusive.
const SECOND_PART_DELAY_MAX: Duration = Duration::from_millis(10);

async fn append_to(fs: &Arc<Filesystem<Connection>>, inode: InodeNumber) -> Handle {
    let flags = OpenFlags::from(libc::O_WRONLY | libc::O_APPEND);
    fs.open(inode, flags).await.unwrap().handle
}

/// Returns the length of each append command.
fn appended(cluster: &MemoryCluster) -> Vec<u32> {
    let operations = written_operations(cluster);
    let appends = operations.iter().filter_map(|operation| match operation {
        Operation::Append { extents, .. } => Some(extents.iter().map(|extent| extent.length).sum()),
        _ => None,
    });
    appends.collect()
}

/// Sends the first part of an append of 1 MiB to `log`, runs `between`, appends from another mount, and sends the
/// second part. The record must be contiguous.
async fn in_two_parts(options: FsOptions, between: impl AsyncFn(&Arc<Filesystem<Connection>>, InodeNumber)) {
    for _ in 0..100 {
        let cluster = MemoryCluster::new();
        let (fs, other) = (mount_with(&cluster, 1, options.clone()), mount(&cluster, 2));
        let (log, _) = create(&fs, "log").await;
        let (own, theirs) = (append_to(&fs, log).await, append_to(&other, log).await);
        let record = vec![b'a'; MIB as usize];
        let (first, second) = record.split_at(record.len() - 100);
        // Nearly exhausts the limit of dirty bytes.
        let (_, data) = create(&fs, "data").await;
        for at in 0..3 {
            write(&fs, data, at * MIB, first).await;
        }
        let began = Instant::now();
        write(&fs, own, 0, first).await;
        between(&fs, log).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
        write(&other, theirs, 0, b"other").await;
        let is_in_time = began.elapsed() < SECOND_PART_DELAY_MAX;
        write(&fs, own, 0, second).await;
        if is_in_time {
            assert_eq!(appended(&cluster), [5, MIB as u32]);
            assert_eq!(
                contents(&other, "log").await,
                [b"other", &record[..]].concat(),
                "the record was split"
            );
            return;
        }
    }
    panic!("the machine is too slow: the test is inconclusive");
}

#[tokio::test]
async fn a_commit_that_makes_room_does_not_split_an_append() {
    let options = FsOptions {
        dirty_bytes_max: 4 * MIB - 1000,
        ..without_commits_by_age()
    };
    in_two_parts(options, async |fs, _| {
        let (_, another) = create(fs, "another").await;
        // Waits for room, so a commit of all dirty files is started.
        write(fs, another, 0, b"more").await;
    })
    .await;
}

#[tokio::test]
async fn a_queued_close_does_not_split_an_append() {
    let options = FsOptions {
        durability: Durability::Fsync,
        ..without_commits_by_age()
    };
    in_two_parts(options, async |fs, log| {
        // Another program closes the same file.
        let closing = append_to(fs, log).await;
        fs.flush(closing).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_second_part_waits_for_queued_closes_and_is_not_split_by_them() {
    let options = FsOptions {
        durability: Durability::Fsync,
        ..without_commits_by_age()
    };
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount_with(&cluster, 1, options), mount(&cluster, 2));
    let (log, _) = create(&fs, "log").await;
    let (own, theirs) = (append_to(&fs, log).await, append_to(&other, log).await);
    let record = vec![b'a'; MIB as usize];
    let (first, second) = record.split_at(record.len() - 100);
    let (_, data) = create(&fs, "data").await;
    write(&fs, data, 0, &record[..100_000]).await;
    write(&fs, own, 0, first).await;
    let slow = cluster.put_gate.write().await;
    fs.flush(data).await.unwrap();
    fs.flush(own).await.unwrap();
    let appending = tokio::spawn({
        let (fs, second) = (Arc::clone(&fs), second.to_vec());
        async move { write(&fs, own, 0, &second).await }
    });
    // Much longer than the wait for a second part, which has already arrived.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!appending.is_finished());
    write(&other, theirs, 0, b"other").await;
    drop(slow);
    appending.await.unwrap();
    assert_eq!(appended(&cluster), [5, MIB as u32]);
    assert_eq!(
        contents(&other, "log").await,
        [b"other", &record[..]].concat(),
        "the record was split"
    );
}

#[tokio::test]
async fn whole_appends_that_look_like_first_parts_do_not_delay_each_other() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (log, _) = create(&fs, "log").await;
    let own = append_to(&fs, log).await;
    let record = vec![b'a'; MIB as usize - 100];
    for _ in 0..3 {
        write(&fs, own, 0, &record).await;
    }
    fs.fsync(own).await.unwrap();
    assert_eq!(appended(&cluster), [record.len() as u32; 3]);
}
