//! Access to the content of other nodes: pushing, fetching, and queries of what they hold.
//!
//! Many concurrent calls share one long stream for each peer and direction; the bytes in flight are bounded for each
//! peer. A push that exceeds the bound fails at once ([`PushError::QueueFull`]), so that a slow peer does not delay
//! the others; the peer gets the chunk by recovery. A fetch waits, because its caller needs the bytes.
//!
//! Invariant: the result of a fetch was verified against its CRCs, and a whole chunk against its SHA-256.
//!
//! Does not know the placement.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::{Chunk, ChunkId, ChunkRange, Member, NodeId, Sha256};
use quorumfs_wire::calls::{CallError, NodeCalls, NodeLimits};
use quorumfs_wire::{
    ChunkStatus, GetChunkRequest, GetChunkResponse, HeldChunksRequest, PutChunkRequest, PutChunkResponse,
    VerifyChunksRequest,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::transport::{Peer, Purpose, Transport};
use quorumfs_wire::MalformedChunk;

/// Most bytes of pushes in flight to one peer: more than half a second at 100 MB/s. A peer that is further behind is
/// left to recovery.
const PUSH_BYTES_MAX: usize = 64 << 20;
/// Most bytes of fetches in flight from one peer: fills the flow-control window of the connection.
const FETCH_BYTES_MAX: usize = 32 << 20;
/// Bytes of one permit; a number of permits has 32 bits.
const PERMIT_BYTES: usize = 1 << 10;
/// Time without an answer, while calls are outstanding, after which a peer is considered unreachable; far above the
/// flush time of a slow disk.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between the end of a stream and the next attempt, so that a peer that is down is not called in a tight loop.
const RECONNECT_PAUSE_MS: u64 = 100;
/// Most streams over which a call is sent: one retry, because the peer may just have restarted.
const STREAMS_MAX: u32 = 2;
/// Most chunk ids in one query of held chunks: well below the largest message.
pub const HELD_IDS_MAX: usize = 1 << 16;
/// Time limit of a query of held chunks, which the peer answers from memory.
const HELD_TIMEOUT_MS: u64 = 5_000;

/// Most chunks in one verification: 64 MiB, which even a busy old disk reads and hashes within the time limit.
pub const VERIFY_IDS_MAX: usize = 64;
/// Time limit of a verification.
const VERIFY_TIMEOUT_MS: u64 = 60_000;

/// The result of verifying a copy on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The copy has the SHA-256 of the metadata.
    Healthy,
    /// There is no copy.
    Missing,
    /// The copy is damaged; says what differs.
    Corrupt(String),
    /// The copy could not be verified; says why.
    Unknown(String),
}

/// Why a push failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// Too many bytes are in flight to this peer.
    #[error("the queue of pushes to node {peer} is full")]
    QueueFull {
        /// The peer that was called.
        peer: NodeId,
    },
    /// The disk of the peer is full.
    #[error("the disk of node {peer} is full")]
    NoSpace {
        /// The peer that was called.
        peer: NodeId,
    },
    /// The peer refused the chunk.
    #[error("node {peer} did not store the chunk: {} {detail}", .status.as_str_name())]
    Refused {
        /// The peer that was called.
        peer: NodeId,
        /// The status of the answer.
        status: ChunkStatus,
        /// The reason that the peer gave.
        detail: String,
    },
    /// The peer did not answer; it may have stored the chunk.
    #[error("cannot reach node {peer}: {reason}")]
    Unreachable {
        /// The peer that was called.
        peer: NodeId,
        /// The reason.
        reason: String,
    },
}

/// Why a fetch failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The peer does not hold the chunk.
    #[error("node {peer} does not hold the chunk")]
    NotFound {
        /// The peer that was called.
        peer: NodeId,
    },
    /// The copy is damaged, was damaged in transit, or differs from the metadata.
    #[error("the copy of node {peer} is damaged: {what}")]
    Corrupt {
        /// The peer that was called.
        peer: NodeId,
        /// What does not match.
        what: String,
    },
    /// The peer refused the request.
    #[error("node {peer} did not send the chunk: {} {detail}", .status.as_str_name())]
    Refused {
        /// The peer that was called.
        peer: NodeId,
        /// The status of the answer.
        status: ChunkStatus,
        /// The reason that the peer gave.
        detail: String,
    },
    /// The peer did not answer.
    #[error("cannot reach node {peer}: {reason}")]
    Unreachable {
        /// The peer that was called.
        peer: NodeId,
        /// The reason.
        reason: String,
    },
}

/// A query of held chunks or a verification failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node {peer} did not answer: {reason}")]
pub struct HeldError {
    /// The peer that was called.
    pub peer: NodeId,
    /// The reason.
    pub reason: String,
}

/// The streams of chunks to and from one peer. Each call holds a permit for its bytes.
struct PeerStreams {
    address: String,
    push: NodeCalls<PutChunkRequest, PutChunkResponse, OwnedSemaphorePermit>,
    push_admission: Arc<Semaphore>,
    fetch: NodeCalls<GetChunkRequest, GetChunkResponse, OwnedSemaphorePermit>,
    fetch_admission: Arc<Semaphore>,
}

