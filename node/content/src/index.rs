//! Where each chunk lies: a cache of what the segments say.
//!
//! A sorted map of 28 bytes for each chunk (about 50 with the tree around them), because recovery walks it in order.
//!
//! A copy that failed its check is set aside: it is not served and not counted as held, but its record stays where it
//! lies until another copy has been written, so that a fault of the check or of the others costs nothing.
//!
//! Invariants: a segment's count of live records is the number of places here, set aside or not, that lie in it; both
//! change under the same lock. Every place's segment is in `segments`.
//!
//! Knows nothing of files.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::RwLock;
use quorumfs_proto::ChunkId;

use super::record::{Entry, Layout};
use super::segment::Segment;

/// Where a chunk's record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLocation {
    /// The segment's sequence.
    pub segment: u32,
    /// The record's position in it, in units.
    pub position_units: u32,
    /// The payload's length.
    pub length: u32,
}

impl RecordLocation {
    /// The place of `entry` of segment `segment`.
    pub fn new(segment: u32, entry: &Entry) -> RecordLocation {
        RecordLocation {
            segment,
            position_units: entry.position_units,
            length: entry.length,
        }
    }

    /// The record's layout.
    pub fn layout(&self, id: ChunkId) -> Layout {
        Entry {
            id,
            position_units: self.position_units,
            length: self.length,
        }
        .layout()
    }
}

/// Records of one segment that are live no more.
#[derive(Debug)]
pub struct Removed {
    /// The segment.
    pub segment: Arc<Segment>,
    /// Their positions, in units.
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

/// The index.
#[derive(Debug, Default)]
pub struct Index {
    // Locked for a lookup or an insertion at a time, or for a batch of removals; never during I/O.
    inner: RwLock<Inner>,
}

impl Index {
    /// The index of `entries`, the live records of `segments` in the order in which they were written. Of several
    /// records of a chunk the last counts; the others are returned.
    pub fn rebuild(
        segments: Vec<Arc<Segment>>,
        mut entries: Vec<(ChunkId, RecordLocation)>,
    ) -> (Index, Vec<Removed>) {
        let segments: BTreeMap<u32, Arc<Segment>> = segments
            .into_iter()
            .map(|segment| (segment.sequence, segment))
            .collect();
        // Stable: records of one chunk stay in the order in which they were written.
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
            // From sorted input the tree is built with full nodes.
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

    /// Where `id` lies.
    pub fn get(&self, id: ChunkId) -> Option<(RecordLocation, Arc<Segment>)> {
        let inner = self.inner.read();
        let place = *inner.places.get(&id)?;
        let segment = inner.segments.get(&place.segment)?;
        Some((place, Arc::clone(segment)))
    }

    /// Whether `id` lies anywhere, durable or not.
    pub fn contains(&self, id: ChunkId) -> bool {
        self.inner.read().places.contains_key(&id)
    }

    /// Whether `id`'s record is known to be on disk.
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

    /// Up to `max` ids above `after`, ascending.
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

    /// How many chunks there are, and the bytes of their payloads.
    pub fn counts(&self) -> (u64, u64) {
        let inner = self.inner.read();
        (inner.places.len() as u64, inner.payload_bytes)
    }

    /// `segment` takes records from now on.
    pub fn add_segment(&self, segment: Arc<Segment>) {
        self.inner.write().segments.insert(segment.sequence, segment);
    }

    /// The segments, oldest first.
    pub fn segments(&self) -> Vec<Arc<Segment>> {
        self.inner.read().segments.values().cloned().collect()
    }

    /// Takes `segment` out if no record in it is live.
    pub fn remove_segment_if_empty(&self, segment: &Segment) -> bool {
        let mut inner = self.inner.write();
        let empty = segment.live_records() == 0;
        if empty {
            inner.segments.remove(&segment.sequence);
        }
        empty
    }

    /// `entry` of `segment` is where its chunk lies.
    pub fn insert(&self, segment: &Segment, entry: &Entry) {
        let mut inner = self.inner.write();
        segment.add_live(entry.layout());
        inner.payload_bytes += u64::from(entry.length);
        let before = inner
            .places
            .insert(entry.id, RecordLocation::new(segment.sequence, entry));
        debug_assert!(before.is_none(), "the writer looks before it appends");
    }

    /// The record of `entry` in `from` is now that of `to`, its copy.
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

    /// Takes chunks out, with what is set aside of them.
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

    /// The copy of `id` at `place` failed its check: it is held no more, but its record stays, if no more than
    /// `bytes_max` are set aside by that. What has to go instead is returned.
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

    /// Takes out what is set aside of these chunks.
    pub fn take_aside(&self, ids: &[ChunkId]) -> Vec<Removed> {
        let mut inner = self.inner.write();
        let mut gone = Vec::new();
        for id in ids {
            gone.extend(inner.aside.remove(id).map(|place| (*id, place)));
        }
        inner.no_longer_live(&gone)
    }

    /// Whether `segment` is one of its segments.
    pub fn has_segment(&self, segment: &Segment) -> bool {
        self.inner.read().segments.contains_key(&segment.sequence)
    }

    /// Whether a record that was set aside lies in `segment`.
    pub fn has_aside(&self, segment: &Segment) -> bool {
        let inner = self.inner.read();
        inner
            .aside
            .values()
            .any(|place| place.segment == segment.sequence)
    }
}

impl Inner {
    /// The records at these places are counted no more.
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
