//! The clock with which a leader stamps commands, and whose time it sends to mounts: the node's own clock, unless that
//! is far ahead of the others'.
//!
//! The times that were applied, stamped or sent never run backwards: if this node's clock is behind the last applied
//! stamp (it was set back, or the previous leader was ahead), time advances slowly until it has caught up
//! ([`SteadyTime`]).
//!
//! Applied time never runs backwards (the state machine uses the later of stamp and last stamp), so a single command
//! stamped by a clock that is a year ahead would stop time for a year. So the wall clock is trusted only as far as it
//! has advanced with the monotonic clock since it was last confirmed. Each round of probes compares it with the median
//! of the others' clocks: within [`LEAP_MAX`] it is confirmed; if it is further ahead, the median becomes the anchor,
//! and stamps continue from there with the monotonic clock.
//!
//! A clock may be wrong from the start, and a node may lead before its first round of probes: its first stamps wait
//! briefly for a comparison with a majority ([`StampClock::stamp`]).

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use quorumfs_proto::{SteadyTime, Timestamp};
use tokio::sync::watch;

/// Most by which the wall clock may be ahead.
const LEAP_MAX: Duration = Duration::from_secs(2);
/// Longest wait of a stamp for the first comparison. A majority has just voted for the leader, so it answers.
const FIRST_COMPARISON_WAIT: Duration = Duration::from_secs(1);

/// The stamping clock of a node; see the module documentation.
#[derive(Debug)]
pub struct StampClock {
    // Locked for a comparison, and for each command.
    anchor: Mutex<Anchor>,
    /// Whether there was a comparison with a majority.
    compared: watch::Sender<bool>,
    applied: AppliedTime,
    began: Instant,
    // Locked for a comparison of times.
    steady: Mutex<SteadyTime>,
}

/// Returns the last stamp that was applied on this node.
struct AppliedTime(Box<dyn Fn() -> Timestamp + Send + Sync>);

impl fmt::Debug for AppliedTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.0)().fmt(f)
    }
}

#[derive(Clone, Copy, Debug)]
struct Anchor {
    wall: SystemTime,
    at: Instant,
    /// By how much the wall clock was ahead of the others', if that was too much.
    ahead: Option<Duration>,
}

impl Anchor {
    /// Returns the time according to the anchor and the monotonic clock.
    fn expected(&self, now: Instant) -> SystemTime {
        let elapsed = now.saturating_duration_since(self.at);
        self.wall.checked_add(elapsed).unwrap_or(self.wall)
    }

    fn stamp(&self, wall: SystemTime, now: Instant) -> SystemTime {
        let expected = self.expected(now);
        match wall.duration_since(expected) {
            Ok(ahead) if ahead > LEAP_MAX => expected,
            _ => wall,
        }
    }
}

impl StampClock {
    /// Makes a clock that trusts the present wall clock until the first comparison. `applied` returns the last stamp
    /// that was applied.
    pub fn new(applied: impl Fn() -> Timestamp + Send + Sync + 'static) -> StampClock {
        StampClock {
            applied: AppliedTime(Box::new(applied)),
            began: Instant::now(),
            steady: Mutex::default(),
            anchor: Mutex::new(Anchor {
                wall: SystemTime::now(),
                at: Instant::now(),
                ahead: None,
            }),
            compared: watch::Sender::new(false),
        }
    }

    /// Returns the stamp for a command. Waits for the first comparison, but at most a second.
    pub async fn stamp(&self) -> Timestamp {
        if !self.is_compared() {
            let mut compared = self.compared.subscribe();
            let _ =
                tokio::time::timeout(FIRST_COMPARISON_WAIT, compared.wait_for(|compared| *compared)).await;
        }
        self.advance()
    }

    /// Returns the time with which a client may stamp its changes; `None` before the first comparison.
    pub fn told(&self) -> Option<Timestamp> {
        self.is_compared().then(|| self.advance())
    }

