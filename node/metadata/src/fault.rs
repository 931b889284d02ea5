//! The two ways in which metadata work fails, kept apart: a verdict is an answer that every node gives alike; a fault
//! is a problem of this node and must never look like an answer.

use quorumfs_proto::FsError;
use quorumfs_proto::codec::DecodeError;

/// A fault of this node's metadata storage. The node must stop, except for [`StorageFault::NoSpace`]; if the fault [is
/// damage](StorageFault::is_damage), the node rebuilds its metadata. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum StorageFault {
    /// The database failed.
    #[error("metadata database: {0}")]
    Database(Box<redb::Error>),
    /// A file operation beside the database failed.
    #[error("cannot {doing}: {error}")]
    Io {
        /// The action that failed.
        doing: &'static str,
        /// The error of the system.
        error: std::io::Error,
    },
    /// A row is damaged, or has a version that this program does not know.
    #[error("metadata row: {0}")]
    Decode(DecodeError),
    /// The bytes on the disk are not those that were written.
    #[error("the metadata is damaged: {what}")]
    Damaged {
        /// What is damaged, or how it was found.
        what: String,
    },
    /// The rows contradict each other.
    #[error("metadata is inconsistent: {what}")]
    Inconsistent {
        /// How they contradict each other.
        what: String,
    },
    /// The database was written by a newer program.
    #[error("metadata format {found} is not known (this program knows {known}); use a newer program")]
    UnknownFormat {
        /// The database's format.
        found: u32,
        /// The format that this program writes.
        known: u32,
    },
    /// The cluster uses features of a newer program.
    #[error("the cluster's feature level is {found}, and this program knows {known}: use a newer program")]
    UnknownFeatures {
        /// The cluster's feature level.
        found: u32,
        /// The highest level that this program knows.
        known: u32,
    },
    /// The received data is not a valid snapshot.
    #[error("the snapshot is not usable: {reason}")]
    BadSnapshot {
        /// Why it is not usable.
        reason: String,
    },
    /// The disk has too little space for a flush. Nothing was written: the flush may be retried when there is space.
    #[error("a metadata flush may need {needed_bytes} bytes, the disk has {available_bytes}")]
    NoSpace {
        /// An upper bound of what the flush writes.
        needed_bytes: u64,
        /// The free space of the disk.
        available_bytes: u64,
    },
}

impl StorageFault {
    /// Whether the bytes on this node's disk are not those that were written: reading again does not help, and the
    /// other nodes have the right data. Contradictions between rows that match their checksums do not count: they are
    /// errors of the program and the same on all nodes, and then no node may discard its state.
    pub fn is_damage(&self) -> bool {
        use std::io::ErrorKind;
        match self {
            StorageFault::Decode(DecodeError::Checksum { .. }) | StorageFault::Damaged { .. } => true,
            StorageFault::Database(error) => match &**error {
                redb::Error::Corrupted(_) => true,
                // redb reports this for a file that is not a redb database, or was cut.
                redb::Error::Io(error) => {
                    matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof)
                }
                _ => false,
            },
            _ => false,
        }
    }

    pub(super) fn damaged(what: impl Into<String>) -> StorageFault {
        StorageFault::Damaged { what: what.into() }
    }

    pub(super) fn inconsistent(what: impl Into<String>) -> StorageFault {
        StorageFault::Inconsistent { what: what.into() }
    }

    pub(super) fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> StorageFault {
        move |error| StorageFault::Io { doing, error }
    }
}

// Not `#[from]`: the message includes the cause, which must not be printed again as the source.
impl From<DecodeError> for StorageFault {
    fn from(error: DecodeError) -> StorageFault {
        StorageFault::Decode(error)
    }
}

macro_rules! from_redb {
    ($($error:ty),+) => {$(
        impl From<$error> for StorageFault {
            fn from(error: $error) -> StorageFault {
                StorageFault::Database(Box::new(error.into()))
            }
        }
        impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                Failure::Fault(error.into())
            }
        }
    )+};
}

from_redb!(
    redb::StorageError,
    redb::TableError,
    redb::TransactionError,
    redb::CommitError,
    redb::DatabaseError,
    redb::SetDurabilityError,
    redb::CursorError
);

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The filesystem's refusal, the same on every node.
    #[error(transparent)]
    Verdict(#[from] FsError),
    /// A fault: this node cannot answer.
    #[error(transparent)]
    Fault(#[from] StorageFault),
}

impl Failure {
    /// Separates verdicts from faults, for callers that return the former and stop at the latter.
    pub fn split<T>(result: Result<T, Failure>) -> Result<Result<T, FsError>, StorageFault> {
        match result {
            Ok(value) => Ok(Ok(value)),
            Err(Failure::Verdict(verdict)) => Ok(Err(verdict)),
            Err(Failure::Fault(fault)) => Err(fault),
        }
    }
}
