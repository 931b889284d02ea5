//! Storing of uploads: content first, the name last.
//!
//! A body of at most one chunk is stored with one command. A larger one is written to an unnamed file while it
//! arrives, which is linked after its last byte. In both cases the same command creates missing directories and
//! replaces an existing file. If an upload fails, its unnamed file is closed and thereby removed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use quorumfs_fs::{Destination, NewFile, Order, WritePosition};
use quorumfs_proto::attributes::Attributes;
use quorumfs_proto::command::{IfExists, Privileges};
use quorumfs_proto::{FileKind, FsError, InodeNumber, Name, Sha256};

use super::access::{Access, OpenFile, verdict};
use super::error::{ApiError, CallError};
use super::locate::{self, Directory, display_names};
use super::path::FilePath;
use super::upload_body::UploadBody;
use super::{SMALL_BYTES_MAX, Service};
use crate::api::http::connections::ClientProgress;

/// Attempts to link a file if the directories of its path change meanwhile.
const LINK_ATTEMPTS_MAX: usize = 20;

/// Age after which the target of an upload is resolved again, because it may have changed.
const TARGET_AGE_MAX: Duration = Duration::from_millis(100);

const FILE_MODE: u16 = 0o644;
const DIRECTORY_MODE: u16 = 0o755;
/// Mode bits that are kept from a replaced file: permissions, but not set-id bits, because the content is new.
const KEPT_MODE_BITS: u16 = 0o777;

/// Whether an upload may replace a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Replace {
    /// An existing file is replaced.
    Allowed,
    /// 412 if the path exists (`If-None-Match: *`).
    Never,
}

/// An upload that was accepted.
pub(super) struct Upload {
    pub(super) access: Access,
    /// The limiters that it shares with other requests.
    pub(super) service: Arc<Service>,
    /// The progress of the client.
    pub(super) progress: Arc<ClientProgress>,
    pub(super) path: FilePath,
    pub(super) replace: Replace,
    pub(super) announced_bytes: Option<u64>,
}

/// A stored file.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) attributes: Attributes,
    /// SHA-256 of the content; only for files of at most one chunk, where it is known anyway.
    pub(super) sha256: Option<Sha256>,
}

/// The target of an upload: where the name is created, and the attributes of the file.
struct Target {
    /// The deepest existing directory.
    directory: InodeNumber,
    /// Directories to create below it.
    missing: Vec<Name>,
    /// Owner of the replaced file, or otherwise of the directory.
    uid: u32,
    gid: u32,
    mode: u16,
}

impl Target {
    fn new_file(&self) -> NewFile {
        NewFile {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
        }
    }
}

impl Upload {
    /// Stores `body` and returns the file.
    pub(super) async fn run(self, body: Body) -> Result<Stored, ApiError> {
        // Resolved before the first byte is read: a client that waits for "100 Continue" does not send the body in
        // vain.
        let target = self.resolve_target().await?;
        let began = Instant::now();
        let mut body = UploadBody::new(body, self.announced_bytes, Arc::clone(&self.progress));
        // A small body is received before it needs a permit, so that no permit waits for an inactive client.
        let limiter = if body.fits_in(SMALL_BYTES_MAX).await? {
            &self.service.small_uploads
        } else {
            &self.service.uploads
        };
        let _permit = self.service.permit(limiter, &self.progress).await?;
        let first = body.next_chunk().await?;
        if body.has_more().await? {
            let attributes = self.store_large(target, first, body).await?;
            return Ok(Stored {
                attributes,
                sha256: None,
            });
        }
        let target = match began.elapsed() {
            elapsed if elapsed > TARGET_AGE_MAX => self.resolve_target().await?,
            _ => target,
        };
        let stored = self
            .link_with_retry(target, None, |target, destination| {
                let (new, content) = (target.new_file(), first.clone());
                self.access.change(move |filesystem| async move {
                    filesystem.store(new, content, destination).await
                })
            })
            .await?;
        Ok(Stored {
            attributes: stored.attributes,
            sha256: Some(stored.sha256),
        })
    }

