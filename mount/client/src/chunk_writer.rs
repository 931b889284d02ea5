//! Sends chunks to the leader, which answers when f + 1 voters have them on disk (P2).
//!
//! Invariant: the bytes in flight are bounded by a budget; a put waits for its permit before it is sent. A put is
//! idempotent: the chunk id identifies the content.

use std::sync::Arc;

use quorumfs_proto::FsError;
use quorumfs_wire::file_system_client::FileSystemClient;
use quorumfs_wire::{ChunkStatus, PutChunkRequest, PutChunkResponse};
use tokio::sync::Semaphore;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::chunk::FreshChunk;
use crate::cluster::Cluster;
use crate::connector::Purpose;
use crate::leader_link::{LeaderLink, Protocol, Verdict};

/// Least cost of a chunk in a budget of bytes, so that a budget also bounds the number of chunks.
pub(crate) const TRANSFER_COST_BYTES_MIN: usize = 32 << 10;
/// Upper bound of a budget: many times the bytes that a connection carries in a second.
pub(crate) const BYTES_IN_FLIGHT_MAX: usize = 256 << 20;
/// Times that a chunk may arrive damaged; after that the copy in this process is considered damaged.
const DAMAGED_MAX: u32 = 4;

/// The protocol of chunk puts.
pub(crate) struct Puts;

impl Protocol for Puts {
    const NAME: &'static str = "put";
    const PURPOSE: Purpose = Purpose::Bulk;
    const OUTSTANDING_MAX: usize = BYTES_IN_FLIGHT_MAX / TRANSFER_COST_BYTES_MIN;
    const RESEND_AFTER_MS: u64 = 5_000;
    type Request = PutChunkRequest;
    type Response = PutChunkResponse;

    async fn open(
        client: &mut FileSystemClient<Channel>,
        requests: ReceiverStream<PutChunkRequest>,
    ) -> Result<Response<Streaming<PutChunkResponse>>, Status> {
        client.put_chunks(requests).await
    }

    fn verdict(response: &PutChunkResponse) -> Verdict {
        match response.status() {
            ChunkStatus::NotLeader => Verdict::NotLeader {
                hint: Some(response.leader.clone()).filter(|leader| !leader.is_empty()),
            },
            ChunkStatus::Unavailable => Verdict::Unavailable {
                reason: response.detail.clone(),
            },
            _ => Verdict::Decided,
        }
    }
}

/// Bounds the bytes of concurrent transfers.
#[derive(Debug)]
pub(crate) struct Budget {
    permits: Semaphore,
    bytes_max: usize,
}

impl Budget {
    pub(crate) fn new(bytes_max: usize) -> Budget {
        let bytes_max = bytes_max.clamp(TRANSFER_COST_BYTES_MIN, BYTES_IN_FLIGHT_MAX);
        Budget {
            permits: Semaphore::new(bytes_max),
            bytes_max,
        }
    }

    /// Waits for `bytes` of the budget. A request above the budget waits until it is alone.
    pub(crate) async fn acquire(&self, bytes: usize) -> tokio::sync::SemaphorePermit<'_> {
        let cost = bytes.max(TRANSFER_COST_BYTES_MIN).min(self.bytes_max) as u32;
        let permit = self.permits.acquire_many(cost).await;
        permit.expect("the budget is never closed")
    }
}

/// Sends chunks to the leader.
pub(crate) struct ChunkWriter {
    link: LeaderLink<Puts>,
    budget: Budget,
}

impl ChunkWriter {
    pub(crate) fn new(cluster: Arc<Cluster>, bytes_in_flight_max: usize) -> ChunkWriter {
        ChunkWriter {
            link: LeaderLink::new(cluster),
            budget: Budget::new(bytes_in_flight_max),
        }
    }

    pub(crate) fn link(&self) -> &LeaderLink<Puts> {
        &self.link
    }

    /// Returns when f + 1 voters hold `chunk`, however long that takes.
    ///
    /// # Errors
    /// [`FsError::NoSpace`], [`FsError::InvalidArgument`] if the leader refuses the chunk, or [`FsError::Io`] if the
    /// client is being closed or the chunk is damaged.
    pub(crate) async fn put(&self, chunk: &FreshChunk) -> Result<(), FsError> {
        let _permit = self.budget.acquire(chunk.payload().len()).await;
        let mut damaged = 0;
        loop {
            let Some((response, _)) = self.link.call(chunk.request()).await else {
                return Err(FsError::Io);
            };
            match response.status() {
                ChunkStatus::Ok => return Ok(()),
                ChunkStatus::NoSpace => return Err(FsError::NoSpace),
                ChunkStatus::Corrupt if damaged < DAMAGED_MAX => damaged += 1,
                status => {
                    tracing::warn!(
                        chunk = %chunk.id(),
                        status = status.as_str_name(),
                        detail = response.detail,
                        "the leader refused a chunk"
                    );
                    return Err(match status {
                        ChunkStatus::Invalid => FsError::InvalidArgument,
                        _ => FsError::Io,
                    });
                }
            }
        }
    }
}
