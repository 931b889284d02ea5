//! THE read path: a barrier, then the metadata as it is; a chunk from here, or from a peer.
//!
//! 1. [`Reader::query`] makes sure that this node leads and has applied everything that was acknowledged before the
//!    query came (ReadIndex, Raft dissertation section 6.4), then answers from one consistent view.
//! 2. [`Reader::chunk`] reads a range of a chunk whose blocks are checked against their CRCs. A copy that fails its
//!    check is never served: it is put aside, another node's is served, and repair makes a new one. A chunk
//!    this node lacks it fetches for the caller; that is no error.

use std::sync::Arc;

use quorumfs_proto::query::Space;
use quorumfs_proto::{Answer, CallReply, ChunkId, FsError, Query, Refusal};
use tracing::{error, warn};

use crate::cluster::placement::Placement;
use crate::cluster::space::SpaceMonitor;
use crate::consensus::{BarrierError, Consensus};
use crate::content::{ChunkRange, ContentError, ContentStore, PeerChunks};
use crate::healing::recovery::Recovery;
use crate::healing::repair::Repair;
use crate::metadata::{Failure, MetadataStore, StorageFault, View};

/// Rows that a query may read on a runtime thread: a few hundred microseconds of work.
const ROWS_IN_PLACE_MAX: u64 = 256;

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
    pub async fn query(&self, query: &Query) -> CallReply {
        if let Err(refusal) = self.barrier().await {
            return CallReply::Refused(refusal);
        }
        match self.answer(query).await {
            Ok(answer) => CallReply::Answer(answer),
            Err(fault) => {
                error!(%fault, "metadata cannot be read");
                let reason = fault.to_string();
                self.consensus.unreadable(&fault);
                CallReply::Refused(Refusal::Unavailable { reason })
            }
        }
    }

    /// Returns when this node is known to lead and has applied everything that was acknowledged before the call.
    pub async fn barrier(&self) -> Result<(), Refusal> {
        if !self.consensus.is_leader() {
            let leader = self.consensus.leader().map(|member| member.addresses.grpc);
            return Err(Refusal::NotLeader { leader });
        }
        match self.consensus.barrier().await {
            Ok(()) => Ok(()),
            Err(BarrierError::NotLeader { leader }) => {
                let leader = leader.map(|member| member.addresses.grpc);
                Err(Refusal::NotLeader { leader })
            }
            Err(error) => Err(Refusal::Unavailable {
                reason: error.to_string(),
            }),
        }
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
        if !is_long(&view, query) {
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

/// Whether answering may take longer than a runtime thread should be kept: a megabyte of a directory takes 40 ms.
fn is_long(view: &View, query: &Query) -> bool {
    let attributes = |inode| view.attributes(inode).ok();
    match query {
        Query::ReadDirectory { inode, .. } => {
            attributes(*inode).is_some_and(|directory| directory.size > ROWS_IN_PLACE_MAX)
        }
        // Each version of the content brings a command's pieces, mostly one.
        Query::Extents { inode, .. } => {
            attributes(*inode).is_some_and(|file| file.content_version > ROWS_IN_PLACE_MAX)
        }
        Query::ListXattrs { inode } => {
            attributes(*inode).is_some_and(|inode| u64::from(inode.xattr_count) > ROWS_IN_PLACE_MAX)
        }
        Query::Lookup { .. }
        | Query::Attributes { .. }
        | Query::Resolve { .. }
        | Query::ReadLink { .. }
        | Query::GetXattr { .. }
        | Query::Space => false,
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

#[cfg(test)]
mod tests {
    use quorumfs_proto::command::{Command, NewKind, Target};
    use quorumfs_proto::query::EntryDetail;
    use quorumfs_proto::{InodeNumber, Name};

    use super::*;
    use crate::metadata::tests::support::{Node, create, write_chunks};

    #[test]
    fn only_what_is_short_is_answered_on_a_runtime_thread() {
        let mut node = Node::with_sessions(1);
        let root = InodeNumber::ROOT;
        let list = Query::ReadDirectory {
            inode: root,
            after: 0,
            bytes_max: u32::MAX,
            detail: EntryDetail::Attributes,
        };
        let file = node.entry(create(root, "file", NewKind::File));
        let extents = Query::Extents {
            inode: file,
            from: 0,
            to: u64::MAX,
            pieces_max: u32::MAX,
        };
        assert!(!is_long(&node.view(), &list) && !is_long(&node.view(), &extents));
        for number in 0..=ROWS_IN_PLACE_MAX {
            node.call(
                1,
                Command::single(create(root, &format!("{number}"), NewKind::File)),
            )
            .0
            .unwrap();
            node.call(1, write_chunks(Target::Inode(file), 1, number + 1, &[number], 1))
                .0
                .unwrap();
        }
        assert!(is_long(&node.view(), &list) && is_long(&node.view(), &extents));
        let parent = root;
        let name = Name::new(&b"file"[..]).unwrap();
        assert!(!is_long(&node.view(), &Query::Lookup { parent, name }));
    }
}
