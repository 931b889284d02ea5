//! A failed commit is reported to some handle.

use quorumfs_proto::FsError;

use super::support::{close, create, mount_with, pattern, read_write, without_commits_by_age, write};
use quorumfs_memory::MemoryCluster;

#[tokio::test]
async fn a_failure_after_the_last_close_is_reported_to_the_next_handle() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (inode, handle) = create(&fs, "mapped").await;
    fs.flush(handle).await.unwrap();
    // Like the pages of a shared mapping, which arrive after the close.
    *cluster.put_fault.lock() = Some(FsError::NoSpace);
    write(&fs, handle, 0, &pattern(100_000, 1)).await;
    fs.release(handle).await.unwrap();
    while !fs.open.is_empty() {
        tokio::task::yield_now().await;
    }
    let next = fs.open(inode, read_write()).await.unwrap().handle;
    assert_eq!(fs.fsync(next).await, Err(FsError::NoSpace));
    assert_eq!(fs.fsync(next).await, Ok(()));
    close(&fs, next).await;
}

#[tokio::test]
async fn a_background_failure_is_reported_to_a_handle_opened_after_it() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (inode, first) = create(&fs, "file").await;
    *cluster.put_fault.lock() = Some(FsError::NoSpace);
    write(&fs, first, 0, &pattern(100_000, 1)).await;
    assert_eq!(fs.flush_all().await, Err(FsError::NoSpace));
    let second = fs.open(inode, read_write()).await.unwrap().handle;
    assert_eq!(fs.fsync(second).await, Err(FsError::NoSpace));
    assert_eq!(fs.fsync(first).await, Err(FsError::NoSpace));
    let third = fs.open(inode, read_write()).await.unwrap().handle;
    assert_eq!(fs.fsync(third).await, Ok(()), "it was reported before");
}
