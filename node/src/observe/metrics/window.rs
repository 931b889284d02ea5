//! Present rates: differences between samples of counters that only grow.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use quorumfs_measure::{CallCounter, Snapshot};

/// Length of the window.
const WINDOW_MS: u64 = 10_000;
/// Number of samples kept: those of the window at one a second, with a margin for uneven steps.
const SAMPLES_MAX: usize = 16;

/// Counters of one kind at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub count: u64,
    pub failures: u64,
    pub bytes: u64,
}

impl Totals {
    pub fn of(counter: &CallCounter) -> Totals {
        Totals {
            count: counter.count(),
            failures: counter.failures(),
            bytes: counter.bytes(),
        }
    }
}

/// The rates of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    pub count_per_s: f64,
    pub failures_per_s: f64,
    pub bytes_per_s: f64,
}

/// The last samples, oldest first.
#[derive(Debug)]
pub struct Window<Sample> {
    samples: VecDeque<(Instant, Sample)>,
}

impl<Sample> Default for Window<Sample> {
    fn default() -> Window<Sample> {
        Window {
            samples: VecDeque::new(),
        }
    }
}

impl<Sample> Window<Sample> {
    /// Adds a sample; samples with which no window begins any more are removed.
    pub fn add(&mut self, at: Instant, sample: Sample) {
        self.samples.push_back((at, sample));
        let window = Duration::from_millis(WINDOW_MS);
        // One sample at or before the beginning of the window is kept.
        while self.samples.len() > SAMPLES_MAX
            || self
                .samples
                .get(1)
                .is_some_and(|(second, _)| at.duration_since(*second) >= window)
        {
            self.samples.pop_front();
        }
    }
}

impl Window<Snapshot> {
    /// Returns the values recorded since the oldest sample.
    pub fn lately(&self, now: &Snapshot) -> Snapshot {
        match self.samples.front() {
            Some((_, before)) => now.since(before),
            None => now.clone(),
        }
    }
}

impl Window<Vec<Totals>> {
    /// Returns the window and the rates from the oldest sample (or from the beginning, when all counters were 0) to
    /// `now`.
    pub fn rates(&self, began: Instant, now: Instant, totals: &[Totals]) -> (Duration, Vec<Rate>) {
        let (since, before) = match self.samples.front() {
            Some((at, before)) => (*at, before.as_slice()),
            None => (began, &[][..]),
        };
        let window = now.duration_since(since);
        // The first moments after a start are too short for a rate.
        let seconds = window.as_secs_f64().max(1.0);
        let per_second = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let rate = |(at, now): (usize, &Totals)| {
            let before = before.get(at).copied().unwrap_or_default();
            Rate {
                count_per_s: per_second(now.count, before.count),
                failures_per_s: per_second(now.failures, before.failures),
                bytes_per_s: per_second(now.bytes, before.bytes),
            }
        };
        (window, totals.iter().enumerate().map(rate).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(count: u64) -> Vec<Totals> {
        vec![Totals {
            count,
            failures: 0,
            bytes: count * 100,
        }]
    }

    #[test]
    fn the_last_ten_seconds_count() {
        let began = Instant::now();
        let at = |second: u64| began + Duration::from_secs(second);
        let mut window = Window::default();
        // 50 per second for a minute, then nothing.
        for second in 1..=60 {
            window.add(at(second), totals(50 * second));
        }
        let (over, rates) = window.rates(began, at(60), &totals(3000));
        assert_eq!(over, Duration::from_secs(10));
        assert_eq!(rates[0].count_per_s, 50.0);
        assert_eq!(rates[0].bytes_per_s, 5000.0);
        for second in 61..=80 {
            window.add(at(second), totals(3000));
        }
        let (_, rates) = window.rates(began, at(80), &totals(3000));
        assert_eq!(rates[0].count_per_s, 0.0);
    }

    #[test]
    fn before_the_first_sample_it_counts_from_the_beginning() {
        let began = Instant::now();
        let (over, rates) = Window::default().rates(began, began + Duration::from_secs(2), &totals(10));
        assert_eq!((over, rates[0].count_per_s), (Duration::from_secs(2), 5.0));
        let (_, rates) = Window::default().rates(began, began + Duration::from_millis(1), &totals(10));
        assert_eq!(rates[0].count_per_s, 10.0, "a millisecond is not blown up");
    }
}
