//! `GET /health/status`: this node's probes, the beliefs of all nodes, and the problems.

use std::time::{Duration, Instant, SystemTime};

use quorumfs_proto::NodeId;
use serde::Serialize;

use super::HealthMonitor;
use super::judgement::HealthState;
use super::merged::{AgedView, Belief, Merged};
use crate::observe::clock::{ClockBelief, ClockReport, ClockState, whole_ms};
use crate::wall_clock::unix_ms_ago;

/// Distance from the median of all members' clocks above which a clock is a problem, whatever NTP says.
const CLOCK_APART_MAX: Duration = Duration::from_secs(1);

/// The answer of `GET /health/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct HealthReport {
    /// The slot of the node that answers.
    pub node: u16,
    /// Whether there is no problem: `problems` is empty and every node was heard.
    pub healthy: bool,
    /// All problems: unhealthy nodes, partitions, clocks.
    pub problems: Vec<String>,
    /// Nodes that are alive but do not reach each other, or only in one direction; also in `problems`.
    pub partitions: Vec<String>,
    /// Problems of the nodes' clocks; also in `problems`.
    pub clock_problems: Vec<String>,
    /// Interval of the probes of each other node, in milliseconds.
    pub probe_interval_ms: u64,
    /// This node's own view: the results of its probes.
    pub peers: Vec<PeerReport>,
    /// The merged view: each member in the eyes of the nodes heard recently.
    pub nodes: Vec<NodeReport>,
    /// The beliefs of each node heard recently, including this one.
    pub views: Vec<ViewReport>,
    /// This node's clock.
    pub clock: ClockReport,
}

/// The results of this node's probes of another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct PeerReport {
    /// The other node's slot.
    pub slot: u16,
    /// Its incarnation, 16 hexadecimal digits.
    pub incarnation: String,
    /// The address that is probed.
    pub grpc_address: String,
    /// `unhealthy` after three failures in a row, `healthy` after one success, `unknown` before either.
    pub state: HealthState,
    /// Time since which the state holds, in milliseconds since 1970 by this node's clock.
    pub since_unix_ms: u64,
    /// Duration of the state, in milliseconds.
    pub since_ms_ago: u64,
    /// Number of probes since this node started or the other joined.
    pub probes: u64,
    /// Number of failed probes.
    pub failures: u64,
    /// Number of failed probes since the last success.
    pub failures_in_row: u32,
    /// The reason of the last failure.
    pub last_error: Option<String>,
    /// Time since the last answer, in milliseconds.
    pub last_success_ms_ago: Option<u64>,
    /// Time since that node's last probe of this one, in milliseconds: shows whether it reaches this node.
    pub probed_us_ms_ago: Option<u64>,
    /// Response times of the latest probes.
    pub response: ResponseReport,
    /// How far its clock is ahead of this node's (negative: behind), in microseconds.
    pub clock_ahead_us: Option<i64>,
}

/// Response times of the latest answered probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ResponseReport {
    /// Number of values; at most 256.
    pub count: usize,
    /// The last one, in microseconds.
    pub last_us: Option<u64>,
    /// The mean, in microseconds.
    pub mean_us: Option<u64>,
    /// The 99th percentile, in microseconds.
    pub p99_us: Option<u64>,
}

/// A member in the eyes of all nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct NodeReport {
    /// The member's slot.
    pub slot: u16,
    /// `healthy` if all nodes with a belief reach it, `unhealthy` if none does, `disputed` if some do, `unknown` if no
    /// node has a belief.
    pub state: MergedState,
    /// Slots of the nodes that reach it.
    pub reached_by: Vec<u16>,
    /// Slots of the nodes that do not.
    pub not_reached_by: Vec<u16>,
    /// Its own report about its clock, if it was heard recently.
    pub clock: Option<ClockSummary>,
}

/// The merged state of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MergedState {
    /// All nodes with a belief reach it.
    Healthy,
    /// No node with a belief reaches it.
    Unhealthy,
    /// Some nodes reach it.
    Disputed,
    /// No node has a belief about it.
    Unknown,
}

/// A node's report about its clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ClockSummary {
    /// The state, as in `clock`.
    pub state: ClockState,
    /// The value to add to the clock, in microseconds.
    pub offset_us: Option<i64>,
    /// Possible error of the offset, in microseconds.
    pub uncertainty_us: Option<u64>,
}

/// The beliefs of one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ViewReport {
    /// The slot of the observer.
    pub observer: u16,
    /// Age of the view, in milliseconds.
    pub age_ms: u64,
    /// Its beliefs about each other node.
    pub beliefs: Vec<BeliefReport>,
}

