//! What a filesystem needs of a cluster: five calls and a name.
//!
//! A trait, so that its verbs are tested against a cluster in memory; [`Client`] is the one that programs run on.

use std::future::Future;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::{Client, FreshChunk};
use quorumfs_proto::query::{Answer, TypedQuery};
use quorumfs_proto::{ChunkId, Command, FsError, InodeNumber, NewChunk, Outcome, Query, Timestamp};

/// Answers which of these unlinked inodes are not open here.
pub type UnlinkedHandler = Box<dyn Fn(&[InodeNumber]) -> Vec<InodeNumber> + Send + Sync>;

/// Content that no command has named yet. As long as one exists its chunk is not given up.
pub trait FreshContent: Clone + Send + Sync + 'static {
    /// The identity drawn for it.
    fn id(&self) -> ChunkId;
    /// How a command names it after it was put.
    fn stored(&self) -> NewChunk;
    /// How a command carries it.
    fn inline(&self) -> NewChunk;
}

/// A cluster, reached through one session.
pub trait Cluster: Send + Sync + 'static {
    /// Content on its way.
    type Chunk: FreshContent;

    /// Does `command` once and answers what it did; waits as long as nobody can decide. [`FsError::ChunkDead`]: make
    /// its chunks anew.
    fn mutate(
        &self,
        command: Command,
        stored: &[Self::Chunk],
    ) -> impl Future<Output = Result<Outcome, FsError>> + Send;

    /// Reads metadata.
    fn query(&self, query: Query) -> impl Future<Output = Result<Answer, FsError>> + Send;

    /// Reads metadata, and takes the answer for what was asked.
    ///
    /// # Errors
    /// The verdict on the query; [`FsError::Io`] for an answer to another one, which is a defect of the cluster.
    fn ask<A>(&self, query: TypedQuery<A>) -> impl Future<Output = Result<A, FsError>> + Send {
        let (query, take) = query.into_parts();
        let answer = self.query(query);
        async move {
            take(answer.await?).map_err(|other| {
                tracing::error!(answer = ?other, "the cluster answered another query");
                FsError::Io
            })
        }
    }

    /// Draws an identity for `payload` and computes its checksums.
    fn new_chunk(&self, payload: Bytes) -> Self::Chunk;

    /// Returns when the content is durable on f + 1 voters. [`FsError::ChunkDead`]: make it anew.
    fn put_chunk(&self, chunk: &Self::Chunk) -> impl Future<Output = Result<(), FsError>> + Send;

    /// Exactly these bytes of a chunk, verified. [`FsError::Stale`]: nobody has it (any more).
    fn get_chunk(
        &self,
        id: ChunkId,
        offset: u32,
        length: u32,
    ) -> impl Future<Output = Result<Bytes, FsError>> + Send;

    /// How long this session alone uses the cluster, from now, and the number of that lease; `None`: others may change
    /// everything at any time.
    fn lease(&self) -> Option<(Duration, u64)> {
        None
    }

    /// What the cluster's clock shows; never before the stamp of a change that was answered.
    fn now(&self) -> Timestamp {
        Timestamp::from(SystemTime::now())
    }

    /// Whether a change that ended without a verdict may still take effect. No later change is sent before that is
    /// settled.
    fn has_unsettled_changes(&self) -> bool {
        false
    }

    /// Who answers the cluster's question which unlinked inodes are still open here.
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
