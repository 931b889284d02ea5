//! The commit lock of an open file: its holder sends the commits, so that they take effect in the order of the writes.
//!
//! The kernel may send one append as two writes. A commit between them would split the append, so it waits for the
//! second one. This module must not know what is committed.

use std::time::Duration;

use futures::FutureExt as _;
use quorumfs_proto::FsError;
use tokio::sync::MutexGuard;

use crate::handles::{AppendStage, SharedInode};
use crate::interrupt::interruptible;

/// Time that a commit waits for a second part: longer than the kernel takes to send it. An `fsync` directly after such
/// a write waits as long.
const SECOND_PART_WAIT: Duration = Duration::from_millis(20);
/// The same for a background commit, which can start at any moment: longer than a busy machine delays the writer.
const SECOND_PART_WAIT_BACKGROUND: Duration = Duration::from_millis(200);
/// The same for both if a second part is known to exist. Bounded, because its program may be killed before it sends it.
const SECOND_PART_WAIT_KNOWN: Duration = Duration::from_secs(1);
/// Interval at which the arrival of the second part is checked.
const SECOND_PART_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Waits for the commit lock of `node`.
///
/// # Errors
/// [`FsError::TimedOut`] if the caller is interrupted.
pub async fn lock_commits<Put>(node: &SharedInode<Put>) -> Result<MutexGuard<'_, ()>, FsError> {
    interruptible(node.commit_lock.lock().map(Ok)).await
}

/// Waits for the commit lock and then until no append of `node` is incomplete.
///
/// # Errors
/// [`FsError::TimedOut`] if the caller is interrupted.
pub async fn lock_after_append<Put>(node: &SharedInode<Put>) -> Result<MutexGuard<'_, ()>, FsError> {
    let lock = lock_commits(node).await?;
    // With the lock held no other first part can arrive. The second part does not need the lock.
    while expects_second_part(node, SECOND_PART_WAIT) {
        tokio::time::sleep(SECOND_PART_POLL_INTERVAL).await;
    }
    Ok(lock)
}

/// Like [`lock_after_append`], for a commit without a caller. It yields the lock while it waits, to commits with a
/// caller and to further appends, each of which commits what was written before it.
pub async fn lock_in_background<Put>(node: &SharedInode<Put>) -> MutexGuard<'_, ()> {
    loop {
        let lock = node.commit_lock.lock().await;
        if !expects_second_part(node, SECOND_PART_WAIT_BACKGROUND) {
            return lock;
        }
        drop(lock);
        tokio::time::sleep(SECOND_PART_POLL_INTERVAL).await;
    }
}

/// Whether the held append of `node` may still receive its second part within `wait` of its first.
fn expects_second_part<Put>(node: &SharedInode<Put>, wait: Duration) -> bool {
    let state = node.state.lock();
    let Some(held) = state.held_append.as_ref() else {
        return false;
    };
    let wait = match held.expects_more {
        true => SECOND_PART_WAIT_KNOWN,
        false => wait,
    };
    held.stage == AppendStage::Open && held.since.elapsed() < wait
}
