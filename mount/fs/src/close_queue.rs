//! `durability=fsync`: closes that return before their commit.
//!
//! Invariant: closes are committed in order. A close appends its commit to a queue, which is drained from its front,
//! one file after another; every later change of this mount waits until the commits queued before it are done. So a
//! crash leaves, and other mounts see, a prefix of what programs did.
//!
//! Other mounts see the bytes after the commit, not after the close: commands in flight together take effect in any
//! order, so to be visible at once a close would have to wait for its command, and would cost as much as with
//! `durability=close`.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Cluster, Durability, Filesystem, OpenInode};
use crate::commit_lock::lock_after_append;
use crate::handles::{Scope, SharedInode};
use crate::interrupt::uninterruptible;

/// The queued commits. Each has at least one dirty byte, so the limit of dirty bytes bounds them.
#[derive(Debug)]
pub(super) struct CloseQueue<Put> {
    queue: Mutex<Queue<Put>>,
    /// Held while draining; taken before any commit lock.
    drain_lock: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Queue<Put> {
    /// Each file with the sequence of the last pack that its close sealed, oldest first.
    closes: VecDeque<(Arc<SharedInode<Put>>, u64)>,
    /// Commits done since the start.
    committed: u64,
}

impl<Put> Default for CloseQueue<Put> {
    fn default() -> CloseQueue<Put> {
        CloseQueue {
            queue: Mutex::new(Queue {
                closes: VecDeque::new(),
                committed: 0,
            }),
            drain_lock: tokio::sync::Mutex::default(),
        }
    }
}

impl<Put> Queue<Put> {
    fn queued_total(&self) -> u64 {
        self.committed + self.closes.len() as u64
    }
}

impl<C: Cluster> Filesystem<C> {
    /// Queues the commit of a close of `node` and starts draining.
    pub(super) fn queue_close(self: &Arc<Self>, node: &OpenInode<C>) {
        if node.state.lock().is_clean() {
            return;
        }
        let last = self.seal(node, Scope::Everything);
        let mut queue = self.close_queue.queue.lock();
        queue.closes.push_back((Arc::clone(node), last));
        drop(queue);
        let filesystem = Arc::clone(self);
        tokio::spawn(async move { filesystem.drain_close_queue().await });
    }

    /// Waits until all commits queued before this call are done. The caller holds no commit lock. Failures are recorded
    /// for the files' handles.
    pub(super) async fn drain_close_queue(&self) {
        if self.options.durability == Durability::Close {
            return;
        }
        let drained_at = {
            let queue = self.close_queue.queue.lock();
            if queue.closes.is_empty() {
                return;
            }
            queue.queued_total()
        };
        let _lock = self.close_queue.drain_lock.lock().await;
        loop {
            let (node, last) = {
                let queue = self.close_queue.queue.lock();
                match queue.closes.front() {
                    Some(front) if queue.committed < drained_at => front.clone(),
                    _ => return,
                }
            };
            // The caller may be interrupted, but other callers wait for the same commit.
            if let Ok(_lock) = uninterruptible(lock_after_append(&node)).await {
                let _recorded = self.commit_up_to(&node, last).await;
            }
            {
                let mut queue = self.close_queue.queue.lock();
                queue.closes.pop_front();
                queue.committed += 1;
            }
            self.open.remove_if_idle(&node);
        }
    }
}