/// The belief of one node about another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct BeliefReport {
    /// The slot of the other node.
    pub slot: u16,
    /// The believed state.
    pub state: HealthState,
    /// Duration of that state, in milliseconds.
    pub since_ms_ago: u64,
    /// Mean of its response times, in microseconds.
    pub mean_us: Option<u64>,
    /// The reason of its last failed probe.
    pub last_error: Option<String>,
}

impl HealthMonitor {
    /// Returns the present report.
    pub fn report(&self) -> HealthReport {
        let now = Instant::now();
        let merged = self.merged(now);
        let partitions = merged.partitions();
        let clock_problems = self.clock_problems(&merged, now);
        let mut problems = merged.unreachable(self.own);
        problems.extend(partitions.iter().chain(&clock_problems).cloned());
        let nodes: Vec<NodeReport> = merged
            .members()
            .iter()
            .map(|member| node_report(&merged, *member))
            .collect();
        HealthReport {
            node: self.own.slot,
            healthy: problems.is_empty() && nodes.iter().all(|node| node.state == MergedState::Healthy),
            problems,
            partitions,
            clock_problems,
            probe_interval_ms: whole_ms(self.interval),
            peers: self.peer_reports(now),
            nodes,
            views: merged.views().iter().map(view_report).collect(),
            clock: self.clock.report(),
        }
    }

    fn peer_reports(&self, now: Instant) -> Vec<PeerReport> {
        let wall = SystemTime::now();
        let clocks = self.clocks_of_others(now);
        let known = self.known.lock();
        let ago = |at: Instant| whole_ms(now.saturating_duration_since(at));
        let report = |(id, peer): (&NodeId, &super::Peer)| {
            let health = &peer.health;
            let (probes, failures) = health.counts();
            let times = health.times();
            PeerReport {
                slot: id.slot,
                incarnation: format!("{:016x}", id.incarnation),
                grpc_address: peer.member.addresses.grpc.clone(),
                state: health.state(),
                since_unix_ms: unix_ms_ago(now.saturating_duration_since(health.since())),
                since_ms_ago: ago(health.since()),
                probes,
                failures,
                failures_in_row: health.failures_in_row(),
                last_error: health.last_error().map(ToString::to_string),
                last_success_ms_ago: health.last_success().map(ago),
                probed_us_ms_ago: peer.probed_us.map(ago),
                response: ResponseReport {
                    count: times.count(),
                    last_us: times.last_us(),
                    mean_us: times.mean_us(),
                    p99_us: times.p99_us(),
                },
                clock_ahead_us: clocks.get(id).map(|clock| ahead_us(*clock, wall)),
            }
        };
        known.peers.iter().map(report).collect()
    }

    fn clock_problems(&self, merged: &Merged, now: Instant) -> Vec<String> {
        let said = merged
            .views()
            .iter()
            .filter_map(|(observer, AgedView { view, .. })| clock_problem(observer.slot, &view.clock));
        let mut problems: Vec<String> = said.collect();
        let mut clocks = self.clocks_of_others(now);
        clocks.insert(self.own, SystemTime::now());
        problems.extend(clocks_apart(&clocks.into_iter().collect::<Vec<_>>()));
        if let Some(ahead) = self.stamps.ahead() {
            problems.push(format!(
                "node {} does not stamp commands with its clock, which is {} ahead of the others'",
                self.own.slot,
                seconds(ahead)
            ));
        }
        problems
    }
}

fn node_report(merged: &Merged, member: NodeId) -> NodeReport {
    let standing = merged.standing(member);
    let slots = |nodes: &[NodeId]| nodes.iter().map(|node| node.slot).collect::<Vec<u16>>();
    let state = match (standing.reached_by.len(), standing.not_reached_by.len()) {
        // A cluster of one node: the node answers, so it is healthy.
        (0, 0) if merged.members().len() == 1 => MergedState::Healthy,
        (0, 0) => MergedState::Unknown,
        (0, _) => MergedState::Unhealthy,
        (_, 0) => MergedState::Healthy,
        _ => MergedState::Disputed,
    };
    let clock = merged.views().get(&member).map(|aged| ClockSummary {
        state: aged.view.clock.state,
        offset_us: aged.view.clock.offset_us,
        uncertainty_us: aged.view.clock.uncertainty_us,
    });
    NodeReport {
        slot: member.slot,
        state,
        reached_by: slots(&standing.reached_by),
        not_reached_by: slots(&standing.not_reached_by),
        clock,
    }
}

