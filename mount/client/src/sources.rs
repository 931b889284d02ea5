//! Ranks the nodes to read from by their recent latency and failures.
//!
//! The base order is that of the configured addresses. A node without a measurement precedes slower nodes, a busy node
//! follows an idle one, and a failed node comes last until a probe or a read succeeds.
//!
//! Pure: the time is an argument.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

/// Weight of one sample in the exponentially weighted mean latency.
const WEIGHT: f64 = 0.2;
/// The latency decays with this half-life, so that a node that was slow is tried again.
const HALF_LIFE_S: f64 = 10.0;
/// Delay from a failure to the first probe; it doubles with each failure up to the maximum.
const PROBE_DELAY_MS_MIN: u64 = 500;
const PROBE_DELAY_MS_MAX: u64 = 8_000;

/// The health of one node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health {
    latency_us: f64,
    measured_at: Option<Instant>,
    /// Requests in flight.
    pub(crate) in_flight: u32,
    failures: u32,
    probe_after: Option<Instant>,
    probing: bool,
}

impl Health {
    /// Notes an answer after `took`.
    pub(crate) fn answered(&mut self, took: Duration, now: Instant) {
        let sample = took.as_micros() as f64;
        self.latency_us = match self.measured_at {
            None => sample,
            Some(_) => self.latency_us * (1.0 - WEIGHT) + sample * WEIGHT,
        };
        self.measured_at = Some(now);
        self.recovered();
    }

    /// Notes a failure. Several requests that fail together count once.
    pub(crate) fn failed(&mut self, now: Instant) {
        if self.failures > 0 && self.probe_after.is_some_and(|until| until > now) {
            return;
        }
        let delay_ms = (PROBE_DELAY_MS_MIN << self.failures.min(16)).min(PROBE_DELAY_MS_MAX);
        self.failures += 1;
        self.probe_after = Some(now + Duration::from_millis(delay_ms));
    }

    fn recovered(&mut self) {
        self.failures = 0;
        self.probe_after = None;
    }

    /// Returns whether the caller is to probe the failed node now. No other probe starts before [`Health::probed`] is
    /// called.
    pub(crate) fn start_probe_if_due(&mut self, now: Instant) -> bool {
        let due = !self.probing && self.probe_after.is_some_and(|until| until <= now);
        self.probing |= due;
        due
    }

    /// Notes the result of a probe.
    pub(crate) fn probed(&mut self, back: bool, now: Instant) {
        self.probing = false;
        match back {
            true => self.recovered(),
            false => self.failed(now),
        }
    }

    fn expected_us(&self, now: Instant) -> f64 {
        let age = self
            .measured_at
            .map_or(Duration::ZERO, |at| now.duration_since(at));
        let faded = self.latency_us * 0.5f64.powf(age.as_secs_f64() / HALF_LIFE_S);
        faded * (f64::from(self.in_flight) + 1.0)
    }

    fn compare(&self, other: &Health, now: Instant) -> Ordering {
        let failed = (self.failures > 0).cmp(&(other.failures > 0));
        failed.then(self.expected_us(now).total_cmp(&other.expected_us(now)))
    }
}

/// Returns the indices of the nodes, best first; equal nodes keep their order.
pub(crate) fn order(nodes: &[Health], now: Instant) -> Vec<usize> {
    let mut order: Vec<usize> = (0..nodes.len()).collect();
    order.sort_by(|a, b| nodes[*a].compare(&nodes[*b], now));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_given_order_is_kept_without_measurements() {
        let now = Instant::now();
        let mut nodes = vec![Health::default(); 3];
        assert_eq!(order(&nodes, now), [0, 1, 2]);
        nodes[0].answered(5 * MS, now);
        assert_eq!(order(&nodes, now), [1, 2, 0], "the unknown are measured");
        nodes[1].answered(MS, now);
        nodes[2].answered(3 * MS, now);
        assert_eq!(order(&nodes, now), [1, 2, 0], "the quickest first");
        nodes[1].in_flight = 3;
        assert_eq!(order(&nodes, now), [2, 1, 0], "the busy one yields");
    }

    #[test]
    fn a_failed_node_comes_last_until_it_is_back() {
        let now = Instant::now();
        let mut nodes = vec![Health::default(); 2];
        nodes[0].answered(MS, now);
        nodes[1].answered(2 * MS, now);
        nodes[0].failed(now);
        assert_eq!(order(&nodes, now), [1, 0]);
        assert!(!nodes[0].start_probe_if_due(now));
        let later = now + Duration::from_millis(PROBE_DELAY_MS_MIN);
        assert!(nodes[0].start_probe_if_due(later));
        assert!(!nodes[0].start_probe_if_due(later), "one probe at a time");
        assert_eq!(
            order(&nodes, later),
            [1, 0],
            "a node that was not probed stays last"
        );
        nodes[0].probed(false, later);
        assert!(!nodes[0].start_probe_if_due(later), "the delay doubles");
        assert!(nodes[0].start_probe_if_due(later + 2 * Duration::from_millis(PROBE_DELAY_MS_MIN)));
        nodes[0].probed(true, later);
        assert_eq!(order(&nodes, later), [0, 1]);
    }

    #[test]
    fn an_old_measurement_fades() {
        let now = Instant::now();
        let mut nodes = vec![Health::default(); 2];
        nodes[0].answered(50 * MS, now);
        let later = now + Duration::from_secs(120);
        nodes[1].answered(MS, later);
        assert_eq!(order(&nodes, later), [0, 1]);
    }
}
