//! An inode without a name lives as long as it is in use here, and no longer.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::command::RenameMode;
use quorumfs_proto::{FsError, InodeNumber, Operation};

use super::support::{ROOT, close, create, mount, mount_with, read_write, write, written_operations};
use crate::{Filesystem, FsOptions, Order, Reader};
use quorumfs_memory::{Connection, MemoryCluster};

fn fast_release() -> FsOptions {
    FsOptions {
        dirty_age_ms: 40,
        ..FsOptions::default()
    }
}

/// Returns the inodes that the simulated kernel knows.
fn kernel_inodes(fs: &Arc<Filesystem<Connection>>) -> Arc<Mutex<BTreeSet<InodeNumber>>> {
    let known: Arc<Mutex<BTreeSet<InodeNumber>>> = Arc::default();
    let checked = Arc::clone(&known);
    fs.set_in_use_check(Arc::new(move |inode| checked.lock().contains(&inode)));
    known
}

async fn wait_for_inodes(cluster: &MemoryCluster, count: usize) {
    let gone = async {
        while cluster.inode_count() != count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone)
        .await
        .expect("it is released");
}

#[tokio::test]
async fn an_unlinked_file_lives_as_long_as_it_is_open_anywhere() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (inode, handle) = create(&fs, "doomed").await;
    write(&fs, handle, 0, b"still here").await;
    other.unlink(ROOT, b"doomed").await.unwrap();
    other.release_unlinked().await;
    cluster.reclaim();
    fs.fsync(handle).await.unwrap();
    assert_eq!(
        fs.read(handle, 0, 100, Order::default(), Reader::default())
            .await
            .unwrap(),
        &b"still here"[..]
    );
    assert_eq!(
        other.open(inode, read_write()).await,
        Err(FsError::Stale),
        "no other mount can open it"
    );
    close(&fs, handle).await;
    cluster.reclaim();
    assert_eq!(cluster.inode_count(), 1);
}

#[tokio::test]
async fn an_unused_inode_is_released_soon_after_its_unlink() {
    let cluster = MemoryCluster::new();
    let options = FsOptions {
        dirty_age_ms: 40,
        ..FsOptions::default()
    };
    let fs = mount_with(&cluster, 1, options);
    let (_, open) = create(&fs, "open").await;
    let (_, closed) = create(&fs, "closed").await;
    close(&fs, closed).await;
    fs.rename(ROOT, b"open", ROOT, b"closed", RenameMode::Replace)
        .await
        .unwrap();
    fs.unlink(ROOT, b"closed").await.unwrap();
    assert_eq!(cluster.inode_count(), 3);
    tokio::time::timeout(Duration::from_secs(10), async {
        while cluster.inode_count() != 2 {
            cluster.reclaim();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the replaced file is not open");
    close(&fs, open).await;
    fs.flush_all().await.unwrap();
    cluster.reclaim();
    assert_eq!(cluster.inode_count(), 1);
    assert!(
        written_operations(&cluster)
            .iter()
            .any(|o| matches!(o, Operation::ReleaseUnlinked { .. }))
    );
}

#[tokio::test]
async fn an_inode_in_use_by_the_kernel_is_kept_and_can_be_opened_again() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, fast_release());
    let known = kernel_inodes(&fs);
    let (inode, handle) = create(&fs, "path").await;
    write(&fs, handle, 0, b"content").await;
    close(&fs, handle).await;
    known.lock().insert(inode);
    fs.unlink(ROOT, b"path").await.unwrap();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        cluster.reclaim();
        assert_eq!(fs.attributes(inode, None).await.unwrap().links, 0);
    }
    let again = fs.open(inode, read_write()).await.unwrap().handle;
    known.lock().clear();
    tokio::time::sleep(Duration::from_millis(60)).await;
    cluster.reclaim();
    assert_eq!(
        fs.read(again, 0, 100, Order::default(), Reader::default())
            .await
            .unwrap(),
        &b"content"[..]
    );
    close(&fs, again).await;
    wait_for_inodes(&cluster, 1).await;
}

#[tokio::test]
async fn an_open_during_an_unlink_succeeds_or_fails_cleanly() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, fast_release());
    let mut good = 0;
    for round in 0..200 {
        let (inode, handle) = create(&fs, "file").await;
        write(&fs, handle, 0, b"content").await;
        close(&fs, handle).await;
        let open = async {
            for _ in 0..round % 8 {
                tokio::task::yield_now().await;
            }
            fs.open(inode, read_write()).await
        };
        let (removed, opened) = tokio::join!(fs.unlink(ROOT, b"file"), open);
        removed.unwrap();
        let Ok(opened) = opened else { continue };
        good += 1;
        cluster.reclaim();
        fs.release_unlinked().await;
        assert_eq!(
            fs.read(opened.handle, 0, 100, Order::default(), Reader::default())
                .await
                .unwrap(),
            &b"content"[..]
        );
        close(&fs, opened.handle).await;
    }
    assert!(good > 0, "no open came in time: the test is inconclusive");
    wait_for_inodes(&cluster, 1).await;
}
