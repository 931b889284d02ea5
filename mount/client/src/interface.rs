//! The operations of a cluster that the filesystem uses, as a trait, so that the filesystem can be tested with an
//! in-memory cluster. [`Client`] implements it for a real cluster.

use std::future::Future;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::{Client, FreshChunk};
use quorumfs_proto::query::{Answer, TypedQuery};
use quorumfs_proto::{ChunkId, Command, FsError, InodeNumber, NewChunk, Outcome, Query, Timestamp};

/// Returns those of the given unlinked inodes that this client does not have open.
pub type UnlinkedHandler = Box<dyn Fn(&[InodeNumber]) -> Vec<InodeNumber> + Send + Sync>;

/// Content that no file refers to yet. While a value exists, the cluster does not delete its chunk.
pub trait FreshContent: Clone + Send + Sync + 'static {
    /// Returns the id of the chunk.
    fn id(&self) -> ChunkId;
    /// Returns how a command names the chunk after it was put.
    fn stored(&self) -> NewChunk;
    /// Returns how a command carries the content itself.
    fn inline(&self) -> NewChunk;
}

/// A cluster as used through one session.
pub trait Cluster: Send + Sync + 'static {
    /// Content that no file refers to yet.
    type Chunk: FreshContent;

    /// Applies `command` once and returns its outcome; waits while no leader can decide. `stored` are the chunks that
    /// it names as stored.
    ///
    /// # Errors
    /// The verdict of the cluster; [`FsError::ChunkDead`] if the chunks belong to an earlier session: create them
    /// again.
    fn mutate(
        &self,
        command: Command,
        stored: &[Self::Chunk],
    ) -> impl Future<Output = Result<Outcome, FsError>> + Send;

    /// Reads metadata.
    ///
    /// # Errors
    /// The verdict on the query.
    fn query(&self, query: Query) -> impl Future<Output = Result<Answer, FsError>> + Send;

    /// Reads metadata and returns the answer in the type of the query.
    fn ask<A>(&self, query: TypedQuery<A>) -> impl Future<Output = Result<A, FsError>> + Send {
        let (query, take) = query.into_parts();
        let answer = self.query(query);
        async move {
            take(answer.await?).map_err(|_| {
                tracing::error!("the cluster answered a different query than the one that was sent");
                FsError::Io
            })
        }
    }

    /// Assigns a chunk id to `payload` and computes its checksums.
    fn new_chunk(&self, payload: Bytes) -> Self::Chunk;

    /// Stores the content; returns when it is durable on f + 1 voters.
    ///
    /// # Errors
    /// [`FsError::ChunkDead`] if the session of the chunk has ended: create it again.
    fn put_chunk(&self, chunk: &Self::Chunk) -> impl Future<Output = Result<(), FsError>> + Send;

    /// Returns exactly `length` bytes of a chunk from `offset` on, verified.
    ///
    /// # Errors
    /// [`FsError::Stale`] if no node has the chunk (any more).
    fn get_chunk(
        &self,
        id: ChunkId,
        offset: u32,
        length: u32,
    ) -> impl Future<Output = Result<Bytes, FsError>> + Send;

    /// Returns the remaining time of exclusive use of the cluster and the number of the lease; `None` if others may
    /// change everything at any time.
    fn lease(&self) -> Option<(Duration, u64)> {
        None
    }

    /// Returns the time of the cluster's clock; never before the stamp of an acknowledged change.
    fn now(&self) -> Timestamp {
        Timestamp::from(SystemTime::now())
    }

    /// Whether a mutation that ended without a verdict may still take effect. No later mutation is sent before that is
    /// decided.
    fn has_unsettled_changes(&self) -> bool {
        false
    }

    /// Sets the handler of questions about which unlinked inodes are open on this client.
    fn set_unlinked_handler(&self, handler: UnlinkedHandler);
}

impl FreshContent for FreshChunk {
    fn id(&self) -> ChunkId {
        FreshChunk::id(self)
    }

    fn stored(&self) -> NewChunk {
        FreshChunk::stored(self)
    }

    fn inline(&self) -> NewChunk {
        FreshChunk::inline(self)
    }
}

impl Cluster for Client {
    type Chunk = FreshChunk;

    async fn mutate(&self, command: Command, stored: &[FreshChunk]) -> Result<Outcome, FsError> {
        Client::mutate(self, command, stored).await
    }

    async fn query(&self, query: Query) -> Result<Answer, FsError> {
        Client::query(self, query).await
    }

    fn new_chunk(&self, payload: Bytes) -> FreshChunk {
        Client::new_chunk(self, payload)
    }

    async fn put_chunk(&self, chunk: &FreshChunk) -> Result<(), FsError> {
        Client::put_chunk(self, chunk).await
    }

    async fn get_chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        Client::get_chunk(self, id, offset, length).await
    }

    fn lease(&self) -> Option<(Duration, u64)> {
        Client::lease(self)
    }

    fn now(&self) -> Timestamp {
        Client::now(self)
    }

    fn has_unsettled_changes(&self) -> bool {
        Client::has_unsettled_changes(self)
    }

    fn set_unlinked_handler(&self, handler: UnlinkedHandler) {
        Client::set_unlinked_handler(self, handler);
    }
}
