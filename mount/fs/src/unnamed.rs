//! Files that get their name last, and so appear at once and whole, or not at all.
//!
//! A file is made without a name ([`Filesystem::create_unnamed`], as by open(2) with O_TMPFILE), written to, and linked
//! into place ([`Filesystem::link_into`]). A file whose bytes are all at hand takes one command ([`Filesystem::store`]).
//! Both make the directories that are missing, and replace a file of the same name if they are told to.
//!
//! Invariant: the command that gives the name also brings the last bytes, and is sent only if all others are committed.
//! So a name never leads to a part of a file.

use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::command::{AttributeChanges, IfExists, NewInode, NewKind, Privileges, Target};
use quorumfs_proto::{Attributes, Command, FsError, InodeNumber, Name, Operation, OperationResult, Sha256};

use super::commit::{ChunkRetries, name_chunks};
use super::namespace::entry_of;
use super::{Cluster, Filesystem, FreshContent, Handle, NewFile, OpenFlags};
use crate::commit_lock::lock_after_append;
use crate::handles::Scope;
use crate::interrupt::check_interrupted;
use crate::write_buffer::{Pack, PackRange};

/// Directories made by one command, which has room for 256 operations. Longer paths take several commands.
const DIRECTORIES_PER_COMMAND_MAX: usize = 200;

/// Where a file gets its name.
#[derive(Clone, Debug)]
pub struct Destination {
    /// A directory that exists.
    pub directory: InodeNumber,
    /// Names of directories below it, each in the one before. Those that do not exist are made.
    pub missing: Vec<Name>,
    /// Owner and permissions of the directories that are made.
    pub new_directory: NewFile,
    /// The name in the last of these directories.
    pub name: Name,
    /// What if the name exists: [`IfExists::Open`] replaces a file, as rename(2) does.
    pub existing: IfExists,
}

/// A file that was stored.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its attributes.
    pub attributes: Attributes,
    /// The hash of its content.
    pub sha256: Sha256,
}

impl Destination {
    /// Adds the operations that make the missing directories. Answers the last of them.
    fn add_directories(&self, operations: &mut Vec<Operation>, names: &[Name]) -> Target {
        let mut parent = Target::Inode(self.directory);
        for name in names {
            let index = operations.len() as u16;
            operations.push(Operation::Create {
                parent,
                name: name.clone(),
                inode: new_inode(NewKind::Directory, self.new_directory),
                existing: IfExists::Open,
            });
            parent = Target::Created(index);
        }
        parent
    }

    /// Adds the operations that give `inode` its name.
    fn add_link(&self, operations: &mut Vec<Operation>, inode: Target) {
        let parent = self.add_directories(operations, &self.missing);
        operations.push(Operation::Link {
            inode,
            parent,
            name: self.name.clone(),
            existing: self.existing,
        });
    }
}

impl<C: Cluster> Filesystem<C> {
    /// Makes a file without a name and opens it. It is gone with its last handle unless it is linked before.
    pub async fn create_unnamed(&self, new: NewFile) -> Result<Handle, FsError> {
        self.writable()?;
        // Until it is held here, the cluster is not told that it is not.
        let _pending = self.unlinked.begin_call();
        let create = Operation::CreateUnlinked {
            inode: new_inode(NewKind::File, new),
        };
        let (attributes, _) = entry_of(&self.mutate(create).await?)?;
        let opened = self.open_created(&attributes, OpenFlags::from(libc::O_RDWR));
        Ok(opened.handle)
    }

    /// Commits what was written to an open file, and gives it a name and the owner and permissions of `new`, in one step.
    ///
    /// # Errors
    ///
    /// Of a name or a directory that cannot be: what was written is kept, and the file can be linked elsewhere. Where
    /// bytes that were written before are lost, their failure, now and at each further attempt.
    pub async fn link_into(
        &self,
        handle: Handle,
        new: NewFile,
        destination: Destination,
    ) -> Result<Attributes, FsError> {
        self.writable()?;
        let file = self.file_of_request(handle)?;
        // Before directories are made, which would stay behind.
        file.failure()?;
        let node = &file.node;
        let destination = self.make_excess_directories(destination).await?;
        self.drain_close_queue().await;
        let outcome = {
            let _lock = lock_after_append(node).await?;
            let last = self.seal(node, Scope::Everything);
            loop {
                file.failure()?;
                let packs = node.state.lock().buffer.next_batch(last);
                if packs.last().is_some_and(|youngest| youngest.sequence < last) {
                    self.send_or_discard(node, &packs).await?;
                    continue;
                }
                let add = |operations: &mut Vec<Operation>| {
                    let inode = Target::Inode(node.inode);
                    let changes = AttributeChanges {
                        mode: Some(new.mode),
                        uid: Some(new.uid),
                        gid: Some(new.gid),
                        ..AttributeChanges::default()
                    };
                    operations.push(Operation::SetAttributes { inode, changes });
                    destination.add_link(operations, inode);
                };
                check_interrupted().await?;
                break self.send(node, &packs, &add).await?;
            }
        };
        entry_of(&outcome).map(|(attributes, _)| attributes)
    }

