//! The read path: a barrier, then the present metadata; a chunk from this node, or from a peer.
//!
//! 1. [`ReadPath::query`] confirms that this node leads and has applied everything that was acknowledged before the query
//!    came (ReadIndex, Raft dissertation section 6.4), then answers from one consistent view.
//! 2. [`ReadPath::chunk`] reads a range of a chunk whose blocks are checked against their CRCs. A copy that fails its
//!    check is never served: it is set aside, another node's is served, and repair makes a new one. A chunk that this
//!    node lacks is fetched for the caller; that is no error.

use std::sync::Arc;

use quorumfs_proto::query::Space;
use quorumfs_proto::{Answer, ChunkId, ChunkRange, ClientResponse, FsError, Query, Refusal};
use tracing::{error, warn};

use crate::consensus::Consensus;
use crate::integrity::repair::Repair;
use crate::replication::PeerChunks;
use crate::replication::placement::Placement;
use crate::replication::recovery::Recovery;
use crate::replication::space::SpaceMonitor;
use quorumfs_content::{ContentError, ContentStore};
use quorumfs_metadata::{Failure, MetadataStore, StorageFault};

/// The read path of a node; see the module documentation.
pub struct ReadPath {
    /// Confirms the leadership.
    pub consensus: Consensus,
    /// The metadata to read.
    pub metadata: Arc<MetadataStore>,
    /// The chunks of this node.
    pub content: Arc<ContentStore>,
    /// The chunks of other nodes.
    pub peers: Arc<PeerChunks>,
    /// The nodes that should hold each chunk.
    pub placement: Arc<Placement>,
    /// Fetches missing chunks.
    pub recovery: Arc<Recovery>,
    /// Repairs bad copies.
    pub repair: Arc<Repair>,
    /// The space of the cluster.
    pub space: Arc<SpaceMonitor>,
}

impl ReadPath {
    /// Answers a query; the answer includes everything that was acknowledged before it came (P5).
    pub async fn query(&self, query: &Query) -> ClientResponse {
        if let Err(refusal) = self.barrier().await {
            return refusal.into();
        }
        match self.answer(query).await {
            Ok(answer) => ClientResponse::Answer(answer),
            Err(fault) => {
                error!(%fault, "cannot read the metadata for a query");
                self.consensus.unreadable(&fault);
                Refusal::unavailable(fault).into()
            }
        }
    }

    /// Returns when this node is confirmed as leader and has applied everything that was acknowledged before the call.
    ///
    /// # Errors
    /// [`Refusal`] if it cannot be confirmed.
    pub async fn barrier(&self) -> Result<(), Refusal> {
        if !self.consensus.is_leader() {
            return Err(Refusal::not_leader(self.consensus.leader()));
        }
        Ok(self.consensus.barrier().await?)
    }

    async fn answer(&self, query: &Query) -> Result<Result<Answer, FsError>, StorageFault> {
        let view = self.metadata.view()?;
        if matches!(query, Query::Space) {
            let (capacity_bytes, available_bytes) = self.space.cluster_bytes();
            return Ok(Ok(Answer::Space(Space {
                capacity_bytes,
                available_bytes,
                inodes: view.inode_count(),
            })));
        }
        if !view.is_long(query) {
            return Failure::split(view.answer(query));
        }
        let query = query.clone();
        match tokio::task::spawn_blocking(move || view.answer(&query)).await {
            Ok(answer) => Failure::split(answer),
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }

    /// Reads a range of a chunk, widened to whole blocks; from a peer if this node cannot.
    ///
    /// # Errors
    /// [`ContentError`] if no node can deliver it.
    pub async fn chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<ChunkRange, ContentError> {
        let content = self.content.clone();
        // A page-cache miss waits for the disk, so this must not run on a runtime thread.
        let own = tokio::task::spawn_blocking(move || content.read(id, offset, length))
            .await
            .unwrap_or_else(|failed| Err(task_failed(failed)));
        let reason = match own {
            Ok(range) => return Ok(range),
            Err(reason) => reason,
        };
        match &reason {
            ContentError::NotFound { .. } => {}
            bad if bad.is_bad_copy() => self.repair.found_bad(id, reason.to_string()).await,
            // The state of the copy is unknown; another node serves.
            ContentError::Io { .. } => {
                warn!(chunk = %id, %reason, "cannot read a copy; another node serves the chunk")
            }
            _ => return Err(reason),
        }
        let found = self.fetch_from_peers(id, offset, length).await;
        match &found {
            // Only a chunk that exists elsewhere is worth recovering; a chunk that no node has may be dead.
            Some(_) => {
                let recovery = self.recovery.clone();
                tokio::task::spawn_blocking(move || recovery.request_fetch(id));
            }
            None => warn!(chunk = %id, %reason, "no reachable node holds a requested chunk"),
        }
        found.ok_or(reason)
    }

    async fn fetch_from_peers(&self, id: ChunkId, offset: u32, length: u32) -> Option<ChunkRange> {
        for member in self.placement.fetch_order(id) {
            match self.peers.fetch(&member, id, offset, length).await {
                Ok(range) => return Some(range),
                Err(error) => {
                    tracing::debug!(chunk = %id, node = member.id.slot, %error, "a peer could not serve a chunk")
                }
            }
        }
        None
    }
}

/// Converts a task that panicked or was cancelled to a failed read.
pub fn task_failed(failed: tokio::task::JoinError) -> ContentError {
    ContentError::Io {
        action: "finish a task on",
        path: "content".into(),
        error: std::io::Error::other(failed),
    }
}
