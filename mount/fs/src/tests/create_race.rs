//! The existing file of a failed creation is returned to the lookup that follows it, and to no other.

use std::sync::Arc;

use quorumfs_proto::command::RenameMode;
use quorumfs_proto::{FsError, InodeNumber};

use super::support::{ROOT, close, create, mount, mount_with, read_write, without_commits_by_age};
use crate::{Filesystem, NewFile, ThreadId};
use quorumfs_memory::{Connection, MemoryCluster};

const THREAD: ThreadId = 7;
const NEW: NewFile = NewFile {
    mode: 0o644,
    uid: 0,
    gid: 0,
};

/// Makes two mounts, and a creation of "file" by `THREAD` on the first that fails because the second has created it.
async fn failed_creation() -> (
    Arc<MemoryCluster>,
    Arc<Filesystem<Connection>>,
    Arc<Filesystem<Connection>>,
    InodeNumber,
) {
    let cluster = MemoryCluster::new();
    let (fs, other) = (
        mount_with(&cluster, 1, without_commits_by_age()),
        mount(&cluster, 2),
    );
    let (inode, handle) = create(&other, "file").await;
    close(&other, handle).await;
    let refused = fs.create_for(THREAD, ROOT, b"file", NEW, read_write()).await;
    assert_eq!(refused.map(|_| ()), Err(FsError::Stale));
    (cluster, fs, other, inode)
}

async fn looked_up(fs: &Filesystem<Connection>) -> Result<InodeNumber, FsError> {
    let found = fs.lookup_for(THREAD, ROOT, b"file").await;
    found.map(|attributes| attributes.inode)
}

#[tokio::test]
async fn it_can_be_opened_after_it_was_unlinked() {
    let (cluster, fs, other, inode) = failed_creation().await;
    other.unlink(ROOT, b"file").await.unwrap();
    other.flush_all().await.unwrap();
    cluster.reclaim();
    assert_eq!(looked_up(&fs).await, Ok(inode));
    fs.release_unlinked().await;
    cluster.reclaim();
    let opened = fs.open_for(THREAD, inode, read_write()).await.unwrap();
    close(&fs, opened.handle).await;
}

#[tokio::test]
async fn a_lookup_without_an_open_leaves_no_state() {
    // As with EACCES, EISDIR or ELOOP: no open is sent.
    let (_, fs, _, inode) = failed_creation().await;
    assert_eq!(looked_up(&fs).await, Ok(inode));
    fs.unlink(ROOT, b"file").await.unwrap();
    assert_eq!(looked_up(&fs).await, Err(FsError::NotFound), "removed here");

    let (_, fs, other, inode) = failed_creation().await;
    assert_eq!(looked_up(&fs).await, Ok(inode));
    let (another, handle) = create(&other, "another").await;
    close(&other, handle).await;
    other
        .rename(ROOT, b"another", ROOT, b"file", RenameMode::Replace)
        .await
        .unwrap();
    assert_eq!(looked_up(&fs).await, Ok(another), "replaced elsewhere");
}

/// An unlink by this mount is no exception.
#[tokio::test]
async fn it_is_found_after_another_thread_unlinked_it() {
    let (_, fs, _, inode) = failed_creation().await;
    fs.unlink(ROOT, b"file").await.unwrap();
    assert_eq!(looked_up(&fs).await, Ok(inode));
    let opened = fs.open_for(THREAD, inode, read_write()).await.unwrap();
    close(&fs, opened.handle).await;
}
