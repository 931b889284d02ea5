//! The two ways in which metadata work does not succeed, kept apart: a verdict is an answer that every node gives
//! alike; a fault is this node's own trouble and must never look like an answer.

use quorumfs_proto::FsError;
use quorumfs_proto::codec::DecodeError;

/// What is wrong with this node's metadata storage. The node must stop with it, except for [`StorageFault::NoSpace`];
/// where it [is damage](StorageFault::is_damage) it makes its metadata anew.
#[derive(Debug, thiserror::Error)]
pub enum StorageFault {
    /// The database failed.
    #[error("metadata database: {0}")]
    Database(Box<redb::Error>),
    /// A file operation beside the database failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
    /// A row is damaged, or of a version this program does not know.
    #[error("metadata row: {0}")]
    Decode(#[from] DecodeError),
    /// What lies on the disk is not what was written there.
    #[error("the metadata is damaged: {what}")]
    Damaged {
        /// What of it, or how it was found.
        what: String,
    },
    /// The rows contradict each other.
    #[error("metadata is inconsistent: {what}")]
    Inconsistent {
        /// How.
        what: String,
    },
    /// The database was written by a newer program.
    #[error("metadata format {found} is not known (this program knows {known}); use a newer program")]
    UnknownFormat {
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The cluster uses what a newer program does.
    #[error("the cluster's feature level is {found}, and this program knows {known}: use a newer program")]
    UnknownFeatures {
        /// The cluster's.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// What was received is not a snapshot.
    #[error("the snapshot is not usable: {reason}")]
    BadSnapshot {
        /// Why.
        reason: String,
    },
    /// The disk has too little room for a flush. Nothing was begun: the flush may be tried again when there is room.
    #[error("a metadata flush may need {needed_bytes} bytes, the disk has {available_bytes}")]
    NoSpace {
        /// An upper bound of what the flush writes.
        needed_bytes: u64,
        /// What the disk has.
        available_bytes: u64,
    },
}

impl StorageFault {
    /// Whether what lies on this node's disk is not what was written there: reading it again does not help, and the other
    /// nodes have it right. Contradictions between rows that match their checksums do not count: what a program did wrong
    /// it did wrong on all nodes, and then none may throw its state away.
    pub fn is_damage(&self) -> bool {
        use std::io::ErrorKind;
        match self {
            StorageFault::Decode(DecodeError::Checksum { .. }) | StorageFault::Damaged { .. } => true,
            StorageFault::Database(error) => match &**error {
                redb::Error::Corrupted(_) => true,
                // How redb says that a file is none of its own, or was cut.
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
        move |source| StorageFault::Io { doing, source }
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
    /// The filesystem's answer is "no", on every node alike.
    #[error(transparent)]
    Verdict(#[from] FsError),
    /// This node cannot tell.
    #[error(transparent)]
    Fault(#[from] StorageFault),
}

impl Failure {
    /// The verdict as a value, the fault as the error: for callers that answer the one and stop at the other.
    pub fn split<T>(result: Result<T, Failure>) -> Result<Result<T, FsError>, StorageFault> {
        match result {
            Ok(value) => Ok(Ok(value)),
            Err(Failure::Verdict(verdict)) => Ok(Err(verdict)),
            Err(Failure::Fault(fault)) => Err(fault),
        }
    }
}
