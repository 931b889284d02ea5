//! The recovery ledger: how many chunks are referenced, which are missing, and which is fetched next. Pure: the time
//! is an argument, and nothing is read.
//!
//! Invariants:
//! - Every known missing chunk is in `missing`, and is in one of the queues or being fetched. Chunks beyond
//!   [`MISSING_CHUNKS_MAX`] are counted in `overflow`, come after its cursor, and are found by the next walk.
//! - A walk of all referenced chunks is requested if and only if something may have been missed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::{Duration, Instant};

use quorumfs_proto::ChunkId;

use quorumfs_metadata::NamedChange;

/// Most missing chunks that are remembered, 40 bytes each; a walk finds the others later.
pub const MISSING_CHUNKS_MAX: usize = 256 << 10;
/// Delay after a failed fetch; doubled with each failure.
const RETRY_MS_MIN: u64 = 1_000;
/// Longest delay if a node that may have the chunk did not answer, because it may return at any moment.
const RETRY_MS_MAX: u64 = 4_000;
/// Longest delay if all nodes answered.
const LOST_RETRY_MS_MAX: u64 = 30_000;
/// Most lost chunks that are remembered.
const LOST_CHUNKS_MAX: usize = 4096;

/// A number of chunks and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Number of chunks.
    pub chunks: u64,
    /// Sum of their lengths, in bytes.
    pub bytes: u64,
}

impl Totals {
    /// Adds one chunk.
    pub fn add(&mut self, length: u32) {
        self.chunks += 1;
        self.bytes += u64::from(length);
    }

    fn subtract(&mut self, length: u32) {
        self.chunks = self.chunks.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(u64::from(length));
    }
}

/// Why all referenced chunks must be compared with the held ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WalkReason {
    /// The node has started.
    Start,
    /// The metadata was replaced by a snapshot.
    SnapshotInstalled,
    /// The queue of effects to recovery was full.
    EffectsDropped,
    /// The content store lost chunks that are not known by id.
    ContentLost,
    /// More chunks were missing or surplus than are remembered.
    MoreMissing,
    /// The placement assigns other chunks to this node than before.
    PlacementChanged,
    /// An administrator requested it.
    Requested,
}

impl fmt::Display for WalkReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WalkReason::Start => "start",
            WalkReason::SnapshotInstalled => "snapshot_installed",
            WalkReason::EffectsDropped => "effects_dropped",
            WalkReason::ContentLost => "content_lost",
            WalkReason::MoreMissing => "more_missing",
            WalkReason::PlacementChanged => "placement_changed",
            WalkReason::Requested => "requested",
        })
    }
}

/// When a missing chunk is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchTime {
    /// Before all others, because a reader waits.
    Urgent,
    /// In the order of discovery.
    Normal,
    /// Not before this time, because the chunk is probably in transit.
    NotBefore(Instant),
}

#[derive(Clone, Copy, Debug)]
struct Missing {
    length: u32,
    /// Number of failed fetches.
    failures: u32,
    fetching: bool,
    /// Whether it was queued as urgent since the last attempt.
    is_urgent: bool,
}

/// The recovery ledger of a node.
#[derive(Debug, Default)]
pub struct Ledger {
    missing: BTreeMap<ChunkId, Missing>,
    missing_totals: Totals,
    /// The first missing chunk that was not remembered, and the totals from there on.
    overflow: Option<(ChunkId, Totals)>,
    ready: VecDeque<ChunkId>,
    /// By the time before which they are not fetched.
    delayed: BTreeSet<(Instant, ChunkId)>,
    walk_requested: Option<WalkReason>,
    /// Referenced chunks at the last walk, and [`NamedChange`] at that time.
    last_walk: Option<(Totals, NamedChange)>,
    effects_dropped: u64,
    /// Chunks that no node has, although all answered.
    lost: BTreeSet<ChunkId>,
}

impl Ledger {
    /// Creates the ledger of a node that has started.
    pub fn new() -> Ledger {
        Ledger {
            walk_requested: Some(WalkReason::Start),
            ..Ledger::default()
        }
    }

    /// Adds `id`, which is missing.
    pub fn add(&mut self, id: ChunkId, length: u32, time: FetchTime) {
        if let Some(missing) = self.missing.get_mut(&id) {
            // Moved to the front only once per attempt.
            if time == FetchTime::Urgent && !std::mem::replace(&mut missing.is_urgent, true) {
                self.ready.push_front(id);
            }
            return;
        }
        if self.missing.len() >= MISSING_CHUNKS_MAX {
            self.request_walk(WalkReason::MoreMissing);
            return;
        }
        self.missing.insert(
            id,
            Missing {
                length,
                failures: 0,
                fetching: false,
                is_urgent: time == FetchTime::Urgent,
            },
        );
        self.missing_totals.add(length);
        match time {
            FetchTime::Urgent => self.ready.push_front(id),
            FetchTime::Normal => self.ready.push_back(id),
            FetchTime::NotBefore(due) => drop(self.delayed.insert((due, id))),
        }
    }