impl PeerStreams {
    fn new(address: &str, peer: &Peer, progress_timeout: Duration) -> PeerStreams {
        let limits = |bytes_max: usize| NodeLimits {
            queue_max: bytes_max / PERMIT_BYTES,
            streams_max: STREAMS_MAX,
            silence_max: progress_timeout,
            pause: Duration::from_millis(RECONNECT_PAUSE_MS),
        };
        let (push, fetch) = (peer.clone(), peer.clone());
        PeerStreams {
            address: address.to_string(),
            push: NodeCalls::new(limits(PUSH_BYTES_MAX), move |requests| {
                let mut peer = push.clone();
                async move { peer.push_chunks(requests).await }
            }),
            push_admission: Arc::new(Semaphore::new(PUSH_BYTES_MAX / PERMIT_BYTES)),
            fetch: NodeCalls::new(limits(FETCH_BYTES_MAX), move |requests| {
                let mut peer = fetch.clone();
                async move { peer.fetch_chunks(requests).await }
            }),
            fetch_admission: Arc::new(Semaphore::new(FETCH_BYTES_MAX / PERMIT_BYTES)),
        }
    }
}

/// The content stores of the other nodes.
pub struct PeerChunks {
    transport: Arc<Transport>,
    progress_timeout: Duration,
    // One entry for each node that was contacted and not forgotten. Locked only for a lookup.
    streams: Mutex<HashMap<NodeId, Arc<PeerStreams>>>,
}

impl PeerChunks {
    /// Creates the client without connections.
    pub fn new(transport: Arc<Transport>) -> PeerChunks {
        PeerChunks::with_progress_timeout(transport, PROGRESS_TIMEOUT)
    }

    /// Like [`PeerChunks::new`], with a different time without an answer after which a peer is considered unreachable.
    pub fn with_progress_timeout(transport: Arc<Transport>, progress_timeout: Duration) -> PeerChunks {
        PeerChunks {
            transport,
            progress_timeout,
            streams: Mutex::new(HashMap::new()),
        }
    }

    /// Pushes `chunk` to `to`; it is on disk there when this returns.
    ///
    /// # Errors
    /// A [`PushError`]; the chunk may have been stored after [`PushError::Unreachable`].
    pub async fn push(&self, to: &Member, chunk: &Chunk) -> Result<(), PushError> {
        let peer = to.id;
        let unreachable = |reason: String| PushError::Unreachable { peer, reason };
        let streams = self.streams(to).map_err(|error| unreachable(error.to_string()))?;
        let admission = Arc::clone(&streams.push_admission)
            .try_acquire_many_owned(permits(chunk.payload().len()))
            .map_err(|_| PushError::QueueFull { peer })?;
        let answer = streams
            .push
            .call(chunk.into(), admission)
            .await
            .map_err(|error: CallError| unreachable(error.to_string()))?;
        match answer.status() {
            ChunkStatus::Ok => Ok(()),
            ChunkStatus::NoSpace => Err(PushError::NoSpace { peer }),
            status => Err(PushError::Refused {
                peer,
                status,
                detail: answer.detail,
            }),
        }
    }

    /// Fetches the blocks of `id` that contain the bytes `offset..offset + length` from `from`, and verifies their
    /// CRCs.
    ///
    /// # Errors
    /// A [`FetchError`].
    pub async fn fetch(
        &self,
        from: &Member,
        id: ChunkId,
        offset: u32,
        length: u32,
    ) -> Result<ChunkRange, FetchError> {
        let peer = from.id;
        let unreachable = |reason: String| FetchError::Unreachable { peer, reason };
        let corrupt = |what: &str| FetchError::Corrupt {
            peer,
            what: what.to_string(),
        };
        let streams = self
            .streams(from)
            .map_err(|error| unreachable(error.to_string()))?;
        let admission = Arc::clone(&streams.fetch_admission)
            .acquire_many_owned(permits(length as usize))
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        let request = GetChunkRequest {
            call_id: 0,
            chunk: Some(id.into()),
            offset,
            length,
            session: 0,
        };
        let answer = streams
            .fetch
            .call(request, admission)
            .await
            .map_err(|error: CallError| unreachable(error.to_string()))?;
        match answer.status() {
            ChunkStatus::Ok => {
                let range = ChunkRange::try_from(answer).map_err(|error| match error {
                    MalformedChunk::Invalid(what) | MalformedChunk::Corrupt(what) => corrupt(&what),
                })?;
                match range.exactly(offset, length) {
                    Some(_) => Ok(range),
                    None => Err(corrupt("the answer does not cover the requested range")),
                }
            }
            ChunkStatus::NotFound => Err(FetchError::NotFound { peer }),
            ChunkStatus::Corrupt => Err(corrupt(&answer.detail)),
            status => Err(FetchError::Refused {
                peer,
                status,
                detail: answer.detail,
            }),
        }
    }

