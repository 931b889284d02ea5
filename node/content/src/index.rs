//! The index: where each chunk is stored. It is a cache of what the segments contain.
//!
//! A sorted map of 28 bytes for each chunk (about 50 with the tree around them). It is sorted because recovery walks it
//! in order.
//!
//! A copy that failed its check is set aside: it is not served and does not count as held, but its record stays in
//! place until another copy has been written, so that an error in the check or damage of the other copies does not lose
//! data.
//!
//! Invariants: a segment's count of live records is the number of locations in it, set aside or not; both change under
//! the same lock. The segment of every location is in `segments`.
//!
//! This module does not know files.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::RwLock;
use quorumfs_proto::ChunkId;

use super::record::{Entry, Layout};
use super::segment::Segment;

/// The location of a chunk's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLocation {
    /// The segment's sequence number.
    pub segment: u32,
    /// The record's position in the segment, in units.
    pub position_units: u32,
    /// The payload's length in bytes.
    pub length: u32,
}

impl RecordLocation {
    /// Returns the location of `entry` in segment `segment`.
    pub fn new(segment: u32, entry: &Entry) -> RecordLocation {
        RecordLocation {
            segment,
            position_units: entry.position_units,
            length: entry.length,
        }
    }

    /// Returns the record's layout.
    pub fn layout(&self, id: ChunkId) -> Layout {
        Entry {
            id,
            position_units: self.position_units,
            length: self.length,
        }
        .layout()
    }
}

/// Records of one segment that are no longer live.
#[derive(Debug)]
pub struct Removed {
    /// The segment of the records.
    pub segment: Arc<Segment>,
    /// The positions of the records, in units.
    pub positions: Vec<u32>,
}

#[derive(Debug, Default)]
struct Inner {
    places: BTreeMap<ChunkId, RecordLocation>,
    /// Copies that failed their check.
    aside: BTreeMap<ChunkId, RecordLocation>,
    payload_bytes: u64,
    segments: BTreeMap<u32, Arc<Segment>>,
}

/// The index of a store; see the module documentation.
#[derive(Debug, Default)]
pub struct Index {
    // Locked for one lookup or insertion, or for a batch of removals; never during I/O.
    inner: RwLock<Inner>,
}

impl Index {
    /// Builds the index from `entries`, the live records of `segments` in the order in which they were written. If a
    /// chunk has several records, the last counts; the others are returned.
    pub fn rebuild(
        segments: Vec<Arc<Segment>>,
        mut entries: Vec<(ChunkId, RecordLocation)>,
    ) -> (Index, Vec<Removed>) {
        let segments: BTreeMap<u32, Arc<Segment>> = segments
            .into_iter()
            .map(|segment| (segment.sequence, segment))
            .collect();
        // The sort is stable: records of one chunk stay in the order in which they were written.
        entries.sort_by_key(|(id, _)| *id);
        let mut superseded: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        let mut kept = Vec::with_capacity(entries.len());
        let mut entries = entries.into_iter().peekable();
        while let Some((id, place)) = entries.next() {
            if entries.peek().is_some_and(|(next, _)| *next == id) {
                superseded
                    .entry(place.segment)
                    .or_default()
                    .push(place.position_units);
            } else {
                kept.push((id, place));
            }
        }
        let mut payload_bytes = 0;
        for (id, place) in &kept {
            payload_bytes += u64::from(place.length);
            segments[&place.segment].add_live(place.layout(*id));
        }
        let superseded = superseded
            .into_iter()
            .map(|(sequence, mut positions)| {
                positions.sort_unstable();
                Removed {
                    segment: Arc::clone(&segments[&sequence]),
                    positions,
                }
            })
            .collect();
        let inner = Inner {
            // A tree built from sorted input has full nodes.
            places: kept.into_iter().collect(),
            aside: BTreeMap::new(),
            payload_bytes,
            segments,
        };
        let index = Index {
            inner: RwLock::new(inner),
        };
        (index, superseded)
    }

    /// Returns the location of `id` and its segment.
    pub fn get(&self, id: ChunkId) -> Option<(RecordLocation, Arc<Segment>)> {
        let inner = self.inner.read();
        let place = *inner.places.get(&id)?;
        let segment = inner.segments.get(&place.segment)?;
        Some((place, Arc::clone(segment)))
    }

    /// Whether `id` has a record, durable or not.
    pub fn contains(&self, id: ChunkId) -> bool {
        self.inner.read().places.contains_key(&id)
    }

    /// Whether the record of `id` is known to be on disk.
    pub fn holds_durably(&self, id: ChunkId) -> bool {
        let inner = self.inner.read();
        let Some(place) = inner.places.get(&id) else {
            return false;
        };
        inner
            .segments
            .get(&place.segment)
            .is_some_and(|segment| place.layout(id).end() <= segment.flushed())
    }

