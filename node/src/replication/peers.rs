//! Other nodes' content: pushing chunks to them, fetching from them, asking what they hold.
//!
//! Many calls travel at once over one long stream for each peer and direction; what is in flight is bounded in bytes
//! for each peer. A push that finds no room is refused at once ([`PushError::QueueFull`]): a peer that does not keep
//! up gets the chunk by recovery, and does not hold up the others. A fetch waits for room: its caller needs the bytes.
//!
//! Invariant: what a fetch returns was verified against its CRCs, and a whole chunk against its SHA-256.
//!
//! Knows nothing of who should hold what.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::{Chunk, ChunkId, ChunkRange, Member, NodeId, Sha256};
use quorumfs_wire::calls::{Lost, NodeCalls, NodeLimits};
use quorumfs_wire::{
    ChunkStatus, GetChunkRequest, GetChunkResponse, HeldChunksRequest, PutChunkRequest, PutChunkResponse,
    VerifyChunksRequest,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::transport::{Peer, Purpose, Transport};
use quorumfs_wire::MalformedChunk;

/// Most bytes of chunks under way to one peer: at 100 MB/s more than half a second's worth; a peer that is further
/// behind is left to recovery.
const PUSH_BYTES_MAX: usize = 64 << 20;
/// Most bytes asked of one peer at once: fills the connection's window.
const FETCH_BYTES_MAX: usize = 32 << 20;
/// Semaphores count permits in 32 bits and less; admission counts in these.
const PERMIT_BYTES: usize = 1 << 10;
/// A peer that answers nothing for this time while calls wait is taken to be lost. Far above a slow disk's flush.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(10);
/// Between a stream's end and the next attempt: a peer that is down is not asked in a tight loop.
const RECONNECT_PAUSE_MS: u64 = 100;
/// A call whose stream ended is sent once more over a new one: the peer may just have restarted.
const STREAMS_MAX: u32 = 2;
/// Most ids in one question: well below the largest message.
pub const HELD_IDS_MAX: usize = 1 << 16;
/// How long one such question may take: the answer comes from memory.
const HELD_TIMEOUT_MS: u64 = 5_000;

/// Most chunks verified in one question: 64 MiB are read and hashed within the time-out even by a busy old disk.
pub const VERIFY_IDS_MAX: usize = 64;
/// How long one such question may take.
const VERIFY_TIMEOUT_MS: u64 = 60_000;

/// What reading a copy from its disk showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has the SHA-256 that the metadata names.
    Healthy,
    /// There is none.
    Missing,
    /// It differs, and in what.
    Corrupt(String),
    /// It could not be judged, and why.
    Unknown(String),
}

/// Why a chunk did not get to a peer's disk, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// Too many bytes are under way to this peer.
    #[error("the queue to {peer} is full")]
    QueueFull {
        /// The peer.
        peer: NodeId,
    },
    /// Its disk is full.
    #[error("{peer} has no space")]
    NoSpace {
        /// The peer.
        peer: NodeId,
    },
    /// It says no, and why.
    #[error("{peer} did not store it: {status:?} {detail}")]
    Refused {
        /// The peer.
        peer: NodeId,
        /// What it answered.
        status: ChunkStatus,
        /// In words.
        detail: String,
    },
    /// No answer: it may have the chunk or not.
    #[error("{peer} cannot be reached: {reason}")]
    Unreachable {
        /// The peer.
        peer: NodeId,
        /// Why not.
        reason: String,
    },
}

/// Why a chunk could not be had from a peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// It does not hold the chunk.
    #[error("{peer} does not hold it")]
    NotFound {
        /// The peer.
        peer: NodeId,
    },
    /// Its copy is damaged, or was on its way, or is not what the metadata names.
    #[error("damaged at or from {peer}: {what}")]
    Corrupt {
        /// The peer.
        peer: NodeId,
        /// What does not match.
        what: String,
    },
    /// It says no, and why.
    #[error("{peer} did not send it: {status:?} {detail}")]
    Refused {
        /// The peer.
        peer: NodeId,
        /// What it answered.
        status: ChunkStatus,
        /// In words.
        detail: String,
    },
    /// No answer.
    #[error("{peer} cannot be reached: {reason}")]
    Unreachable {
        /// The peer.
        peer: NodeId,
        /// Why not.
        reason: String,
    },
}

/// Why it is not known what a peer holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node {peer} does not answer: {reason}")]
pub struct HeldError {
    /// The peer.
    pub peer: NodeId,
    /// Why not.
    pub reason: String,
}

/// The chunks that go to one peer and come from it. A call holds its share of the bytes that may be under way.
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
    // One entry for each node that was ever talked to and not forgotten; locked for a lookup.
    streams: Mutex<HashMap<NodeId, Arc<PeerStreams>>>,
}

