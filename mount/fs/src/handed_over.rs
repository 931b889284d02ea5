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
use crate::handles::{Scope, SharedInode};
use crate::interrupt::uninterrupted;
use crate::turn::take_turn_after_append;

/// Closes that returned early. Each has at least one dirty byte, so the bound of those is theirs too.
#[derive(Debug)]
pub(super) struct HandedOver<Put> {
    queue: Mutex<Queue<Put>>,
    /// Held by whoever commits from the front; taken before any file's turn.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Queue<Put> {
    /// Each file with the last pack that its close sealed, oldest first.
    closes: VecDeque<(Arc<SharedInode<Put>>, u64)>,
    /// Committed since the start.
    committed: u64,
}

impl<Put> Default for HandedOver<Put> {
    fn default() -> HandedOver<Put> {
        HandedOver {
            queue: Mutex::new(Queue {
                closes: VecDeque::new(),
                committed: 0,
            }),
            turn: tokio::sync::Mutex::default(),
        }
    }
}

impl<Put> Queue<Put> {
    fn handed_over(&self) -> u64 {
        self.committed + self.closes.len() as u64
    }
}

impl<C: Cluster> Filesystem<C> {
    /// A close of `node` returns; what was written goes on its way.
    pub(super) fn hand_over(self: &Arc<Self>, node: &OpenInode<C>) {
        if node.state.lock().is_clean() {
            return;
        }
        let last = self.seal(node, Scope::Everything);
        let mut queue = self.handed_over.queue.lock();
        queue.closes.push_back((Arc::clone(node), last));
        drop(queue);
        let filesystem = Arc::clone(self);
        tokio::spawn(async move { filesystem.settle_handed_over().await });
    }

    /// Waits until what was handed over before the call is committed. The caller holds no file's turn. What fails is kept
    /// for the files' handles.
    pub(super) async fn settle_handed_over(&self) {
        if self.options.durability == Durability::Close {
            return;
        }
        let before = {
            let queue = self.handed_over.queue.lock();
            if queue.closes.is_empty() {
                return;
            }
            queue.handed_over()
        };
        let _turn = self.handed_over.turn.lock().await;
        loop {
            let (node, last) = {
                let queue = self.handed_over.queue.lock();
                match queue.closes.front() {
                    Some(front) if queue.committed < before => front.clone(),
                    _ => return,
                }
            };
            // Whoever waits here may be gone, but others wait for the same.
            if let Ok(_turn) = uninterrupted(take_turn_after_append(&node)).await {
                let _kept = self.commit_up_to(&node, last).await;
            }
            {
                let mut queue = self.handed_over.queue.lock();
                queue.closes.pop_front();
                queue.committed += 1;
            }
            self.open.retire(&node);
        }
    }
}
