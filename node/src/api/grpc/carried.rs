//! The bytes of chunks that this process carries between clients and disks: one budget for all streams together.
//!
//! Owes: whatever the number of clients, and whether they read their answers or not, the chunks in memory are bounded by
//! [`CARRIED_BYTES_MAX`] and one chunk for each stream; and no stream is kept from working by the others: its one chunk is
//! always carried, and beyond that the stream that waits longest is next.
//!
//! What a stream may not carry yet stays in its connection's flow-control window.

use std::sync::Arc;

use quorumfs_wire::calls::Admission;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of all streams, beyond the one chunk of each: what a fast disk takes in a good tenth of a second.
pub const CARRIED_BYTES_MAX: usize = 256 << 20;

/// See the module. Cloning shares it.
#[derive(Clone, Debug)]
pub struct CarriedBytes {
    shared: Arc<Semaphore>,
}

impl Default for CarriedBytes {
    fn default() -> CarriedBytes {
        CarriedBytes::bounded(CARRIED_BYTES_MAX)
    }
}

impl CarriedBytes {
    /// A budget of `bytes_max`, beyond the one chunk of each stream.
    pub fn bounded(bytes_max: usize) -> CarriedBytes {
        CarriedBytes {
            shared: Arc::new(Semaphore::new(bytes_max)),
        }
    }

    /// For one stream; `bytes` says how many a request, or its answer, carries.
    pub fn stream<Q>(&self, bytes: fn(&Q) -> u32) -> StreamShare<Q> {
        StreamShare {
            shared: Arc::clone(&self.shared),
            own: Arc::new(Semaphore::new(1)),
            bytes,
        }
    }
}

/// What one stream may carry.
#[derive(Debug)]
pub struct StreamShare<Q> {
    shared: Arc<Semaphore>,
    /// The one chunk that is always carried.
    own: Arc<Semaphore>,
    bytes: fn(&Q) -> u32,
}

/// Lets a request in when what it carries fits; that counts until its answer has been sent.
impl<Q: Sync + 'static> Admission<Q> for StreamShare<Q> {
    type Held = Option<OwnedSemaphorePermit>;

    async fn admit(&self, request: &Q) -> Self::Held {
        tokio::select! {
            biased;
            // Neither is ever closed.
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
        let budget = CarriedBytes::bounded(4 << 20);
        let (greedy, modest) = (budget.stream(|_| MIB), budget.stream(|_| MIB));
        let carry = |share: &StreamShare<()>| share.admit(&()).now_or_never().flatten();
        let mut carried: Vec<_> = std::iter::from_fn(|| carry(&greedy)).collect();
        assert_eq!(carried.len(), 5, "the budget, and its own one");
        let own = carry(&modest);
        assert!(own.is_some(), "nobody is kept from working");
        assert!(carry(&modest).is_none());
        let mut first = Box::pin(modest.admit(&()));
        assert!(first.as_mut().now_or_never().is_none());
        let mut second = Box::pin(greedy.admit(&()));
        assert!(second.as_mut().now_or_never().is_none());
        drop(carried.remove(0));
        assert!(second.as_mut().now_or_never().is_none(), "the other is first");
        assert!(first.now_or_never().is_some());
    }
}
