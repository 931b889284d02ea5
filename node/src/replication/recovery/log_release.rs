//! Release of content that only the log holds. Inline content of a command that did not fit on the full disk of this
//! node exists only in its log, which then cannot be purged and would grow until the node accepts nothing any more.
//!
//! With its log the node counts as one of the f + 1 voters that hold such a chunk. It may release the chunk only when
//! f + 1 other voters have it on disk (a majority of each active configuration without this node), and then no longer
//! reports it as held: the chunk is missing here, and is fetched when there is space.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use quorumfs_proto::{ChunkId, NodeId};
use tracing::{debug, info};

use super::Recovery;
use crate::replication::peers::HELD_IDS_MAX;

/// Interval at which other nodes are asked while content is held by the log.
const ASK_INTERVAL_MS: u64 = 1_000;
/// Chunks in one query.
const BATCH_CHUNKS: usize = 4096;
const _: () = assert!(BATCH_CHUNKS <= HELD_IDS_MAX);

impl Recovery {
    /// Releases content from the log when enough other nodes hold it; never returns.
    pub(super) async fn run_log_release(self: Arc<Self>) {
        loop {
            tokio::time::sleep(Duration::from_millis(ASK_INTERVAL_MS)).await;
            let mut after = None;
            let mut released = 0;
            loop {
                let batch = self.consensus.kept_by_log(after, BATCH_CHUNKS);
                let Some(last) = batch.last() else { break };
                after = Some(*last);
                let ids: Vec<ChunkId> = batch.into_iter().map(|(_, id)| id).collect();
                let held = self.held_by_enough_others(&ids).await;
                released += held.len();
                self.consensus.release_from_log(&held);
            }
            if released > 0 {
                info!(
                    chunks = released,
                    "the disk is full; content that other nodes hold was released from the log"
                );
            }
        }
    }

    /// Returns those of `ids` that a majority of each active configuration has on disk, without this node.
    async fn held_by_enough_others(&self, ids: &[ChunkId]) -> Vec<ChunkId> {
        let own = self.consensus.id();
        // Read before the query: a voter that is added meanwhile is asked the next time.
        let voter_sets = self.consensus.voter_sets();
        let members = self.consensus.members().into_iter();
        let answers = members
            .filter(|member| member.id != own)
            .map(|member| async move {
                match self.peers.held(&member, ids).await {
                    Ok(held) => Some((member.id, held)),
                    Err(error) => {
                        debug!(%error, "a node did not report which chunks it holds");
                        None
                    }
                }
            });
        let mut holders: HashMap<ChunkId, BTreeSet<NodeId>> = HashMap::new();
        for (node, held) in join_all(answers).await.into_iter().flatten() {
            for (id, _) in ids.iter().zip(held).filter(|(_, held)| *held) {
                holders.entry(*id).or_default().insert(node);
            }
        }
        holders.retain(|_, holders| voter_sets.is_quorum(|voter| holders.contains(voter)));
        holders.into_keys().collect()
    }
}
