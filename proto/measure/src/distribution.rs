//! Distributions of values, with their quantiles.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use histogram::{AtomicHistogram, Histogram};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Each power of two is divided into 2^5 = 32 buckets, so a value is known to 1/32.
const GROUPING_POWER: u8 = 5;
/// Values are below 2^40; larger ones count as the largest. As nanoseconds that is 18 minutes.
const VALUE_POWER_MAX: u8 = 40;
const VALUE_MAX: u64 = (1 << VALUE_POWER_MAX) - 1;

const NANOS_PER_MICRO: u64 = 1_000;

/// Values recorded from any thread. Takes about 9 KiB.
#[derive(Debug)]
pub struct Distribution {
    buckets: AtomicHistogram,
    count: AtomicU64,
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Distribution {
    fn default() -> Distribution {
        Distribution::new()
    }
}

impl Distribution {
    /// Returns a distribution without values.
    pub fn new() -> Distribution {
        let buckets = AtomicHistogram::new(GROUPING_POWER, VALUE_POWER_MAX);
        Distribution {
            buckets: buckets.expect("the powers are within the crate's bounds"),
            count: AtomicU64::new(0),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }

    /// Records one value.
    pub fn record(&self, value: u64) {
        // The crate refuses only a value out of bounds; `min` keeps this one within them.
        let _ = self.buckets.increment(value.min(VALUE_MAX));
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
        if value > self.max.load(Ordering::Relaxed) {
            self.max.fetch_max(value, Ordering::Relaxed);
        }
    }

    /// Records one duration, as nanoseconds.
    pub fn record_duration(&self, duration: Duration) {
        self.record(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Returns the number of values.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Returns the sum of the values; it wraps at 2^64 (584 years in nanoseconds).
    pub fn sum(&self) -> u64 {
        self.sum.load(Ordering::Relaxed)
    }

    /// Returns the whole distribution at this moment.
    pub fn snapshot(&self) -> Snapshot {
        let buckets = self.buckets.load();
        Snapshot {
            count: buckets.as_slice().iter().sum(),
            sum: self.sum(),
            max: self.max.load(Ordering::Relaxed),
            buckets,
        }
    }
}

/// A distribution at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    count: u64,
    sum: u64,
    max: u64,
    buckets: Histogram,
}

impl Snapshot {
    /// Returns the values of both snapshots together.
    pub fn merged(&self, other: &Snapshot) -> Snapshot {
        Snapshot {
            count: self.count + other.count,
            sum: self.sum.wrapping_add(other.sum),
            max: self.max.max(other.max),
            // Cannot fail: all distributions have the same buckets.
            buckets: self
                .buckets
                .wrapping_add(&other.buckets)
                .unwrap_or_else(|_| self.buckets.clone()),
        }
    }

    /// Returns the values recorded after `earlier`, an older snapshot of the same distribution. Its largest value is
    /// known to 1/32.
    pub fn since(&self, earlier: &Snapshot) -> Snapshot {
        let buckets = self
            .buckets
            .checked_sub(&earlier.buckets)
            .unwrap_or_else(|_| self.buckets.clone());
        let largest = buckets.iter().filter(|bucket| bucket.count() > 0).last();
        Snapshot {
            count: buckets.as_slice().iter().sum(),
            sum: self.sum.wrapping_sub(earlier.sum),
            max: largest.map_or(0, |bucket| bucket.end().min(self.max)),
            buckets,
        }
    }

    /// Returns the number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns the sum of the values.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// Returns the largest value; 0 if there is none.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// Returns the mean of the values; 0 if there is none.
    pub fn mean(&self) -> f64 {
        match self.count {
            0 => 0.0,
            count => self.sum as f64 / count as f64,
        }
    }

    /// Returns a value that the fraction `quantile` (0 to 1) of the values does not exceed, at most 1/32 too large; 0
    /// if there are no values. Never above [`Snapshot::max`].
    pub fn quantile(&self, quantile: f64) -> u64 {
        // Only a quantile out of bounds is refused, and this one is not.
        let bucket = self.buckets.quantile_bucket(quantile.clamp(0.0, 1.0));
        bucket
            .ok()
            .flatten()
            .map_or(0, |bucket| bucket.end().min(self.max))
    }

    /// Returns the number of values that are at most `value`, without the values of `value`'s own bucket (1/32 around
    /// it).
    pub fn count_up_to(&self, value: u64) -> u64 {
        let below = |bucket: &histogram::Bucket| bucket.end() <= value;
        self.buckets
            .iter()
            .take_while(below)
            .map(|bucket| bucket.count())
            .sum()
    }

    /// Returns the values as a latency; they must be nanoseconds.
    pub fn latency(&self) -> Latency {
        let micros = |nanos: u64| nanos / NANOS_PER_MICRO;
        Latency {
            mean_us: self.mean() as u64 / NANOS_PER_MICRO,
            p50_us: micros(self.quantile(0.50)),
            p90_us: micros(self.quantile(0.90)),
            p99_us: micros(self.quantile(0.99)),
            max_us: micros(self.max),
        }
    }
}

/// Durations of one kind of work, in microseconds; all 0 if there was none. Quantiles are known to about 3 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Latency {
    /// The mean duration.
    pub mean_us: u64,
    /// Half of the durations are at most this.
    pub p50_us: u64,
    /// 90 % of the durations are at most this.
    pub p90_us: u64,
    /// 99 % of the durations are at most this.
    pub p99_us: u64,
    /// The longest duration.
    pub max_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn what_came_since_is_told_apart_from_what_was_before() {
        let distribution = Distribution::new();
        (0..1000).for_each(|_| distribution.record(100));
        let before = distribution.snapshot();
        (0..10).for_each(|_| distribution.record(5_000));
        let lately = distribution.snapshot().since(&before);
        assert_eq!((lately.count(), lately.mean()), (10, 5_000.0));
        assert!((5_000..5_200).contains(&lately.quantile(0.5)));
        assert!((5_000..5_200).contains(&lately.max()));
        let nothing = distribution.snapshot().since(&distribution.snapshot());
        assert_eq!(
            (nothing.count(), nothing.max(), nothing.quantile(0.99)),
            (0, 0, 0)
        );
    }

    #[test]
    fn quantiles_are_within_a_thirtysecond_and_in_order() {
        let distribution = Distribution::new();
        (1..=100_000).for_each(|value| distribution.record(value * 10));
        let snapshot = distribution.snapshot();
        assert_eq!(snapshot.count(), 100_000);
        assert_eq!(snapshot.max(), 1_000_000);
        assert!((snapshot.mean() - 500_005.0).abs() < 1.0);
        for (quantile, exact) in [(0.5, 500_000.0), (0.9, 900_000.0), (0.99, 990_000.0), (1.0, 1e6)] {
            let found = snapshot.quantile(quantile) as f64;
            assert!(
                found >= exact && found <= exact * (1.0 + 1.0 / 32.0),
                "{quantile}: {found}"
            );
        }
        assert_eq!(snapshot.quantile(1.0), 1_000_000, "never above the largest");
        let below = snapshot.count_up_to(500_000);
        assert!((48_000..=50_000).contains(&below), "{below}");
        let twice = snapshot.merged(&snapshot);
        assert_eq!((twice.count(), twice.max()), (200_000, 1_000_000));
        assert_eq!(twice.quantile(0.5), snapshot.quantile(0.5));
        let latency = snapshot.latency();
        assert!(latency.p50_us <= latency.p90_us && latency.p90_us <= latency.p99_us);
        assert!(latency.p99_us <= latency.max_us);
    }

    #[test]
    fn extremes_are_kept_and_nothing_is_nothing() {
        let distribution = Distribution::new();
        assert_eq!(distribution.snapshot().latency(), Latency::default());
        assert_eq!(distribution.snapshot().quantile(0.5), 0);
        distribution.record(0);
        assert_eq!(distribution.snapshot().quantile(0.5), 0);
        distribution.record(u64::MAX);
        assert_eq!(distribution.snapshot().count(), 2);
        assert_eq!(distribution.snapshot().max(), u64::MAX);
        assert!(distribution.snapshot().quantile(0.99) >= VALUE_MAX / 2);
    }

    #[test]
    fn no_value_is_lost_between_threads() {
        let distribution = Distribution::new();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let distribution = &distribution;
                scope.spawn(move || (0..50_000).for_each(|value| distribution.record(value + thread)));
            }
        });
        assert_eq!(distribution.snapshot().count(), 200_000);
        assert_eq!(distribution.count(), 200_000);
        let one: u64 = (0..50_000).sum();
        assert_eq!(distribution.sum(), 4 * one + 50_000 * (1 + 2 + 3));
        assert_eq!(distribution.snapshot().max(), 50_002);
    }

    /// Prints the cost of one record. The bound is wide; it only detects a lock or an allocation.
    #[test]
    fn recording_takes_nanoseconds() {
        const EVENTS: u32 = 1_000_000;
        let distribution = Distribution::new();
        let start = Instant::now();
        for event in 0..u64::from(EVENTS) {
            distribution.record(std::hint::black_box(event * 7919 % 3_000_000));
        }
        let each = start.elapsed() / EVENTS;
        let start = Instant::now();
        for _ in 0..EVENTS {
            let began = Instant::now();
            distribution.record_duration(std::hint::black_box(began.elapsed()));
        }
        let timed = start.elapsed() / EVENTS;
        println!("record: {each:?}, with its two looks at the clock: {timed:?}");
        assert!(timed < Duration::from_micros(5), "{timed:?}");
    }
}