    /// Removes `id`, which is held now or no longer needed.
    pub fn remove(&mut self, id: ChunkId) {
        if let Some(missing) = self.missing.remove(&id) {
            self.missing_totals.subtract(missing.length);
        }
        self.lost.remove(&id);
        // There is space for chunks that were not remembered.
        if self.overflow.is_some() && self.missing.len() <= MISSING_CHUNKS_MAX / 2 {
            self.request_walk(WalkReason::MoreMissing);
        }
    }

    /// Returns the next chunk to fetch with its length in bytes; the caller then removes or postpones it. If none is
    /// due, returns the time at which one will be.
    pub fn next(&mut self, now: Instant) -> Result<(ChunkId, u32), Option<Instant>> {
        while let Some((due, _)) = self.delayed.first() {
            if *due > now {
                break;
            }
            self.ready.extend(self.delayed.pop_first().map(|(_, id)| id));
        }
        while let Some(id) = self.ready.pop_front() {
            // The chunk may have been removed, or queued twice.
            if let Some(missing) = self.missing.get_mut(&id)
                && !missing.fetching
            {
                missing.fetching = true;
                missing.is_urgent = false;
                return Ok((id, missing.length));
            }
        }
        Err(self.delayed.first().map(|(due, _)| *due))
    }

    /// Schedules another fetch of `id` after a failure. `all_answered` means that all nodes answered, so the chunk is
    /// lost.
    pub fn postpone(&mut self, id: ChunkId, now: Instant, all_answered: bool) {
        let Some(missing) = self.missing.get_mut(&id) else {
            return;
        };
        missing.fetching = false;
        let delay_ms_max = if all_answered {
            LOST_RETRY_MS_MAX
        } else {
            RETRY_MS_MAX
        };
        let delay_ms = (RETRY_MS_MIN << missing.failures.min(8)).min(delay_ms_max);
        missing.failures += 1;
        if !all_answered {
            self.lost.remove(&id);
        } else if self.lost.len() < LOST_CHUNKS_MAX {
            self.lost.insert(id);
        }
        self.delayed.insert((now + Duration::from_millis(delay_ms), id));
    }

    /// Makes all delayed chunks due now, because conditions have improved.
    pub fn retry_now(&mut self) {
        for (_, id) in std::mem::take(&mut self.delayed) {
            self.ready.push_back(id);
        }
    }

    /// Returns the first `max` delayed chunks.
    pub fn delayed(&self, max: usize) -> Vec<ChunkId> {
        self.delayed.iter().take(max).map(|(_, id)| *id).collect()
    }

    /// Requests a walk.
    pub fn request_walk(&mut self, reason: WalkReason) {
        self.walk_requested = self.walk_requested.max(Some(reason));
    }

    /// Notes the total number of dropped effects; an increase requests a walk.
    pub fn note_dropped_effects(&mut self, dropped: u64) {
        if dropped > self.effects_dropped {
            self.effects_dropped = dropped;
            self.request_walk(WalkReason::EffectsDropped);
        }
    }

    /// Returns the reason of the requested walk, if any.
    pub fn walk_requested(&self) -> Option<WalkReason> {
        self.walk_requested
    }

    /// Begins the requested walk and returns its reason. What is missed from now on requests another.
    pub fn begin_walk(&mut self) -> Option<WalkReason> {
        self.overflow = None;
        self.walk_requested.take()
    }

    /// Adds `id`, which the walk found missing.
    pub fn add_from_walk(&mut self, id: ChunkId, length: u32) {
        if let Some((_, totals)) = &mut self.overflow {
            totals.add(length);
        } else if self.missing.len() >= MISSING_CHUNKS_MAX && !self.missing.contains_key(&id) {
            let mut totals = Totals::default();
            totals.add(length);
            self.overflow = Some((id, totals));
        } else {
            self.add(id, length, FetchTime::Normal);
        }
    }

    /// Ends a walk that counted `named` in a view with [`NamedChange`] `at`.
    pub fn end_walk(&mut self, named: Totals, at: NamedChange) {
        self.last_walk = Some((named, at));
    }

