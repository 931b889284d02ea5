//! Merges the views of all nodes, and describes the problems that follow. Pure.
//!
//! A view contains the beliefs of one node at some moment. Views travel with probes in both directions and are passed
//! on, so each node knows the views of all others, even of nodes that it cannot reach itself. An old view says nothing
//! about the present: it counts only while it is fresh.
//!
//! A one-way partition is reported only if it cannot be the trace of a node that died, or has just started: the view of
//! the side that gets through must be newer than the other side's judgement, and must have held for a round of probes.

use std::collections::BTreeMap;
use std::time::Duration;

use quorumfs_proto::NodeId;

use super::judgement::HealthState;
use crate::observe::clock::ClockBelief;

/// The belief of a node about one other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Belief {
    /// The node that it is about.
    pub subject: NodeId,
    /// The believed state.
    pub state: HealthState,
    /// How long that state had held when the view was sent.
    pub state_age: Duration,
    /// The reason of the last failed probe.
    pub last_error: Option<String>,
    /// Mean of the latest response times, in microseconds.
    pub mean_us: Option<u64>,
}

/// The beliefs of one node about all others, and about its own clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// One belief for each other member.
    pub beliefs: Vec<Belief>,
    /// The state of its clock.
    pub clock: ClockBelief,
}

/// A view and its age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgedView {
    /// The beliefs of the node.
    pub view: View,
    /// Age of the view.
    pub age: Duration,
}

/// A node in the eyes of the nodes whose view is fresh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Nodes that reach it.
    pub reached_by: Vec<NodeId>,
    /// Nodes that do not reach it.
    pub not_reached_by: Vec<NodeId>,
}

/// The views of all nodes at one moment.
#[derive(Debug)]
pub struct Merged {
    members: Vec<NodeId>,
    views: BTreeMap<NodeId, AgedView>,
    round: Duration,
}

/// One direction of a pair: the belief of `from` about `to`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// `from` reaches `to`, since `lasts`; the view has this age.
    Yes { lasts: Duration, age: Duration },
    /// `from` does not reach `to`, since `lasts`.
    No { lasts: Duration },
}

impl Merged {
    /// Merges the views of `members` that are at most `fresh` old. A round of probes takes at most `round`.
    pub fn new(
        mut members: Vec<NodeId>,
        views: BTreeMap<NodeId, AgedView>,
        fresh: Duration,
        round: Duration,
    ) -> Merged {
        members.sort_unstable();
        let mut views = views;
        views.retain(|observer, aged| members.contains(observer) && aged.age <= fresh);
        Merged {
            members,
            views,
            round,
        }
    }

    /// Returns all members, in the order of their slots.
    pub fn members(&self) -> &[NodeId] {
        &self.members
    }

    /// Returns the fresh views.
    pub fn views(&self) -> &BTreeMap<NodeId, AgedView> {
        &self.views
    }

    fn reach(&self, from: NodeId, to: NodeId) -> Option<Reach> {
        let AgedView { view, age } = self.views.get(&from)?;
        let belief = view.beliefs.iter().find(|belief| belief.subject == to)?;
        let lasts = belief.state_age + *age;
        match belief.state {
            HealthState::Unknown => None,
            HealthState::Healthy => Some(Reach::Yes { lasts, age: *age }),
            HealthState::Unhealthy => Some(Reach::No { lasts }),
        }
    }

    /// Returns which nodes reach `subject` and which do not.
    pub fn standing(&self, subject: NodeId) -> Standing {
        let mut standing = Standing::default();
        for observer in self.members.iter().filter(|member| **member != subject) {
            match self.reach(*observer, subject) {
                Some(Reach::Yes { .. }) => standing.reached_by.push(*observer),
                Some(Reach::No { .. }) => standing.not_reached_by.push(*observer),
                None => {}
            }
        }
        standing
    }

