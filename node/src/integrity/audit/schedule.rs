//! Decides when nodes compare their metadata. Pure.
//!
//! The leader begins audits; a node that has a reason for one asks it. Reasons besides the interval: a leader has led
//! for a while and has not been compared since, a node has started and has not been compared, rows contradict each
//! other. Audits always leave most of the time to other work, because each reads all metadata.

use std::time::{Duration, Instant};

/// A leader that has led for this long is compared. If leaders change more often, [`SPACING`] applies.
const AFTER_CHANGE: Duration = Duration::from_secs(30);
/// A node that started this long ago is compared. Later than a new leader, whose audit compares all nodes.
const AFTER_START: Duration = Duration::from_secs(60);
/// Least time between two audits outside the interval …
const SPACING: Duration = Duration::from_secs(60);
/// … which is also at least this multiple of the duration of the last one on this node.
const SPACING_DIGESTS: u32 = 20;

/// The next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Begin an audit.
    Begin,
    /// Ask the leader to begin one.
    AskLeader,
}

/// The situation of this node.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// The term in which it leads, if it leads.
    pub leads_in: Option<u64>,
    /// The entry of the last audit that it took part in, and the duration on this node in milliseconds.
    pub last: Option<(u64, u64)>,
    /// Whether it is taking part in one now.
    pub is_comparing: bool,
}

/// The schedule of audits; see the module documentation.
#[derive(Debug)]
pub struct Schedule {
    interval: Duration,
    /// The term in which it leads, and the time since which it does.
    leads_since: Option<(u64, Instant)>,
    began: Instant,
    /// The last audit that was seen, and the time.
    seen: Option<(u64, Instant)>,
    /// The time of the last action.
    stepped: Option<Instant>,
    suspects: bool,
}

impl Schedule {
    /// Makes the schedule of a node that starts at `now`.
    pub fn new(interval: Duration, now: Instant) -> Schedule {
        Schedule {
            interval,
            leads_since: None,
            began: now,
            seen: None,
            stepped: None,
            suspects: false,
        }
    }

    /// Records that rows of this node's metadata contradict each other.
    pub fn suspect(&mut self) {
        self.suspects = true;
    }

    /// Returns the action that is due at `now`.
    pub fn next(&mut self, standing: Standing, now: Instant) -> Option<Step> {
        let Standing {
            leads_in,
            last,
            is_comparing,
        } = standing;
        self.leads_since = leads_in.map(|term| match self.leads_since {
            Some((same, since)) if same == term => (same, since),
            _ => (term, now),
        });
        if let Some((index, _)) = last
            && self.seen.map(|(seen, _)| seen) != Some(index)
        {
            self.seen = Some((index, now));
            self.suspects = false;
        }
        let seen_at = self.seen.map(|(_, at)| at);
        let digest = Duration::from_millis(last.map_or(0, |(_, digest_ms)| digest_ms));
        let spacing = SPACING.max(digest * SPACING_DIGESTS).min(self.interval);
        let is_recent = |at: Option<Instant>| at.is_some_and(|at| now.duration_since(at) < spacing);
        if is_comparing || is_recent(seen_at) || is_recent(self.stepped) {
            return None;
        }
        let not_compared_since = |since: Instant| seen_at.is_none_or(|at| at < since);
        let has_reason = self.suspects
            || match self.leads_since {
                Some((_, since)) => {
                    let last = seen_at.max(self.stepped).unwrap_or(self.began);
                    now.duration_since(last) >= self.interval
                        || now.duration_since(since) >= AFTER_CHANGE && not_compared_since(since)
                }
                None => now.duration_since(self.began) >= AFTER_START && seen_at.is_none(),
            };
        if !has_reason {
            return None;
        }
        self.stepped = Some(now);
        Some(match self.leads_since {
            Some(_) => Step::Begin,
            None => Step::AskLeader,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(6 * 3600);

    fn standing(leads_in: Option<u64>, last: Option<(u64, u64)>) -> Standing {
        Standing {
            leads_in,
            last,
            is_comparing: false,
        }
    }

    /// Returns the seconds, up to `until_s`, at which an action is due in this situation.
    fn steps(
        schedule: &mut Schedule,
        start: Instant,
        seconds: std::ops::Range<u64>,
        of: Standing,
    ) -> Vec<(u64, Step)> {
        let at = |second| start + Duration::from_secs(second);
        let steps = seconds.filter_map(|second| Some((second, schedule.next(of, at(second))?)));
        steps.collect()
    }

    #[test]
    fn a_new_leader_is_compared_once_and_then_at_the_interval() {
        let start = Instant::now();
        let mut schedule = Schedule::new(INTERVAL, start);
        let leads = standing(Some(3), None);
        assert_eq!(steps(&mut schedule, start, 0..31, leads), [(30, Step::Begin)]);
        let compared = standing(Some(3), Some((7, 10)));
        let hours = steps(&mut schedule, start, 31..40_000, compared);
        assert_eq!(hours, [(31 + 6 * 3600, Step::Begin)]);
        let again = standing(Some(5), Some((9, 10)));
        assert_eq!(
            steps(&mut schedule, start, 40_000..40_200, again),
            [],
            "the audit that was seen when the term began is new enough"
        );
        let third = standing(Some(6), Some((9, 10)));
        assert_eq!(
            steps(&mut schedule, start, 40_200..40_290, third),
            [(40_230, Step::Begin)]
        );
    }

    #[test]
    fn a_node_that_begins_asks_unless_it_was_compared() {
        let start = Instant::now();
        let follows = standing(None, None);
        let mut schedule = Schedule::new(INTERVAL, start);
        let asked = steps(&mut schedule, start, 0..125, follows);
        assert_eq!(
            asked,
            [(60, Step::AskLeader), (120, Step::AskLeader)],
            "until it is heard"
        );
        let mut schedule = Schedule::new(INTERVAL, start);
        assert_eq!(steps(&mut schedule, start, 0..50, follows), []);
        let compares = Standing {
            is_comparing: true,
            ..follows
        };
        assert_eq!(
            steps(&mut schedule, start, 50..5_000, compares),
            [],
            "one at a time"
        );
        let compared = standing(None, Some((7, 10)));
        assert_eq!(steps(&mut schedule, start, 5_000..100_000, compared), []);
    }

    #[test]
    fn contradicting_rows_are_a_reason_that_leaves_time_for_other_work() {
        let start = Instant::now();
        let mut schedule = Schedule::new(INTERVAL, start);
        let compared = standing(None, Some((7, 10_000)));
        assert_eq!(steps(&mut schedule, start, 0..1, compared), []);
        schedule.suspect();
        let asked = steps(&mut schedule, start, 1..500, compared);
        assert_eq!(asked, [(200, Step::AskLeader), (400, Step::AskLeader)]);
        let again = standing(None, Some((8, 10_000)));
        assert_eq!(
            steps(&mut schedule, start, 500..2_000, again),
            [],
            "an audit answers it"
        );
    }
}
