//! The errors of the content store, as its callers must distinguish them.
//!
//! Callers handle a full disk ([`ContentError::NoSpace`]) and a failed read. A failed flush ([`ContentError::Fatal`])
//! ends the node: it is unknown which bytes the disk holds.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quorumfs_blocks::is_medium_error;
use quorumfs_proto::BadChunk;
use quorumfs_proto::ChunkId;

/// Why the content store did not do what it was asked. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// This node has no copy; another node may have one.
    #[error("chunk {id} is not held here")]
    NotFound {
        /// The chunk asked for.
        id: ChunkId,
    },
    /// This node's copy does not match its checksums; another node's may.
    #[error("chunk {id} is damaged here: {what}")]
    Corrupt {
        /// The chunk asked for.
        id: ChunkId,
        /// The part of the copy that is wrong.
        what: &'static str,
    },
    /// The chunk ends before the range asked for begins.
    #[error("chunk {id} has {held} bytes, none at offset {offset}")]
    OutOfRange {
        /// The chunk asked for.
        id: ChunkId,
        /// Offset of the range.
        offset: u32,
        /// Length of the chunk.
        held: u32,
    },
    /// The data is not a valid chunk. Nothing was written.
    #[error(transparent)]
    Malformed(#[from] BadChunk),
    /// The disk is full, or nearly: a reserve is kept for deletions. The store stays usable.
    #[error("no space left for content")]
    NoSpace,
    /// A system call failed.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the system.
        error: io::Error,
    },
    /// The segment was written by a newer program.
    #[error("{} has format version {found}, which this program does not know; use a newer one", path.display())]
    UnknownVersion {
        /// Path of the segment.
        path: PathBuf,
        /// The version in the segment.
        found: u32,
    },
    /// The folder cannot be listed, and no other node has its content.
    #[error(
        "{error}; no other node has its content, so it is left unchanged: repair the filesystem of {}, or put a copy of the \
         folder in its place",
        path.display()
    )]
    Unlisted {
        /// Path of the folder.
        path: PathBuf,
        /// The error of the last attempt.
        error: Box<ContentError>,
    },
    /// Another process has the folder open.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// Path of the folder.
        path: PathBuf,
    },
    /// A flush failed. It is not retried, and nothing is acknowledged any more: the node must stop.
    #[error("the content store has stopped: {reason}")]
    Fatal {
        /// The first failure.
        reason: Arc<str>,
    },
}

/// The state of a store after a flush has failed, or after files were removed from under it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Stopped {
    /// The first failure.
    pub reason: Arc<str>,
    /// Whether files were removed from under the running store. The disk may be intact: if the store is opened again,
    /// it holds the chunks that are left.
    pub files_gone: bool,
}

impl Stopped {
    /// `action` on `path` failed.
    pub(super) fn because(action: &str, path: &Path, source: &io::Error) -> Stopped {
        Stopped {
            reason: format!("cannot {action} {}: {source}", path.display()).into(),
            files_gone: false,
        }
    }

    /// `path` was removed.
    pub(super) fn gone(path: &Path) -> Stopped {
        Stopped {
            reason: format!("{} was removed while it was in use", path.display()).into(),
            files_gone: true,
        }
    }
}

impl From<Stopped> for ContentError {
    fn from(Stopped { reason, .. }: Stopped) -> ContentError {
        ContentError::Fatal { reason }
    }
}

impl ContentError {
    /// Whether the error says that the copy is bad. Any other failure to read it (too many open files, no memory, no
    /// permission) says nothing about the copy, which may be the last good one.
    pub fn is_bad_copy(&self) -> bool {
        match self {
            ContentError::Corrupt { .. } => true,
            ContentError::Io { error, .. } => is_medium_error(error),
            _ => false,
        }
    }

    /// Makes an I/O error with its context. A full disk is [`ContentError::NoSpace`] wherever it is reported.
    pub(super) fn io(action: &'static str, path: &Path, error: io::Error) -> ContentError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ContentError::NoSpace,
            _ => ContentError::Io {
                action,
                path: path.to_path_buf(),
                error,
            },
        }
    }
}
