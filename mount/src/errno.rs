//! The mapping of the filesystem's errors to the kernel's error numbers.
//!
//! The match is exhaustive, so that a new [`FsError`] does not compile until it has an errno.

use fuser::Errno;
use quorumfs_proto::FsError;

/// Returns the `errno` that programs see.
pub fn errno(error: FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::ENOENT,
        FsError::Exists => Errno::EEXIST,
        FsError::NotDirectory => Errno::ENOTDIR,
        FsError::IsDirectory => Errno::EISDIR,
        FsError::NotEmpty => Errno::ENOTEMPTY,
        FsError::InvalidArgument => Errno::EINVAL,
        FsError::NameTooLong => Errno::ENAMETOOLONG,
        FsError::TooManyLinks => Errno::EMLINK,
        FsError::NotPermitted => Errno::EPERM,
        FsError::AccessDenied => Errno::EACCES,
        FsError::NoAttribute => Errno::ENODATA,
        FsError::Range => Errno::ERANGE,
        FsError::FileTooLarge => Errno::EFBIG,
        FsError::NoSpace => Errno::ENOSPC,
        FsError::Stale => Errno::ESTALE,
        FsError::NotSupported => Errno::EOPNOTSUPP,
        FsError::ReadOnly => Errno::EROFS,
        // Programs expect EIO; ETIMEDOUT from a file surprises most. The client puts again chunks that are ChunkDead,
        // so such an error that arrives here could not be repaired.
        FsError::Io | FsError::TimedOut | FsError::ChunkDead => Errno::EIO,
        FsError::TooBig => Errno::E2BIG,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_see_the_numbers_of_linux() {
        for (error, code) in [
            (FsError::NotFound, libc::ENOENT),
            (FsError::NotEmpty, libc::ENOTEMPTY),
            (FsError::NoAttribute, libc::ENODATA),
            (FsError::NotSupported, libc::EOPNOTSUPP),
            (FsError::Stale, libc::ESTALE),
            (FsError::TimedOut, libc::EIO),
            (FsError::TooBig, libc::E2BIG),
            (FsError::NoSpace, libc::ENOSPC),
        ] {
            assert_eq!(errno(error).code(), code, "{error}");
        }
    }
}
