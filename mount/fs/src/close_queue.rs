//! `durability=fsync`: closes that return before what was written is committed.
//!
//! Rule: their order is kept. What a close hands over waits in a queue and is committed from its front, one file after the
//! other; every later change of this mount waits until what was handed over before it is committed. So what a crash
//! leaves, and what other mounts see, is a prefix of what programs did.
//!
//! Other mounts see it when it is committed, not with the close: commands that are under way together take effect in any
//! order, so to show it at once the close would have to wait for its command, and would be no cheaper than
//! `durability=close`.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Cluster, Durability, Filesystem, OpenInode};
use crate::commit_lock::lock_after_append;
use crate::handles::{Scope, SharedInode};
use crate::interrupt::uninterruptible;

/// Closes that returned early. Each has at least one dirty byte, so the bound of those is theirs too.
#[derive(Debug)]
pub(super) struct CloseQueue<Put> {
    queue: Mutex<Queue<Put>>,
    /// Held by whoever commits from the front; taken before any file's turn.
    drain_lock: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Queue<Put> {
    /// Each file with the last pack that its close sealed, oldest first.
    closes: VecDeque<(Arc<SharedInode<Put>>, u64)>,
    /// Committed since the start.
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
    /// A close of `node` returns; what was written goes on its way.
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

    /// Waits until what was handed over before the call is committed. The caller holds no file's turn. What fails is kept
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
            // Whoever waits here may be gone, but others wait for the same.
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
