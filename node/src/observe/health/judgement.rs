//! Judges the health of a peer from the probes of one node. Pure: results and times are arguments.
//!
//! A peer is unhealthy after [`FAILURES_MAX`] failures in a row, healthy after one success; before either its state is
//! unknown.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::Serialize;

/// Number of failures in a row that makes a peer unhealthy.
pub const FAILURES_MAX: u32 = 3;
/// Number of response times kept: at one probe in 5 s, those of the last 21 minutes.
const WINDOW_PROBES: usize = 256;
/// Most bytes kept of the reason of a failed probe.
const REASON_BYTES_MAX: usize = 200;

/// The health of a peer, judged by one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthState {
    /// The state is not decided yet.
    #[default]
    Unknown,
    /// The last probe was answered, or fewer than three in a row were not.
    Healthy,
    /// At least three probes in a row were not answered.
    Unhealthy,
}

/// A change of the peer's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The peer answers. The value is how long it was unhealthy, or `None` if it was not judged before.
    BecameHealthy(Option<Duration>),
    /// The peer does not answer, for this reason of the last probe.
    BecameUnhealthy(String),
}

/// The judgement of one peer.
#[derive(Clone, Debug)]
pub struct PeerHealth {
    state: HealthState,
    since: Instant,
    failures_in_row: u32,
    probes: u64,
    failures: u64,
    last_success: Option<Instant>,
    last_error: Option<String>,
    times: ResponseTimes,
}

impl PeerHealth {
    /// Returns the state at `now`, before any probe.
    pub fn new(now: Instant) -> PeerHealth {
        PeerHealth {
            state: HealthState::Unknown,
            since: now,
            failures_in_row: 0,
            probes: 0,
            failures: 0,
            last_success: None,
            last_error: None,
            times: ResponseTimes::default(),
        }
    }

    /// Records a probe that ended at `now`: its duration, or why it failed.
    pub fn record(&mut self, now: Instant, outcome: Result<Duration, String>) -> Option<Change> {
        self.probes += 1;
        let before = self.state;
        match outcome {
            Ok(time) => {
                self.failures_in_row = 0;
                self.last_success = Some(now);
                self.times.add(time);
                self.state = HealthState::Healthy;
            }
            Err(reason) => {
                self.failures += 1;
                self.failures_in_row = self.failures_in_row.saturating_add(1);
                self.last_error = Some(shortened(reason));
                if self.failures_in_row >= FAILURES_MAX {
                    self.state = HealthState::Unhealthy;
                }
            }
        }
        if self.state == before {
            return None;
        }
        let lasted = now.saturating_duration_since(self.since);
        self.since = now;
        match self.state {
            HealthState::Healthy => Some(Change::BecameHealthy(
                (before == HealthState::Unhealthy).then_some(lasted),
            )),
            HealthState::Unhealthy => Some(Change::BecameUnhealthy(
                self.last_error.clone().unwrap_or_default(),
            )),
            HealthState::Unknown => None,
        }
    }

    /// Returns the present judgement.
    pub fn state(&self) -> HealthState {
        self.state
    }

    /// Returns the time since which it holds.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Returns the number of failures since the last success.
    pub fn failures_in_row(&self) -> u32 {
        self.failures_in_row
    }

    /// Returns the number of probes, and of failed ones.
    pub fn counts(&self) -> (u64, u64) {
        (self.probes, self.failures)
    }

    /// Returns the time of the last answered probe.
    pub fn last_success(&self) -> Option<Instant> {
        self.last_success
    }

    /// Returns the reason of the last failed probe.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// Returns the latest response times.
    pub fn times(&self) -> &ResponseTimes {
        &self.times
    }
}

fn shortened(mut reason: String) -> String {
    if reason.len() > REASON_BYTES_MAX {
        let end = (0..=REASON_BYTES_MAX)
            .rev()
            .find(|at| reason.is_char_boundary(*at));
        reason.truncate(end.unwrap_or(0));
    }
    reason
}

/// A bounded window of the latest response times of one peer.
#[derive(Clone, Debug, Default)]
pub struct ResponseTimes {
    latest_us: VecDeque<u64>,
}

