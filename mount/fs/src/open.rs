//! Opening, creating, closing, syncing.

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

/// Extents that come with an open: all of most files, and no burden for those that are opened for a look at their end.
const EXTENTS_AT_OPEN_MAX: u32 = 64;

/// A file that was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Names it from now on.
    pub handle: Handle,
    /// Whether caches above must be passed by (O_APPEND).
    pub direct_io: bool,
    /// Whether caches above have the content as it is now, and may keep it.
    pub keep_cache: bool,
}

/// How often a creation is tried again because what had the name is gone when it is looked up.
const CREATE_ATTEMPTS_MAX: u32 = 16;

/// What a program says of a file that it creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Permissions, without the bits of the umask.
    pub mode: u16,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl<C: Cluster> Filesystem<C> {
    /// As [`Filesystem::open`], for a thread whose creation may have found something just now.
    pub async fn open_for(
        &self,
        caller: ThreadId,
        inode: InodeNumber,
        flags: OpenFlags,
    ) -> Result<Opened, FsError> {
        self.recent_lookups.forget_existing(caller);
        self.open(inode, flags).await
    }

    /// Opens a file, as it is now (close-to-open).
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

    /// Answers whether caches above must be dropped.
    async fn open_acquired(&self, node: &OpenInode<C>, flags: OpenFlags) -> Result<Option<DropId>, FsError> {
        if flags.truncate {
            self.truncate_at_open(node, flags.privileges).await?;
        } else if flags.read {
            self.look_up_extents(node, 0, EXTENTS_AT_OPEN_MAX).await?;
        } else {
            let attributes = self.ask(Query::attributes(node.inode)).await?;
            node.state.lock().update_attributes(&attributes);
        }
        let Some(view) = node.state.lock().view.clone() else {
            return Err(FsError::Io);
        };
        match view.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(FsError::IsDirectory),
            _ => return Err(FsError::InvalidArgument),
        }
        // Nobody's name leads there any more; unless it is held here the cluster may already have been told so.
        let may_open = || self.unlinked.holds(node.inode) || self.recent_lookups.may_open(node.inode);
        if view.links == 0 && self.open.use_count(node.inode) == 1 && !may_open() {
            return Err(FsError::Stale);
        }
        Ok(self.page_versions.opened(node.inode, view.content_version))
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

    /// The attributes of an open file that were told last: those of the open, if nothing was told since.
    pub fn known_attributes(&self, handle: Handle) -> Result<Attributes, FsError> {
        let file = self.open.get(handle)?;
        let attributes = file.node.state.lock().attributes();
        attributes.ok_or(FsError::Stale)
    }

    /// The file of a handle that a request came on: so its open has taken place above, whatever it was to drop there.
    pub(super) fn file_of_request(&self, handle: Handle) -> Result<Arc<OpenFile<Put<C>>>, FsError> {
        let file = self.open.get(handle)?;
        if let Some(drop_id) = file.drop_id.lock().take() {
            self.page_versions.dropped(file.node.inode, drop_id);
            file.node.state.lock().tail.record_drop(Instant::now());
        }
        Ok(file)
    }

    /// As [`Filesystem::create_for`], for a thread that cannot be named.
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
    /// Where there is one by now (of another mount, since the name was looked up) it answers [`FsError::Exists`] if
    /// `flags` say exclusive and else [`FsError::Stale`]: the kernel allowed a creation, so nobody has checked whether
    /// the program may open or truncate what is there. It looks the name up again then, as `caller`, finds what was found
    /// here ([`Filesystem::lookup_for`]), and asks for an open.
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
        // Another mount may take the name away before the file is held here.
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

    /// The handle of a file that a command of this mount has just made.
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

    /// A program closes one of its descriptors: what was written is committed (or, by `durability=fsync`, handed
    /// over), and a failure that no fsync reported is.
    pub async fn flush(self: &Arc<Self>, handle: Handle) -> Result<(), FsError> {
        let file = self.file_of_request(handle)?;
        if !file.flags.write {
            return Ok(());
        }
        match self.options.durability {
            Durability::Close => {
                // What fails is kept for the file's handles, so for this one too.
                let _recorded = self.commit(&file.node, Scope::Everything).await;
            }
            Durability::Fsync => self.queue_close(&file.node),
        }
        file.take_failure()
    }

    /// What was written to the file, by anybody on this mount, is on f + 1 disks when this returns. There is no cheaper
    /// form for data only.
    pub async fn fsync(&self, handle: Handle) -> Result<(), FsError> {
        let file = self.file_of_request(handle)?;
        let committed = self.commit(&file.node, Scope::Everything).await;
        file.take_failure().and(committed)
    }

    /// The last descriptor of a handle is gone.
    pub async fn release(self: &Arc<Self>, handle: Handle) -> Result<(), FsError> {
        let file = self.open.remove(handle)?;
        let (is_dirty, is_unlinked) = {
            let state = file.node.state.lock();
            (
                !state.is_clean(),
                state.view.as_ref().is_some_and(|view| view.links == 0),
            )
        };
        if is_dirty {
            // Written through a mapping after the close.
            self.commit_in_background(&file.node, Scope::Everything);
        }
        self.open.release(&file.node);
        if is_unlinked && self.open.use_count(file.node.inode) == 0 {
            self.unlinked.add(file.node.inode, UnlinkedBy::Another);
        }
        Ok(())
    }

    /// Names in this directory are durable when this returns: they were when the calls that made them did, but for
    /// what `durability=fsync` handed over.
    pub async fn fsync_directory(&self, _inode: InodeNumber) -> Result<(), FsError> {
        self.drain_close_queue().await;
        Ok(())
    }
}
