//! What the consensus says when it cannot start, decide, confirm or change its members.

use openraft::errors::{Fatal, InitializeError};
use quorumfs_proto::{Member, Refusal, codec};

use super::fatal::FatalError;
use super::types::TypeConfig;
use super::wal::WalError;

/// Why consensus cannot start on this node.
#[derive(Debug, thiserror::Error)]
pub enum ConsensusError {
    /// The log and the metadata are gone, and so is its vote. The node must take part under a new incarnation.
    #[error("the log and the metadata are gone")]
    AllLost,
    /// The log cannot be opened. [`WalError::DamagedBelowWatermark`] costs the node its incarnation.
    #[error(transparent)]
    Log(#[from] WalError),
    /// The metadata says that entries were applied, but the log has forgotten everything: so has its vote
    /// been. The node must take part under a new incarnation.
    #[error("the log is empty although the metadata goes up to entry {index}")]
    LogLost {
        /// The last applied entry.
        index: u64,
    },
    /// Entries between the metadata and the log are missing.
    #[error("the metadata needs entry {next} next, and the log begins at entry {first}")]
    Hole {
        /// The first entry that was not applied.
        next: u64,
        /// The first that the log holds.
        first: u64,
    },
    /// The metadata and the log tell two different stories, and the log's is newer.
    #[error("the log has entry {logged} where entry {applied} was applied")]
    Contradiction {
        /// The log's.
        logged: String,
        /// The metadata's.
        applied: String,
    },
    /// The log could not be cut behind a snapshot.
    #[error("cut the log behind a snapshot: {0}")]
    Fit(std::io::Error),
    /// The metadata is damaged, as entries of the log show that were to be applied again. It costs the node its
    /// incarnation.
    #[error(transparent)]
    Metadata(FatalError),
    /// The metadata's note of its position cannot be read.
    #[error("position of the metadata: {0}")]
    Position(#[from] codec::DecodeError),
    /// The timings contradict each other.
    #[error("consensus timings: {0}")]
    Timings(#[from] openraft::ConfigError),
    /// A thread could not be started.
    #[error("start a thread: {0}")]
    Thread(#[from] std::io::Error),
    /// openraft does not start, or has stopped.
    #[error("consensus: {0}")]
    Raft(Box<Fatal<TypeConfig>>),
    /// Nobody of those who were asked can lead.
    #[error("leadership cannot be handed on: {0}")]
    HandOn(String),
    /// Not allowed now.
    #[error("initialize: {0}")]
    Initialize(Box<InitializeError<TypeConfig>>),
}

impl ConsensusError {
    /// Whether the node has forgotten what it promised, or made of it, so that it must not take part as whom it was.
    pub fn costs_incarnation(&self) -> bool {
        match self {
            ConsensusError::LogLost { .. }
            | ConsensusError::AllLost
            | ConsensusError::Hole { .. }
            | ConsensusError::Contradiction { .. }
            | ConsensusError::Metadata(_) => true,
            ConsensusError::Log(error) => matches!(
                error,
                WalError::DamagedBelowWatermark { .. }
                    | WalError::Missing { .. }
                    | WalError::Inconsistent { .. }
            ),
            _ => false,
        }
    }
}

/// Why a command was not decided, as far as this node knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another leads.
    #[error("this node does not lead")]
    NotLeader {
        /// Who does, if known.
        leader: Option<Member>,
    },
    /// Nobody can decide now, or this node cannot tell: the command may still take effect.
    #[error("{reason}")]
    Unavailable {
        /// In words.
        reason: String,
    },
    /// Too much is under way. Nothing was proposed.
    #[error("too much is under way")]
    Busy,
    /// The log's disk is nearly full and the command does not free anything. Nothing was proposed.
    #[error("no space left for the log")]
    NoSpace,
    /// What the command relies on does not hold any more. Nothing was proposed.
    #[error("what the command relies on has changed while it waited")]
    Overtaken,
}

/// Why this node cannot say that it has seen everything acknowledged so far.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    /// Another leads.
    #[error("this node does not lead")]
    NotLeader {
        /// Who does, if known.
        leader: Option<Member>,
    },
    /// No quorum answers, or the state is not recovered yet.
    #[error("{reason}")]
    Unavailable {
        /// In words.
        reason: String,
    },
}

impl From<ProposeError> for Refusal {
    fn from(error: ProposeError) -> Refusal {
        match error {
            ProposeError::NotLeader { leader } => Refusal::not_leader(leader),
            error => Refusal::unavailable(error),
        }
    }
}

impl From<BarrierError> for Refusal {
    fn from(error: BarrierError) -> Refusal {
        match error {
            BarrierError::NotLeader { leader } => Refusal::not_leader(leader),
            error => Refusal::unavailable(error),
        }
    }
}

/// Why the members were not changed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MembershipError {
    /// Another leads.
    #[error("this node does not lead")]
    NotLeader {
        /// Who does, if known.
        leader: Option<Member>,
    },
    /// Refused, or it is not known what came of it.
    #[error("{reason}")]
    Refused {
        /// In words.
        reason: String,
    },
}
