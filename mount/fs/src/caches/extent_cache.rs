//! The extents of one file at one version of its content.
//!
//! Invariants: extents are disjoint; all are of the same version; an unknown range is never taken for a hole. The size
//! is bounded by [`EXTENTS_MAX`]: beyond it only the ranges around the newest answer are kept. The caches of all files
//! of a mount share one count ([`ExtentCount`]), and the caller clears other caches if it is exceeded. Pure.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use quorumfs_proto::{ChunkId, Extent};

/// Most extents cached of one file: those of 16 GiB in whole chunks, about 1 MiB of memory. (Exceeded only if a single
/// read needs more.)
pub const EXTENTS_MAX: usize = 16_384;

/// Bytes kept before the newest answer if there are too many extents: the largest read, so that a read which needs
/// several answers finds them all.
const KEPT_BEFORE_BYTES: u64 = 1 << 20;

/// Memory of an extent, with its share of the other maps.
const EXTENT_COST_BYTES: usize = 128;

/// Most memory for the extents of all files of a mount: those of 256 GiB in whole chunks.
const MOUNT_BYTES_MAX: usize = 32 << 20;

/// The number of extents in all caches of a mount. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ExtentCount(Arc<AtomicUsize>);

impl ExtentCount {
    /// Whether the caches of the mount hold too many extents.
    pub fn is_exceeded(&self) -> bool {
        self.extents() > MOUNT_BYTES_MAX / EXTENT_COST_BYTES
    }

    /// Whether at most half of the limit is used.
    pub fn has_room(&self) -> bool {
        self.extents() <= MOUNT_BYTES_MAX / EXTENT_COST_BYTES / 2
    }

