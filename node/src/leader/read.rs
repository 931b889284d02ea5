//! THE read path: a barrier, then the metadata as it is; a chunk from here, or from a peer.
//!
//! 1. [`Reader::query`] makes sure that this node leads and has applied everything that was acknowledged before the
//!    query came (ReadIndex, Raft dissertation section 6.4), then answers from one consistent view.
//! 2. [`Reader::chunk`] reads a range of a chunk whose blocks are checked against their CRCs. A copy that fails its
//!    check is never served: it is put aside, another node's is served, and repair makes a new one. A chunk
//!    this node lacks it fetches for the caller; that is no error.

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

/// The path every read takes.
pub struct Reader {
    /// Who leads.
    pub consensus: Consensus,
    /// What is where.
    pub metadata: Arc<MetadataStore>,
    /// What is here.
    pub content: Arc<ContentStore>,
    /// What others have.
    pub peers: Arc<PeerChunks>,
    /// Who should have what.
    pub placement: Arc<Placement>,
    /// Hears of what is missing.
    pub recovery: Arc<Recovery>,
    /// Hears of what is bad.
    pub repair: Arc<Repair>,
    /// Knows how much fits.
    pub space: Arc<SpaceMonitor>,
}

impl Reader {
    /// Answers a query with everything in it that was acknowledged before it came (P5).
    pub async fn query(&self, query: &Query) -> ClientResponse {
        if let Err(refusal) = self.barrier().await {
            return refusal.into();
        }
        match self.answer(query).await {
            Ok(answer) => ClientResponse::Answer(answer),
            Err(fault) => {
                error!(%fault, "metadata cannot be read");
                self.consensus.unreadable(&fault);
                Refusal::unavailable(fault).into()
            }
        }
    }

    /// Returns when this node is known to lead and has applied everything that was acknowledged before the call.
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

    /// Reads a range of a chunk, widened to whole blocks; from a peer where this node cannot.
    pub async fn chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<ChunkRange, ContentError> {
        let content = self.content.clone();
        // A page-cache miss waits for the disk: not on a runtime thread.
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
            // Nothing is known of the copy; another's serves.
            ContentError::Io { .. } => warn!(chunk = %id, %reason, "a copy cannot be read; another serves"),
            _ => return Err(reason),
        }
        let found = self.fetch_from_peers(id, offset, length).await;
        match &found {
            // Only a chunk that exists elsewhere is worth recovering; what nobody has may be dead since.
            Some(_) => {
                let recovery = self.recovery.clone();
                tokio::task::spawn_blocking(move || recovery.wanted(id));
            }
            None => warn!(chunk = %id, %reason, "a chunk was asked for that no reachable node holds"),
        }
        found.ok_or(reason)
    }

    async fn fetch_from_peers(&self, id: ChunkId, offset: u32, length: u32) -> Option<ChunkRange> {
        for member in self.placement.sources(id) {
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

/// A task of the runtime that panicked or was cancelled, as a failed read.
pub fn task_failed(failed: tokio::task::JoinError) -> ContentError {
    ContentError::Io {
        action: "finish a task on",
        path: "content".into(),
        source: std::io::Error::other(failed),
    }
}
