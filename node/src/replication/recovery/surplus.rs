//! Surplus copies: chunks that this node holds although the placement assigns them to other nodes. They were stored in
//! place of a node that did not answer, came inside commands, or were reassigned. A surplus copy is deleted when every
//! holder of the chunk confirms that it has the chunk on disk under the same placement.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use parking_lot::Mutex;
use quorumfs_proto::{ChunkId, NodeId};
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use super::Recovery;
use super::ledger::WalkReason;
use crate::replication::peers::HELD_IDS_MAX;
use crate::replication::placement::{Layout, PlacementSnapshot};
use quorumfs_metadata::Failure;

/// Most surplus chunks that are remembered; a walk finds the others after these are deleted.
const SURPLUS_CHUNKS_MAX: usize = 256 << 10;
/// Chunks deleted in one step, during which queries of held chunks wait.
const BATCH_CHUNKS: usize = 256;
const _: () = assert!(BATCH_CHUNKS <= HELD_IDS_MAX);
/// Time for which surplus chunks are collected, because a new chunk takes a moment to reach its holders.
const GATHER_MS: u64 = 1_000;
/// Delay after a round in which a holder did not have all of its chunks.
const RETRY_MS: u64 = 5_000;

/// The known surplus chunks.
#[derive(Default)]
pub(super) struct Surplus {
    // Locked only for one chunk or a batch of chunks.
    state: Mutex<State>,
    added: Notify,
}

#[derive(Default)]
struct State {
    chunks: BTreeSet<ChunkId>,
    overflowed: bool,
}

impl Surplus {
    /// Adds `id`, which is held here but assigned to other nodes.
    pub(super) fn add(&self, id: ChunkId) {
        let mut state = self.state.lock();
        if state.chunks.len() < SURPLUS_CHUNKS_MAX {
            state.chunks.insert(id);
        } else {
            state.overflowed = true;
        }
        drop(state);
        self.added.notify_one();
    }

    /// Returns the number of known surplus chunks.
    pub(super) fn count(&self) -> u64 {
        self.state.lock().chunks.len() as u64
    }

    /// Returns at most `max` surplus chunks after `after`.
    fn after(&self, after: Option<ChunkId>, max: usize) -> Vec<ChunkId> {
        use std::ops::Bound::{Excluded, Unbounded};
        let state = self.state.lock();
        let from = after.map_or(Unbounded, Excluded);
        state.chunks.range((from, Unbounded)).take(max).copied().collect()
    }

    /// Removes chunks that are no longer surplus.
    fn remove(&self, ids: impl IntoIterator<Item = ChunkId>) {
        let mut state = self.state.lock();
        for id in ids {
            state.chunks.remove(&id);
        }
    }

    /// Returns whether some chunks were not remembered, once all remembered ones are gone; resets it.
    fn take_overflowed(&self) -> bool {
        let mut state = self.state.lock();
        state.chunks.is_empty() && std::mem::take(&mut state.overflowed)
    }
}

impl Recovery {
    /// Deletes surplus copies; never returns.
    pub(super) async fn run_surplus_removal(self: Arc<Self>) {
        loop {
            if self.surplus.count() == 0 {
                self.surplus.added.notified().await;
            }
            tokio::time::sleep(Duration::from_millis(GATHER_MS)).await;
            match self.drop_surplus().await {
                Ok(0) => {}
                Ok(chunks) => info!(
                    chunks,
                    "surplus copies were deleted; the assigned nodes hold them"
                ),
                Err(reason) => debug!(%reason, "surplus copies are kept until the next attempt"),
            }
            if self.surplus.take_overflowed() {
                self.request_comparison(WalkReason::MoreMissing);
            }
            if self.surplus.count() > 0 {
                tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
            }
        }
    }

    /// Tries to delete each surplus chunk once; returns the number of deleted chunks.
    async fn drop_surplus(self: &Arc<Self>) -> Result<u64, String> {
        let (mut after, mut freed) = (None, 0);
        loop {
            let batch = self.surplus.after(after, BATCH_CHUNKS);
            let Some(last) = batch.last() else {
                return Ok(freed);
            };
            after = Some(*last);
            let snapshot = self.placement.snapshot();
            let surplus = self
                .still_surplus(batch, &snapshot)
                .map_err(|error| error.to_string())?;
            // While voters change, and on a node that is not a voter, all copies are kept.
            let own = self.consensus.id();
            let Some(layout) = snapshot.stable().filter(|layout| layout.voters().contains(&own)) else {
                return Err("the voters are changing".to_string());
            };
            let confirmed = self.confirmed(surplus, layout, snapshot.epoch).await;
            let (recovery, epoch) = (Arc::clone(self), snapshot.epoch);
            let dropping = tokio::task::spawn_blocking(move || {
                let dropped = recovery
                    .placement
                    .drop_copies_at(epoch, || recovery.content.discard(&confirmed));
                match dropped {
                    Some(Ok(_)) => {
                        let count = confirmed.len() as u64;
                        recovery.surplus.remove(confirmed);
                        count
                    }
                    Some(Err(error)) => {
                        warn!(%error, "cannot delete surplus copies; trying again");
                        0
                    }
                    None => 0,
                }
            });
            freed += dropping.await.map_err(|panic| panic.to_string())?;
        }
    }

    /// Returns those of `batch` that are still surplus: held, referenced and assigned to other nodes. Removes the
    /// others. Unreferenced chunks are left to the sweeper.
    fn still_surplus(
        &self,
        batch: Vec<ChunkId>,
        snapshot: &PlacementSnapshot,
    ) -> Result<Vec<ChunkId>, Failure> {
        let own = self.consensus.id();
        let view = self.metadata.view()?;
        let (mut surplus, mut settled) = (Vec::new(), Vec::new());
        for id in batch {
            let is_surplus =
                !snapshot.should_hold(id, own) && self.content.contains(id) && view.chunk(id)?.is_some();
            if is_surplus { &mut surplus } else { &mut settled }.push(id);
        }
        self.surplus.remove(settled);
        Ok(surplus)
    }

    /// Returns those of `ids` that all their holders confirm under `epoch`.
    async fn confirmed(&self, ids: Vec<ChunkId>, layout: &Layout, epoch: u64) -> Vec<ChunkId> {
        let mut queries: BTreeMap<NodeId, Vec<ChunkId>> = BTreeMap::new();
        for id in &ids {
            for holder in layout.holders(*id) {
                queries.entry(holder).or_default().push(*id);
            }
        }
        let members = self.consensus.members();
        let answers = queries.iter().map(|(holder, ids)| async {
            let member = members.iter().find(|member| member.id == *holder);
            let answer = match member {
                Some(member) => self.peers.held_under_epoch(member, ids).await,
                None => return Vec::new(),
            };
            match answer {
                Ok((node_epoch, held)) if node_epoch == epoch => ids
                    .iter()
                    .zip(held)
                    .filter(|(_, held)| *held)
                    .map(|(id, _)| *id)
                    .collect(),
                Ok((node_epoch, _)) => {
                    debug!(
                        node = holder.slot,
                        epoch, node_epoch, "a node has a different placement"
                    );
                    Vec::new()
                }
                Err(error) => {
                    debug!(%error, "a node did not report which chunks it holds");
                    Vec::new()
                }
            }
        });
        let mut copies: BTreeMap<ChunkId, usize> = BTreeMap::new();
        for id in join_all(answers).await.into_iter().flatten() {
            *copies.entry(id).or_default() += 1;
        }
        copies.retain(|_, count| *count == layout.copies());
        copies.into_keys().collect()
    }
}
