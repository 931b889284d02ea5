//! The turn of an open file: who has it commits what was written, so that commits follow one another in order.
//!
//! The kernel may send one append as two writes. A commit between them would make two appends of it, so it waits for the
//! second. Must not know what is committed.

use std::time::Duration;

use futures::FutureExt as _;
use quorumfs_proto::FsError;
use tokio::sync::MutexGuard;

use crate::handles::{AppendStage, SharedInode};
use crate::interrupt::interruptible;

/// For so long what is not this write's own waits for a second part: longer than the kernel takes to send it. A program's
/// own `fsync` behind such a write waits as long.
const SECOND_PART_WAIT: Duration = Duration::from_millis(20);
/// As above, for what no request asked for, which comes at any moment: longer than a busy machine lets the writer wait.
const SECOND_PART_WAIT_UNASKED: Duration = Duration::from_millis(200);
/// For so long both wait where it is known that there is one: its program may be killed before it is sent.
const SECOND_PART_WAIT_KNOWN: Duration = Duration::from_secs(1);
/// Between two looks whether it is there.
const SECOND_PART_TICK: Duration = Duration::from_millis(1);

/// Waits for the turn of `node`.
pub async fn lock_commits<Put>(node: &SharedInode<Put>) -> Result<MutexGuard<'_, ()>, FsError> {
    interruptible(node.commit_lock.lock().map(Ok)).await
}

/// The file's turn, for a commit: not between the two parts of an append, which would then be two.
pub async fn lock_after_append<Put>(node: &SharedInode<Put>) -> Result<MutexGuard<'_, ()>, FsError> {
    let lock = lock_commits(node).await?;
    // With the turn, so that there is no other first part then. The second one does not need it.
    while expects_second_part(node, SECOND_PART_WAIT) {
        tokio::time::sleep(SECOND_PART_TICK).await;
    }
    Ok(lock)
}

/// As above, for a commit that nobody waits for. It gives way to whoever does, and to appends that follow one another:
/// each of these commits what was written before it.
pub async fn lock_in_background<Put>(node: &SharedInode<Put>) -> MutexGuard<'_, ()> {
    loop {
        let lock = node.commit_lock.lock().await;
        if !expects_second_part(node, SECOND_PART_WAIT_UNASKED) {
            return lock;
        }
        drop(lock);
        tokio::time::sleep(SECOND_PART_TICK).await;
    }
}

/// Whether what `node` holds back may still get its second part, if that is waited for so long.
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
