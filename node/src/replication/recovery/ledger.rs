//! What is named, what is missing, and what comes next: the books of recovery. Pure: the time is told, nothing is read.
//!
//! Invariants:
//! - Every chunk known to be missing is in `missing`, and waits in one of the queues at least or is being fetched;
//!   those beyond [`MISSING_MAX`] are counted in `beyond`, lie after its cursor, and are found by the next walk from
//!   there.
//! - A walk of all that is named is asked for whenever something may have been missed, and for no other reason.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use quorumfs_proto::ChunkId;

use quorumfs_metadata::NamedChange;

/// Missing chunks that are known by name; 40 bytes each. A walk finds the rest when there is room again.
pub const MISSING_MAX: usize = 256 << 10;
/// After a fetch that failed; doubled each time …
const RETRY_MS_MIN: u64 = 1_000;
/// … up to this where a node that might have it did not answer: it may be back any moment …
const RETRY_MS_MAX: u64 = 4_000;
/// … and up to this where all answered.
const LOST_RETRY_MS_MAX: u64 = 30_000;
/// Chunks remembered that nobody could give.
const LOST_MAX: usize = 4096;

/// Chunks and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Amount {
    /// One chunk more.
    pub fn add(&mut self, length: u32) {
        self.chunks += 1;
        self.bytes += u64::from(length);
    }

    fn subtract(&mut self, length: u32) {
        self.chunks = self.chunks.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(u64::from(length));
    }
}

/// Why everything named must be compared with everything held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WalkReason {
    /// The node has just begun.
    Start,
    /// The metadata was replaced by a snapshot.
    SnapshotInstalled,
    /// Recovery was not told of some of what was applied.
    EffectsDropped,
    /// The content store has lost chunks that cannot be named.
    ContentLost,
    /// More was missing, or too much, than is kept in mind.
    MoreMissing,
    /// Other chunks should be here than before.
    PlacementChanged,
    /// An administrator asked.
    Requested,
}

/// How long a chunk that was found missing is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Somebody waits for it: before all others.
    First,
    /// In its turn.
    Now,
    /// It is probably on its way here.
    At(Instant),
}

#[derive(Clone, Copy, Debug)]
struct Missing {
    length: u32,
    /// Fetches that failed.
    failures: u32,
    fetching: bool,
    /// Whether it was put before all others, since the last attempt.
    preferred: bool,
}

/// The books.
#[derive(Debug, Default)]
pub struct Ledger {
    missing: BTreeMap<ChunkId, Missing>,
    missing_amount: Amount,
    /// Missing ones that did not fit, and after which chunk they lie.
    beyond: Option<(ChunkId, Amount)>,
    ready: VecDeque<ChunkId>,
    /// By the time before which they are left alone.
    delayed: BTreeSet<(Instant, ChunkId)>,
    walk_wanted: Option<WalkReason>,
    /// What was named at the last walk, and what [`NamedChange`] said then.
    base: Option<(Amount, NamedChange)>,
    effects_dropped: u64,
    /// Chunks that no node could give although all answered.
    lost: BTreeSet<ChunkId>,
}

impl Ledger {
    /// Books of a node that has just begun.
    pub fn new() -> Ledger {
        Ledger {
            walk_wanted: Some(WalkReason::Start),
            ..Ledger::default()
        }
    }

    /// `id` should be here and is not.
    pub fn add(&mut self, id: ChunkId, length: u32, when: When) {
        if let Some(missing) = self.missing.get_mut(&id) {
            // Once, however many ask for it.
            if when == When::First && !std::mem::replace(&mut missing.preferred, true) {
                self.ready.push_front(id);
            }
            return;
        }
        if self.missing.len() >= MISSING_MAX {
            self.want_walk(WalkReason::MoreMissing);
            return;
        }
        self.missing.insert(
            id,
            Missing {
                length,
                failures: 0,
                fetching: false,
                preferred: when == When::First,
            },
        );
        self.missing_amount.add(length);
        match when {
            When::First => self.ready.push_front(id),
            When::Now => self.ready.push_back(id),
            When::At(due) => drop(self.delayed.insert((due, id))),
        }
    }

