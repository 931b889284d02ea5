//! The leader and the members, as this node knows them.

use std::collections::BTreeSet;

use openraft::RaftMetrics;
use openraft::async_runtime::{Instant as _, WatchReceiver as _};
use quorumfs_proto::{ClusterId, Member, NodeId};

use super::Consensus;
use super::types::{TypeConfig, VoterId, member};
use super::voters::VoterSets;

impl Consensus {
    /// Returns this node's id.
    pub fn id(&self) -> NodeId {
        self.0.id.0
    }

    /// Returns the id of its cluster.
    pub fn cluster(&self) -> ClusterId {
        self.0.cluster
    }

    /// Returns the leader, as far as this node knows.
    pub fn leader(&self) -> Option<Member> {
        let metrics = self.metrics();
        let id = metrics.current_leader?;
        if id == self.0.id && !self.has_quorum(&metrics) {
            return None;
        }
        Some(member(id, metrics.membership_config.get_node(&id)?))
    }

    /// Whether this node believes to lead, and has recently heard from enough others for that. Another node may already
    /// have been elected; only a confirmation by a quorum is certain.
    pub fn is_leader(&self) -> bool {
        let watched = self.0.raft.metrics();
        let metrics = watched.borrow_watched();
        metrics.current_leader == Some(self.0.id) && self.has_quorum(&metrics)
    }

    /// Whether this node was elected and has not learned of another leader, even if no node answers it any more.
    pub fn claims_to_lead(&self) -> bool {
        self.0.raft.metrics().borrow_watched().current_leader == Some(self.0.id)
    }

    /// Whether a quorum has acknowledged this leader within the time in which others could have elected another.
    fn has_quorum(&self, metrics: &RaftMetrics<TypeConfig>) -> bool {
        let quorum_ms_max = u128::from(2 * self.0.options.timings.election_ms_max);
        // A single voter acknowledges only to itself, with each command, and there may be none for long. A newly
        // elected leader has no acknowledgement yet.
        metrics.membership_config.voter_ids().eq([self.0.id])
            || metrics
                .last_quorum_acked
                .as_ref()
                .is_none_or(|acknowledged| acknowledged.elapsed().as_millis() <= quorum_ms_max)
    }

    /// Returns the present term; each term has at most one leader.
    pub fn term(&self) -> u64 {
        self.0.raft.metrics().borrow_watched().current_term
    }

    /// Returns the voters: one set, or two during a change. A quorum is a majority of each set.
    pub fn voter_sets(&self) -> VoterSets {
        VoterSets::of(self.metrics().membership_config.membership())
    }

    /// Returns the voters of the newest configuration.
    pub fn voters(&self) -> BTreeSet<NodeId> {
        self.voter_sets().newest()
    }

    /// Returns the number of committed entries that `member` lacks; `None` if this node does not lead or has not heard
    /// of the member.
    pub fn lag_of(&self, member: NodeId) -> Option<u64> {
        let metrics = self.metrics();
        let matched = *metrics.replication.as_ref()?.get(&VoterId(member))?;
        let committed = metrics.cluster_committed.map_or(0, |id| id.index);
        Some(committed.saturating_sub(matched.map_or(0, |id| id.index)))
    }

    /// Returns all members, voters and learners.
    pub fn members(&self) -> Vec<Member> {
        let membership = self.metrics().membership_config;
        membership.nodes().map(|(id, node)| member(*id, node)).collect()
    }
}
