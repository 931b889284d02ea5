//! An upload's way into the filesystem: content first, the name last.
//!
//! A body of at most one chunk is stored in one command. A larger one is written to a file without a name while it arrives;
//! the name comes with the last of its bytes. Either way the directories that are missing are made, and what had the name
//! before is replaced, in the same step. When an upload fails, its file is closed without a name, and so it is gone.

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
use super::incoming::Incoming;
use super::path::FilePath;
use super::places::{self, Directory, shown};
use super::{SMALL_BYTES_MAX, Service};
use crate::api::http::connections::Pace;

/// How often the name is given anew because the directories on the way changed meanwhile.
const LINK_ATTEMPTS_MAX: usize = 20;

/// A body that took longer than this to arrive is given a place that is looked up again.
const PLACE_AGE_MAX: Duration = Duration::from_millis(100);

const FILE_MODE: u16 = 0o644;
const DIRECTORY_MODE: u16 = 0o755;
/// Of a file that is replaced the permissions are kept, but what lends privileges is not: the bytes are new.
const KEPT_MODE_BITS: u16 = 0o777;

/// Whether an upload may replace a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Replace {
    /// It may.
    Allowed,
    /// 412 if anything has the name (`If-None-Match: *`).
    Never,
}

/// An upload that may begin.
pub(super) struct Upload {
    pub(super) access: Access,
    /// Whose turns it shares with the node's other requests.
    pub(super) service: Arc<Service>,
    /// How fast the body comes.
    pub(super) pace: Arc<Pace>,
    pub(super) path: FilePath,
    pub(super) replace: Replace,
    pub(super) announced_bytes: Option<u64>,
}

/// What was stored.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) attributes: Attributes,
    /// Where it cost nothing: of files of one chunk.
    pub(super) sha256: Option<Sha256>,
}

/// Where the name will be, and what the file will be.
struct Place {
    /// The deepest directory that is there.
    directory: InodeNumber,
    /// Directories to be made below it.
    missing: Vec<Name>,
    /// Of the file it replaces, else of the directory it comes into.
    uid: u32,
    gid: u32,
    mode: u16,
}

impl Place {
    fn new_file(&self) -> NewFile {
        NewFile {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
        }
    }
}

impl Upload {
    /// Stores `body`.
    pub(super) async fn run(self, body: Body) -> Result<Stored, ApiError> {
        // Before the first byte is asked for: a client that waits for "100 Continue" is spared sending the body.
        let place = self.place().await?;
        let began = Instant::now();
        let mut incoming = Incoming::new(body, self.announced_bytes, Arc::clone(&self.pace));
        // What is small is here before it takes a turn, so that no turn waits for a client that sends nothing.
        let turns = if incoming.fits_in(SMALL_BYTES_MAX).await? {
            &self.service.small_uploads
        } else {
            &self.service.uploads
        };
        let _turn = self.service.turn(turns, &self.pace).await?;
        let first = incoming.next_chunk().await?;
        if incoming.has_more().await? {
            let attributes = self.store_large(place, first, incoming).await?;
            return Ok(Stored {
                attributes,
                sha256: None,
            });
        }
        let place = match began.elapsed() {
            elapsed if elapsed > PLACE_AGE_MAX => self.place().await?,
            _ => place,
        };
        let stored = self
            .give_name(place, None, |place, destination| {
                let (new, content) = (place.new_file(), first.clone());
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
        place: Place,
        first: Bytes,
        mut incoming: Incoming,
    ) -> Result<Attributes, ApiError> {
        let new = place.new_file();
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
            not_lost(&file)?;
            chunk = incoming.next_chunk().await?;
        }
        // Since the body began the path may lead elsewhere, and the file that is replaced may be another one.
        let place = self.place().await?;
        self.give_name(place, Some(&file), |place, destination| {
            let new = place.new_file();
            self.access
                .change(move |filesystem| async move { filesystem.link_into(handle, new, destination).await })
        })
        .await
    }

    /// Checks the path and says where the name will be.
    async fn place(&self) -> Result<Place, ApiError> {
        let (parents, _) = self.path.split();
        let (directory, existing) = tokio::join!(
            places::locate_directory(&self.access, parents),
            self.access.resolve(self.path.names()),
        );
        let (directory, missing) = match directory? {
            Directory::Found(directory) => (directory, Vec::new()),
            Directory::Missing { nearest, existing } => (nearest, parents[existing..].to_vec()),
            Directory::Blocked { by, at } if by.kind == FileKind::Symlink => {
                return Err(places::is_symlink(&self.access, &parents[..=at], &by).await);
            }
            Directory::Blocked { by, at } => {
                let kind = places::kind_name(by.kind);
                let message = format!("'{}' is a {kind}, not a directory", shown(&parents[..=at]));
                return Err(ApiError::conflict("not_a_directory", message));
            }
        };
        let mut place = Place {
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
                    places::refuse_unless_file(&self.access, self.path.names(), &found).await
                {
                    return Err(refusal);
                }
                (place.uid, place.gid) = (found.uid, found.gid);
                place.mode = found.mode & KEPT_MODE_BITS;
            }
            Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => {}
            Err(other) => return Err(other.into()),
        }
        Ok(place)
    }

    /// Gives the name as `give` does, again for as long as the directories on the way change under it. `file` is what was
    /// written to before.
    async fn give_name<T, Giving>(
        &self,
        mut place: Place,
        file: Option<&OpenFile>,
        give: impl Fn(&Place, Destination) -> Giving,
    ) -> Result<T, ApiError>
    where
        Giving: Future<Output = Result<T, CallError>>,
    {
        for _ in 0..LINK_ATTEMPTS_MAX {
            match verdict(give(&place, self.destination(&place)).await)? {
                Ok(given) => return Ok(given),
                Err(
                    FsError::NotFound
                    | FsError::Exists
                    | FsError::NotDirectory
                    | FsError::IsDirectory
                    | FsError::NotEmpty
                    | FsError::Stale,
                ) => {
                    file.map_or(Ok(()), not_lost)?;
                    place = self.place().await?;
                }
                Err(other) => return Err(other.into()),
            }
        }
        Err(ApiError::unavailable(format!(
            "the directories of '{}' or the upload's session changed again and again",
            shown(self.path.names())
        )))
    }

    fn destination(&self, place: &Place) -> Destination {
        let (_, name) = self.path.split();
        Destination {
            directory: place.directory,
            missing: place.missing.clone(),
            new_directory: NewFile {
                mode: DIRECTORY_MODE,
                ..place.new_file()
            },
            name: name.clone(),
            existing: match self.replace {
                Replace::Allowed => IfExists::Open,
                Replace::Never => IfExists::Refuse,
            },
        }
    }
}

/// Whether all that was written to an upload's file is there.
fn not_lost(file: &OpenFile) -> Result<(), ApiError> {
    file.failure().map_err(|failure| match failure {
        // The file has no name: that it is not there means that the session lapsed.
        FsError::NotFound => FsError::Stale.into(),
        other => other.into(),
    })
}

fn exists(path: &FilePath) -> ApiError {
    let message = format!("'{}' exists", shown(path.names()));
    ApiError::new(axum::http::StatusCode::PRECONDITION_FAILED, "exists", message)
        .hint("If-None-Match: * asks to store only what is not there; without it the file is replaced")
}
