//! Content that came inside commands and found this node's disk full: its log alone has it, cannot be purged beyond it,
//! and on a full disk would grow until it takes nothing any more.
//!
//! By its log the node is one of the f + 1 voters that hold such a chunk. It may let go of it only once f + 1 others have
//! it on disk (a majority of each active configuration without this node), and then it does not say that it holds it:
//! the chunk is missing here, and fetched from the others when there is room.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use quorumfs_proto::{ChunkId, NodeId};
use tracing::{debug, info};

use super::Recovery;
use crate::replication::peers::HELD_IDS_MAX;

/// How often the others are asked while the log is held up.
const ASK_INTERVAL_MS: u64 = 1_000;
/// Chunks asked about in one question.
const BATCH_CHUNKS: usize = 4096;
const _: () = assert!(BATCH_CHUNKS <= HELD_IDS_MAX);

impl Recovery {
    /// Relieves the log of what others hold, for ever.
    pub(super) async fn run_relieving_the_log(self: Arc<Self>) {
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
                    "the disk is full: content that others hold was let go from the log"
                );
            }
        }
    }

    /// Those of `ids` that a majority of each active configuration has on disk without this node.
    async fn held_by_enough_others(&self, ids: &[ChunkId]) -> Vec<ChunkId> {
        let own = self.consensus.id();
        // Taken before the question: who is made a voter meanwhile is asked the next time.
        let voter_sets = self.consensus.voter_sets();
        let members = self.consensus.members().into_iter();
        let asking = members
            .filter(|member| member.id != own)
            .map(|member| async move {
                match self.peers.held(&member, ids).await {
                    Ok(held) => Some((member.id, held)),
                    Err(error) => {
                        debug!(%error, "a node does not say what it holds");
                        None
                    }
                }
            });
        let mut holders: HashMap<ChunkId, BTreeSet<NodeId>> = HashMap::new();
        for (node, held) in join_all(asking).await.into_iter().flatten() {
            for (id, _) in ids.iter().zip(held).filter(|(_, held)| *held) {
                holders.entry(*id).or_default().insert(node);
            }
        }
        holders.retain(|_, holders| voter_sets.is_quorum(|voter| holders.contains(voter)));
        holders.into_keys().collect()
    }
}
