//! Estimates the offset of this node's clock from samples of NTP servers. Pure: no sockets, no clock.
//!
//! Of one server's samples the one with the least delay is used, because other delays may be asymmetric. Of several
//! servers the one with the least delay is used among those with which a majority agrees: of three, one may be wrong.
//! An estimate is kept while servers do not answer; its uncertainty grows with the possible drift of the clock, until
//! it is too old.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Above this offset a clock is skewed.
const SKEWED_US_MIN: u64 = 1_000_000;
/// A skewed clock is good again below this offset, so that its state does not flap.
const STRAIGHT_US_MAX: u64 = 500_000;
/// After this many failed rounds in a row the last estimate is discarded (as in chrony and ntpd).
const FAILED_ROUNDS_MAX: u32 = 8;
/// Possible drift of an ordinary quartz clock.
const DRIFT_PPM: u64 = 15;

/// One answer of one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The value to add to this node's clock to get the server's time, in microseconds.
    pub offset_us: i64,
    /// Round trip without the server's own time, in microseconds.
    pub delay_us: u64,
    /// Possible error of the server's clock, in microseconds: half its root delay plus its root dispersion.
    pub root_us: u64,
    /// The server's distance from a reference clock: 1 to 15.
    pub stratum: u8,
    /// Time of arrival.
    pub at: Instant,
}

/// The result of a round of questions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Address of the server.
    pub server: String,
    /// The sample that was selected.
    pub sample: Sample,
}

impl Estimate {
    /// Returns the possible error of `offset_us` at `now`, in microseconds.
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

/// Returns the best sample of a server.
pub fn best_sample(samples: Vec<Sample>) -> Option<Sample> {
    samples.into_iter().min_by_key(|sample| sample.delay_us)
}

/// Returns the best estimate: the one with the least delay among those with which more than half of all agree. Without
/// a majority, the one with the least delay.
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

/// The state of a node's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClockState {
    /// No NTP server is configured.
    #[default]
    Off,
    /// No NTP server has answered, ever or recently.
    Unsynchronized,
    /// The clock was compared with an NTP server.
    Synchronized,
    /// Compared with an NTP server, and more than a second off.
    Skewed,
}

/// The estimate of this node's clock over several rounds.
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
    /// Returns the state before the first round; `off` stays if no server is configured.
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

    /// Records the result of a round. Returns whether it is worth reporting: the state has changed, or it was the first
    /// round.
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

    /// Returns the state of the clock.
    pub fn state(&self) -> ClockState {
        self.state
    }

    /// Returns the result of the last successful round; `None` if it is too old.
    pub fn estimate(&self) -> Option<&Estimate> {
        self.estimate
            .as_ref()
            .filter(|_| self.state != ClockState::Unsynchronized)
    }

    /// Returns the time of the last successful round.
    pub fn last_success(&self) -> Option<Instant> {
        self.estimate.as_ref().map(|estimate| estimate.sample.at)
    }

    /// Returns why the last round failed, if it did.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Returns the number of rounds, and of failed ones.
    pub fn counts(&self) -> (u64, u64) {
        (self.rounds, self.failed_rounds)
    }

    /// Returns the pause before the next round, for rounds that are `interval` apart: after a failure the next round
    /// comes sooner, with growing pauses.
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
        // One against one: it is unknown which is right, so the nearer one is used.
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