    /// Returns descriptions of pairs of nodes that are both alive but do not reach each other, or only in one
    /// direction.
    pub fn partitions(&self) -> Vec<String> {
        let mut named = Vec::new();
        for (at, a) in self.members.iter().enumerate() {
            for b in &self.members[at + 1..] {
                match (self.reach(*a, *b), self.reach(*b, *a)) {
                    (Some(yes), Some(no)) if self.is_one_way(yes, no) => named.push(one_way(*a, *b)),
                    (Some(no), Some(yes)) if self.is_one_way(yes, no) => named.push(one_way(*b, *a)),
                    (Some(Reach::No { .. }), Some(Reach::No { .. })) => {
                        if let Some(between) = self.reaches_both(*a, *b) {
                            named.push(format!(
                                "node {} and node {} do not reach each other, though node {} reaches both: the network \
                                 between them is parted",
                                a.slot, b.slot, between.slot
                            ));
                        }
                    }
                    _ => {}
                }
            }
        }
        named
    }

    fn is_one_way(&self, yes: Reach, no: Reach) -> bool {
        match (yes, no) {
            (Reach::Yes { lasts: reached, age }, Reach::No { lasts: unreached }) => {
                age < unreached && reached > self.round
            }
            _ => false,
        }
    }

    fn reaches_both(&self, a: NodeId, b: NodeId) -> Option<NodeId> {
        let reaches = |from, to| matches!(self.reach(from, to), Some(Reach::Yes { .. }));
        let others = self.members.iter().filter(|member| ![a, b].contains(member));
        others.copied().find(|c| reaches(*c, a) && reaches(*c, b))
    }

    /// Returns descriptions of nodes that no node with a fresh view reaches.
    pub fn unreachable(&self, own: NodeId) -> Vec<String> {
        let others: Vec<&NodeId> = self.members.iter().filter(|member| **member != own).collect();
        let lost: Vec<&NodeId> = others
            .iter()
            .filter(|node| {
                let standing = self.standing(***node);
                standing.reached_by.is_empty() && !standing.not_reached_by.is_empty()
            })
            .copied()
            .collect();
        if lost.len() == others.len() && lost.len() > 1 {
            let all = "this node reaches none of the others: it is cut off from them, or they are all down";
            return vec![all.to_string()];
        }
        let describe = |node: &&NodeId| {
            let why = self
                .views
                .get(&own)
                .and_then(|own| own.view.beliefs.iter().find(|belief| belief.subject == **node))
                .and_then(|belief| belief.last_error.as_deref())
                .map_or(String::new(), |error| format!(" ({error})"));
            format!(
                "node {} is unhealthy: no node reaches it, so it is down or cut off{why}",
                node.slot
            )
        };
        lost.iter().map(describe).collect()
    }
}

