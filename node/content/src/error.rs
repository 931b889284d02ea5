//! What can go wrong with content, as its callers must tell it apart.
//!
//! A full disk ([`ContentError::NoSpace`]) and a failed read are the caller's to handle; a failed flush
//! ([`ContentError::Fatal`]) ends the node: nobody knows any more which bytes the disk holds.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quorumfs_blocks::is_medium_error;
use quorumfs_proto::BadChunk;
use quorumfs_proto::ChunkId;

/// Why the content store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// No copy here; another node may have one.
    #[error("chunk {id} is not held here")]
    NotFound {
        /// The chunk asked for.
        id: ChunkId,
    },
    /// The copy here does not match its checksums; another node's may.
    #[error("chunk {id} is damaged here: {what}")]
    Corrupt {
        /// The chunk asked for.
        id: ChunkId,
        /// What does not match.
        what: &'static str,
    },
    /// The chunk ends before the range asked for begins.
    #[error("chunk {id} has {held} bytes, none at offset {offset}")]
    OutOfRange {
        /// The chunk asked for.
        id: ChunkId,
        /// Where the range begins.
        offset: u32,
        /// How long the chunk is.
        held: u32,
    },
    /// What was to be stored is no chunk: nothing was written.
    #[error(transparent)]
    Malformed(#[from] BadChunk),
    /// The disk is full (or nearly: a reserve is left to those who delete). The store stays usable.
    #[error("no space left for content")]
    NoSpace,
    /// The operating system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A segment written by a later program.
    #[error("{} has format version {found}, which this program does not know; use a newer one", path.display())]
    UnknownVersion {
        /// The segment.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The folder cannot be listed, and no other node has what is in it.
    #[error(
        "{source}; no other node has what is in it, so it stays as it is: repair the filesystem of {}, or put a copy of the \
         folder in its place",
        path.display()
    )]
    Unlisted {
        /// The folder.
        path: PathBuf,
        /// What the disk said the last time.
        source: Box<ContentError>,
    },
    /// Another process has the folder open.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// A flush failed. It is not tried again, and nothing is acknowledged any more: the node must stop.
    #[error("the content store has stopped: {reason}")]
    Fatal {
        /// The first failure.
        reason: Arc<str>,
    },
}

/// A flush has failed, or files are gone: what the store answers from then on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Stopped {
    /// The first failure.
    pub reason: Arc<str>,
    /// Somebody took files away from under the running store. The disk may be well: opened anew, the store holds what is
    /// left.
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

    /// `path` was taken away.
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
    /// Whether it says that the copy is bad. Any other failure to read it (too many open files, no memory, no permission)
    /// says nothing of the copy, which may be the last good one.
    pub fn is_bad_copy(&self) -> bool {
        match self {
            ContentError::Corrupt { .. } => true,
            ContentError::Io { source, .. } => is_medium_error(source),
            _ => false,
        }
    }

    /// An I/O error with its context; a full disk is [`ContentError::NoSpace`] wherever it shows.
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> ContentError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ContentError::NoSpace,
            _ => ContentError::Io {
                action,
                path: path.to_path_buf(),
                source,
            },
        }
    }
}
