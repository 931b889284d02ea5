//! The verdicts of the filesystem: values that `apply` answers with, never faults of a node.

use serde::{Deserialize, Serialize};

/// Why an operation was not done, in the terms of POSIX. The mount turns each into its errno, REST into a
/// status.
///
/// The order is part of the encoding: append, never reorder.
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
    /// ESTALE: the inode is gone for ever.
    #[error("stale file handle")]
    Stale,
    /// EOPNOTSUPP
    #[error("operation not supported")]
    NotSupported,
    /// EROFS
    #[error("read-only file system")]
    ReadOnly,
    /// EIO: bytes could not be read from, or a call could not be brought to, any node.
    #[error("input/output error")]
    Io,
    /// ETIMEDOUT within, EIO towards programs: no quorum answered within the time-out the user set.
    #[error("no quorum answered in time")]
    TimedOut,
    /// The command names a chunk that is already dead (below the session's low-water mark): put it again.
    #[error("the command names a chunk that is dead")]
    ChunkDead,
    /// E2BIG: an extended attribute is larger than 64 KiB.
    #[error("argument list too long")]
    TooBig,
}
