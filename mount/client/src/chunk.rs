//! The chunks of a session and its low-water mark.
//!
//! Invariant: [`SessionChunks::low_water`] is never above a chunk that is still claimed by a [`FreshChunk`] or by a
//! pending mutation that names it. The cluster may delete chunks below the mark that no file refers to.
//!
//! Does not know connections.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::{Chunk, ChunkBody, ChunkId, NewChunk, SessionId, Sha256};
use quorumfs_wire as wire;

/// The chunks of one session.
#[derive(Debug)]
pub(crate) struct SessionChunks {
    session: SessionId,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The counter of the next chunk; starts at 1.
    next: u64,
    /// The number of claims of each chunk.
    held: BTreeMap<u64, u32>,
}

/// Keeps the low-water mark at or below one chunk until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    chunks: Arc<SessionChunks>,
    counter: u64,
}

impl SessionChunks {
    pub(crate) fn new(session: SessionId) -> Arc<SessionChunks> {
        Arc::new(SessionChunks {
            session,
            state: Mutex::new(State {
                next: 1,
                held: BTreeMap::new(),
            }),
        })
    }

    /// Returns the low-water mark: chunks of this session with a smaller counter that no file refers to are dead.
    pub(crate) fn low_water(&self) -> u64 {
        let state = self.state.lock();
        state.held.keys().next().copied().unwrap_or(state.next)
    }

    /// Claims a chunk that a mutation names; `None` if it belongs to another session.
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
            chunks: self.clone(),
            counter,
        }
    }

    fn claim_counter(self: &Arc<Self>, counter: u64) -> Claim {
        *self.state.lock().held.entry(counter).or_default() += 1;
        Claim {
            chunks: self.clone(),
            counter,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.chunks.state.lock();
        if let Some(times) = state.held.get_mut(&self.counter) {
            *times -= 1;
            if *times == 0 {
                state.held.remove(&self.counter);
            }
        }
    }
}

/// Content with a chunk id that no file refers to yet. Cheap to clone.
///
/// Keep it until the mutation that names it has returned: while it or a clone exists, the cluster does not delete the
/// chunk.
#[derive(Clone, Debug)]
pub struct FreshChunk {
    fresh: Arc<Fresh>,
}

#[derive(Debug)]
struct Fresh {
    chunk: Chunk,
    /// Keeps the low-water mark at or below the chunk.
    _claim: Claim,
}

impl FreshChunk {
    /// Assigns a chunk id to `payload` and computes its checksums.
    pub(crate) fn new(chunks: &Arc<SessionChunks>, payload: Bytes) -> FreshChunk {
        let claim = chunks.claim_new();
        let id = ChunkId {
            session: chunks.session,
            counter: claim.counter,
        };
        let chunk = Chunk::new(id, payload).unwrap_or_else(|bad| panic!("{bad}"));
        FreshChunk {
            fresh: Arc::new(Fresh { chunk, _claim: claim }),
        }
    }

    /// Returns the id of the chunk.
    pub fn id(&self) -> ChunkId {
        self.fresh.chunk.id()
    }

    /// Returns the content.
    pub fn payload(&self) -> &Bytes {
        self.fresh.chunk.payload()
    }

    /// Returns the SHA-256 of the content.
    pub fn sha256(&self) -> Sha256 {
        self.fresh.chunk.sha256()
    }

    /// Returns how a command names the chunk after [`crate::Client::put_chunk`] has returned.
    pub fn stored(&self) -> NewChunk {
        self.named(ChunkBody::Stored)
    }

    /// Returns how a command carries the content itself, without a put. The inline content of one command is at most
    /// [`quorumfs_proto::limits::INLINE_BYTES_MAX`] bytes.
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
        let chunks = SessionChunks::new(SessionId(9));
        assert_eq!(chunks.low_water(), 1);
        let chunk = |bytes: &'static [u8]| FreshChunk::new(&chunks, Bytes::from_static(bytes));
        let (first, second) = (chunk(b"one"), chunk(b"two"));
        assert_eq!(first.id().counter, 1);
        assert_eq!(second.id().counter, 2);
        assert_eq!(chunks.low_water(), 1);

        let clone = first.clone();
        drop(first);
        assert_eq!(chunks.low_water(), 1);
        let in_flight = chunks.claim(clone.id()).unwrap();
        drop(clone);
        assert_eq!(chunks.low_water(), 1, "a mutation still names it");
        drop(in_flight);
        assert_eq!(chunks.low_water(), 2);
        drop(second);
        assert_eq!(chunks.low_water(), 3, "no chunk is claimed");

        let foreign = ChunkId {
            session: SessionId(8),
            counter: 1,
        };
        assert!(chunks.claim(foreign).is_none());
    }

    #[test]
    fn both_ways_of_naming_are_valid() {
        let chunks = SessionChunks::new(SessionId(9));
        let chunk = FreshChunk::new(&chunks, Bytes::from(vec![7; 5000]));
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
