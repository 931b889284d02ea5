//! The encoding of views in probes. Received views are bounded and validated here, once.

use std::time::Duration;

use quorumfs_proto::NodeId;
use quorumfs_wire as wire;

use super::judgement::HealthState;
use super::merged::{AgedView, Belief, View};
use crate::observe::clock::{ClockBelief, ClockState, whole_ms};

/// Most views in one message, the sender's own first: keeps a probe far below the largest message even in the largest
/// cluster.
pub const VIEWS_MAX: usize = 16;
/// Most beliefs in one view: as many as there are slots.
const BELIEFS_MAX: usize = 255;
/// Most characters kept of a reason.
const REASON_CHARS_MAX: usize = 500;

/// Encodes a node's id.
pub fn node_to_wire(id: NodeId) -> wire::ProbeNode {
    wire::ProbeNode {
        slot: u32::from(id.slot),
        incarnation: id.incarnation,
    }
}

/// Decodes a node's id; `None` if it is not valid.
pub fn node_from_wire(node: Option<&wire::ProbeNode>) -> Option<NodeId> {
    let node = node?;
    let slot = u16::try_from(node.slot).ok().filter(|slot| *slot > 0)?;
    Some(NodeId {
        slot,
        incarnation: node.incarnation,
    })
}

/// Encodes the view of `observer`.
pub fn view_to_wire(observer: NodeId, aged: &AgedView) -> wire::HealthView {
    let beliefs = aged.view.beliefs.iter().take(BELIEFS_MAX);
    wire::HealthView {
        observer: Some(node_to_wire(observer)),
        age_ms: whole_ms(aged.age),
        beliefs: beliefs.map(belief_to_wire).collect(),
        clock: Some(clock_to_wire(&aged.view.clock)),
    }
}

/// Decodes a view and its observer; `None` if the observer is missing.
pub fn view_from_wire(view: &wire::HealthView) -> Option<(NodeId, AgedView)> {
    let observer = node_from_wire(view.observer.as_ref())?;
    let beliefs = view.beliefs.iter().take(BELIEFS_MAX);
    let aged = AgedView {
        view: View {
            beliefs: beliefs.filter_map(belief_from_wire).collect(),
            clock: view.clock.as_ref().map(clock_from_wire).unwrap_or_default(),
        },
        age: Duration::from_millis(view.age_ms),
    };
    Some((observer, aged))
}

fn belief_to_wire(belief: &Belief) -> wire::HealthBelief {
    let state = match belief.state {
        HealthState::Unknown => wire::HealthState::Unspecified,
        HealthState::Healthy => wire::HealthState::Healthy,
        HealthState::Unhealthy => wire::HealthState::Unhealthy,
    };
    wire::HealthBelief {
        subject: Some(node_to_wire(belief.subject)),
        state: state.into(),
        state_age_ms: whole_ms(belief.state_age),
        last_error: belief.last_error.clone().unwrap_or_default(),
        mean_us: belief.mean_us.unwrap_or_default(),
    }
}

fn belief_from_wire(belief: &wire::HealthBelief) -> Option<Belief> {
    let state = match belief.state() {
        wire::HealthState::Unspecified => HealthState::Unknown,
        wire::HealthState::Healthy => HealthState::Healthy,
        wire::HealthState::Unhealthy => HealthState::Unhealthy,
    };
    Some(Belief {
        subject: node_from_wire(belief.subject.as_ref())?,
        state,
        state_age: Duration::from_millis(belief.state_age_ms),
        last_error: words(&belief.last_error),
        mean_us: (belief.mean_us > 0).then_some(belief.mean_us),
    })
}

fn clock_to_wire(clock: &ClockBelief) -> wire::ClockBelief {
    let state = match clock.state {
        ClockState::Off => wire::ClockState::Off,
        ClockState::Unsynchronized => wire::ClockState::Unsynchronized,
        ClockState::Synchronized => wire::ClockState::Synchronized,
        ClockState::Skewed => wire::ClockState::Skewed,
    };
    wire::ClockBelief {
        state: state.into(),
        offset_us: clock.offset_us.unwrap_or_default(),
        uncertainty_us: clock.uncertainty_us.unwrap_or_default(),
        reason: clock.reason.clone().unwrap_or_default(),
    }
}

fn clock_from_wire(clock: &wire::ClockBelief) -> ClockBelief {
    let state = match clock.state() {
        wire::ClockState::Unspecified | wire::ClockState::Off => ClockState::Off,
        wire::ClockState::Unsynchronized => ClockState::Unsynchronized,
        wire::ClockState::Synchronized => ClockState::Synchronized,
        wire::ClockState::Skewed => ClockState::Skewed,
    };
    let known = matches!(state, ClockState::Synchronized | ClockState::Skewed);
    ClockBelief {
        state,
        offset_us: known.then_some(clock.offset_us),
        uncertainty_us: known.then_some(clock.uncertainty_us),
        reason: words(&clock.reason),
    }
}

fn words(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.chars().take(REASON_CHARS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_the_same_after_the_journey() {
        let node = |slot| NodeId {
            slot,
            incarnation: 7 + u64::from(slot),
        };
        let belief = |slot, state, last_error: Option<&str>, mean_us| Belief {
            subject: node(slot),
            state,
            state_age: Duration::from_millis(1234),
            last_error: last_error.map(ToString::to_string),
            mean_us,
        };
        let aged = AgedView {
            view: View {
                beliefs: vec![
                    belief(2, HealthState::Healthy, None, Some(250)),
                    belief(3, HealthState::Unhealthy, Some("refused"), None),
                    belief(4, HealthState::Unknown, None, None),
                ],
                clock: ClockBelief {
                    state: ClockState::Skewed,
                    offset_us: Some(-3_000_000),
                    uncertainty_us: Some(80),
                    reason: None,
                },
            },
            age: Duration::from_millis(17),
        };
        let wire = view_to_wire(node(1), &aged);
        assert_eq!(view_from_wire(&wire), Some((node(1), aged)));
        let nameless = wire::HealthView {
            observer: None,
            ..wire
        };
        assert_eq!(view_from_wire(&nameless), None);
    }
}