fn view_report((observer, aged): (&NodeId, &AgedView)) -> ViewReport {
    let belief = |belief: &Belief| BeliefReport {
        slot: belief.subject.slot,
        state: belief.state,
        since_ms_ago: whole_ms(belief.state_age + aged.age),
        mean_us: belief.mean_us,
        last_error: belief.last_error.clone(),
    };
    ViewReport {
        observer: observer.slot,
        age_ms: whole_ms(aged.age),
        beliefs: aged.view.beliefs.iter().map(belief).collect(),
    }
}

/// Describes the problem with a node's clock, if there is one.
fn clock_problem(slot: u16, clock: &ClockBelief) -> Option<String> {
    match clock.state {
        ClockState::Off | ClockState::Synchronized => None,
        ClockState::Unsynchronized => {
            let reason = clock
                .reason
                .as_deref()
                .unwrap_or("no NTP server has answered lately");
            Some(format!("the clock of node {slot} is unsynchronized: {reason}"))
        }
        ClockState::Skewed => {
            // The offset is the value to add: negative if the clock is ahead.
            let offset_us = clock.offset_us.unwrap_or_default();
            let side = if offset_us < 0 { "ahead of" } else { "behind" };
            Some(format!(
                "the clock of node {slot} is skewed: {} {side} its NTP server",
                seconds(Duration::from_micros(offset_us.unsigned_abs()))
            ))
        }
    }
}

/// Describes clocks that are far from the median of all. Of an even number the later of the two middle values is the
/// median.
fn clocks_apart(clocks: &[(NodeId, SystemTime)]) -> Vec<String> {
    let mut sorted: Vec<SystemTime> = clocks.iter().map(|(_, clock)| *clock).collect();
    sorted.sort_unstable();
    let Some(median) = sorted.get(sorted.len() / 2).copied() else {
        return Vec::new();
    };
    let problem = |(node, clock): &(NodeId, SystemTime)| {
        let (apart, side) = match clock.duration_since(median) {
            Ok(ahead) => (ahead, "ahead of"),
            Err(behind) => (behind.duration(), "behind"),
        };
        (apart > CLOCK_APART_MAX).then(|| {
            format!(
                "the clock of node {} is {} {side} the median of the nodes' clocks",
                node.slot,
                seconds(apart)
            )
        })
    };
    clocks.iter().filter_map(problem).collect()
}

fn ahead_us(clock: SystemTime, of: SystemTime) -> i64 {
    let whole_us = |duration: Duration| i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    match clock.duration_since(of) {
        Ok(ahead) => whole_us(ahead),
        Err(behind) => -whole_us(behind.duration()),
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_far_from_the_median_is_named_with_its_side() {
        let now = SystemTime::now();
        let node = |slot| NodeId { slot, incarnation: 1 };
        let hour = Duration::from_secs(3600);
        assert!(clocks_apart(&[]).is_empty());
        assert!(clocks_apart(&[(node(1), now)]).is_empty());
        let near = now + Duration::from_millis(900);
        assert!(clocks_apart(&[(node(1), now), (node(2), near), (node(3), now)]).is_empty());
        assert_eq!(
            clocks_apart(&[(node(1), now), (node(2), now + hour), (node(3), now)]),
            ["the clock of node 2 is 3600.0 s ahead of the median of the nodes' clocks"]
        );
        assert_eq!(
            clocks_apart(&[(node(1), now), (node(2), now - hour), (node(3), now)]),
            ["the clock of node 2 is 3600.0 s behind the median of the nodes' clocks"]
        );
    }

    #[test]
    fn clocks_that_are_skewed_or_unsynchronized_are_named() {
        let skewed = |offset_us| ClockBelief {
            state: ClockState::Skewed,
            offset_us: Some(offset_us),
            uncertainty_us: Some(10),
            reason: None,
        };
        let problem = |clock| clock_problem(2, &clock);
        assert_eq!(
            problem(skewed(-5_000_000)).unwrap(),
            "the clock of node 2 is skewed: 5.0 s ahead of its NTP server"
        );
        assert_eq!(
            problem(skewed(1_500_000)).unwrap(),
            "the clock of node 2 is skewed: 1.5 s behind its NTP server"
        );
        assert_eq!(problem(ClockBelief::default()), None);
        let silent = ClockBelief {
            state: ClockState::Unsynchronized,
            reason: Some("no answer".to_string()),
            ..ClockBelief::default()
        };
        assert!(problem(silent).unwrap().ends_with("unsynchronized: no answer"));
    }
}
