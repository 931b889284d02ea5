//! An upload's way into the filesystem: content first, the name last.
//!
//! - A body of at most one chunk is one command: it makes the file with its content (inline when it is small, else the
//!   chunk was put before), the directories that are missing, and the name.
//! - A larger one goes into an inode without a name that this node's session holds open; its chunks are put and
//!   written while the rest arrives. One last command adds the tail, the missing directories and the name.
//!
//! So the name appears at once and whole, or not at all; what had it before is replaced in the same step. When the
//! upload fails, the inode without a name is released, and if that cannot be said now, the keep-alive says it later
//! (`open_inodes`).

use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use quorumfs_client::FreshChunk;
use quorumfs_proto::attributes::Attributes;
use quorumfs_proto::command::{
    AttributeChanges, IfExists, NewInode, NewKind, Operation, Privileges, SetTime, Target,
};
use quorumfs_proto::limits::INLINE_BYTES_MAX;
use quorumfs_proto::{
    Command, Extent, FileKind, FsError, InodeNumber, Name, NewChunk, OperationResult, Outcome, Sha256,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::calls::{Calls, verdict};
use super::error::ApiError;
use super::incoming::Incoming;
use super::open_inodes::HeldInode;
use super::path::FilePath;
use super::places::{self, Directory, shown};
use super::{SMALL_BYTES_MAX, Service};
use crate::api::http::connections::Pace;

/// Chunks of one upload on their way to the cluster. With the one that fills, and what the HTTP library holds of the
/// next, an upload holds at most 8 MiB.
const CHUNKS_IN_FLIGHT_MAX: usize = 6;

/// How often a chunk is put again whose id the cluster had given up on.
const PUT_ATTEMPTS_MAX: usize = 3;

/// How often the last command is made anew because the directories on the way changed meanwhile, or had to be made
/// before: a path of 2,048 names takes ten commands for that.
const LINK_ATTEMPTS_MAX: usize = 20;

/// Directories made by one command; deeper paths take several (a command has room for 256 operations).
const DIRECTORIES_PER_COMMAND_MAX: usize = 200;

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
    pub(super) calls: Calls,
    /// Whose turns, open inodes and room for chunks it shares with the node's other requests.
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

/// Where the name will be.
struct Destination {
    /// The deepest directory that is there.
    directory: InodeNumber,
    /// Directories to be made below it.
    missing: Vec<Name>,
    owner: Owner,
    mode: u16,
}

/// Whose the new file is: that of the file it replaces, else of the directory it comes into.
#[derive(Clone, Copy)]
struct Owner {
    uid: u32,
    gid: u32,
}

impl Owner {
    fn of(attributes: &Attributes) -> Owner {
        Owner {
            uid: attributes.uid,
            gid: attributes.gid,
        }
    }

    fn makes(self, kind: NewKind, mode: u16) -> NewInode {
        NewInode {
            kind,
            mode,
            uid: self.uid,
            gid: self.gid,
        }
    }
}

/// The bytes that come with the last command.
#[derive(Default)]
struct Tail {
    chunk: Option<NewChunk>,
    piece: Option<Extent>,
    /// The chunk itself: the client may have to put it again.
    fresh: Vec<FreshChunk>,
}

/// What gets the name.
enum Subject {
    /// An inode that the last command makes.
    New,
    /// One that is filled already.
    Filled(Arc<HeldInode>),
}

impl Upload {
    /// Stores `body`.
    pub(super) async fn run(self, body: Body) -> Result<Stored, ApiError> {
        // Before the first byte is asked for: a client that waits for "100 Continue" is spared sending the body.
        let place = self.place().await?;
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
            return self.store_large(place, first, incoming).await;
        }
        let mut sha256 = Sha256::of(b"");
        let tail = self.tail(0, &first).await?;
        if let Some(chunk) = &tail.chunk {
            sha256 = chunk.sha256;
        }
        let attributes = self.link(place, Subject::New, 0, first, tail).await?;
        Ok(Stored {
            attributes,
            sha256: Some(sha256),
        })
    }

    async fn store_large(
        &self,
        place: Destination,
        first: Bytes,
        mut incoming: Incoming,
    ) -> Result<Stored, ApiError> {
        let inode = place.owner.makes(NewKind::File, place.mode);
        let create = Command::single(Operation::CreateUnlinked { inode });
        let opening = self.service.open_inodes.begin();
        let outcome = self.calls.mutate(create, &[]).await?;
        let held = Arc::new(opening.hold(entry(&outcome, 0)?));

        let result = self.fill_and_link(place, &held, first, &mut incoming).await;
        match result {
            Ok(attributes) => Ok(Stored {
                attributes,
                sha256: None,
            }),
            Err(error) => {
                self.release(held).await;
                Err(error)
            }
        }
    }

    async fn fill_and_link(
        &self,
        place: Destination,
        held: &Arc<HeldInode>,
        first: Bytes,
        incoming: &mut Incoming,
    ) -> Result<Attributes, ApiError> {
        // Dropped with its tasks when this returns early: none outlives the upload.
        let mut in_flight: JoinSet<Result<(), ApiError>> = JoinSet::new();
        let mut offset = 0;
        let mut chunk = first;
        while incoming.has_more().await? {
            while in_flight.len() >= CHUNKS_IN_FLIGHT_MAX {
                finished(in_flight.join_next().await)?;
            }
            while let Some(done) = in_flight.try_join_next() {
                finished(Some(done))?;
            }
            let permit = permit(&self.service.upload_chunks).await?;
            let length = chunk.len() as u64;
            in_flight.spawn(write_chunk(
                self.calls.clone(),
                Arc::clone(held),
                offset,
                chunk,
                permit,
            ));
            offset += length;
            chunk = incoming.next_chunk().await?;
        }
        let tail = self.tail(offset, &chunk).await?;
        while let Some(done) = in_flight.join_next().await {
            finished(Some(done))?;
        }
        let subject = Subject::Filled(Arc::clone(held));
        self.link(place, subject, offset, chunk, tail).await
    }

    /// Checks the path and says where the name will be.
    async fn place(&self) -> Result<Destination, ApiError> {
        let (parents, _) = self.path.split();
        let (directory, existing) = tokio::join!(
            places::locate_directory(&self.calls, parents),
            self.calls.resolve(self.path.names()),
        );
        let (directory, missing) = match directory? {
            Directory::Found(directory) => (directory, Vec::new()),
            Directory::Missing { nearest, existing } => (nearest, parents[existing..].to_vec()),
            Directory::Blocked { by, at } if by.kind == FileKind::Symlink => {
                return Err(places::is_symlink(&self.calls, &parents[..=at], &by).await);
            }
            Directory::Blocked { by, at } => {
                let kind = places::kind_name(by.kind);
                let message = format!("'{}' is a {kind}, not a directory", shown(&parents[..=at]));
                return Err(ApiError::conflict("not_a_directory", message));
            }
        };
        let mut place = Destination {
            directory: directory.inode,
            missing,
            owner: Owner::of(&directory),
            mode: FILE_MODE,
        };
        match verdict(existing)? {
            Ok(_) if self.replace == Replace::Never => return Err(exists(&self.path)),
            Ok(found) => {
                if let Some(refusal) =
                    places::refuse_unless_file(&self.calls, self.path.names(), &found).await
                {
                    return Err(refusal);
                }
                place.owner = Owner::of(&found);
                place.mode = found.mode & KEPT_MODE_BITS;
            }
            Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => {}
            Err(other) => return Err(other.into()),
        }
        Ok(place)
    }

    /// Puts `payload` where it does not fit into a command, and says how the last command names it.
    async fn tail(&self, offset: u64, payload: &Bytes) -> Result<Tail, ApiError> {
        if payload.is_empty() {
            return Ok(Tail::default());
        }
        let fresh = fresh_chunk(&self.calls, payload.clone()).await?;
        let piece = Some(whole(&fresh, offset, payload));
        let chunk = if payload.len() <= INLINE_BYTES_MAX as usize {
            fresh.inline()
        } else {
            let _permit = permit(&self.service.upload_chunks).await?;
            self.calls.in_time(self.calls.client.put_chunk(&fresh)).await?;
            fresh.stored()
        };
        Ok(Tail {
            chunk: Some(chunk),
            piece,
            fresh: vec![fresh],
        })
    }

    /// The last command, made anew for as long as the directories on the way change under it.
    async fn link(
        &self,
        mut place: Destination,
        subject: Subject,
        tail_offset: u64,
        tail_payload: Bytes,
        mut tail: Tail,
    ) -> Result<Attributes, ApiError> {
        for _ in 0..LINK_ATTEMPTS_MAX {
            if place.missing.len() > DIRECTORIES_PER_COMMAND_MAX {
                self.make_directories(&place).await?;
                place = self.place().await?;
                continue;
            }
            let command = self.last_command(&place, &subject, &tail);
            match verdict(self.calls.mutate(command, &tail.fresh).await)? {
                Ok(outcome) => {
                    let inode = match &subject {
                        Subject::New => entry(&outcome, 0)?,
                        Subject::Filled(held) => held.inode(),
                    };
                    return outcome
                        .attributes_of(inode)
                        .cloned()
                        .ok_or_else(|| ApiError::internal("the outcome lacks the new file's attributes"));
                }
                Err(
                    FsError::NotFound
                    | FsError::Exists
                    | FsError::NotDirectory
                    | FsError::IsDirectory
                    | FsError::NotEmpty
                    | FsError::Stale,
                ) => place = self.place().await?,
                Err(FsError::ChunkDead) => tail = self.tail(tail_offset, &tail_payload).await?,
                Err(other) => return Err(other.into()),
            }
        }
        Err(ApiError::unavailable(format!(
            "the directories of '{}' or the upload's session changed again and again",
            shown(self.path.names())
        )))
    }

    /// Makes the first of the missing directories.
    async fn make_directories(&self, place: &Destination) -> Result<(), ApiError> {
        let mut operations = Vec::new();
        let names = &place.missing[..DIRECTORIES_PER_COMMAND_MAX];
        push_directories(&mut operations, place, names);
        let command = Command {
            chunks: Vec::new(),
            operations,
        };
        // Whatever got in the way, the next look at the path says it better.
        let result = self.calls.mutate(command, &[]).await;
        verdict(result)?.map(|_| ()).or_else(|refused| match refused {
            FsError::NotFound | FsError::Exists | FsError::NotDirectory => Ok(()),
            other => Err(other.into()),
        })
    }

    fn last_command(&self, place: &Destination, subject: &Subject, tail: &Tail) -> Command {
        let mut operations = Vec::new();
        let inode = match subject {
            Subject::New => {
                let inode = place.owner.makes(NewKind::File, place.mode);
                operations.push(Operation::CreateUnlinked { inode });
                Target::Created(0)
            }
            Subject::Filled(held) => Target::Inode(held.inode()),
        };
        if let Some(piece) = tail.piece {
            operations.push(write(inode, piece));
        }
        if let Subject::Filled(_) = subject {
            // The time of the upload is when it was complete, not when it began.
            let changes = AttributeChanges {
                mtime: Some(SetTime::Now),
                ..AttributeChanges::default()
            };
            operations.push(Operation::SetAttributes { inode, changes });
        }
        let parent = push_directories(&mut operations, place, &place.missing);
        let (_, name) = self.path.split();
        operations.push(Operation::Link {
            inode,
            parent,
            name: name.clone(),
            existing: match self.replace {
                Replace::Allowed => IfExists::Open,
                Replace::Never => IfExists::Refuse,
            },
        });
        Command {
            chunks: tail.chunk.iter().cloned().collect(),
            operations,
        }
    }

    /// Says that the inode of a failed upload is not needed. Best effort: the keep-alive says it too.
    async fn release(&self, held: Arc<HeldInode>) {
        let inodes = vec![held.inode()];
        let command = Command::single(Operation::ReleaseUnlinked { inodes });
        if let Err(error) = self.calls.mutate(command, &[]).await {
            tracing::debug!(
                ?error,
                "releasing the inode of a failed upload; the keep-alive will"
            );
        }
    }
}

