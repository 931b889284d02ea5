//! What the books of recovery say this node lacks, where they can say it: without a look at all that is stored.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use quorumfs_proto::ChunkId;

use super::Recovery;
use crate::replication::placement::Layout;

impl Recovery {
    /// Some chunks, at most `max`, that were named up to entry `through_index`, that this node holds by `layout`, and that
    /// are not here. Chunks that are here but not on disk yet count as here.
    ///
    /// `None`: the books cannot say. All that is named must have been compared with all that is held since this node
    /// prepares for `layout`, and everything applied since must have been accounted for. If it was not, a walk is due or
    /// under way.
    pub fn lacking(&self, layout: &Layout, through_index: u64, max: usize) -> Option<BTreeSet<ChunkId>> {
        // The same picture, not an equal one: there was no other in between.
        let picture = self.placement.picture();
        let compared_under = self.compared_under.lock().clone()?;
        if !Arc::ptr_eq(&picture, &compared_under) || !picture.prepares_for(layout) {
            return None;
        }
        if self.consensus.effects_through() < through_index {
            return None;
        }
        let (told, dropped) = self.consensus.effects_sent_and_dropped();
        if self.effects_handled.load(Ordering::Acquire) < told || self.walking.load(Ordering::Acquire) {
            return None;
        }
        self.settle_arrived(max);
        let own = self.consensus.id();
        let mut ledger = self.ledger.lock();
        ledger.effects_dropped(dropped);
        if ledger.walk_wanted().is_some() {
            self.pass_soon.notify_one();
            return None;
        }
        let missing = ledger.missing_by(|id| layout.is_place(id, own), max);
        Some(missing)
    }
}
