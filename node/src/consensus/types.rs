//! The types with which openraft is instantiated.
//!
//! Standard Raft leaders (one for each term): a term names one leadership, which is what
//! [`super::Consensus::term`] promises to those who ask.

// `declare_raft_types!` names the runtime by a path that this release of openraft deprecates.
#![allow(deprecated)]

use std::fmt;

use quorumfs_proto::{Addresses, Member, NodeId};
use serde::{Deserialize, Serialize};

use quorumfs_metadata::{ApplyResult, LogCommand};

/// [`NodeId`] as openraft sees it. A type of its own because openraft's storage suite makes ids from numbers,
/// which nothing but a test may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VoterId(pub NodeId);

impl fmt::Display for VoterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
impl From<u64> for VoterId {
    fn from(number: u64) -> VoterId {
        VoterId(NodeId {
            slot: number as u16,
            incarnation: number,
        })
    }
}

openraft::declare_raft_types!(
    /// What openraft is made of here.
    pub TypeConfig:
        D = LogCommand,
        R = ApplyResult,
        NodeId = VoterId,
        Node = Addresses,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, VoterId>,
);

/// Term and index of a log entry.
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
/// What a log entry says of the leader that made it: its term.
pub type CommittedLeader = openraft::alias::CommittedLeaderIdOf<TypeConfig>;
/// Whom a node follows, and since which term.
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
/// A log entry.
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
/// The members, and the entry that made them so.
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
/// What a snapshot covers.
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;

/// A member, put together from the two halves that openraft keeps.
pub fn member(id: VoterId, addresses: &Addresses) -> Member {
    Member {
        id: id.0,
        addresses: addresses.clone(),
    }
}
