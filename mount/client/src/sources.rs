//! Which node to read from first: a judgement on what each did lately.
//!
//! The nodes come in the order of the user's list. One that has not been measured is tried before slower ones, one
//! that is busy yields to one that is not, one that failed comes last until it shows that it is back.
//!
//! Pure: the clock is an argument.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

/// How much one answer counts against those before.
const WEIGHT: f64 = 0.2;
/// A measurement counts half after this: a node that was slow once is tried again.
const HALF_LIFE_S: f64 = 10.0;
/// How long a node that failed is left alone before it is asked whether it is back.
const REST_MS_MIN: u64 = 500;
const REST_MS_MAX: u64 = 8_000;

/// What is known of one node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health {
    latency_us: f64,
    measured_at: Option<Instant>,
    /// Requests that wait for it.
    pub(crate) under_way: u32,
    failures: u32,
    rests_until: Option<Instant>,
    probing: bool,
}

impl Health {
    /// It answered after `took`.
    pub(crate) fn answered(&mut self, took: Duration, now: Instant) {
        let sample = took.as_micros() as f64;
        self.latency_us = match self.measured_at {
            None => sample,
            Some(_) => self.latency_us * (1.0 - WEIGHT) + sample * WEIGHT,
        };
        self.measured_at = Some(now);
        self.recovered();
    }

    /// It did not answer. Many requests that fail together count once.
    pub(crate) fn failed(&mut self, now: Instant) {
        if self.failures > 0 && self.rests_until.is_some_and(|until| until > now) {
            return;
        }
        let rest = (REST_MS_MIN << self.failures.min(16)).min(REST_MS_MAX);
        self.failures += 1;
        self.rests_until = Some(now + Duration::from_millis(rest));
    }

    fn recovered(&mut self) {
        self.failures = 0;
        self.rests_until = None;
    }

    /// Whether it is time to ask a failed node whether it is back. Counts as the asking: until
    /// [`Health::probed`] says what came of it, there is no second one.
    pub(crate) fn wants_probe(&mut self, now: Instant) -> bool {
        let due = !self.probing && self.rests_until.is_some_and(|until| until <= now);
        self.probing |= due;
        due
    }

    /// Whether it is back.
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
        faded * (f64::from(self.under_way) + 1.0)
    }

    fn compare(&self, other: &Health, now: Instant) -> Ordering {
        let failed = (self.failures > 0).cmp(&(other.failures > 0));
        failed.then(self.expected_us(now).total_cmp(&other.expected_us(now)))
    }
}

/// The nodes, by index, best first; among equals the order given.
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
    fn the_order_given_stands_until_there_is_a_reason() {
        let now = Instant::now();
        let mut nodes = vec![Health::default(); 3];
        assert_eq!(order(&nodes, now), [0, 1, 2]);
        nodes[0].answered(5 * MS, now);
        assert_eq!(order(&nodes, now), [1, 2, 0], "the unknown are measured");
        nodes[1].answered(MS, now);
        nodes[2].answered(3 * MS, now);
        assert_eq!(order(&nodes, now), [1, 2, 0], "the quickest first");
        nodes[1].under_way = 3;
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
        assert!(!nodes[0].wants_probe(now));
        let later = now + Duration::from_millis(REST_MS_MIN);
        assert!(nodes[0].wants_probe(later));
        assert!(!nodes[0].wants_probe(later), "one probe at a time");
        assert_eq!(order(&nodes, later), [1, 0], "time alone does not heal");
        nodes[0].probed(false, later);
        assert!(!nodes[0].wants_probe(later), "it rests twice as long");
        assert!(nodes[0].wants_probe(later + 2 * Duration::from_millis(REST_MS_MIN)));
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
