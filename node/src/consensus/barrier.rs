//! The read barrier: ReadIndex, one round at a time, for all who came before the round began.
//!
//! A round asks a quorum whether this node still leads, then waits until what was committed when it began has
//! been applied. Who comes during a round waits for the next: what was acknowledged before they came may be
//! newer than the round.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use openraft::ReadPolicy;
use openraft::errors::{LinearizableReadError, RaftError};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::{BarrierError, Consensus, named_leader};

/// How long applying may lag behind what is committed before waiting makes no sense.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);

type Waiter = oneshot::Sender<Result<(), BarrierError>>;

/// Who waits. Bounded by the callers that the edges admit.
pub struct Barrier {
    /// `None` once the node shuts down.
    waiting: Mutex<Option<Vec<Waiter>>>,
    wake: Notify,
    rounds: AtomicU64,
}

impl Default for Barrier {
    fn default() -> Barrier {
        Barrier {
            waiting: Mutex::new(Some(Vec::new())),
            wake: Notify::new(),
            rounds: AtomicU64::new(0),
        }
    }
}

impl Barrier {
    /// Waits for a round that begins after this call.
    pub async fn wait(&self) -> Result<(), BarrierError> {
        let (sender, answer) = oneshot::channel();
        if let Some(waiting) = self.waiting.lock().as_mut() {
            waiting.push(sender);
        }
        self.wake.notify_one();
        answer.await.unwrap_or_else(|_| {
            Err(BarrierError::Unavailable {
                reason: "the node is shutting down".to_string(),
            })
        })
    }

    /// Rounds since the start.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Who waits is told that the node shuts down, and so is who comes later.
    pub fn close(&self) {
        self.waiting.lock().take();
    }
}

impl Consensus {
    pub(super) async fn run_barrier(self) {
        let barrier = &self.0.barrier;
        loop {
            barrier.wake.notified().await;
            let waiting = barrier.waiting.lock().as_mut().map(std::mem::take);
            let Some(waiting) = waiting.filter(|waiting| !waiting.is_empty()) else {
                continue;
            };
            barrier.rounds.fetch_add(1, Ordering::Relaxed);
            let result = self.barrier_round().await;
            for waiter in waiting {
                // Who has gone does not want to know.
                let _ = waiter.send(result.clone());
            }
        }
    }

    async fn barrier_round(&self) -> Result<(), BarrierError> {
        let unavailable = |reason: String| BarrierError::Unavailable { reason };
        self.recovered().map_err(unavailable)?;
        let raft = &self.0.raft;
        let linearizer = match raft.get_read_linearizer(ReadPolicy::ReadIndex).await {
            Ok(linearizer) => linearizer,
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                return Err(BarrierError::NotLeader {
                    leader: named_leader(&forward),
                });
            }
            Err(error) => return Err(unavailable(error.to_string())),
        };
        match linearizer.try_await_ready(raft, Some(APPLY_TIMEOUT)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(state)) => Err(unavailable(format!("applying is behind: {state}"))),
            Err(fatal) => Err(unavailable(fatal.to_string())),
        }
    }
}