    /// Returns the totals of referenced chunks at [`NamedChange`] `now`; `None` before the first walk.
    pub fn named(&self, now: NamedChange) -> Option<Totals> {
        let (totals, base) = self
            .last_walk
            .filter(|(_, base)| base.generation == now.generation)?;
        Some(Totals {
            chunks: totals.chunks.saturating_add_signed(now.chunks - base.chunks),
            bytes: totals.bytes.saturating_add_signed(now.bytes - base.bytes),
        })
    }

    /// Returns the totals of known missing chunks.
    pub fn missing(&self) -> Totals {
        let overflow = self.overflow.map_or_else(Totals::default, |(_, totals)| totals);
        Totals {
            chunks: self.missing_totals.chunks + overflow.chunks,
            bytes: self.missing_totals.bytes + overflow.bytes,
        }
    }

    /// Returns the first `max` missing chunks.
    pub fn missing_ids(&self, max: usize) -> BTreeSet<ChunkId> {
        self.missing.keys().take(max).copied().collect()
    }

    /// Returns the first `max` missing chunks for which `predicate` holds. If not all missing chunks are remembered,
    /// returns the first `max` of all, because the others may match.
    pub fn missing_where(&self, predicate: impl Fn(ChunkId) -> bool, max: usize) -> BTreeSet<ChunkId> {
        let known = self.missing.keys().copied();
        match self.overflow {
            None => known.filter(|id| predicate(*id)).take(max).collect(),
            Some(_) => known.take(max).collect(),
        }
    }

    /// Returns the chunks that no node has, although all answered.
    pub fn lost(&self) -> &BTreeSet<ChunkId> {
        &self.lost
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
    fn missing_chunks_are_ordered_and_counted_once() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut ledger = Ledger::new();
        ledger.add(id(1), 10, FetchTime::NotBefore(later));
        ledger.add(id(2), 20, FetchTime::Normal);
        ledger.add(id(3), 30, FetchTime::Urgent);
        ledger.add(id(3), 30, FetchTime::Urgent);
        assert_eq!(ledger.missing(), Totals { chunks: 3, bytes: 60 });
        assert_eq!(ledger.next(now), Ok((id(3), 30)));
        ledger.remove(id(3));
        assert_eq!(ledger.next(now), Ok((id(2), 20)));
        assert_eq!(ledger.next(now), Err(Some(later)));
        ledger.postpone(id(2), now, true);
        assert!(ledger.lost().contains(&id(2)));
        assert_eq!(ledger.next(later), Ok((id(1), 10)));
        assert_eq!(ledger.next(later), Ok((id(2), 20)));
        ledger.remove(id(1));
        ledger.remove(id(2));
        assert_eq!(ledger.missing(), Totals::default());
        assert!(ledger.lost().is_empty());
        assert_eq!(ledger.next(later), Err(None));
    }

    #[test]
    fn a_walk_is_requested_only_when_something_may_have_been_missed() {
        let mut ledger = Ledger::new();
        assert_eq!(ledger.begin_walk(), Some(WalkReason::Start));
        ledger.end_walk(Totals::default(), NamedChange::default());
        ledger.note_dropped_effects(0);
        assert_eq!(ledger.walk_requested(), None);
        ledger.note_dropped_effects(3);
        assert_eq!(ledger.begin_walk(), Some(WalkReason::EffectsDropped));
        ledger.note_dropped_effects(3);
        assert_eq!(ledger.walk_requested(), None);
    }

    #[test]
    fn chunks_beyond_the_bound_are_counted_and_found_by_a_walk() {
        let mut ledger = Ledger::new();
        ledger.begin_walk();
        let count = MISSING_CHUNKS_MAX as u64 + 10;
        (0..count).for_each(|counter| ledger.add_from_walk(id(counter), 1));
        assert_eq!(ledger.missing().chunks, count);
        assert_eq!(ledger.walk_requested(), None);
        (0..count / 2 + 10).for_each(|counter| ledger.remove(id(counter)));
        assert_eq!(ledger.walk_requested(), Some(WalkReason::MoreMissing));
    }

    #[test]
    fn what_is_named_follows_the_changes_since_the_walk() {
        let mut ledger = Ledger::new();
        let change = |generation, chunks, bytes| NamedChange {
            generation,
            chunks,
            bytes,
        };
        assert_eq!(ledger.named(change(0, 5, 50)), None);
        ledger.end_walk(Totals { chunks: 7, bytes: 70 }, change(0, 5, 50));
        let named = ledger.named(change(0, 4, 40));
        assert_eq!(named, Some(Totals { chunks: 6, bytes: 60 }));
        assert_eq!(ledger.named(change(1, 0, 0)), None, "replaced by a snapshot");
    }
}
