//! Files that are named last, so that a name refers to a whole file or to nothing.
//!
//! A file is created without a name ([`Filesystem::create_unnamed`], like open(2) with O_TMPFILE), written to, and
//! linked into place ([`Filesystem::link_into`]). A file whose bytes are all available takes one command
//! ([`Filesystem::store`]). Both create missing directories, and replace a file of the same name if
//! [`Destination::existing`] permits it.
//!
//! Invariant: the command that makes the name also contains the last bytes, and is sent only after all other bytes are
//! committed. So a name never refers to a part of a file.

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

/// Directories created by one command, which holds at most 256 operations. Longer paths take several commands.
const DIRECTORIES_PER_COMMAND_MAX: usize = 200;

/// The path at which a file is linked.
#[derive(Clone, Debug)]
pub struct Destination {
    /// An existing directory.
    pub directory: InodeNumber,
    /// Names of directories below it, each the parent of the next. Missing ones are created.
    pub missing: Vec<Name>,
    /// Owner and permissions of created directories.
    pub new_directory: NewFile,
    /// The name of the file in the last directory.
    pub name: Name,
    /// What happens if the name exists: [`IfExists::Open`] replaces a file, as rename(2) does.
    pub existing: IfExists,
}

/// A file that was stored.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Attributes of the file.
    pub attributes: Attributes,
    /// SHA-256 of the content.
    pub sha256: Sha256,
}

impl Destination {
    /// Adds the operations that create the missing directories; returns the last of them.
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

    /// Adds the operations that link `inode` at the destination.
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
    /// Creates a file without a name and opens it for reading and writing. It is removed with its last handle unless it
    /// is linked before.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`].
    pub async fn create_unnamed(&self, new: NewFile) -> Result<Handle, FsError> {
        self.writable()?;
        // Must live until the inode is acquired; before that, the cluster could be answered that it is not in use.
        let _pending = self.unlinked.begin_call();
        let create = Operation::CreateUnlinked {
            inode: new_inode(NewKind::File, new),
        };
        let (attributes, _) = entry_of(&self.mutate(create).await?)?;
        let opened = self.open_created(&attributes, OpenFlags::from(libc::O_RDWR));
        Ok(opened.handle)
    }

    /// Commits the bytes written to an open file, and in the same step links it and sets the owner and permissions of
    /// `new`.
    ///
    /// # Errors
    /// Those of an impossible name or directory: the bytes are kept, and the file can be linked elsewhere. If bytes
    /// written before are lost, the failure of their commit, in this and every later call.
    pub async fn link_into(
        &self,
        handle: Handle,
        new: NewFile,
        destination: Destination,
    ) -> Result<Attributes, FsError> {
        self.writable()?;
        let file = self.file_of_request(handle)?;
        // Checked before directories are created, because these would remain.
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

    /// Creates a file with `content`, of at most one chunk, in one command.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`]; [`FsError::FileTooLarge`]; those of the destination.
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

    /// Returns the failure that the next fsync of this handle would return, without consuming it.
    ///
    /// # Errors
    /// That failure; [`FsError::Stale`] if there is no such handle.
    pub fn failure(&self, handle: Handle) -> Result<(), FsError> {
        self.open.get(handle)?.failure()
    }

    /// Closes a file and drops its uncommitted bytes.
    ///
    /// # Errors
    /// [`FsError::Stale`] if there is no such handle.
    pub async fn discard(self: &Arc<Self>, handle: Handle) -> Result<(), FsError> {
        let file = self.open.get(handle)?;
        {
            // A commit in progress needs its packs until it is answered.
            let _lock = file.node.commit_lock.lock().await;
            let mut state = file.node.state.lock();
            state.buffer.seal_all();
            let last = state.buffer.last_sequence();
            self.remove_packs_to(&file.node, &mut state, last);
        }
        self.release(handle).await
    }

    /// Creates the first missing directories of `destination` if they are too many for one command; returns the
    /// remaining destination.
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
                tracing::error!(?outcome, "the outcome of a creation has no directory");
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