    async fn store_large(
        &self,
        target: Target,
        first: Bytes,
        mut body: UploadBody,
    ) -> Result<Attributes, ApiError> {
        let new = target.new_file();
        let file = self
            .access
            .change(|filesystem| async move {
                let handle = filesystem.create_unnamed(new).await?;
                Ok(OpenFile::new(filesystem, handle))
            })
            .await?;
        let handle = file.handle;
        let mut offset = 0;
        let mut chunk = first;
        while !chunk.is_empty() {
            let position = WritePosition::At(offset);
            offset += chunk.len() as u64;
            self.access
                .change(|filesystem| async move {
                    let written =
                        filesystem.write(handle, position, chunk, Privileges::Keep, Order::default());
                    written.await
                })
                .await?;
            check_written(&file)?;
            chunk = body.next_chunk().await?;
        }
        // The path and the replaced file may have changed since the upload began.
        let target = self.resolve_target().await?;
        self.link_with_retry(target, Some(&file), |target, destination| {
            let new = target.new_file();
            self.access
                .change(move |filesystem| async move { filesystem.link_into(handle, new, destination).await })
        })
        .await
    }

    /// Checks the path and returns the target.
    async fn resolve_target(&self) -> Result<Target, ApiError> {
        let (parents, _) = self.path.split();
        let (directory, existing) = tokio::join!(
            locate::locate_directory(&self.access, parents),
            self.access.resolve(self.path.names()),
        );
        let (directory, missing) = match directory? {
            Directory::Found(directory) => (directory, Vec::new()),
            Directory::Missing { nearest, existing } => (nearest, parents[existing..].to_vec()),
            Directory::Blocked { by, at } if by.kind == FileKind::Symlink => {
                return Err(locate::is_symlink(&self.access, &parents[..=at], &by).await);
            }
            Directory::Blocked { by, at } => {
                let kind = locate::kind_name(by.kind);
                let message = format!(
                    "'{}' is a {kind}, not a directory",
                    display_names(&parents[..=at])
                );
                return Err(ApiError::conflict("not_a_directory", message));
            }
        };
        let mut target = Target {
            directory: directory.inode,
            missing,
            uid: directory.uid,
            gid: directory.gid,
            mode: FILE_MODE,
        };
        match verdict(existing)? {
            Ok(_) if self.replace == Replace::Never => return Err(exists(&self.path)),
            Ok(found) => {
                if let Some(refusal) =
                    locate::refuse_unless_file(&self.access, self.path.names(), &found).await
                {
                    return Err(refusal);
                }
                (target.uid, target.gid) = (found.uid, found.gid);
                target.mode = found.mode & KEPT_MODE_BITS;
            }
            Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => {}
            Err(other) => return Err(other.into()),
        }
        Ok(target)
    }

    /// Links the file with `link`, and retries while the directories of the path change. `file` is the unnamed file,
    /// if any.
    async fn link_with_retry<T, Linking>(
        &self,
        mut target: Target,
        file: Option<&OpenFile>,
        link: impl Fn(&Target, Destination) -> Linking,
    ) -> Result<T, ApiError>
    where
        Linking: Future<Output = Result<T, CallError>>,
    {
        for _ in 0..LINK_ATTEMPTS_MAX {
            match verdict(link(&target, self.destination(&target)).await)? {
                Ok(linked) => return Ok(linked),
                Err(
                    FsError::NotFound
                    | FsError::Exists
                    | FsError::NotDirectory
                    | FsError::IsDirectory
                    | FsError::NotEmpty
                    | FsError::Stale,
                ) => {
                    file.map_or(Ok(()), check_written)?;
                    target = self.resolve_target().await?;
                }
                Err(other) => return Err(other.into()),
            }
        }
        Err(ApiError::unavailable(format!(
            "the directories of '{}' or the session of this node changed during each attempt",
            display_names(self.path.names())
        )))
    }

    fn destination(&self, target: &Target) -> Destination {
        let (_, name) = self.path.split();
        Destination {
            directory: target.directory,
            missing: target.missing.clone(),
            new_directory: NewFile {
                mode: DIRECTORY_MODE,
                ..target.new_file()
            },
            name: name.clone(),
            existing: match self.replace {
                Replace::Allowed => IfExists::Open,
                Replace::Never => IfExists::Refuse,
            },
        }
    }
}

/// Returns an error if written bytes were lost.
fn check_written(file: &OpenFile) -> Result<(), ApiError> {
    file.failure().map_err(|failure| match failure {
        // The file has no name, so if it does not exist, the session was lost.
        FsError::NotFound => FsError::Stale.into(),
        other => other.into(),
    })
}

fn exists(path: &FilePath) -> ApiError {
    let message = format!("'{}' already exists", display_names(path.names()));
    ApiError::new(axum::http::StatusCode::PRECONDITION_FAILED, "exists", message)
        .hint("with If-None-Match: * an existing file is not replaced; omit the header to replace it")
}