    /// Returns up to `max` ids above `after`, ascending.
    pub fn ids_after(&self, after: Option<ChunkId>, max: usize) -> Vec<ChunkId> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let inner = self.inner.read();
        inner
            .places
            .range((from, Bound::Unbounded))
            .take(max)
            .map(|(id, _)| *id)
            .collect()
    }

    /// Returns the number of chunks and the bytes of their payloads.
    pub fn counts(&self) -> (u64, u64) {
        let inner = self.inner.read();
        (inner.places.len() as u64, inner.payload_bytes)
    }

    /// Adds `segment`, which takes records from now on.
    pub fn add_segment(&self, segment: Arc<Segment>) {
        self.inner.write().segments.insert(segment.sequence, segment);
    }

    /// Returns the segments, oldest first.
    pub fn segments(&self) -> Vec<Arc<Segment>> {
        self.inner.read().segments.values().cloned().collect()
    }

    /// Removes `segment` if no record in it is live.
    pub fn remove_segment_if_empty(&self, segment: &Segment) -> bool {
        let mut inner = self.inner.write();
        let empty = segment.live_records() == 0;
        if empty {
            inner.segments.remove(&segment.sequence);
        }
        empty
    }

    /// Sets the location of a chunk to `entry` of `segment`.
    pub fn insert(&self, segment: &Segment, entry: &Entry) {
        let mut inner = self.inner.write();
        segment.add_live(entry.layout());
        inner.payload_bytes += u64::from(entry.length);
        let before = inner
            .places
            .insert(entry.id, RecordLocation::new(segment.sequence, entry));
        debug_assert!(before.is_none(), "the writer looks before it appends");
    }

    /// Changes the location of a chunk from the record `entry` in `from` to its copy in `to`.
    pub fn relocate(&self, from: &Segment, entry: &Entry, to: &Segment, copy: &Entry) {
        let mut inner = self.inner.write();
        let old = RecordLocation::new(from.sequence, entry);
        if let Some(place) = inner.places.get_mut(&entry.id)
            && *place == old
        {
            *place = RecordLocation::new(to.sequence, copy);
            to.add_live(copy.layout());
            from.remove_live(entry.layout());
        }
    }

    /// Removes chunks, with the copies of them that were set aside.
    pub fn remove(&self, ids: &[ChunkId]) -> Vec<Removed> {
        let mut inner = self.inner.write();
        let mut gone = Vec::new();
        for id in ids {
            if let Some(place) = inner.places.remove(id) {
                inner.payload_bytes -= u64::from(place.length);
                gone.push((*id, place));
            }
            gone.extend(inner.aside.remove(id).map(|place| (*id, place)));
        }
        inner.no_longer_live(&gone)
    }

    /// Sets aside the copy of `id` at `place`, which failed its check: it is no longer held, but its record stays as
    /// long as at most `bytes_max` are set aside. Returns the copies that must be removed for that.
    pub fn set_aside(&self, id: ChunkId, place: RecordLocation, bytes_max: u64) -> Vec<Removed> {
        let mut inner = self.inner.write();
        if inner.places.get(&id) != Some(&place) {
            return Vec::new();
        }
        inner.places.remove(&id);
        inner.payload_bytes -= u64::from(place.length);
        let aside_bytes: u64 = inner.aside.values().map(|place| u64::from(place.length)).sum();
        let gone = if aside_bytes + u64::from(place.length) > bytes_max {
            Some(place)
        } else {
            inner.aside.insert(id, place)
        };
        let gone: Vec<(ChunkId, RecordLocation)> = gone.into_iter().map(|place| (id, place)).collect();
        inner.no_longer_live(&gone)
    }

    /// Removes the copies of these chunks that were set aside.
    pub fn take_aside(&self, ids: &[ChunkId]) -> Vec<Removed> {
        let mut inner = self.inner.write();
        let mut gone = Vec::new();
        for id in ids {
            gone.extend(inner.aside.remove(id).map(|place| (*id, place)));
        }
        inner.no_longer_live(&gone)
    }

    /// Whether the index has `segment`.
    pub fn has_segment(&self, segment: &Segment) -> bool {
        self.inner.read().segments.contains_key(&segment.sequence)
    }

    /// Whether `segment` has a record that was set aside.
    pub fn has_aside(&self, segment: &Segment) -> bool {
        let inner = self.inner.read();
        inner
            .aside
            .values()
            .any(|place| place.segment == segment.sequence)
    }
}

impl Inner {
    /// Lowers the counts of the segments by the records at these locations.
    fn no_longer_live(&self, gone: &[(ChunkId, RecordLocation)]) -> Vec<Removed> {
        let mut removed: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (id, place) in gone {
            self.segments[&place.segment].remove_live(place.layout(*id));
            removed
                .entry(place.segment)
                .or_default()
                .push(place.position_units);
        }
        removed
            .into_iter()
            .map(|(sequence, mut positions)| {
                positions.sort_unstable();
                Removed {
                    segment: Arc::clone(&self.segments[&sequence]),
                    positions,
                }
            })
            .collect()
    }
}
