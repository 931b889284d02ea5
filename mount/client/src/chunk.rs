//! Chunks that this client makes, and the mark below which it makes no more claims.
//!
//! Invariant: [`ChunkLedger::low_water`] is never above a chunk that somebody still holds: its [`FreshChunk`], or a
//! mutation under way that names it. The cluster may drop what lies below and is not named by a file.
//!
//! Knows nothing of connections.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::{Chunk, ChunkBody, ChunkId, NewChunk, SessionId, Sha256};
use quorumfs_wire as wire;

/// The chunks of one session.
#[derive(Debug)]
pub(crate) struct ChunkLedger {
    session: SessionId,
    state: Mutex<Ledger>,
}

#[derive(Debug)]
struct Ledger {
    /// Counts up from 1.
    next: u64,
    /// How often each is held.
    held: BTreeMap<u64, u32>,
}

/// Keeps the low-water mark at or below one chunk.
#[derive(Debug)]
pub(crate) struct Claim {
    ledger: Arc<ChunkLedger>,
    counter: u64,
}

impl ChunkLedger {
    pub(crate) fn new(session: SessionId) -> Arc<ChunkLedger> {
        Arc::new(ChunkLedger {
            session,
            state: Mutex::new(Ledger {
                next: 1,
                held: BTreeMap::new(),
            }),
        })
    }

    /// Chunks of this session with a smaller counter that no file names are dead.
    pub(crate) fn low_water(&self) -> u64 {
        let state = self.state.lock();
        state.held.keys().next().copied().unwrap_or(state.next)
    }

    /// Holds a chunk that a mutation names, if it is one of this session.
    pub(crate) fn claim(self: &Arc<Self>, id: ChunkId) -> Option<Claim> {
        (id.session == self.session).then(|| self.claim_counter(id.counter))
    }

    fn claim_new(self: &Arc<Self>) -> Claim {
        let mut state = self.state.lock();
        let counter = state.next;
        state.next += 1;
        state.held.insert(counter, 1);
        drop(state);
        Claim {
            ledger: self.clone(),
            counter,
        }
    }

    fn claim_counter(self: &Arc<Self>, counter: u64) -> Claim {
        *self.state.lock().held.entry(counter).or_default() += 1;
        Claim {
            ledger: self.clone(),
            counter,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.ledger.state.lock();
        if let Some(times) = state.held.get_mut(&self.counter) {
            *times -= 1;
            if *times == 0 {
                state.held.remove(&self.counter);
            }
        }
    }
}

/// Content with an identity, not yet named by any file. Cheap to clone.
///
/// Hold it until the mutation that names it has returned; as long as it (or a clone) lives, the cluster keeps what it
/// has of it.
#[derive(Clone, Debug)]
pub struct FreshChunk {
    fresh: Arc<Fresh>,
}

#[derive(Debug)]
struct Fresh {
    chunk: Chunk,
    /// Keeps the mark below it.
    _claim: Claim,
}

impl FreshChunk {
    /// Draws an identity for `payload` and computes its checksums.
    pub(crate) fn new(ledger: &Arc<ChunkLedger>, payload: Bytes) -> FreshChunk {
        let claim = ledger.claim_new();
        let id = ChunkId {
            session: ledger.session,
            counter: claim.counter,
        };
        let chunk = Chunk::new(id, payload).unwrap_or_else(|bad| panic!("{bad}"));
        FreshChunk {
            fresh: Arc::new(Fresh { chunk, _claim: claim }),
        }
    }

    /// Its identity.
    pub fn id(&self) -> ChunkId {
        self.fresh.chunk.id()
    }

    /// Its bytes.
    pub fn payload(&self) -> &Bytes {
        self.fresh.chunk.payload()
    }

    /// Their digest.
    pub fn sha256(&self) -> Sha256 {
        self.fresh.chunk.sha256()
    }

    /// How a command names it after [`crate::Client::put_chunk`] returned.
    pub fn stored(&self) -> NewChunk {
        self.named(ChunkBody::Stored)
    }

    /// How a command brings it along, without a put. For at most
    /// [`quorumfs_proto::limits::INLINE_BYTES_MAX`] bytes in one command.
    pub fn inline(&self) -> NewChunk {
        self.named(ChunkBody::Inline(self.payload().clone()))
    }

    fn named(&self, body: ChunkBody) -> NewChunk {
        NewChunk {
            id: self.id(),
            length: self.fresh.chunk.length(),
            sha256: self.sha256(),
            body,
        }
    }

    pub(crate) fn request(&self) -> wire::PutChunkRequest {
        (&self.fresh.chunk).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_stays_below_what_is_held() {
        let ledger = ChunkLedger::new(SessionId(9));
        assert_eq!(ledger.low_water(), 1);
        let chunk = |bytes: &'static [u8]| FreshChunk::new(&ledger, Bytes::from_static(bytes));
        let (first, second) = (chunk(b"one"), chunk(b"two"));
        assert_eq!(first.id().counter, 1);
        assert_eq!(second.id().counter, 2);
        assert_eq!(ledger.low_water(), 1);

        let clone = first.clone();
        drop(first);
        assert_eq!(ledger.low_water(), 1);
        let under_way = ledger.claim(clone.id()).unwrap();
        drop(clone);
        assert_eq!(ledger.low_water(), 1, "a mutation still names it");
        drop(under_way);
        assert_eq!(ledger.low_water(), 2);
        drop(second);
        assert_eq!(ledger.low_water(), 3, "nothing is held: all so far may go");

        let foreign = ChunkId {
            session: SessionId(8),
            counter: 1,
        };
        assert!(ledger.claim(foreign).is_none());
    }

    #[test]
    fn both_ways_of_naming_are_valid() {
        let ledger = ChunkLedger::new(SessionId(9));
        let chunk = FreshChunk::new(&ledger, Bytes::from(vec![7; 5000]));
        assert_eq!(chunk.stored().validate(), Ok(()));
        assert_eq!(chunk.inline().validate(), Ok(()));
        assert_eq!(chunk.stored().sha256, Sha256::of(&[7; 5000]));
        let request = chunk.request();
        assert!(quorumfs_proto::chunk::blocks_match(
            &request.payload,
            &request.block_crcs
        ));
    }
}
