//! What samples of NTP servers say about this node's clock. Pure: no sockets, no clock.
//!
//! Of one server's samples the one with the least delay wins: what delayed the others is not known to be symmetric. Of
//! several servers the one with the least delay wins among those that a majority agrees with: of three, one may lie.
//! An estimate is kept while servers do not answer, and its uncertainty grows as a quartz may drift, until it is too old.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Above this offset a clock is skewed.
const SKEWED_US_MIN: u64 = 1_000_000;
/// A skewed clock is good again below this: it does not flap.
const STRAIGHT_US_MAX: u64 = 500_000;
/// After so many failed rounds in a row the last estimate says nothing any more (as chrony and ntpd have it).
const FAILED_ROUNDS_MAX: u32 = 8;
/// How far an ordinary quartz may drift.
const DRIFT_PPM: u64 = 15;

/// One answer of one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What must be added to this node's clock to get the server's time, in microseconds.
    pub offset_us: i64,
    /// Of the round trip, without the time the server took.
    pub delay_us: u64,
    /// How far the server may be off itself: half its root delay, and its root dispersion.
    pub root_us: u64,
    /// How far the server is from a reference clock: 1 to 15.
    pub stratum: u8,
    /// When it came.
    pub at: Instant,
}

/// What a round of asking made known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Whom it is from.
    pub server: String,
    /// The sample that won.
    pub sample: Sample,
}

impl Estimate {
    /// How far `offset_us` may be wrong at `now`.
    pub fn uncertainty_us(&self, now: Instant) -> u64 {
        let age = now.saturating_duration_since(self.sample.at);
        let drift = u64::try_from(age.as_micros() * u128::from(DRIFT_PPM) / 1_000_000).unwrap_or(u64::MAX);
        (self.sample.delay_us / 2)
            .saturating_add(self.sample.root_us)
            .saturating_add(drift)
    }

    fn agrees_with(&self, other: &Estimate) -> bool {
        let apart = self.sample.offset_us.abs_diff(other.sample.offset_us);
        let own = self.uncertainty_us(self.sample.at);
        apart <= own.saturating_add(other.uncertainty_us(other.sample.at))
    }
}

/// The sample of a server that is worth most.
pub fn best_sample(samples: Vec<Sample>) -> Option<Sample> {
    samples.into_iter().min_by_key(|sample| sample.delay_us)
}

/// The server's estimate that is worth most: of the least delay among those that more than half of all agree with. Where
/// there is no majority, of the least delay.
pub fn best_estimate(estimates: Vec<Estimate>) -> Option<Estimate> {
    let agreeing = |one: &Estimate| estimates.iter().filter(|other| one.agrees_with(other)).count();
    let majority: Vec<&Estimate> = estimates
        .iter()
        .filter(|one| agreeing(one) > estimates.len() / 2)
        .collect();
    let candidates = if majority.is_empty() {
        estimates.iter().collect()
    } else {
        majority
    };
    let best = candidates.into_iter().min_by_key(|one| one.sample.delay_us);
    best.cloned()
}

/// How a node's clock is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClockState {
    /// No NTP server is to be asked.
    #[default]
    Off,
    /// No NTP server has answered, lately or ever.
    Unsynchronized,
    /// An NTP server was compared with.
    Synchronized,
    /// As synchronized, and the clock is over a second off.
    Skewed,
}

/// What is known of this node's clock.
#[derive(Clone, Debug)]
pub struct ClockFilter {
    state: ClockState,
    estimate: Option<Estimate>,
    reason: Option<String>,
    rounds: u64,
    failed_rounds: u64,
    failed_in_row: u32,
}

impl ClockFilter {
    /// Before the first round; `off` for ever if nobody is to be asked.
    pub fn new(off: bool) -> ClockFilter {
        let (state, reason) = match off {
            true => (ClockState::Off, None),
            false => (
                ClockState::Unsynchronized,
                Some("no NTP server has been asked yet".to_string()),
            ),
        };
        ClockFilter {
            state,
            estimate: None,
            reason,
            rounds: 0,
            failed_rounds: 0,
            failed_in_row: 0,
        }
    }

    /// A round ended: what it made known, or why nothing. Answers whether that is worth telling: the state is another,
    /// or it was the first round.
    pub fn record(&mut self, round: Result<Estimate, String>) -> bool {
        self.rounds += 1;
        let before = self.state;
        match round {
            Ok(estimate) => {
                let offset_us = estimate.sample.offset_us.unsigned_abs();
                let skewed = match before {
                    ClockState::Skewed => offset_us >= STRAIGHT_US_MAX,
                    _ => offset_us > SKEWED_US_MIN,
                };
                self.state = if skewed {
                    ClockState::Skewed
                } else {
                    ClockState::Synchronized
                };
                self.estimate = Some(estimate);
                self.reason = None;
                self.failed_in_row = 0;
            }
            Err(reason) => {
                self.failed_rounds += 1;
                self.failed_in_row = self.failed_in_row.saturating_add(1);
                self.reason = Some(reason);
                if self.estimate.is_none() || self.failed_in_row >= FAILED_ROUNDS_MAX {
                    self.state = ClockState::Unsynchronized;
                }
            }
        }
        self.state != before || self.rounds == 1
    }