    /// Fetches all of `id` from `from`: `length` bytes with this SHA-256, which the metadata records.
    ///
    /// # Errors
    /// A [`FetchError`].
    pub async fn fetch_whole(
        &self,
        from: &Member,
        id: ChunkId,
        length: u32,
        sha256: Sha256,
    ) -> Result<Chunk, FetchError> {
        let range = self.fetch(from, id, 0, length).await?;
        let peer = from.id;
        let corrupt = |what: &str| FetchError::Corrupt {
            peer,
            what: what.to_string(),
        };
        if range.payload().len() != length as usize {
            return Err(corrupt("the length differs from the metadata"));
        }
        let chunk = range
            .into_chunk(id, sha256)
            .map_err(|bad| corrupt(&bad.to_string()))?;
        // Hashing takes about a millisecond, too long for a runtime thread.
        tokio::task::spawn_blocking(move || (Sha256::of(chunk.payload()) == chunk.sha256()).then_some(chunk))
            .await
            .ok()
            .flatten()
            .ok_or_else(|| corrupt("the SHA-256 differs from the metadata"))
    }

    /// Returns for each of `ids` whether `at` has it on disk.
    ///
    /// # Errors
    /// A [`HeldError`].
    pub async fn held(&self, at: &Member, ids: &[ChunkId]) -> Result<Vec<bool>, HeldError> {
        let mut held = Vec::with_capacity(ids.len());
        for page in ids.chunks(HELD_IDS_MAX) {
            held.extend(self.held_under_epoch(at, page).await?.1);
        }
        Ok(held)
    }

    /// Returns for each of at most [`HELD_IDS_MAX`] chunks whether `at` has it on disk, and the epoch of the placement
    /// under which the answer is valid.
    ///
    /// # Errors
    /// A [`HeldError`].
    pub async fn held_under_epoch(
        &self,
        at: &Member,
        ids: &[ChunkId],
    ) -> Result<(u64, Vec<bool>), HeldError> {
        let failed = |reason: String| HeldError { peer: at.id, reason };
        let mut peer = self
            .transport
            .member(at, Purpose::Control)
            .map_err(|error| failed(error.to_string()))?;
        let mut request = tonic::Request::new(HeldChunksRequest {
            chunks: ids.iter().map(|id| (*id).into()).collect(),
        });
        request.set_timeout(Duration::from_millis(HELD_TIMEOUT_MS));
        let answer = tokio::time::timeout(Duration::from_millis(HELD_TIMEOUT_MS), peer.held_chunks(request))
            .await
            .map_err(|_| failed(format!("no answer in {HELD_TIMEOUT_MS} ms")))?
            .map_err(|status| failed(format!("{}: {}", status.code(), status.message())))?
            .into_inner();
        if answer.held.len() != ids.len() {
            return Err(failed("the answer has a different number of chunks".to_string()));
        }
        Ok((answer.placement_epoch, answer.held))
    }

    /// Makes `at` verify at most [`VERIFY_IDS_MAX`] chunks on its disk. It repairs bad copies by itself.
    ///
    /// # Errors
    /// A [`HeldError`].
    pub async fn verify(&self, at: &Member, ids: &[ChunkId]) -> Result<Vec<Verdict>, HeldError> {
        let failed = |reason: String| HeldError { peer: at.id, reason };
        let mut peer = self
            .transport
            .member(at, Purpose::Control)
            .map_err(|error| failed(error.to_string()))?;
        let request = VerifyChunksRequest {
            chunks: ids.iter().map(|id| (*id).into()).collect(),
        };
        let call = peer.verify_chunks(request);
        let answer = tokio::time::timeout(Duration::from_millis(VERIFY_TIMEOUT_MS), call)
            .await
            .map_err(|_| failed(format!("no answer in {VERIFY_TIMEOUT_MS} ms")))?
            .map_err(|status| failed(format!("{}: {}", status.code(), status.message())))?
            .into_inner();
        if answer.verdicts.len() != ids.len() {
            return Err(failed("the answer has a different number of chunks".to_string()));
        }
        let verdict = |answer: quorumfs_wire::ChunkVerdict| match answer.status() {
            ChunkStatus::Ok => Verdict::Healthy,
            ChunkStatus::NotFound => Verdict::Missing,
            ChunkStatus::Corrupt => Verdict::Corrupt(answer.detail),
            _ => Verdict::Unknown(answer.detail),
        };
        Ok(answer.verdicts.into_iter().map(verdict).collect())
    }

    /// Ends the streams to a node that is no longer a member.
    pub fn forget(&self, node: NodeId) {
        self.streams.lock().remove(&node);
    }

    fn streams(&self, member: &Member) -> Result<Arc<PeerStreams>, tonic::transport::Error> {
        let mut streams = self.streams.lock();
        let address = &member.addresses.grpc;
        if let Some(known) = streams.get(&member.id)
            && known.address == *address
        {
            return Ok(Arc::clone(known));
        }
        let peer = self.transport.member(member, Purpose::Bulk)?;
        let created = Arc::new(PeerStreams::new(address, &peer, self.progress_timeout));
        streams.insert(member.id, Arc::clone(&created));
        Ok(created)
    }
}

fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(PERMIT_BYTES).max(1)).unwrap_or(u32::MAX)
}