impl ResponseTimes {
    fn add(&mut self, time: Duration) {
        if self.latest_us.len() == WINDOW_PROBES {
            self.latest_us.pop_front();
        }
        self.latest_us
            .push_back(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// Returns the number of times.
    pub fn count(&self) -> usize {
        self.latest_us.len()
    }

    /// Returns the last time, in microseconds.
    pub fn last_us(&self) -> Option<u64> {
        self.latest_us.back().copied()
    }

    /// Returns the mean, in microseconds.
    pub fn mean_us(&self) -> Option<u64> {
        let sum = self.latest_us.iter().map(|us| u128::from(*us)).sum::<u128>();
        let mean = sum.checked_div(self.latest_us.len() as u128)?;
        Some(u64::try_from(mean).unwrap_or(u64::MAX))
    }

    /// Returns the 99th percentile, in microseconds.
    pub fn p99_us(&self) -> Option<u64> {
        let mut sorted: Vec<u64> = self.latest_us.iter().copied().collect();
        sorted.sort_unstable();
        let rank = (sorted.len() * 99).div_ceil(100);
        sorted.get(rank.checked_sub(1)?).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn fails(peer: &mut PeerHealth, now: Instant, reason: &str) -> Option<Change> {
        peer.record(now, Err(reason.to_string()))
    }

    #[test]
    fn three_failures_in_a_row_make_unhealthy_and_one_success_heals() {
        let start = Instant::now();
        let mut peer = PeerHealth::new(start);
        assert_eq!(peer.state(), HealthState::Unknown);
        assert_eq!(
            peer.record(start + SECOND, Ok(SECOND)),
            Some(Change::BecameHealthy(None))
        );
        assert_eq!(fails(&mut peer, start + 2 * SECOND, "a"), None);
        assert_eq!(fails(&mut peer, start + 3 * SECOND, "b"), None);
        assert_eq!(peer.state(), HealthState::Healthy, "two are not three");
        assert_eq!(peer.since(), start + SECOND);
        assert_eq!(
            fails(&mut peer, start + 4 * SECOND, "c"),
            Some(Change::BecameUnhealthy("c".to_string()))
        );
        assert_eq!((peer.failures_in_row(), peer.counts()), (3, (4, 3)));
        assert_eq!(fails(&mut peer, start + 5 * SECOND, "d"), None, "told once");
        assert_eq!(peer.since(), start + 4 * SECOND);
        assert_eq!(
            peer.record(start + 9 * SECOND, Ok(SECOND)),
            Some(Change::BecameHealthy(Some(5 * SECOND)))
        );
        assert_eq!(
            (peer.failures_in_row(), peer.last_error()),
            (0, Some("d")),
            "the count begins anew, the reason is kept"
        );
    }

    #[test]
    fn failures_that_are_not_in_a_row_do_not_count() {
        let start = Instant::now();
        let mut peer = PeerHealth::new(start);
        for round in 0..50u32 {
            let outcome = if round % 3 == 2 {
                Ok(SECOND)
            } else {
                Err(String::new())
            };
            peer.record(start + round * SECOND, outcome);
            assert_ne!(peer.state(), HealthState::Unhealthy, "round {round}");
        }
    }

    #[test]
    fn a_peer_that_never_answered_is_not_decided_before_the_third_failure() {
        let start = Instant::now();
        let mut peer = PeerHealth::new(start);
        fails(&mut peer, start, "refused");
        fails(&mut peer, start, "refused");
        assert_eq!(peer.state(), HealthState::Unknown);
        assert!(matches!(
            fails(&mut peer, start, "refused"),
            Some(Change::BecameUnhealthy(_))
        ));
    }

    #[test]
    fn response_times_are_of_a_bounded_window() {
        let mut times = ResponseTimes::default();
        assert_eq!(
            (times.last_us(), times.mean_us(), times.p99_us()),
            (None, None, None)
        );
        times.add(Duration::from_micros(7));
        assert_eq!(
            (times.last_us(), times.mean_us(), times.p99_us()),
            (Some(7), Some(7), Some(7))
        );
        // Values older than the window do not count: 256 times from 1 to 256 remain.
        for us in (1..=1000).rev() {
            times.add(Duration::from_micros(us));
        }
        assert_eq!(times.count(), WINDOW_PROBES);
        assert_eq!(times.last_us(), Some(1));
        assert_eq!(times.mean_us(), Some(128));
        // ceil(256 * 0.99) = 254
        assert_eq!(times.p99_us(), Some(254));
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let mut peer = PeerHealth::new(Instant::now());
        fails(&mut peer, Instant::now(), &"ä".repeat(150));
        assert_eq!(peer.last_error().unwrap().len(), 200);
        let mut peer = PeerHealth::new(Instant::now());
        fails(&mut peer, Instant::now(), &format!("x{}", "ä".repeat(150)));
        assert_eq!(peer.last_error().unwrap().len(), 199);
    }
}