    /// `id` is here, or not wanted any more.
    pub fn settled(&mut self, id: ChunkId) {
        if let Some(missing) = self.missing.remove(&id) {
            self.missing_amount.subtract(missing.length);
        }
        self.lost.remove(&id);
        // Half empty: what did not fit may come.
        if self.beyond.is_some() && self.missing.len() <= MISSING_MAX / 2 {
            self.want_walk(WalkReason::MoreMissing);
        }
    }

    /// The next chunk that is due, which the caller fetches and then settles or postpones; else when there will be one.
    pub fn next(&mut self, now: Instant) -> Result<(ChunkId, u32), Option<Instant>> {
        while let Some((due, _)) = self.delayed.first() {
            if *due > now {
                break;
            }
            self.ready.extend(self.delayed.pop_first().map(|(_, id)| id));
        }
        while let Some(id) = self.ready.pop_front() {
            // It may have been settled, or queued twice.
            if let Some(missing) = self.missing.get_mut(&id)
                && !missing.fetching
            {
                missing.fetching = true;
                missing.preferred = false;
                return Ok((id, missing.length));
            }
        }
        Err(self.delayed.first().map(|(due, _)| *due))
    }

    /// No node that could be reached gave it: again later. `everywhere`: all nodes answered, so it is lost.
    pub fn postpone(&mut self, id: ChunkId, now: Instant, everywhere: bool) {
        let Some(missing) = self.missing.get_mut(&id) else {
            return;
        };
        missing.fetching = false;
        let most_ms = if everywhere {
            LOST_RETRY_MS_MAX
        } else {
            RETRY_MS_MAX
        };
        let delay_ms = (RETRY_MS_MIN << missing.failures.min(8)).min(most_ms);
        missing.failures += 1;
        if !everywhere {
            self.lost.remove(&id);
        } else if self.lost.len() < LOST_MAX {
            self.lost.insert(id);
        }
        self.delayed.insert((now + Duration::from_millis(delay_ms), id));
    }

    /// All that waits may be tried at once: something has changed for the better.
    pub fn hurry(&mut self) {
        for (_, id) in std::mem::take(&mut self.delayed) {
            self.ready.push_back(id);
        }
    }

    /// The first `max` of those that are left alone a little longer.
    pub fn delayed(&self, max: usize) -> Vec<ChunkId> {
        self.delayed.iter().take(max).map(|(_, id)| *id).collect()
    }

    /// A walk is needed.
    pub fn want_walk(&mut self, reason: WalkReason) {
        self.walk_wanted = self.walk_wanted.max(Some(reason));
    }

    /// How many effects were dropped in all: if more than before, a walk is needed.
    pub fn effects_dropped(&mut self, dropped: u64) {
        if dropped > self.effects_dropped {
            self.effects_dropped = dropped;
            self.want_walk(WalkReason::EffectsDropped);
        }
    }

    /// Whether a walk is needed.
    pub fn walk_wanted(&self) -> Option<WalkReason> {
        self.walk_wanted
    }

    /// A walk begins; what is missed from now on asks for another.
    pub fn walk_begins(&mut self) -> Option<WalkReason> {
        self.beyond = None;
        self.walk_wanted.take()
    }

    /// The walk has found `id` missing.
    pub fn walk_found(&mut self, id: ChunkId, length: u32) {
        if let Some((_, amount)) = &mut self.beyond {
            amount.add(length);
        } else if self.missing.len() >= MISSING_MAX && !self.missing.contains_key(&id) {
            let mut amount = Amount::default();
            amount.add(length);
            self.beyond = Some((id, amount));
        } else {
            self.add(id, length, When::Now);
        }
    }

    /// The walk has found `named` in a view in which [`NamedChange`] was `at`.
    pub fn walk_ends(&mut self, named: Amount, at: NamedChange) {
        self.base = Some((named, at));
    }

