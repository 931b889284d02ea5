//! The errors of starting the consensus, deciding commands, confirming leadership and changing members.

use openraft::errors::{Fatal, InitializeError};
use quorumfs_content::ContentError;
use quorumfs_metadata::StorageFault;
use quorumfs_proto::{Member, Refusal, codec};

use super::fatal::FatalError;
use super::types::TypeConfig;
use super::wal::WalError;

/// Why consensus cannot start on this node. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum ConsensusError {
    /// The log and the metadata are gone, and with them the node's vote. The node must take part under a new
    /// incarnation.
    #[error("the log and the metadata are gone")]
    AllLost,
    /// The log cannot be opened. After [`WalError::DamagedBelowWatermark`] the node must take part under a new
    /// incarnation.
    #[error(transparent)]
    Log(#[from] WalError),
    /// The metadata show that entries were applied, but the log is empty, so the node's vote is lost. The node must
    /// take part under a new incarnation.
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
        /// The first entry in the log.
        first: u64,
    },
    /// The metadata and the log contradict each other, and the log is newer.
    #[error("the log has entry {logged} where entry {applied} was applied")]
    Contradiction {
        /// The log's entry.
        logged: String,
        /// The metadata's entry.
        applied: String,
    },
    /// The log could not be cut behind a snapshot.
    #[error("cannot cut the log behind a snapshot: {0}")]
    Fit(std::io::Error),
    /// The metadata is damaged: entries of the log could not be applied again. The node must take part under a new
    /// incarnation.
    #[error(transparent)]
    Metadata(FatalError),
    /// The position stored in the metadata cannot be decoded.
    #[error("cannot decode the position of the metadata: {0}")]
    Position(codec::DecodeError),
    /// The timings contradict each other.
    #[error("the timings of the consensus are not valid: {0}")]
    Timings(openraft::ConfigError),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// openraft does not start, or has stopped.
    #[error("openraft has stopped: {0}")]
    Raft(Box<Fatal<TypeConfig>>),
    /// None of the nodes that were asked can lead.
    #[error("leadership cannot be handed on: {0}")]
    HandOn(String),
    /// The cluster cannot be created now.
    #[error("cannot create the cluster: {0}")]
    Initialize(Box<InitializeError<TypeConfig>>),
}

// Not `#[from]`: the messages include the cause, which must not be printed again as the source.
macro_rules! from_cause {
    ($($variant:ident($error:ty)),+) => {$(
        impl From<$error> for ConsensusError {
            fn from(error: $error) -> ConsensusError {
                ConsensusError::$variant(error)
            }
        }
    )+};
}

from_cause!(
    Position(codec::DecodeError),
    Timings(openraft::ConfigError),
    Thread(std::io::Error)
);

impl ConsensusError {
    /// Whether the node has lost or misused its promises, so that it must not take part under its present incarnation.
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

// Not in `fatal`: the log imports that module, and an import circle would result.
impl FatalError {
    /// Whether reading or writing this node's files failed; else the cause is in the program.
    pub fn is_storage_failure(&self) -> bool {
        self.source.is::<StorageFault>()
            || self.source.is::<ContentError>()
            || self.source.is::<WalError>()
            || self.source.is::<std::io::Error>()
    }
}

/// Why a command was not decided, as far as this node knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another node leads.
    #[error("this node does not lead")]
    NotLeader {
        /// The leader, if known.
        leader: Option<Member>,
    },
    /// The command cannot be decided now, or this node does not know its result: it may still take effect.
    #[error("{reason}")]
    Unavailable {
        /// The reason, for people.
        reason: String,
    },
    /// Too many bytes of commands are in progress. Nothing was proposed.
    #[error("too many commands are in progress")]
    Busy,
    /// The log's disk is nearly full and the command does not free anything. Nothing was proposed.
    #[error("no space left for the log")]
    NoSpace,
    /// A condition of the command no longer holds. Nothing was proposed.
    #[error("a condition of the command changed while it waited")]
    Overtaken,
}

/// Why this node cannot confirm that it has seen everything acknowledged so far.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    /// Another node leads.
    #[error("this node does not lead")]
    NotLeader {
        /// The leader, if known.
        leader: Option<Member>,
    },
    /// No quorum answers, or the state is not recovered yet.
    #[error("{reason}")]
    Unavailable {
        /// The reason, for people.
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
    /// Another node leads.
    #[error("this node does not lead")]
    NotLeader {
        /// The leader, if known.
        leader: Option<Member>,
    },
    /// The change was refused, or its result is unknown.
    #[error("{reason}")]
    Refused {
        /// The reason, for people.
        reason: String,
    },
}
