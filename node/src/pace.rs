//! Rates: a limit for work that could use all of a disk or a network, and a measurement of work done. Pure: times are
//! arguments.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most time that a [`Pacer`] may catch up: after a busy moment it does not demand all of the missed work at once.
const SLACK_MS: u64 = 100;
/// Window of a [`RateMeter`].
const RATE_WINDOW_MS: u64 = 5_000;
/// Least divisor: work that has just begun has no rate yet.
const RATE_SPAN_MS_MIN: u64 = 1_000;
/// Bounds the memory of a meter: work within less time than this is one entry.
const RATE_STEP_MS: u64 = 100;

/// Limits bytes to a rate.
#[derive(Debug)]
pub struct Pacer {
    bytes_per_s: u64,
    next: Option<Instant>,
}

impl Pacer {
    /// Makes a limit of `bytes_per_s`, at least 1.
    pub fn new(bytes_per_s: u64) -> Pacer {
        Pacer {
            bytes_per_s: bytes_per_s.max(1),
            next: None,
        }
    }

    /// Takes `bytes` at `now`; returns the time to wait before they may be used.
    pub fn take(&mut self, now: Instant, bytes: u64) -> Duration {
        let earliest = now.checked_sub(Duration::from_millis(SLACK_MS)).unwrap_or(now);
        let begin = self.next.map_or(now, |next| next.max(earliest));
        let seconds = bytes as f64 / self.bytes_per_s as f64;
        self.next = Some(begin + Duration::from_secs_f64(seconds));
        begin.saturating_duration_since(now)
    }
}

/// Measures bytes per second over the last seconds.
#[derive(Debug, Default)]
pub struct RateMeter {
    steps: VecDeque<(Instant, u64)>,
}

impl RateMeter {
    /// Records `bytes` done at `now`.
    pub fn add(&mut self, now: Instant, bytes: u64) {
        match self.steps.back_mut() {
            Some((at, sum)) if now.saturating_duration_since(*at) < Duration::from_millis(RATE_STEP_MS) => {
                *sum += bytes;
            }
            _ => self.steps.push_back((now, bytes)),
        }
        self.forget(now);
    }

    /// Returns the rate at `now` in bytes per second; 0 if nothing was done recently.
    pub fn bytes_per_s(&mut self, now: Instant) -> u64 {
        self.forget(now);
        let Some((first, _)) = self.steps.front() else {
            return 0;
        };
        let bytes: u64 = self.steps.iter().map(|(_, bytes)| bytes).sum();
        let over = now
            .saturating_duration_since(*first)
            .max(Duration::from_millis(RATE_SPAN_MS_MIN));
        (bytes as f64 / over.as_secs_f64()) as u64
    }

    fn forget(&mut self, now: Instant) {
        let window = Duration::from_millis(RATE_WINDOW_MS);
        while self
            .steps
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > window)
        {
            self.steps.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pacer_spreads_bytes_over_time() {
        let mut pacer = Pacer::new(1000);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(pacer.take(at(0), 500), Duration::ZERO);
        assert_eq!(pacer.take(at(0), 500), Duration::from_millis(500));
        assert_eq!(pacer.take(at(600), 100), Duration::from_millis(400));
        // Idle time is not saved up, except for the slack.
        assert_eq!(pacer.take(at(10_000), 1000), Duration::ZERO);
        assert_eq!(pacer.take(at(10_000), 1), Duration::from_millis(900));
    }

    #[test]
    fn a_rate_is_of_the_last_seconds() {
        let mut meter = RateMeter::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(meter.bytes_per_s(at(0)), 0);
        for ms in (0..2000).step_by(10) {
            meter.add(at(ms), 1000);
        }
        assert_eq!(meter.bytes_per_s(at(2000)), 100_000);
        assert!(meter.steps.len() <= 21);
        assert_eq!(meter.bytes_per_s(at(8000)), 0);
    }
}
