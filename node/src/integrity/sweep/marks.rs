//! The progress of the sweep in the chunks of each session, so that chunks that a session put and never named are found
//! without examining everything held. Pure.
//!
//! A session's mark is the counter below which it can name nothing new: its low-water mark, or a value above every
//! counter once it has ended. Chunks below it without a reference are dead; for chunks with one, an apply reports their
//! death. So examining each stretch once is enough, if all copies have arrived by then: it is done in the pass after
//! the one that found the mark there. The chunks of an ended session are examined in both passes, because there may be
//! many.
//!
//! Invariant: everything held below `looked` was examined after the mark had passed it. A session that is no longer
//! known is removed here: it ended long before.

use std::collections::BTreeMap;

use quorumfs_proto::{ChunkId, SessionId};

/// The mark of a session that has ended.
pub const ENDED: u64 = u64::MAX;

/// The marks of all known sessions at one moment.
pub type Marks = BTreeMap<SessionId, u64>;

/// A range of consecutive chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The chunks come after this one; `None` for the first chunk.
    pub after: Option<ChunkId>,
    /// The chunks come before this one; `None` for the last chunk.
    pub before: Option<ChunkId>,
}

impl Stretch {
    /// The stretch of all chunks.
    pub const ALL: Stretch = Stretch {
        after: None,
        before: None,
    };

    /// Returns the chunks of `session` from the counter `from` to below `to`.
    fn of(session: SessionId, from: u64, to: u64) -> Stretch {
        let last_before = |session: u64| ChunkId {
            session: SessionId(session),
            counter: u64::MAX,
        };
        Stretch {
            after: match from.checked_sub(1) {
                Some(counter) => Some(ChunkId { session, counter }),
                None => session.0.checked_sub(1).map(last_before),
            },
            before: Some(ChunkId { session, counter: to }),
        }
    }

    /// Whether `id`, which comes after `after`, is in the range.
    pub fn reaches(&self, id: ChunkId) -> bool {
        self.before.is_none_or(|before| id < before)
    }
}

/// The progress of the sweep; see the module documentation.
#[derive(Debug, Default)]
pub struct Progress {
    looked: Marks,
    /// The marks found by the last pass.
    found: Marks,
}

impl Progress {
    /// Records that everything held was examined after the marks were `now`.
    pub fn all_looked(&mut self, now: Marks) {
        self.looked.clone_from(&now);
        self.found = now;
    }

    /// Returns the stretches that a pass that finds the marks `now` must examine.
    pub fn stretches(&self, now: &Marks) -> Vec<Stretch> {
        let below = |marks: &Marks, session| marks.get(session).copied().unwrap_or(0);
        let mut stretches = Vec::new();
        for (session, mark) in now {
            let to = match *mark {
                ENDED => ENDED,
                _ => below(&self.found, session),
            };
            let from = below(&self.looked, session);
            if from < to {
                stretches.push(Stretch::of(*session, from, to));
            }
        }
        stretches
    }

    /// Records that the pass that found the marks `now` has examined its stretches.
    pub fn looked(&mut self, now: Marks) {
        self.looked = std::mem::replace(&mut self.found, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId(7);

    fn marks(marks: &[(u64, u64)]) -> Marks {
        marks
            .iter()
            .map(|(session, mark)| (SessionId(*session), *mark))
            .collect()
    }

    /// Simulates a pass that finds these marks; returns the stretches that it examines.
    fn pass(progress: &mut Progress, found: &[(u64, u64)]) -> Vec<Stretch> {
        let now = marks(found);
        let stretches = progress.stretches(&now);
        progress.looked(now);
        stretches
    }

    #[test]
    fn what_a_mark_has_passed_is_looked_at_once_a_pass_later() {
        let mut progress = Progress::default();
        progress.all_looked(marks(&[(7, 10)]));
        assert_eq!(pass(&mut progress, &[(7, 10)]), []);
        assert_eq!(pass(&mut progress, &[(7, 25)]), []);
        assert_eq!(pass(&mut progress, &[(7, 30)]), [Stretch::of(SESSION, 10, 25)]);
        assert_eq!(pass(&mut progress, &[(7, 30)]), [Stretch::of(SESSION, 25, 30)]);
        assert_eq!(pass(&mut progress, &[(7, 30)]), []);
    }

    #[test]
    fn what_an_ended_session_left_is_looked_at_twice_and_what_it_had_passed_not_again() {
        let mut progress = Progress::default();
        progress.all_looked(marks(&[(7, 10)]));
        assert_eq!(pass(&mut progress, &[(7, 12)]), []);
        let rest = Stretch::of(SESSION, 10, ENDED);
        assert_eq!(pass(&mut progress, &[(7, ENDED)]), [rest]);
        let rest = Stretch::of(SESSION, 12, ENDED);
        assert_eq!(pass(&mut progress, &[(7, ENDED)]), [rest]);
        assert_eq!(pass(&mut progress, &[(7, ENDED)]), []);
        assert_eq!(pass(&mut progress, &[]), []);
        assert!(progress.found.is_empty());
        assert_eq!(pass(&mut progress, &[]), []);
        assert!(progress.looked.is_empty(), "forgotten sessions take no room");
    }

    #[test]
    fn a_session_that_came_and_went_between_two_passes_is_looked_at() {
        let mut progress = Progress::default();
        progress.all_looked(marks(&[]));
        let all = [Stretch::of(SESSION, 0, ENDED)];
        assert_eq!(pass(&mut progress, &[(7, ENDED)]), all);
        assert_eq!(pass(&mut progress, &[(7, ENDED)]), all);
        assert_eq!(pass(&mut progress, &[(7, ENDED)]), []);
    }

    #[test]
    fn a_pass_that_failed_is_made_up_for() {
        let mut progress = Progress::default();
        progress.all_looked(marks(&[(7, 10)]));
        pass(&mut progress, &[(7, 20)]);
        assert_eq!(progress.stretches(&marks(&[(7, 30)])).len(), 1);
        assert_eq!(pass(&mut progress, &[(7, 40)]), [Stretch::of(SESSION, 10, 20)]);
        assert_eq!(pass(&mut progress, &[(7, 40)]), [Stretch::of(SESSION, 20, 40)]);
    }

    #[test]
    fn a_stretch_begins_and_ends_where_it_says() {
        let id = |session, counter| ChunkId {
            session: SessionId(session),
            counter,
        };
        let stretch = Stretch::of(SESSION, 0, 3);
        assert_eq!(stretch.after, Some(id(6, u64::MAX)));
        assert!(stretch.reaches(id(7, 2)) && !stretch.reaches(id(7, 3)));
        assert_eq!(Stretch::of(SESSION, 5, 9).after, Some(id(7, 4)));
        assert_eq!(Stretch::of(SessionId(0), 0, 9).after, None);
        let rest = Stretch::of(SESSION, 5, ENDED);
        assert!(rest.reaches(id(7, u64::MAX - 1)) && !rest.reaches(id(8, 1)));
        assert!(Stretch::ALL.reaches(id(u64::MAX, u64::MAX)));
    }
}