    /// Makes a file of at most a chunk's length that holds `content`, in one command.
    pub async fn store(
        &self,
        new: NewFile,
        content: Bytes,
        destination: Destination,
    ) -> Result<Stored, FsError> {
        self.writable()?;
        let destination = self.make_excess_directories(destination).await?;
        let length = u32::try_from(content.len()).map_err(|_| FsError::FileTooLarge)?;
        let pack = Pack {
            sequence: 0,
            payload: content,
            ranges: vec![PackRange {
                file_offset: 0,
                length,
                pack_offset: 0,
            }],
        };
        let packs = match length {
            0 => Vec::new(),
            _ => vec![Arc::new(pack)],
        };
        let mut retries = ChunkRetries::default();
        loop {
            let mut chunks = Vec::with_capacity(packs.len());
            for pack in &packs {
                chunks.push(self.put_new_chunk(pack, &mut retries).await?);
            }
            let (named, stored) = name_chunks::<C>(&packs, &chunks);
            let sha256 = named
                .first()
                .map_or_else(|| Sha256::of(b""), |chunk| chunk.sha256);
            let mut operations = vec![Operation::CreateUnlinked {
                inode: new_inode(NewKind::File, new),
            }];
            for (pack, chunk) in packs.iter().zip(&chunks) {
                operations.push(Operation::Write {
                    inode: Target::Created(0),
                    extents: pack.extents(chunk.id()).collect(),
                    mtime: None,
                    privileges: Privileges::Keep,
                });
            }
            destination.add_link(&mut operations, Target::Created(0));
            let command = Command {
                chunks: named,
                operations,
            };
            match self.mutate_all(command, &stored).await {
                Ok(outcome) => {
                    let (attributes, _) = entry_of(&outcome)?;
                    return Ok(Stored { attributes, sha256 });
                }
                Err(FsError::ChunkDead) if !chunks.is_empty() => {
                    retries.record(chunks[0].id().session)?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The failure of a commit of what was written through this handle, which the next sync would answer too.
    pub fn failure(&self, handle: Handle) -> Result<(), FsError> {
        self.open.get(handle)?.failure()
    }

    /// Closes a file whose bytes are not wanted: those that are not committed are dropped.
    pub async fn discard(self: &Arc<Self>, handle: Handle) -> Result<(), FsError> {
        let file = self.open.get(handle)?;
        {
            // A commit under way has what it needs until it is answered.
            let _lock = file.node.commit_lock.lock().await;
            let mut state = file.node.state.lock();
            state.buffer.seal_all();
            let last = state.buffer.last_sequence();
            self.remove_packs_to(&file.node, &mut state, last);
        }
        self.release(handle).await
    }

    /// `destination`, with the first of its missing directories made where there are too many of them for one command.
    async fn make_excess_directories(&self, mut destination: Destination) -> Result<Destination, FsError> {
        while destination.missing.len() > DIRECTORIES_PER_COMMAND_MAX {
            let rest = destination.missing.split_off(DIRECTORIES_PER_COMMAND_MAX);
            let mut operations = Vec::new();
            destination.add_directories(&mut operations, &destination.missing);
            let command = Command {
                chunks: Vec::new(),
                operations,
            };
            let outcome = self.mutate_all(command, &[]).await?;
            let Some(OperationResult::Entry { inode, .. }) = outcome.results.last() else {
                tracing::error!(?outcome, "outcome without the directory that was asked for");
                return Err(FsError::Io);
            };
            destination.directory = *inode;
            destination.missing = rest;
        }
        Ok(destination)
    }
}

fn new_inode(kind: NewKind, new: NewFile) -> NewInode {
    NewInode {
        kind,
        mode: new.mode,
        uid: new.uid,
        gid: new.gid,
    }
}
