//! Open, create, flush (close), fsync and release.

use std::sync::Arc;
use std::time::Instant;

use quorumfs_proto::command::{AttributeChanges, IfExists, NewInode, NewKind, Privileges, Target};
use quorumfs_proto::limits::FILE_BYTES_MAX;
use quorumfs_proto::{Attributes, FileKind, FsError, InodeNumber, Name, Operation, Query};

use super::namespace::entry_of;
use super::unlinked::UnlinkedBy;
use super::{Cluster, Durability, Filesystem, Handle, OpenFlags, OpenInode, Put, ThreadId};
use crate::caches::page_versions::DropId;
use crate::handles::{OpenFile, Scope};

/// Most extents queried at open: all of most files, and little work for a file that is opened to read its end.
const EXTENTS_AT_OPEN_MAX: u32 = 64;

/// The result of an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The handle for later operations.
    pub handle: Handle,
    /// Whether reads and writes must bypass the kernel's page cache (O_APPEND).
    pub direct_io: bool,
    /// Whether the kernel's cached pages are of the current version and may be kept.
    pub keep_cache: bool,
}

/// Most attempts at a creation whose name exists at the create but not at the lookup after it.
const CREATE_ATTEMPTS_MAX: u32 = 16;

/// Owner and permissions of a new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Permission bits after the umask.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl<C: Cluster> Filesystem<C> {
    /// Like [`Filesystem::open`], for a thread whose creation may just have failed because the file exists.
    pub async fn open_for(
        &self,
        caller: ThreadId,
        inode: InodeNumber,
        flags: OpenFlags,
    ) -> Result<Opened, FsError> {
        self.recent_lookups.forget_existing(caller);
        self.open(inode, flags).await
    }

    /// Opens a file at its current version (close-to-open).
    ///
    /// # Errors
    /// [`FsError::ReadOnly`]; [`FsError::IsDirectory`]; [`FsError::InvalidArgument`] for other inodes that are not
    /// files; [`FsError::Stale`] if the inode is unlinked and not kept for this mount.
    pub async fn open(&self, inode: InodeNumber, flags: OpenFlags) -> Result<Opened, FsError> {
        if flags.write || flags.truncate {
            self.writable()?;
        }
        let node = self.open.acquire(inode);
        match self.open_acquired(&node, flags).await {
            Ok(drop_id) => Ok(self.opened(node, flags, drop_id)),
            Err(error) => {
                self.open.release(&node);
                Err(error)
            }
        }
    }

    /// Returns the id of the page drop that must happen first, if any.
    async fn open_acquired(&self, node: &OpenInode<C>, flags: OpenFlags) -> Result<Option<DropId>, FsError> {
        if flags.truncate {
            self.truncate_at_open(node, flags.privileges).await?;
        } else if flags.read {
            self.look_up_extents(node, 0, EXTENTS_AT_OPEN_MAX).await?;
        } else {
            let attributes = self.ask(Query::attributes(node.inode)).await?;
            node.state.lock().update_attributes(&attributes);
        }
        let Some(committed) = node.state.lock().committed.clone() else {
            return Err(FsError::Io);
        };
        match committed.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(FsError::IsDirectory),
            _ => return Err(FsError::InvalidArgument),
        }
        // An unlinked inode that is not held here may already be reported to the cluster as not in use.
        let may_open = || self.unlinked.holds(node.inode) || self.recent_lookups.may_open(node.inode);
        if committed.links == 0 && self.open.use_count(node.inode) == 1 && !may_open() {
            return Err(FsError::Stale);
        }
        Ok(self.page_versions.opened(node.inode, committed.content_version))
    }

    async fn truncate_at_open(&self, node: &OpenInode<C>, privileges: Privileges) -> Result<(), FsError> {
        let cut = Operation::SetAttributes {
            inode: Target::Inode(node.inode),
            changes: AttributeChanges {
                size: Some(0),
                privileges: Some(privileges),
                ..AttributeChanges::default()
            },
        };
        self.commit_with(node, cut).await.map(|_| ())
    }

    fn opened(&self, node: OpenInode<C>, flags: OpenFlags, drop_id: Option<DropId>) -> Opened {
        {
            let mut state = node.state.lock();
            let size = state.size();
            state.tail.record_open(size);
            match drop_id {
                None if flags.append => {}
                None => state.tail.record_kept(size),
                Some(_) => state.tail.record_drop(Instant::now()),
            }
        }
        Opened {
            handle: self.open.add(node, flags, drop_id),
            direct_io: flags.append,
            keep_cache: drop_id.is_none(),
        }
    }

    /// Returns the newest attributes known of an open file, without a query.
    ///
    /// # Errors
    /// [`FsError::Stale`] if there is no such handle.
    pub fn known_attributes(&self, handle: Handle) -> Result<Attributes, FsError> {
        let file = self.open.get(handle)?;
        let attributes = file.node.state.lock().attributes();
        attributes.ok_or(FsError::Stale)
    }

    /// Returns the file of a handle that a request uses. Such a request proves that the kernel has received the answer
    /// to the open and dropped the pages that it had to drop.
    pub(super) fn file_of_request(&self, handle: Handle) -> Result<Arc<OpenFile<Put<C>>>, FsError> {
        let file = self.open.get(handle)?;
        if let Some(drop_id) = file.drop_id.lock().take() {
            self.page_versions.dropped(file.node.inode, drop_id);
            file.node.state.lock().tail.record_drop(Instant::now());
        }
        Ok(file)
    }

    /// Like [`Filesystem::create_for`], for an unknown thread.
    pub async fn create(
        &self,
        parent: InodeNumber,
        name: &[u8],
        mode: u16,
        uid: u32,
        gid: u32,
        flags: OpenFlags,
    ) -> Result<(Attributes, Opened), FsError> {
        let new = NewFile { mode, uid, gid };
        self.create_for(0, parent, name, new, flags).await
    }

    /// Creates a regular file and opens it.
    ///
    /// # Errors
    /// If the name exists by now (made by another mount after the lookup): [`FsError::Exists`] if `flags` are
    /// exclusive, otherwise [`FsError::Stale`], because the kernel has only permitted a creation and nothing has
    /// checked whether the program may open or truncate the existing file. The kernel then repeats the lookup as
    /// `caller`, receives the file found here ([`Filesystem::lookup_for`]), and sends an open.
    pub async fn create_for(
        &self,
        caller: ThreadId,
        parent: InodeNumber,
        name: &[u8],
        new: NewFile,
        flags: OpenFlags,
    ) -> Result<(Attributes, Opened), FsError> {
        self.writable()?;
        self.recent_lookups.forget_existing(caller);
        let create = Operation::Create {
            parent: Target::Inode(parent),
            name: Name::new(name.to_vec())?,
            inode: NewInode {
                kind: NewKind::File,
                mode: new.mode,
                uid: new.uid,
                gid: new.gid,
            },
            existing: IfExists::Refuse,
        };
        let mut attempt = 1;
        // Another mount may unlink the file before it is acquired here.
        let _pending = self.unlinked.begin_call();
        let made = loop {
            match self.mutate(create.clone()).await {
                Err(FsError::Exists) if !flags.exclusive => {}
                made => break made,
            }
            match self.lookup(parent, name).await {
                Ok(found) => {
                    self.recent_lookups.record_existing(caller, parent, name, found);
                    return Err(FsError::Stale);
                }
                Err(FsError::NotFound) if attempt < CREATE_ATTEMPTS_MAX => attempt += 1,
                Err(FsError::NotFound) => return Err(FsError::Stale),
                Err(error) => return Err(error),
            }
        };
        let (attributes, _) = entry_of(&made?)?;
        let opened = self.open_created(&attributes, flags);
        Ok((attributes, opened))
    }

    /// Opens a file that a command of this mount has just created.
    pub(super) fn open_created(&self, attributes: &Attributes, flags: OpenFlags) -> Opened {
        let node = self.open.acquire(attributes.inode);
        {
            let mut state = node.state.lock();
            state.update_attributes(attributes);
            state
                .extents
                .store(attributes.content_version, 0..FILE_BYTES_MAX, Vec::new());
        }
        self.page_versions
            .created(attributes.inode, attributes.content_version);
        self.opened(node, flags, None)
    }

    /// Handles the close of a descriptor: commits the written bytes (or, with `durability=fsync`, queues the commit).
    ///
    /// # Errors
    /// The failure of an earlier commit, if it has not been reported to this handle.
    pub async fn flush(self: &Arc<Self>, handle: Handle) -> Result<(), FsError> {
        let file = self.file_of_request(handle)?;
        if !file.flags.write {
            return Ok(());
        }
        match self.options.durability {
            Durability::Close => {
                // A failure is recorded for all handles, and so for this one.
                let _recorded = self.commit(&file.node, Scope::Everything).await;
            }
            Durability::Fsync => self.queue_close(&file.node),
        }
        file.take_failure()
    }

    /// Commits all bytes that this mount has written to the file. When this returns, they are on f + 1 disks. There is
    /// no cheaper form for data only.
    ///
    /// # Errors
    /// The failure of this commit or of an earlier one that has not been reported to this handle.
    pub async fn fsync(&self, handle: Handle) -> Result<(), FsError> {
        let file = self.file_of_request(handle)?;
        let committed = self.commit(&file.node, Scope::Everything).await;
        file.take_failure().and(committed)
    }

    /// Ends a handle, after its last descriptor is closed.
    pub async fn release(self: &Arc<Self>, handle: Handle) -> Result<(), FsError> {
        let file = self.open.remove(handle)?;
        let (is_dirty, is_unlinked) = {
            let state = file.node.state.lock();
            (
                !state.is_clean(),
                state
                    .committed
                    .as_ref()
                    .is_some_and(|committed| committed.links == 0),
            )
        };
        if is_dirty {
            // Bytes written through a mapping may arrive after the close.
            self.commit_in_background(&file.node, Scope::Everything);
        }
        self.open.release(&file.node);
        if is_unlinked && self.open.use_count(file.node.inode) == 0 {
            self.unlinked.add(file.node.inode, UnlinkedBy::Another);
        }
        Ok(())
    }

    /// Returns when the names in this directory are durable. They already are, except for what `durability=fsync` has
    /// queued.
    pub async fn fsync_directory(&self, _inode: InodeNumber) -> Result<(), FsError> {
        self.drain_close_queue().await;
        Ok(())
    }
}