    /// Whether there was a comparison with a majority.
    pub fn is_compared(&self) -> bool {
        *self.compared.borrow()
    }

    /// Records that there was a comparison with a majority.
    pub fn note_compared(&self) {
        self.compared
            .send_if_modified(|compared| !std::mem::replace(compared, true));
    }

    /// Returns the time. It must not be used as a stamp.
    pub fn now(&self) -> Timestamp {
        let (moment, wall) = self.wall();
        let mut steady = self.steady.lock();
        steady.advance(moment, (self.applied.0)());
        steady.at(moment, wall)
    }

    /// Returns the time; later stamps and times sent are not before it.
    fn advance(&self) -> Timestamp {
        let (moment, wall) = self.wall();
        let mut steady = self.steady.lock();
        steady.advance(moment, (self.applied.0)());
        steady.advance(moment, wall)
    }

    /// Returns this node's clock without its jumps, and the time of the monotonic clock.
    fn wall(&self) -> (Duration, Timestamp) {
        let anchor = *self.anchor.lock();
        let now = Instant::now();
        let wall = anchor.stamp(SystemTime::now(), now);
        (now.saturating_duration_since(self.began), Timestamp::from(wall))
    }

    /// Returns by how much the wall clock was ahead of the others' at the last comparison, if that was too much.
    pub fn ahead(&self) -> Option<Duration> {
        self.anchor.lock().ahead
    }

    /// Compares `wall`, this node's clock at `now`, with the others' clocks at the same moment. Returns whether the
    /// clock has become trusted or has ceased to be.
    pub fn compare(&self, wall: SystemTime, now: Instant, others: Vec<SystemTime>) -> bool {
        let mut anchor = self.anchor.lock();
        let before = anchor.ahead.is_some();
        *anchor = match ahead_of_median(wall, others) {
            Some((ahead, median)) if ahead > LEAP_MAX => Anchor {
                wall: median,
                at: now,
                ahead: Some(ahead),
            },
            _ => Anchor {
                wall,
                at: now,
                ahead: None,
            },
        };
        before != anchor.ahead.is_some()
    }
}