    /// How the clock is.
    pub fn state(&self) -> ClockState {
        self.state
    }

    /// What the last round that succeeded made known; `None` where it says nothing any more.
    pub fn estimate(&self) -> Option<&Estimate> {
        self.estimate
            .as_ref()
            .filter(|_| self.state != ClockState::Unsynchronized)
    }

    /// When a round succeeded last.
    pub fn last_success(&self) -> Option<Instant> {
        self.estimate.as_ref().map(|estimate| estimate.sample.at)
    }

    /// Why the last round failed, if it did.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Rounds so far, and how many failed.
    pub fn counts(&self) -> (u64, u64) {
        (self.rounds, self.failed_rounds)
    }

    /// How long to wait for the next round, where rounds are `interval` apart: who has not answered is asked again
    /// earlier, and ever later.
    pub fn pause(&self, interval: Duration) -> Duration {
        match self.failed_in_row {
            0 => interval,
            failed => interval * failed.min(4) / 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(offset_us: i64, delay_us: u64) -> Sample {
        Sample {
            offset_us,
            delay_us,
            root_us: 100,
            stratum: 2,
            at: Instant::now(),
        }
    }

    fn estimate(server: &str, offset_us: i64, delay_us: u64) -> Estimate {
        Estimate {
            server: server.to_string(),
            sample: sample(offset_us, delay_us),
        }
    }

    #[test]
    fn the_sample_with_the_least_delay_wins() {
        let best = best_sample(vec![sample(900, 5_000), sample(10, 40), sample(-700, 9_000)]);
        assert_eq!(best.map(|best| best.offset_us), Some(10));
        assert_eq!(best_sample(Vec::new()), None);
    }

    #[test]
    fn uncertainty_is_half_the_delay_the_servers_own_and_grows_with_age() {
        let one = estimate("a", 0, 400);
        let at = one.sample.at;
        assert_eq!(one.uncertainty_us(at), 200 + 100);
        assert_eq!(
            one.uncertainty_us(at + Duration::from_secs(1000)),
            300 + 15_000,
            "15 ppm of 1000 s"
        );
    }

    #[test]
    fn of_three_servers_one_may_lie_however_near_it_is() {
        let lying = estimate("liar", 5_000_000, 10);
        let best = best_estimate(vec![
            lying.clone(),
            estimate("a", 120, 800),
            estimate("b", 90, 600),
        ]);
        assert_eq!(best.unwrap().server, "b");
        // One against one: nobody knows who is right, the nearer one is taken.
        let best = best_estimate(vec![lying, estimate("a", 120, 800)]);
        assert_eq!(best.unwrap().server, "liar");
        assert_eq!(best_estimate(Vec::new()), None);
    }

    #[test]
    fn a_clock_is_skewed_above_a_second_in_either_direction_and_does_not_flap() {
        let mut filter = ClockFilter::new(false);
        assert_eq!(filter.state(), ClockState::Unsynchronized);
        assert!(filter.record(Ok(estimate("a", 999_000, 10))));
        assert_eq!(filter.state(), ClockState::Synchronized);
        assert!(filter.record(Ok(estimate("a", -1_000_001, 10))));
        assert_eq!(filter.state(), ClockState::Skewed);
        assert!(
            !filter.record(Ok(estimate("a", 999_000, 10))),
            "still skewed, told once"
        );
        assert_eq!(filter.state(), ClockState::Skewed);
        assert!(filter.record(Ok(estimate("a", 400_000, 10))));
        assert_eq!(filter.state(), ClockState::Synchronized);
    }

    #[test]
    fn silence_is_told_once_and_only_after_eight_rounds_if_there_was_an_answer() {
        let mut silent = ClockFilter::new(false);
        assert!(
            silent.record(Err("nobody".to_string())),
            "the first round is told"
        );
        for _ in 0..20 {
            assert!(!silent.record(Err("nobody".to_string())));
        }
        assert_eq!(
            (silent.state(), silent.reason()),
            (ClockState::Unsynchronized, Some("nobody"))
        );

        let mut lost = ClockFilter::new(false);
        lost.record(Ok(estimate("a", 5, 10)));
        for _ in 0..7 {
            assert!(!lost.record(Err("gone".to_string())));
            assert_eq!(lost.state(), ClockState::Synchronized);
        }
        assert!(lost.record(Err("gone".to_string())));
        assert_eq!(lost.state(), ClockState::Unsynchronized);
        assert_eq!(lost.estimate(), None);
        assert!(lost.record(Ok(estimate("a", 5, 10))));
        assert_eq!((lost.state(), lost.counts()), (ClockState::Synchronized, (10, 8)));
    }

    #[test]
    fn who_does_not_answer_is_asked_earlier_but_ever_less() {
        let interval = Duration::from_secs(64);
        let mut filter = ClockFilter::new(false);
        assert_eq!(filter.pause(interval), interval);
        let pauses: Vec<u64> = (0..6)
            .map(|_| {
                filter.record(Err(String::new()));
                filter.pause(interval).as_secs()
            })
            .collect();
        assert_eq!(pauses, [16, 32, 48, 64, 64, 64]);
    }
}
