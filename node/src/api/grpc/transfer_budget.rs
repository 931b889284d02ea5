//! The budget for the bytes of chunks that the streams of all clients transfer.
//!
//! The chunks in memory are bounded by [`TRANSFER_BYTES_MAX`] plus one chunk for each stream, for any number of
//! clients, and even if they do not read their answers. No stream is blocked by others: it may always transfer one
//! chunk, and waiting streams get the shared budget in order.
//!
//! Requests that are not admitted yet stay in the flow-control window of their connection.

use std::sync::Arc;

use quorumfs_wire::calls::Admission;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Shared bytes of all streams, besides one chunk of each: more than a fast disk writes in 0.1 s.
pub const TRANSFER_BYTES_MAX: usize = 256 << 20;

/// The budget of a process. Clones share it.
#[derive(Clone, Debug)]
pub struct TransferBudget {
    shared: Arc<Semaphore>,
}

impl Default for TransferBudget {
    fn default() -> TransferBudget {
        TransferBudget::bounded(TRANSFER_BYTES_MAX)
    }
}

impl TransferBudget {
    /// Creates a budget of `bytes_max`, besides one chunk of each stream.
    pub fn bounded(bytes_max: usize) -> TransferBudget {
        TransferBudget {
            shared: Arc::new(Semaphore::new(bytes_max)),
        }
    }

    /// Returns the budget of one stream; `bytes` returns the size of a request or of its answer.
    pub fn stream<Q>(&self, bytes: fn(&Q) -> u32) -> StreamBudget<Q> {
        StreamBudget {
            shared: Arc::clone(&self.shared),
            own: Arc::new(Semaphore::new(1)),
            bytes,
        }
    }
}

/// The budget of one stream.
#[derive(Debug)]
pub struct StreamBudget<Q> {
    shared: Arc<Semaphore>,
    /// The one chunk that a stream may always transfer.
    own: Arc<Semaphore>,
    bytes: fn(&Q) -> u32,
}

/// Admits a request when its bytes fit; they count until the answer has been sent.
impl<Q: Sync + 'static> Admission<Q> for StreamBudget<Q> {
    type Held = Option<OwnedSemaphorePermit>;

    async fn admit(&self, request: &Q) -> Self::Held {
        tokio::select! {
            biased;
            // Neither semaphore is ever closed.
            shared = Arc::clone(&self.shared).acquire_many_owned((self.bytes)(request)) => shared.ok(),
            own = Arc::clone(&self.own).acquire_owned() => own.ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const MIB: u32 = 1 << 20;

    #[tokio::test]
    async fn streams_share_a_budget_and_each_carries_one_chunk_in_any_case() {
        let budget = TransferBudget::bounded(4 << 20);
        let (greedy, modest) = (budget.stream(|_| MIB), budget.stream(|_| MIB));
        let admit = |share: &StreamBudget<()>| share.admit(&()).now_or_never().flatten();
        let mut permits: Vec<_> = std::iter::from_fn(|| admit(&greedy)).collect();
        assert_eq!(permits.len(), 5, "the shared budget, and one chunk of the stream");
        let own = admit(&modest);
        assert!(own.is_some(), "a stream may always transfer one chunk");
        assert!(admit(&modest).is_none());
        let mut first = Box::pin(modest.admit(&()));
        assert!(first.as_mut().now_or_never().is_none());
        let mut second = Box::pin(greedy.admit(&()));
        assert!(second.as_mut().now_or_never().is_none());
        drop(permits.remove(0));
        assert!(
            second.as_mut().now_or_never().is_none(),
            "the other stream is first"
        );
        assert!(first.now_or_never().is_some());
    }
}