    /// What is named where [`NamedChange`] says `now`; before the first walk, nothing is known.
    pub fn named(&self, now: NamedChange) -> Option<Amount> {
        let (amount, base) = self.base.filter(|(_, base)| base.generation == now.generation)?;
        Some(Amount {
            chunks: amount.chunks.saturating_add_signed(now.chunks - base.chunks),
            bytes: amount.bytes.saturating_add_signed(now.bytes - base.bytes),
        })
    }

    /// What is missing, as far as it is known.
    pub fn missing(&self) -> Amount {
        let beyond = self.beyond.map_or_else(Amount::default, |(_, amount)| amount);
        Amount {
            chunks: self.missing_amount.chunks + beyond.chunks,
            bytes: self.missing_amount.bytes + beyond.bytes,
        }
    }

    /// The first `max` missing chunks.
    pub fn missing_ids(&self, max: usize) -> BTreeSet<ChunkId> {
        self.missing.keys().take(max).copied().collect()
    }

    /// The first `max` missing chunks of those that `matter`. Where more are missing than are known by name, there are `max`
    /// that matter for all that is known.
    pub fn missing_by(&self, matter: impl Fn(ChunkId) -> bool, max: usize) -> BTreeSet<ChunkId> {
        let known = self.missing.keys().copied();
        match self.beyond {
            None => known.filter(|id| matter(*id)).take(max).collect(),
            Some(_) => known.take(max).collect(),
        }
    }

    /// Chunks that no node could give although all answered.
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
    fn what_is_missing_comes_in_its_turn_and_is_counted_once() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut ledger = Ledger::new();
        ledger.add(id(1), 10, When::At(later));
        ledger.add(id(2), 20, When::Now);
        ledger.add(id(3), 30, When::First);
        ledger.add(id(3), 30, When::First);
        assert_eq!(ledger.missing(), Amount { chunks: 3, bytes: 60 });
        assert_eq!(ledger.next(now), Ok((id(3), 30)));
        ledger.settled(id(3));
        assert_eq!(ledger.next(now), Ok((id(2), 20)));
        assert_eq!(ledger.next(now), Err(Some(later)));
        ledger.postpone(id(2), now, true);
        assert!(ledger.lost().contains(&id(2)));
        assert_eq!(ledger.next(later), Ok((id(1), 10)));
        assert_eq!(ledger.next(later), Ok((id(2), 20)));
        ledger.settled(id(1));
        ledger.settled(id(2));
        assert_eq!(ledger.missing(), Amount::default());
        assert!(ledger.lost().is_empty());
        assert_eq!(ledger.next(later), Err(None));
    }

    #[test]
    fn a_walk_is_asked_for_only_when_something_may_have_been_missed() {
        let mut ledger = Ledger::new();
        assert_eq!(ledger.walk_begins(), Some(WalkReason::Start));
        ledger.walk_ends(Amount::default(), NamedChange::default());
        ledger.effects_dropped(0);
        assert_eq!(ledger.walk_wanted(), None);
        ledger.effects_dropped(3);
        assert_eq!(ledger.walk_begins(), Some(WalkReason::EffectsDropped));
        ledger.effects_dropped(3);
        assert_eq!(ledger.walk_wanted(), None);
    }

    #[test]
    fn what_does_not_fit_is_counted_and_walked_for_again() {
        let mut ledger = Ledger::new();
        ledger.walk_begins();
        let count = MISSING_MAX as u64 + 10;
        (0..count).for_each(|counter| ledger.walk_found(id(counter), 1));
        assert_eq!(ledger.missing().chunks, count);
        assert_eq!(ledger.walk_wanted(), None);
        (0..count / 2 + 10).for_each(|counter| ledger.settled(id(counter)));
        assert_eq!(ledger.walk_wanted(), Some(WalkReason::MoreMissing));
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
        ledger.walk_ends(Amount { chunks: 7, bytes: 70 }, change(0, 5, 50));
        let named = ledger.named(change(0, 4, 40));
        assert_eq!(named, Some(Amount { chunks: 6, bytes: 60 }));
        assert_eq!(ledger.named(change(1, 0, 0)), None, "replaced by a snapshot");
    }
}