    fn extents(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// The share of one cache in the count.
#[derive(Debug, Default)]
struct CountShare {
    count: ExtentCount,
    extents: usize,
}

impl CountShare {
    fn set(&mut self, extents: usize) {
        // The difference wraps around, and so does the addition.
        let added = extents.wrapping_sub(self.extents);
        self.count.0.fetch_add(added, Ordering::Relaxed);
        self.extents = extents;
    }
}

impl Drop for CountShare {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The cached extents of a file.
#[derive(Debug, Default)]
pub struct ExtentCache {
    count_share: CountShare,
    version: u64,
    extents: BTreeMap<u64, Extent>,
    /// Ranges in which all extents are known, start to end; disjoint and not adjacent.
    known: BTreeMap<u64, u64>,
    /// The end of the used part of each chunk, as far as seen.
    chunk_ends: HashMap<ChunkId, u32>,
}

impl ExtentCache {
    /// Makes an empty cache that adds to `count`.
    pub fn with_count(count: &ExtentCount) -> ExtentCache {
        ExtentCache {
            count_share: CountShare {
                count: count.clone(),
                extents: 0,
            },
            ..ExtentCache::default()
        }
    }

    /// Removes everything and frees the memory.
    pub fn clear(&mut self) {
        self.extents = BTreeMap::new();
        self.known = BTreeMap::new();
        self.chunk_ends = HashMap::new();
        self.update_count();
    }

    /// Sets this cache's share of the count.
    fn update_count(&mut self) {
        self.count_share
            .set(self.extents.len().max(self.chunk_ends.len()));
    }

    /// Returns the end of the known use of the extent's chunk by the file, so that a chunk of many extents is fetched
    /// once.
    pub fn chunk_end(&self, extent: &Extent) -> u32 {
        let end = extent.chunk_offset + extent.length;
        self.chunk_ends
            .get(&extent.chunk)
            .map_or(end, |known_end| end.max(*known_end))
    }

    /// Returns the extents that overlap `range` at `version`.
    ///
    /// # Errors
    /// The offset of the first byte whose extents are unknown.
    pub fn lookup(&self, version: u64, range: Range<u64>) -> Result<Vec<Extent>, u64> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let known_to = self
            .known
            .range(..=range.start)
            .next_back()
            .map_or(0, |(_, end)| *end);
        if version != self.version || known_to <= range.start {
            return Err(range.start);
        }
        if known_to < range.end {
            return Err(known_to);
        }
        let first = self
            .extents
            .range(..=range.start)
            .next_back()
            .map_or(range.start, |(offset, _)| *offset);
        let extents = self.extents.range(first..range.end).map(|(_, extent)| *extent);
        Ok(extents.filter(|extent| extent.file_end() > range.start).collect())
    }

    /// Stores the cluster's answer for `range` at `version`; `extents` may extend beyond the range.
    pub fn store(&mut self, version: u64, range: Range<u64>, extents: Vec<Extent>) {
        if version != self.version {
            self.clear();
            self.version = version;
        }
        if range.is_empty() {
            return;
        }
        if self.extents.len() + extents.len() > EXTENTS_MAX {
            self.forget(0..range.start.saturating_sub(KEPT_BEFORE_BYTES));
            self.forget(range.end..u64::MAX);
        }
        self.cut(range.clone());
        for extent in extents {
            if let Some(extent) = clip(extent, range.clone()) {
                self.add(extent);
            }
        }
        self.mark_known(range);
        self.update_count();
    }

    /// Applies a command of this mount that wrote `extents` (later ones over earlier ones) and alone changed the
    /// content from version `after - 1` to `after`. A cache of another version is cleared.
    pub fn patch(&mut self, after: u64, extents: &[Extent]) {
        if self.version >= after {
            return; // An answer that already has the change came first.
        }
        if self.version + 1 != after || self.extents.len() + extents.len() > EXTENTS_MAX {
            self.clear();
            self.version = after;
            return;
        }
        self.version = after;
        for extent in extents {
            let range = extent.file_offset..extent.file_end();
            self.cut(range.clone());
            self.add(*extent);
            self.mark_known(range);
        }
        self.update_count();
    }

    fn add(&mut self, extent: Extent) {
        self.extents.insert(extent.file_offset, extent);
        if self.chunk_ends.len() > 2 * EXTENTS_MAX.max(self.extents.len()) {
            // It still has chunks that were overwritten.
            self.chunk_ends.clear();
        }
        let known_end = self.chunk_ends.entry(extent.chunk).or_default();
        *known_end = (*known_end).max(extent.chunk_offset + extent.length);
    }

    /// Makes `range` unknown.
    fn forget(&mut self, range: Range<u64>) {
        self.cut(range.clone());
        let first = self
            .known
            .range(..range.start)
            .next_back()
            .map_or(range.start, |(start, _)| *start);
        let touched: Vec<(u64, u64)> = self
            .known
            .range(first..range.end)
            .map(|(s, e)| (*s, *e))
            .collect();
        for (start, end) in touched {
            self.known.remove(&start);
            if start < range.start {
                self.known.insert(start, end.min(range.start));
            }
            if end > range.end {
                self.known.insert(range.end, end);
            }
        }
    }

    /// Removes all extents in `range` and cuts those that extend beyond it.
    fn cut(&mut self, range: Range<u64>) {
        let first = self
            .extents
            .range(..range.start)
            .next_back()
            .map_or(range.start, |(offset, _)| *offset);
        let touched: Vec<Extent> = self
            .extents
            .range(first..range.end)
            .map(|(_, extent)| *extent)
            .collect();
        for extent in touched
            .into_iter()
            .filter(|extent| extent.file_end() > range.start)
        {
            self.extents.remove(&extent.file_offset);
            for rest in [0..range.start, range.end..u64::MAX] {
                if let Some(rest) = clip(extent, rest) {
                    self.extents.insert(rest.file_offset, rest);
                }
            }
        }
    }

    fn mark_known(&mut self, range: Range<u64>) {
        let first = self
            .known
            .range(..range.start)
            .next_back()
            .map_or(range.start, |(start, _)| *start);
        let touching: Vec<(u64, u64)> = self
            .known
            .range(first..=range.end)
            .map(|(s, e)| (*s, *e))
            .collect();
        let (mut from, mut to) = (range.start, range.end);
        for (start, end) in touching.into_iter().filter(|(_, end)| *end >= range.start) {
            self.known.remove(&start);
            (from, to) = (from.min(start), to.max(end));
        }
        self.known.insert(from, to);
    }
}

/// Returns the part of `extent` in `range`.
pub fn clip(extent: Extent, range: Range<u64>) -> Option<Extent> {
    let from = extent.file_offset.max(range.start);
    let to = extent.file_end().min(range.end);
    (from < to).then(|| Extent {
        file_offset: from,
        length: (to - from) as u32,
        chunk: extent.chunk,
        chunk_offset: extent.chunk_offset + (from - extent.file_offset) as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use quorumfs_proto::{ChunkId, SessionId};

    fn extent(file_offset: u64, length: u32, counter: u64) -> Extent {
        Extent {
            file_offset,
            length,
            chunk: ChunkId {
                session: SessionId(1),
                counter,
            },
            chunk_offset: 0,
        }
    }

    #[test]
    fn an_unknown_range_is_not_a_hole() {
        let mut cache = ExtentCache::default();
        cache.store(3, 10..20, vec![extent(12, 2, 1)]);
        assert_eq!(cache.lookup(3, 10..20), Ok(vec![extent(12, 2, 1)]));
        assert_eq!(cache.lookup(3, 15..25), Err(20));
        assert_eq!(cache.lookup(3, 5..15), Err(5));
        assert_eq!(cache.lookup(4, 10..20), Err(10));
        cache.store(3, 20..30, Vec::new());
        assert_eq!(cache.lookup(3, 15..25), Ok(Vec::new()), "two adjacent answers");
    }

    #[test]
    fn the_extents_of_all_caches_are_counted() {
        let count = ExtentCount::default();
        let mut first = ExtentCache::with_count(&count);
        let mut second = ExtentCache::with_count(&count);
        first.store(1, 0..30, vec![extent(0, 10, 1), extent(10, 10, 2)]);
        second.store(1, 0..30, vec![extent(0, 10, 3)]);
        assert_eq!(count.extents(), 3);
        second.patch(2, &[extent(20, 10, 4)]);
        assert_eq!(count.extents(), 4);
        first.clear();
        assert_eq!(count.extents(), 2);
        drop(second);
        assert_eq!(count.extents(), 0);
    }

    #[test]
    fn the_end_of_a_chunk_is_that_of_its_last_extent() {
        let mut cache = ExtentCache::default();
        let second = Extent {
            chunk_offset: 10,
            ..extent(100, 10, 1)
        };
        cache.store(1, 0..200, vec![extent(0, 10, 1), second]);
        assert_eq!(cache.chunk_end(&extent(0, 10, 1)), 20);
        assert_eq!(
            cache.chunk_end(&extent(0, 10, 2)),
            10,
            "of an unknown chunk only the extent itself"
        );
    }

    #[test]
    fn a_change_by_another_mount_in_between_clears_the_cache() {
        let mut cache = ExtentCache::default();
        cache.store(3, 0..20, Vec::new());
        cache.patch(4, &[extent(0, 5, 1)]);
        assert_eq!(cache.lookup(4, 0..20), Ok(vec![extent(0, 5, 1)]));
        cache.patch(6, &[extent(5, 5, 2)]);
        assert_eq!(cache.lookup(6, 0..20), Err(0));
    }

    #[test]
    fn a_read_of_very_many_extents_finds_all_of_its_answers() {
        let mut cache = ExtentCache::default();
        for at in 0..5 * EXTENTS_MAX as u64 {
            cache.store(1, 8 * at..8 * (at + 1), vec![extent(8 * at, 8, at)]);
        }
        let end = 40 * EXTENTS_MAX as u64;
        let kept = KEPT_BEFORE_BYTES.min(end) - 8;
        assert_eq!(
            cache
                .lookup(1, end - kept..end)
                .map(|extents| extents.len() as u64),
            Ok(kept / 8)
        );
        let mut far = ExtentCache::default();
        for at in 0..2 * EXTENTS_MAX as u64 {
            let offset = at * (KEPT_BEFORE_BYTES / 4);
            far.store(1, offset..offset + 8, vec![extent(offset, 8, at)]);
        }
        assert!(far.extents.len() <= EXTENTS_MAX && far.known.len() <= EXTENTS_MAX);
        assert!(far.lookup(1, 0..8).is_err());
    }

    proptest! {
        #[test]
        fn patches_act_like_writes_on_a_byte_map(
            patches in prop::collection::vec((0u64..200, 1u32..80), 1..40),
            window in (0u64..200, 1u64..100),
        ) {
            let mut cache = ExtentCache::default();
            cache.store(0, 0..300, Vec::new());
            let mut model = [None; 300];
            for (number, (offset, length)) in patches.iter().enumerate() {
                cache.patch(number as u64 + 1, &[extent(*offset, *length, number as u64)]);
                for at in 0..u64::from(*length) {
                    model[(offset + at) as usize] = Some((number as u64, at as u32));
                }
            }
            let range = window.0..window.0 + window.1;
            let mut seen = [None; 300];
            for extent in cache.lookup(patches.len() as u64, range.clone()).unwrap() {
                for at in 0..extent.length {
                    seen[extent.file_offset as usize + at as usize] =
                        Some((extent.chunk.counter, extent.chunk_offset + at));
                }
            }
            let range = range.start as usize..range.end as usize;
            prop_assert_eq!(&seen[range.clone()], &model[range]);
        }
    }
}
