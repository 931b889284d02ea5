//! The voters, and the question whether some nodes are a quorum.
//!
//! During a change of the voters there are two configurations, and a quorum is a majority of each (joint consensus,
//! Raft dissertation section 4.3).

use std::collections::BTreeSet;

use openraft::Membership;
use quorumfs_proto::{Addresses, NodeId};

use super::types::VoterId;

/// The active configurations, the newest last. Another incarnation of a node is another voter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VoterSets(Vec<BTreeSet<NodeId>>);

impl VoterSets {
    pub(super) fn of(membership: &Membership<VoterId, Addresses>) -> VoterSets {
        let voters = |set: &BTreeSet<VoterId>| set.iter().map(|voter| voter.0).collect();
        membership.get_joint_config().iter().map(voters).collect()
    }

    /// Whether `counts` is true for a majority of each configuration.
    pub fn is_quorum(&self, counts: impl Fn(&NodeId) -> bool) -> bool {
        self.lacking(counts).is_none()
    }

    /// Returns the first configuration without a majority for which `counts` is true.
    pub fn lacking(&self, counts: impl Fn(&NodeId) -> bool) -> Option<&BTreeSet<NodeId>> {
        self.0
            .iter()
            .find(|voters| voters.iter().filter(|voter| counts(voter)).count() <= voters.len() / 2)
    }

    /// Whether the node votes in any configuration.
    pub fn contains(&self, node: &NodeId) -> bool {
        self.0.iter().any(|voters| voters.contains(node))
    }

    /// Returns the voters of all configurations; with two configurations, most come twice.
    pub fn iter(&self) -> impl Iterator<Item = &NodeId> {
        self.0.iter().flatten()
    }

    /// Returns the voters of the newest configuration.
    pub fn newest(mut self) -> BTreeSet<NodeId> {
        self.0.pop().unwrap_or_default()
    }
}

impl FromIterator<BTreeSet<NodeId>> for VoterSets {
    fn from_iter<Sets: IntoIterator<Item = BTreeSet<NodeId>>>(sets: Sets) -> VoterSets {
        VoterSets(sets.into_iter().collect())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a node with this slot.
    pub(crate) fn node(slot: u16) -> NodeId {
        NodeId {
            slot,
            incarnation: u64::from(slot),
        }
    }

    /// Returns nodes with these slots.
    pub(crate) fn nodes(slots: &[u16]) -> BTreeSet<NodeId> {
        slots.iter().map(|slot| node(*slot)).collect()
    }

    #[test]
    fn a_quorum_is_a_majority_of_every_active_configuration() {
        let three = VoterSets::from_iter([nodes(&[1, 2, 3])]);
        let joint = VoterSets::from_iter([nodes(&[1, 2, 3]), nodes(&[3, 4, 5])]);
        let are_quorum = |sets: &VoterSets, of: BTreeSet<NodeId>| sets.is_quorum(|voter| of.contains(voter));
        assert!(are_quorum(&three, nodes(&[1, 2])));
        assert!(!are_quorum(&joint, nodes(&[1, 2])));
        assert!(are_quorum(&joint, nodes(&[1, 3, 4])));
        assert_eq!(joint.lacking(|voter| voter.slot < 4), Some(&nodes(&[3, 4, 5])));
        let replaced = NodeId {
            slot: 2,
            incarnation: 99,
        };
        assert!(
            !are_quorum(&three, [node(1), replaced].into()),
            "another incarnation is another node"
        );
        assert!(joint.contains(&node(5)) && !three.contains(&node(5)));
        assert_eq!(joint.newest(), nodes(&[3, 4, 5]));
    }
}