/// Puts a chunk and writes it into the upload's inode.
async fn write_chunk(
    calls: Calls,
    held: Arc<HeldInode>,
    offset: u64,
    payload: Bytes,
    _permit: OwnedSemaphorePermit,
) -> Result<(), ApiError> {
    for _ in 0..PUT_ATTEMPTS_MAX {
        let fresh = put(&calls, &payload).await?;
        let command = Command {
            chunks: vec![fresh.stored()],
            operations: vec![write(
                Target::Inode(held.inode()),
                whole(&fresh, offset, &payload),
            )],
        };
        let written = calls.mutate(command, &[fresh]).await;
        match verdict(written)? {
            Ok(_) => return Ok(()),
            Err(FsError::ChunkDead) => {}
            // The inode has no name: that it is not there means that the session lapsed.
            Err(FsError::NotFound) => return Err(FsError::Stale.into()),
            Err(other) => return Err(other.into()),
        }
    }
    Err(FsError::ChunkDead.into())
}

/// Makes `payload` a chunk that f + 1 voters hold.
async fn put(calls: &Calls, payload: &Bytes) -> Result<FreshChunk, ApiError> {
    for _ in 0..PUT_ATTEMPTS_MAX {
        let fresh = fresh_chunk(calls, payload.clone()).await?;
        match verdict(calls.in_time(calls.client.put_chunk(&fresh)).await)? {
            Ok(()) => return Ok(fresh),
            // The session was replaced by a new one in between.
            Err(FsError::ChunkDead) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(FsError::ChunkDead.into())
}

/// Draws an id for `payload` and hashes it, off the threads that serve others.
async fn fresh_chunk(calls: &Calls, payload: Bytes) -> Result<FreshChunk, ApiError> {
    let client = calls.client.clone();
    tokio::task::spawn_blocking(move || client.new_chunk(payload))
        .await
        .map_err(|error| ApiError::internal(format!("hashing a chunk: {error}")))
}

fn whole(fresh: &FreshChunk, offset: u64, payload: &Bytes) -> Extent {
    Extent {
        file_offset: offset,
        length: payload.len() as u32,
        chunk: fresh.id(),
        chunk_offset: 0,
    }
}

fn write(inode: Target, piece: Extent) -> Operation {
    Operation::Write {
        inode,
        extents: vec![piece],
        mtime: None,
        privileges: Privileges::Keep,
    }
}

/// Adds the making of `names` below the place's directory, each in the one before; a directory that came to be
/// meanwhile is taken. The last of them.
fn push_directories(operations: &mut Vec<Operation>, place: &Destination, names: &[Name]) -> Target {
    let mut parent = Target::Inode(place.directory);
    for name in names {
        let index = operations.len() as u16;
        operations.push(Operation::Create {
            parent,
            name: name.clone(),
            inode: place.owner.makes(NewKind::Directory, DIRECTORY_MODE),
            existing: IfExists::Open,
        });
        parent = Target::Created(index);
    }
    parent
}

fn entry(outcome: &Outcome, operation: usize) -> Result<InodeNumber, ApiError> {
    match outcome.results.get(operation) {
        Some(OperationResult::Entry { inode, .. }) => Ok(*inode),
        other => Err(ApiError::internal(format!(
            "a create was answered with {other:?}"
        ))),
    }
}

fn exists(path: &FilePath) -> ApiError {
    let message = format!("'{}' exists", shown(path.names()));
    ApiError::new(axum::http::StatusCode::PRECONDITION_FAILED, "exists", message)
        .hint("If-None-Match: * asks to store only what is not there; without it the file is replaced")
}

async fn permit(semaphore: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, ApiError> {
    let permit = Arc::clone(semaphore).acquire_owned().await;
    permit.map_err(|_| ApiError::unavailable("the node is shutting down"))
}

fn finished(joined: Option<Result<Result<(), ApiError>, tokio::task::JoinError>>) -> Result<(), ApiError> {
    match joined {
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(ApiError::internal(format!("storing a chunk: {error}"))),
        None => Ok(()),
    }
}
