//! Finds what lies at a path, and says in words why nothing does.
//!
//! Symbolic links are never followed: where one points depends on where the tree is mounted, which HTTP does not
//! know, and an absolute one points out of it.

use axum::http::StatusCode;
use quorumfs_proto::{Attributes, FileKind, FsError, InodeNumber, Name};

use super::access::{Access, verdict};
use super::error::ApiError;
use super::path::{FilePath, display, encode_path, joined};

/// What is known of a directory that a path names.
#[derive(Debug)]
pub(super) enum Directory {
    /// It is there.
    Found(Attributes),
    /// Only the first `existing` of its names are there; `nearest` is what they name.
    Missing {
        /// The deepest directory that is there.
        nearest: Attributes,
        /// How many names lead to it.
        existing: usize,
    },
    /// The name at this index is there and is no directory.
    Blocked {
        /// What it is.
        by: Attributes,
        /// Its index among the names.
        at: usize,
    },
}

/// Looks for the directory `names`.
pub(super) async fn locate_directory(access: &Access, names: &[Name]) -> Result<Directory, ApiError> {
    match verdict(access.resolve(names).await)? {
        Ok(found) if found.kind == FileKind::Directory => return Ok(Directory::Found(found)),
        Ok(_) | Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => {}
        Err(other) => return Err(other.into()),
    }
    // Something is in the way: go step by step to see what.
    let mut nearest = access.attributes(InodeNumber::ROOT).await?;
    for (at, name) in names.iter().enumerate() {
        match verdict(access.lookup(nearest.inode, name).await)? {
            Ok(found) if found.kind == FileKind::Directory => nearest = found,
            Ok(by) => return Ok(Directory::Blocked { by, at }),
            Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => {
                return Ok(Directory::Missing {
                    nearest,
                    existing: at,
                });
            }
            Err(other) => return Err(other.into()),
        }
    }
    Ok(Directory::Found(nearest))
}

/// What lies at `path`; where nothing does, 404 that names the first component that is not there.
pub(super) async fn find(access: &Access, path: &FilePath) -> Result<Attributes, ApiError> {
    match verdict(access.resolve(path.names()).await)? {
        Ok(found) => return Ok(found),
        Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => {}
        Err(other) => return Err(other.into()),
    }
    let (parents, _) = path.split();
    let why = match locate_directory(access, parents).await? {
        Directory::Blocked { by, at } if by.kind == FileKind::Symlink => {
            return Err(is_symlink(access, &parents[..=at], &by).await);
        }
        Directory::Blocked { at, .. } => {
            format!("'{}' is not a directory", shown(&parents[..=at]))
        }
        Directory::Missing { existing, .. } => {
            format!("the directory '{}' does not exist", shown(&parents[..=existing]))
        }
        Directory::Found(_) => "no such file".to_string(),
    };
    let message = format!("nothing at '{}': {why}", shown(path.names()));
    Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
        .hint("GET /files?prefix=… lists what there is"))
}

/// 409: the path `names` is a symbolic link.
pub(super) async fn is_symlink(access: &Access, names: &[Name], link: &Attributes) -> ApiError {
    let target = match access.read_link(link.inode).await {
        Ok(target) => format!(" to '{}'", display(&target)),
        Err(_) => String::new(),
    };
    ApiError::conflict(
        "symbolic_link",
        format!("'{}' is a symbolic link{target}", shown(names)),
    )
    .hint("symbolic links are not followed over HTTP; use the path of the file itself (DELETE removes the link)")
}

/// 409: the path `names` is a directory, where a file is wanted.
pub(super) fn is_directory(names: &[Name]) -> ApiError {
    let path = joined(names);
    ApiError::conflict("is_a_directory", format!("'{}' is a directory", display(&path)))
        .hint(format!("GET /files?prefix={}/ lists it", encode_path(&path)))
}

/// 409 for what has no content that HTTP could carry; `None` for a regular file.
pub(super) async fn refuse_unless_file(
    access: &Access,
    names: &[Name],
    found: &Attributes,
) -> Option<ApiError> {
    match found.kind {
        FileKind::File => None,
        FileKind::Directory => Some(is_directory(names)),
        FileKind::Symlink => Some(is_symlink(access, names, found).await),
        FileKind::Fifo | FileKind::Socket | FileKind::CharacterDevice | FileKind::BlockDevice => {
            let message = format!("'{}' is a {}, not a file", shown(names), kind_name(found.kind));
            Some(ApiError::conflict("not_a_file", message))
        }
    }
}

/// A kind as listings and messages name it.
pub(super) fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharacterDevice => "character_device",
        FileKind::BlockDevice => "block_device",
    }
}

pub(super) fn shown(names: &[Name]) -> String {
    display(&joined(names))
}
