//! Resolves paths, and explains why one does not exist.
//!
//! Symbolic links are never followed: the meaning of a target depends on the mount point, which HTTP does not know,
//! and an absolute target is outside the tree.

use axum::http::StatusCode;
use quorumfs_proto::{Attributes, FileKind, FsError, InodeNumber, Name};

use super::access::{Access, verdict};
use super::error::ApiError;
use super::path::{FilePath, display, encode_path, joined};

/// The result of resolving the path of a directory.
#[derive(Debug)]
pub(super) enum Directory {
    /// The directory exists.
    Found(Attributes),
    /// Only the first `existing` names exist; `nearest` is the directory that they name.
    Missing {
        /// The deepest existing directory.
        nearest: Attributes,
        /// The number of names that lead to it.
        existing: usize,
    },
    /// The name at this index exists and is not a directory.
    Blocked {
        /// The attributes of what it names.
        by: Attributes,
        /// Its index among the names.
        at: usize,
    },
}

/// Resolves the directory `names`.
pub(super) async fn locate_directory(access: &Access, names: &[Name]) -> Result<Directory, ApiError> {
    match verdict(access.resolve(names).await)? {
        Ok(found) if found.kind == FileKind::Directory => return Ok(Directory::Found(found)),
        Ok(_) | Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => {}
        Err(other) => return Err(other.into()),
    }
    // The path does not resolve to a directory: find out where it ends.
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

/// Returns the attributes of the inode at `path`; otherwise a 404 that names the first missing component.
pub(super) async fn find_entry(access: &Access, path: &FilePath) -> Result<Attributes, ApiError> {
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
            format!("'{}' is not a directory", display_names(&parents[..=at]))
        }
        Directory::Missing { existing, .. } => {
            format!(
                "the directory '{}' does not exist",
                display_names(&parents[..=existing])
            )
        }
        Directory::Found(_) => "the file does not exist".to_string(),
    };
    let message = format!("'{}' does not exist: {why}", display_names(path.names()));
    Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
        .hint("GET /files?prefix=… lists existing files"))
}

/// Creates a 409: the path `names` is a symbolic link.
pub(super) async fn is_symlink(access: &Access, names: &[Name], link: &Attributes) -> ApiError {
    let target = match access.read_link(link.inode).await {
        Ok(target) => format!(" to '{}'", display(&target)),
        Err(_) => String::new(),
    };
    ApiError::conflict(
        "symbolic_link",
        format!("'{}' is a symbolic link{target}", display_names(names)),
    )
    .hint("symbolic links are not followed over HTTP; use the path of the file itself (DELETE removes the link)")
}

/// Creates a 409: the path `names` is a directory, but a file is required.
pub(super) fn is_directory(names: &[Name]) -> ApiError {
    let path = joined(names);
    ApiError::conflict("is_a_directory", format!("'{}' is a directory", display(&path)))
        .hint(format!("GET /files?prefix={}/ lists it", encode_path(&path)))
}

/// Returns a 409 if the inode has no content to transfer; `None` for a regular file.
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
            let message = format!(
                "'{}' is a {}, not a file",
                display_names(names),
                kind_name(found.kind)
            );
            Some(ApiError::conflict("not_a_file", message))
        }
    }
}

/// Returns the name of a kind in listings and messages.
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

pub(super) fn display_names(names: &[Name]) -> String {
    display(&joined(names))
}
