//! The record of content that came inside commands and did not fit on the disk: on this node only the log has it. Pure.
//!
//! Invariant: the log is not purged beyond the oldest recorded entry (see [`flusher`](super::flusher)). So there is at
//! most one record for each chunk in the log, and the log uses more memory than that for each of its entries.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;

use quorumfs_proto::ChunkId;

/// The recorded chunks by entry; see the module documentation.
#[derive(Debug, Default)]
pub struct Unstored {
    in_order: BTreeSet<(u64, ChunkId)>,
    entries: HashMap<ChunkId, u64>,
}

impl Unstored {
    /// Records that entry `index` of the log has `id`.
    pub fn add(&mut self, index: u64, id: ChunkId) {
        if let Some(before) = self.entries.insert(id, index) {
            self.in_order.remove(&(before, id));
        }
        self.in_order.insert((index, id));
    }

    /// Removes chunks that the log need not keep: they are stored or dead, or other nodes have them.
    pub fn settle(&mut self, ids: &[ChunkId]) {
        for id in ids {
            if let Some(index) = self.entries.remove(id) {
                self.in_order.remove(&(index, *id));
            }
        }
    }

    /// Removes all chunks.
    pub fn clear(&mut self) {
        *self = Unstored::default();
    }

    /// Returns the number of chunks.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Returns up to `max` chunks after `after`, with their entries, in the order of the log.
    pub fn after(&self, after: Option<(u64, ChunkId)>, max: usize) -> Vec<(u64, ChunkId)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = self.in_order.range((from, Bound::Unbounded));
        range.take(max).copied().collect()
    }

    /// Returns the last entry up to which the log may be purged, given that it may be purged up to `upto` otherwise;
    /// `None` if it may not be purged.
    pub fn purge_limit(&self, upto: u64) -> Option<u64> {
        match self.in_order.first() {
            Some((oldest, _)) => oldest.checked_sub(1).map(|before| before.min(upto)),
            None => Some(upto),
        }
    }
}

#[cfg(test)]
mod tests {
    use quorumfs_proto::SessionId;

    use super::*;

    fn id(counter: u64) -> ChunkId {
        ChunkId {
            session: SessionId(1),
            counter,
        }
    }

    #[test]
    fn the_log_is_kept_from_the_oldest_entry_on() {
        let mut unstored = Unstored::default();
        assert_eq!(unstored.purge_limit(100), Some(100));
        unstored.add(30, id(3));
        unstored.add(20, id(2));
        unstored.add(20, id(1));
        assert_eq!(unstored.purge_limit(100), Some(19));
        assert_eq!(unstored.purge_limit(7), Some(7));
        unstored.settle(&[id(1)]);
        assert_eq!(unstored.purge_limit(100), Some(19), "another one of that entry");
        unstored.settle(&[id(2), id(9)]);
        assert_eq!(unstored.purge_limit(100), Some(29));
        unstored.add(30, id(3));
        assert_eq!(unstored.count(), 1, "applied twice, after a restart, it is one");
        unstored.clear();
        assert_eq!((unstored.count(), unstored.purge_limit(100)), (0, Some(100)));
        unstored.add(0, id(1));
        assert_eq!(unstored.purge_limit(100), None);
    }

    #[test]
    fn they_are_listed_in_the_order_of_the_log() {
        let mut unstored = Unstored::default();
        for (index, counter) in [(5, 1), (4, 2), (5, 3), (6, 0)] {
            unstored.add(index, id(counter));
        }
        let first = unstored.after(None, 3);
        assert_eq!(first, [(4, id(2)), (5, id(1)), (5, id(3))]);
        assert_eq!(unstored.after(first.last().copied(), 3), [(6, id(0))]);
    }
}
