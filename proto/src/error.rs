//! The verdicts of the filesystem: values with which `apply` answers, never faults of a node.

use serde::{Deserialize, Serialize};

/// Why an operation was refused, in the terms of POSIX. The mount converts each to its errno, REST to a status.
///
/// The order of the variants is part of the encoding: append, never reorder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum FsError {
    /// ENOENT
    #[error("no such file or directory")]
    NotFound,
    /// EEXIST
    #[error("file exists")]
    Exists,
    /// ENOTDIR
    #[error("not a directory")]
    NotDirectory,
    /// EISDIR
    #[error("is a directory")]
    IsDirectory,
    /// ENOTEMPTY
    #[error("directory not empty")]
    NotEmpty,
    /// EINVAL
    #[error("invalid argument")]
    InvalidArgument,
    /// ENAMETOOLONG
    #[error("name too long")]
    NameTooLong,
    /// EMLINK
    #[error("too many links")]
    TooManyLinks,
    /// EPERM
    #[error("operation not permitted")]
    NotPermitted,
    /// EACCES
    #[error("permission denied")]
    AccessDenied,
    /// ENODATA
    #[error("no such attribute")]
    NoAttribute,
    /// ERANGE
    #[error("result or argument out of range")]
    Range,
    /// EFBIG
    #[error("file too large")]
    FileTooLarge,
    /// ENOSPC
    #[error("no space left on a quorum of nodes")]
    NoSpace,
    /// ESTALE: the inode no longer exists.
    #[error("stale file handle")]
    Stale,
    /// EOPNOTSUPP
    #[error("operation not supported")]
    NotSupported,
    /// EROFS
    #[error("read-only file system")]
    ReadOnly,
    /// EIO: no node could deliver the bytes, or no node could be reached with the call.
    #[error("input/output error")]
    Io,
    /// ETIMEDOUT inside, EIO for programs: no quorum answered within the time-out that the user set.
    #[error("no quorum answered in time")]
    TimedOut,
    /// The command names a chunk that is already dead (below the session's low-water mark). The client puts it again.
    #[error("the command names a chunk that is dead")]
    ChunkDead,
    /// E2BIG: an extended attribute is larger than 64 KiB.
    #[error("argument list too long")]
    TooBig,
}
