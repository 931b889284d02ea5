//! Chunks that this node lacks, answered from the recovery ledger without a walk of the metadata.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use quorumfs_proto::ChunkId;

use super::Recovery;
use crate::replication::placement::Layout;

impl Recovery {
    /// Returns at most `max` chunks that were referenced up to log index `through_index`, that `layout` assigns to
    /// this node, and that it does not have. Chunks in memory that are not on disk yet count as present.
    ///
    /// `None` if the ledger cannot answer: a complete comparison must have taken place since this node prepares for
    /// `layout`, and everything applied since must have been processed. Otherwise a walk is due or in progress.
    pub fn lacking(&self, layout: &Layout, through_index: u64, max: usize) -> Option<BTreeSet<ChunkId>> {
        // Compared by identity: the placement did not change in between.
        let snapshot = self.placement.snapshot();
        let compared_under = self.compared_under.lock().clone()?;
        if !Arc::ptr_eq(&snapshot, &compared_under) || !snapshot.includes(layout) {
            return None;
        }
        if self.consensus.effects_through() < through_index {
            return None;
        }
        let (sent, dropped) = self.consensus.effects_sent_and_dropped();
        if self.effects_handled.load(Ordering::Acquire) < sent || self.walking.load(Ordering::Acquire) {
            return None;
        }
        self.remove_arrived(max);
        let own = self.consensus.id();
        let mut ledger = self.ledger.lock();
        ledger.note_dropped_effects(dropped);
        if ledger.walk_requested().is_some() {
            self.pass_wakeup.notify_one();
            return None;
        }
        let missing = ledger.missing_where(|id| layout.is_holder(id, own), max);
        Some(missing)
    }
}