impl PeerChunks {
    /// No connection is made yet.
    pub fn new(transport: Arc<Transport>) -> PeerChunks {
        PeerChunks::with_progress_timeout(transport, PROGRESS_TIMEOUT)
    }

    /// As [`PeerChunks::new`]; a peer that answers nothing for `progress_timeout` while calls wait is taken to be lost.
    pub fn with_progress_timeout(transport: Arc<Transport>, progress_timeout: Duration) -> PeerChunks {
        PeerChunks {
            transport,
            progress_timeout,
            streams: Mutex::new(HashMap::new()),
        }
    }

    /// Sends `chunk` to `to`; on that node's disk when it returns.
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
            .map_err(|lost: Lost| unreachable(lost.to_string()))?;
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

    /// The blocks of `id` that hold `offset..offset + length`, from `from`; verified.
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
            .map_err(|lost: Lost| unreachable(lost.to_string()))?;
        match answer.status() {
            ChunkStatus::Ok => {
                let range = ChunkRange::try_from(answer).map_err(|error| match error {
                    MalformedChunk::Invalid(what) | MalformedChunk::Corrupt(what) => corrupt(&what),
                })?;
                match range.exactly(offset, length) {
                    Some(_) => Ok(range),
                    None => Err(corrupt("it is not all of what was asked for")),
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

    /// All of `id` from `from`: `length` bytes with this SHA-256, as the metadata names them.
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
            return Err(corrupt("its length is not what the metadata names"));
        }
        let chunk = range
            .into_chunk(id, sha256)
            .map_err(|bad| corrupt(&bad.to_string()))?;
        // A millisecond of hashing does not belong between other calls' polls.
        tokio::task::spawn_blocking(move || (Sha256::of(chunk.payload()) == chunk.sha256()).then_some(chunk))
            .await
            .ok()
            .flatten()
            .ok_or_else(|| corrupt("its SHA-256 is not what the metadata names"))
    }

    /// For each of `ids` whether `at` has it on disk.
    pub async fn held(&self, at: &Member, ids: &[ChunkId]) -> Result<Vec<bool>, HeldError> {
        let mut held = Vec::with_capacity(ids.len());
        for page in ids.chunks(HELD_IDS_MAX) {
            held.extend(self.held_under_epoch(at, page).await?.1);
        }
        Ok(held)
    }

    /// For each of up to [`HELD_IDS_MAX`] chunks whether `at` has it on disk, and the epoch of placement under which it
    /// says so.
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
            .map_err(|_| failed(format!("no answer for {HELD_TIMEOUT_MS} ms")))?
            .map_err(|status| failed(format!("{}: {}", status.code(), status.message())))?
            .into_inner();
        if answer.held.len() != ids.len() {
            return Err(failed("it answered about other chunks".to_string()));
        }
        Ok((answer.placement_epoch, answer.held))
    }

    /// Has `at` read up to [`VERIFY_IDS_MAX`] chunks from its disk; it repairs what is bad by itself.
    pub async fn verify(&self, at: &Member, ids: &[ChunkId]) -> Result<Vec<Verdict>, HeldError> {
        let failed = |reason: String| HeldError { peer: at.id, reason };
        let mut peer = self
            .transport
            .member(at, Purpose::Control)
            .map_err(|error| failed(error.to_string()))?;
        let request = VerifyChunksRequest {
            chunks: ids.iter().map(|id| (*id).into()).collect(),
        };
        let asked = peer.verify_chunks(request);
        let answer = tokio::time::timeout(Duration::from_millis(VERIFY_TIMEOUT_MS), asked)
            .await
            .map_err(|_| failed(format!("no answer for {VERIFY_TIMEOUT_MS} ms")))?
            .map_err(|status| failed(format!("{}: {}", status.code(), status.message())))?
            .into_inner();
        if answer.verdicts.len() != ids.len() {
            return Err(failed("it answered about other chunks".to_string()));
        }
        let verdict = |answer: quorumfs_wire::ChunkVerdict| match answer.status() {
            ChunkStatus::Ok => Verdict::Healthy,
            ChunkStatus::NotFound => Verdict::Missing,
            ChunkStatus::Corrupt => Verdict::Corrupt(answer.detail),
            _ => Verdict::Unknown(answer.detail),
        };
        Ok(answer.verdicts.into_iter().map(verdict).collect())
    }

    /// Ends the streams to a node that is no member any more.
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
        let made = Arc::new(PeerStreams::new(address, &peer, self.progress_timeout));
        streams.insert(member.id, Arc::clone(&made));
        Ok(made)
    }
}

fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(PERMIT_BYTES).max(1)).unwrap_or(u32::MAX)
}