fn one_way(through: NodeId, stuck: NodeId) -> String {
    format!(
        "one-way partition: node {} reaches node {}, but node {} does not reach node {}",
        through.slot, stuck.slot, stuck.slot, through.slot
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRESH: Duration = Duration::from_secs(19);
    const ROUND: Duration = Duration::from_secs(7);

    fn node(slot: u16) -> NodeId {
        NodeId {
            slot,
            incarnation: u64::from(slot),
        }
    }

    /// A slot, `+` or `-`, and a number of seconds.
    type Told = (u16, char, u64);

    /// Merges views of three nodes: observer, age in seconds, beliefs.
    fn merged(views: &[(u16, u64, &[Told])]) -> Merged {
        let views = views.iter().map(|(observer, age, beliefs)| {
            let belief = |(subject, state, lasts): &Told| Belief {
                subject: node(*subject),
                state: match state {
                    '+' => HealthState::Healthy,
                    '-' => HealthState::Unhealthy,
                    _ => HealthState::Unknown,
                },
                state_age: Duration::from_secs(*lasts),
                last_error: None,
                mean_us: None,
            };
            let view = View {
                beliefs: beliefs.iter().map(belief).collect(),
                clock: ClockBelief::default(),
            };
            let age = Duration::from_secs(*age);
            (node(*observer), AgedView { view, age })
        });
        Merged::new(vec![node(3), node(1), node(2)], views.collect(), FRESH, ROUND)
    }

    #[test]
    fn all_well_is_nothing_to_tell() {
        let all = merged(&[
            (1, 0, &[(2, '+', 99), (3, '+', 99)]),
            (2, 3, &[(1, '+', 99), (3, '+', 99)]),
            (3, 3, &[(1, '+', 99), (2, '+', 99)]),
        ]);
        assert!(all.partitions().is_empty());
        assert!(all.unreachable(node(1)).is_empty());
        assert_eq!(all.standing(node(3)).reached_by, [node(1), node(2)]);
    }

    #[test]
    fn a_one_way_partition_is_named_with_its_direction() {
        let all = merged(&[
            (1, 0, &[(2, '+', 99), (3, '+', 99)]),
            (2, 1, &[(1, '-', 20), (3, '+', 99)]),
            (3, 3, &[(1, '+', 99), (2, '+', 99)]),
        ]);
        assert_eq!(
            all.partitions(),
            ["one-way partition: node 1 reaches node 2, but node 2 does not reach node 1"]
        );
        assert!(all.unreachable(node(3)).is_empty(), "node 1 is reached by node 3");
    }

    #[test]
    fn a_node_that_died_is_not_a_partition() {
        // Node 3's last view, from before it died, is still fresh.
        let all = merged(&[
            (1, 0, &[(2, '+', 99), (3, '-', 2)]),
            (2, 1, &[(1, '+', 99), (3, '-', 3)]),
            (3, 15, &[(1, '+', 99), (2, '+', 99)]),
        ]);
        assert!(all.partitions().is_empty(), "{:?}", all.partitions());
        let lost = all.unreachable(node(1));
        assert_eq!(lost.len(), 1);
        assert!(
            lost[0].starts_with("node 3 is unhealthy: no node reaches it"),
            "{lost:?}"
        );
    }

    #[test]
    fn a_node_that_has_just_come_back_is_not_a_partition() {
        let all = merged(&[
            (1, 0, &[(2, '+', 99), (3, '-', 60)]),
            (2, 1, &[(1, '+', 99), (3, '-', 60)]),
            (3, 1, &[(1, '+', 2), (2, '+', 2)]),
        ]);
        assert!(all.partitions().is_empty(), "{:?}", all.partitions());
    }

    #[test]
    fn two_that_do_not_reach_each_other_are_parted_only_if_a_third_reaches_both() {
        let parted = merged(&[
            (1, 0, &[(2, '-', 30), (3, '+', 99)]),
            (2, 3, &[(1, '-', 30), (3, '+', 99)]),
            (3, 3, &[(1, '+', 99), (2, '+', 99)]),
        ]);
        assert_eq!(parted.partitions().len(), 1);
        assert!(parted.partitions()[0].contains("node 1 and node 2 do not reach each other"));
        let third_gone = merged(&[
            (1, 0, &[(2, '-', 30), (3, '-', 30)]),
            (2, 3, &[(1, '-', 30), (3, '-', 30)]),
        ]);
        assert!(third_gone.partitions().is_empty());
    }

    #[test]
    fn a_node_that_reaches_nobody_says_so_of_itself() {
        let alone = merged(&[
            (1, 0, &[(2, '-', 30), (3, '-', 30)]),
            (2, 40, &[(1, '+', 99), (3, '+', 99)]),
        ]);
        let lost = alone.unreachable(node(1));
        assert_eq!(lost.len(), 1);
        assert!(lost[0].contains("reaches none of the others"), "{lost:?}");
        assert!(!alone.views().contains_key(&node(2)), "too old to count");
    }

    #[test]
    fn what_is_not_decided_says_nothing() {
        let early = merged(&[(1, 0, &[(2, '?', 1), (3, '-', 30)]), (2, 0, &[(1, '-', 1)])]);
        assert_eq!(early.standing(node(2)), Standing::default());
        assert!(early.partitions().is_empty());
    }
}