/// Returns by how much `wall` is ahead of the median of the others, and the median; `None` if it is not ahead, or there
/// are no others. Of an even number the later of the two middle values is used: half of the others and this node are a
/// majority.
fn ahead_of_median(wall: SystemTime, mut others: Vec<SystemTime>) -> Option<(Duration, SystemTime)> {
    others.sort_unstable();
    let median = *others.get(others.len() / 2)?;
    Some((wall.duration_since(median).ok()?, median))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const SECOND: Duration = Duration::from_secs(1);

    struct Story {
        clock: StampClock,
        wall: SystemTime,
        now: Instant,
    }

    impl Story {
        fn begin() -> Story {
            let clock = StampClock::new(Timestamp::default);
            let Anchor { wall, at: now, .. } = *clock.anchor.lock();
            Story { clock, wall, now }
        }

        /// Returns the stamp at `after` the beginning, from a wall clock that is then `ahead` of the right time.
        fn stamp(&self, after: Duration, ahead: Duration) -> SystemTime {
            let anchor = *self.clock.anchor.lock();
            anchor.stamp(self.wall + after + ahead, self.now + after)
        }

        /// Compares with others that have the right time.
        fn compare(&self, after: Duration, ahead: Duration, others: usize) -> bool {
            let right = self.wall + after;
            self.clock
                .compare(right + ahead, self.now + after, vec![right; others])
        }
    }

    #[test]
    fn a_leap_is_not_stamped_from_the_first_command_on_nor_after_the_comparison() {
        let story = Story::begin();
        assert_eq!(
            story.stamp(SECOND, SECOND),
            story.wall + 2 * SECOND,
            "a little is not a leap"
        );
        assert_eq!(story.stamp(10 * SECOND, HOUR), story.wall + 10 * SECOND);
        assert!(story.compare(11 * SECOND, HOUR, 2), "told");
        assert_eq!(story.clock.ahead(), Some(HOUR));
        assert_eq!(story.stamp(12 * SECOND, HOUR), story.wall + 12 * SECOND);
        assert!(!story.compare(16 * SECOND, HOUR, 2), "told once");
        assert_eq!(story.stamp(99 * SECOND, HOUR), story.wall + 99 * SECOND);
        assert!(story.compare(100 * SECOND, Duration::ZERO, 2), "mended");
        assert_eq!(story.clock.ahead(), None);
    }

    #[test]
    fn a_leap_that_the_others_made_too_is_trusted_after_the_comparison() {
        let story = Story::begin();
        let leapt = story.wall + HOUR;
        assert!(!story.clock.compare(leapt, story.now, vec![leapt, story.wall]));
        assert_eq!(story.stamp(SECOND, HOUR), story.wall + HOUR + SECOND);
    }

    #[test]
    fn a_clock_that_was_wrong_from_the_start_is_found_by_the_comparison() {
        let story = Story::begin();
        let right = story.wall - HOUR;
        assert!(story.clock.compare(story.wall, story.now, vec![right; 2]));
        assert_eq!(story.stamp(SECOND, Duration::ZERO), right + SECOND);
    }

    #[test]
    fn a_clock_that_is_behind_or_alone_is_used_as_it_is() {
        let story = Story::begin();
        let later = story.wall + HOUR;
        assert!(!story.clock.compare(story.wall, story.now, vec![later; 2]));
        assert_eq!(story.stamp(SECOND, Duration::ZERO), story.wall + SECOND);
        assert!(!story.compare(2 * SECOND, HOUR, 0), "nobody to compare with");
        assert_eq!(story.stamp(3 * SECOND, HOUR), story.wall + HOUR + 3 * SECOND);
    }

    #[tokio::test]
    async fn the_first_stamps_wait_for_the_first_comparison() {
        let clock = StampClock::new(Timestamp::default);
        let began = Instant::now();
        clock.stamp().await;
        assert!(began.elapsed() >= FIRST_COMPARISON_WAIT, "nobody answers");
        let clock = StampClock::new(Timestamp::default);
        let hour_back = SystemTime::now() - HOUR;
        let (stamp, ()) = tokio::join!(clock.stamp(), async {
            tokio::time::sleep(FIRST_COMPARISON_WAIT / 20).await;
            clock.compare(SystemTime::now(), Instant::now(), vec![hour_back; 2]);
            clock.note_compared();
        });
        assert!(stamp < Timestamp::from(SystemTime::now() - HOUR / 2));
        let began = Instant::now();
        clock.stamp().await;
        assert!(began.elapsed() < FIRST_COMPARISON_WAIT / 2);
    }

    #[tokio::test]
    async fn a_clock_behind_what_was_applied_goes_on_from_there() {
        let ahead = Timestamp::from(SystemTime::now() + HOUR);
        let clock = StampClock::new(move || ahead);
        assert_eq!(clock.told(), None, "nobody vouches for it");
        clock.note_compared();
        let first = clock.stamp().await;
        assert!(first >= ahead);
        std::thread::sleep(SECOND / 20);
        let told = clock.told().unwrap();
        assert!(
            told >= first.plus(SECOND / 80) && told < first.plus(HOUR / 2),
            "it stands still, or leaps: {first:?}, {told:?}"
        );
        assert!(clock.stamp().await >= told);
    }

    #[test]
    fn one_that_is_far_behind_does_not_draw_the_others_back() {
        let wall = SystemTime::now();
        let (ahead, _) = ahead_of_median(wall, vec![wall - HOUR, wall]).unwrap();
        assert_eq!(ahead, Duration::ZERO);
        let four = vec![wall - HOUR, wall - HOUR, wall, wall];
        assert_eq!(ahead_of_median(wall, four).unwrap().0, Duration::ZERO);
    }
}
