//! A node's report on its part in the consensus.

use openraft::ServerState;
use quorumfs_proto::{Member, NodeId};
use serde::Serialize;

use super::Consensus;
use super::log::LogStatus;

/// The trouble of a node that is about to set its state aside.
pub(super) const STOOD_DOWN: &str =
    "this node's metadata is damaged or not that of the majority: it is about to be set aside";

/// The role of a node in the consensus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Gets the log, does not vote.
    Learner,
    /// Votes, and follows a leader.
    Follower,
    /// Stands for election.
    Candidate,
    /// Leads the cluster.
    Leader,
    /// Takes no part any more.
    Stopped,
}

/// The consensus part of `/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConsensusStatus {
    /// This node's id.
    pub id: NodeId,
    /// Role of this node.
    pub role: Role,
    /// Present term of this node.
    pub term: u64,
    /// The leader, if known.
    pub leader: Option<Member>,
    /// Index of the last entry in its log.
    pub last_log: Option<u64>,
    /// Index up to which it knows entries to be committed.
    pub committed: Option<u64>,
    /// Index up to which it has applied entries.
    pub applied: Option<u64>,
    /// Index up to which they are on disk in the metadata.
    pub durable: u64,
    /// Last index in its last snapshot.
    pub snapshot: Option<u64>,
    /// Index up to which the log was purged.
    pub purged: Option<u64>,
    /// Status of the log.
    pub log: LogStatus,
    /// Bytes applied and not yet on disk.
    pub overlay_bytes: u64,
    /// Messages to the content store that were dropped because it was slow.
    pub effects_dropped: u64,
    /// Rounds of the read barrier since the start; many readers share one.
    pub barrier_rounds: u64,
    /// Whether commands can be decided, as far as this node can tell.
    pub writable: bool,
    /// The reason if they cannot.
    pub reason: Option<String>,
}

impl Consensus {
    /// Returns this node's status.
    pub fn status(&self) -> ConsensusStatus {
        let metrics = self.metrics();
        let reason = self.unwritable_reason();
        ConsensusStatus {
            id: self.id(),
            role: match metrics.state {
                ServerState::Learner => Role::Learner,
                ServerState::Follower => Role::Follower,
                ServerState::Candidate => Role::Candidate,
                ServerState::Leader if self.is_leader() => Role::Leader,
                // It was elected, and would be again.
                ServerState::Leader => Role::Candidate,
                ServerState::Shutdown => Role::Stopped,
            },
            term: metrics.current_term,
            leader: self.leader(),
            last_log: metrics.last_log_index,
            committed: metrics.cluster_committed.map(|id| id.index),
            applied: metrics.last_applied.map(|id| id.index),
            durable: self.0.metadata.durable_position().index,
            snapshot: metrics.snapshot.map(|id| id.index),
            purged: metrics.purged.map(|id| id.index),
            log: self.0.log.status(),
            overlay_bytes: self.0.metadata.overlay_bytes(),
            effects_dropped: self.effects_sent_and_dropped().1,
            barrier_rounds: self.0.barrier.rounds(),
            writable: reason.is_none(),
            reason,
        }
    }

    /// Returns why this node's state is unreliable, so that it must not lead; `None` if it is reliable.
    pub fn trouble(&self) -> Option<String> {
        if let Some(fatal) = self.0.fatal.raised() {
            return Some(format!("this node must stop: {fatal}"));
        }
        let stood_down = self.0.stood_down.load(super::Ordering::Acquire);
        stood_down.then(|| STOOD_DOWN.to_string())
    }

    fn unwritable_reason(&self) -> Option<String> {
        if let Some(trouble) = self.trouble() {
            return Some(trouble);
        }
        let metrics = self.metrics();
        if metrics.membership_config.voter_ids().next().is_none() {
            return Some("this node belongs to no cluster yet".to_string());
        }
        if metrics.membership_config.get_node(&self.0.id).is_none() {
            return Some("this node was removed from its cluster".to_string());
        }
        if let Err(reason) = self.recovered() {
            return Some(reason);
        }
        if metrics.current_leader.is_none() {
            return Some("no leader is known".to_string());
        }
        if self.claims_to_lead() && !self.is_leader() {
            return Some("no quorum answers".to_string());
        }
        let silence_ms_max = u128::from(2 * self.0.options.timings.election_ms_max);
        if !self.is_leader()
            && let Some(heard) = *self.0.heard_of_leader.lock()
            && heard.elapsed().as_millis() > silence_ms_max
        {
            let seconds = heard.elapsed().as_secs();
            return Some(format!("the leader has not been heard of for {seconds} s"));
        }
        if self.0.log.status().disk_full || self.0.flusher.disk_full() {
            return Some("the disk is full".to_string());
        }
        (!self.has_room())
            .then(|| "the disk is nearly full: only commands that free space are admitted".to_string())
    }
}
