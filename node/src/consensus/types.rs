//! The types with which openraft is instantiated.
//!
//! Leaders as in standard Raft (one for each term): a term identifies one leadership, as [`super::Consensus::term`]
//! promises.

// `declare_raft_types!` names the runtime by a path that this release of openraft deprecates.
#![allow(deprecated)]

use std::fmt;

use quorumfs_proto::{Addresses, Member, NodeId};
use serde::{Deserialize, Serialize};

use quorumfs_metadata::{ApplyResult, LogCommand};

/// [`NodeId`] for openraft. It is a separate type because openraft's storage suite makes ids from numbers, which only
/// tests may do.
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
    /// The type configuration of openraft.
    pub TypeConfig:
        D = LogCommand,
        R = ApplyResult,
        NodeId = VoterId,
        Node = Addresses,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, VoterId>,
);

/// Term and index of a log entry.
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
/// The leader that made a log entry, identified by its term.
pub type CommittedLeader = openraft::alias::CommittedLeaderIdOf<TypeConfig>;
/// The leader that a node follows, and the term.
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
/// A log entry.
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
/// The members, and the entry that set them.
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
/// The entries that a snapshot covers.
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;

/// Makes a member from the two parts that openraft stores.
pub fn member(id: VoterId, addresses: &Addresses) -> Member {
    Member {
        id: id.0,
        addresses: addresses.clone(),
    }
}
