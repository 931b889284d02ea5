//! Names: create, link, unlink, rmdir.
//!
//! Invariants: an inode's `links` is the number of entries that refer to it (for a directory 2 plus its number of
//! sub-directories). A directory's `size` is the number of its entries. An inode without links is an orphan. The
//! `parent` pointers of directories lead to the root.

use quorumfs_proto::command::{Held, IfExists, NewInode, NewKind, Target};
use quorumfs_proto::limits::LINKS_MAX;
use quorumfs_proto::{Attributes, FileKind, FsError, InodeNumber, Name, OperationResult};

use super::super::fault::{Failure, StorageFault};
use super::super::tables::{DirentKey, DirentRecord, Dirents, Symlinks};
use super::transaction::Transaction;

const SET_GROUP_ID: u16 = 0o2000;
const SYMLINK_MODE: u16 = 0o777;

impl Transaction<'_> {
    pub(super) fn create(
        &mut self,
        parent: Target,
        name: &Name,
        new: &NewInode,
        existing: IfExists,
    ) -> Result<OperationResult, Failure> {
        let parent = self.directory(parent)?;
        if let Some(entry) = self.entry(parent, name)? {
            return match (existing, &new.kind, entry.kind) {
                (IfExists::Refuse, ..) => Err(FsError::Exists.into()),
                (IfExists::Open, NewKind::Directory, kind) if kind != FileKind::Directory => {
                    Err(FsError::NotDirectory.into())
                }
                (IfExists::Open, kind, FileKind::Directory) if *kind != NewKind::Directory => {
                    Err(FsError::IsDirectory.into())
                }
                (IfExists::Open, ..) => {
                    self.inode(entry.inode)?;
                    Ok(OperationResult::Entry {
                        inode: entry.inode,
                        created: false,
                    })
                }
            };
        }
        let inode = self.make_inode(new, Some(parent))?;
        let kind = self.inode(inode)?.attributes.kind;
        self.add_entry(parent, name, DirentRecord { inode, kind })?;
        Ok(OperationResult::Entry { inode, created: true })
    }

    /// Returns the record of a new inode. Without a directory it inherits nothing.
    pub(super) fn make_inode(
        &mut self,
        new: &NewInode,
        directory: Option<InodeNumber>,
    ) -> Result<InodeNumber, Failure> {
        let now = self.now;
        let inherited = match directory {
            Some(directory) => {
                let attributes = &self.inode(directory)?.attributes;
                (attributes.mode & SET_GROUP_ID != 0).then_some(attributes.gid)
            }
            None => None,
        };
        let (kind, rdev) = match new.kind {
            NewKind::File => (FileKind::File, 0),
            NewKind::Directory => (FileKind::Directory, 0),
            NewKind::Symlink(_) => (FileKind::Symlink, 0),
            NewKind::Fifo => (FileKind::Fifo, 0),
            NewKind::Socket => (FileKind::Socket, 0),
            NewKind::CharacterDevice(device) => (FileKind::CharacterDevice, device),
            NewKind::BlockDevice(device) => (FileKind::BlockDevice, device),
        };
        let mode = match kind {
            FileKind::Symlink => SYMLINK_MODE,
            FileKind::Directory if inherited.is_some() => new.mode | SET_GROUP_ID,
            _ => new.mode,
        };
        let target = match &new.kind {
            NewKind::Symlink(target) => Some(target),
            _ => None,
        };
        let inode = self.add_inode(|inode| Attributes {
            inode,
            kind,
            mode,
            uid: new.uid,
            gid: inherited.unwrap_or(new.gid),
            links: match kind {
                FileKind::Directory => 2,
                _ => 1,
            },
            size: target.map_or(0, |target| target.as_bytes().len() as u64),
            allocated_bytes: 0,
            rdev,
            atime: now,
            mtime: now,
            ctime: now,
            birth_time: now,
            content_version: 1,
            xattr_count: 0,
            has_capability: false,
            parent: match (kind, directory) {
                (FileKind::Directory, Some(directory)) => directory,
                // Only directories have a parent.
                _ => InodeNumber(0),
            },
        })?;
        if let Some(target) = target {
            self.writer.put::<Symlinks>(&inode, target);
        }
        Ok(inode)
    }

    pub(super) fn link(
        &mut self,
        target: Target,
        parent: Target,
        name: &Name,
        existing: IfExists,
    ) -> Result<OperationResult, Failure> {
        let parent = self.directory(parent)?;
        let inode = self.resolve(target)?;
        let attributes = &self.inode(inode)?.attributes;
        let (kind, links) = (attributes.kind, attributes.links);
        if kind == FileKind::Directory {
            return Err(FsError::NotPermitted.into());
        }
        let entry = self.entry(parent, name)?;
        match (&entry, existing) {
            (Some(_), IfExists::Refuse) => return Err(FsError::Exists.into()),
            (Some(entry), IfExists::Open) if entry.inode == inode => {
                return Ok(OperationResult::Entry {
                    inode,
                    created: false,
                });
            }
            (Some(entry), IfExists::Open) if entry.kind == FileKind::Directory => {
                return Err(FsError::IsDirectory.into());
            }
            _ => {}
        }
        if links >= LINKS_MAX {
            return Err(FsError::TooManyLinks.into());
        }
        if links == 0 {
            self.end_orphanhood(inode)?;
        }
        if let Some(entry) = entry {
            self.remove_entry(parent, name, &entry)?;
            // The operation does not say whether the sender has the replaced file open, so the sender is asked too.
            self.drop_link(&entry, Held::Open)?;
        }
        self.change(inode)?.links += 1;
        self.add_entry(parent, name, DirentRecord { inode, kind })?;
        Ok(OperationResult::Entry {
            inode,
            created: false,
        })
    }

    pub(super) fn unlink(
        &mut self,
        parent: Target,
        name: &Name,
        held: Held,
    ) -> Result<OperationResult, Failure> {
        let parent = self.directory(parent)?;
        let entry = self.entry(parent, name)?.ok_or(FsError::NotFound)?;
        if entry.kind == FileKind::Directory {
            return Err(FsError::IsDirectory.into());
        }
        self.remove_entry(parent, name, &entry)?;
        let last = self.drop_link(&entry, held)?;
        Ok(OperationResult::Removed {
            inode: entry.inode,
            last,
        })
    }

    pub(super) fn remove_directory(
        &mut self,
        parent: Target,
        name: &Name,
    ) -> Result<OperationResult, Failure> {
        let parent = self.directory(parent)?;
        let entry = self.entry(parent, name)?.ok_or(FsError::NotFound)?;
        if entry.kind != FileKind::Directory {
            return Err(FsError::NotDirectory.into());
        }
        self.require_empty(entry.inode)?;
        self.remove_entry(parent, name, &entry)?;
        // A program may have the directory as its working directory, so all sessions are asked, as for files.
        let last = self.drop_link(&entry, Held::Open)?;
        Ok(OperationResult::Removed {
            inode: entry.inode,
            last,
        })
    }

    /// Returns a directory whose entries can be looked up and changed.
    ///
    /// # Errors
    /// [`FsError::NotFound`] if the directory has been removed.
    pub(super) fn directory(&mut self, target: Target) -> Result<InodeNumber, Failure> {
        let inode = self.resolve(target)?;
        let attributes = &self.inode(inode)?.attributes;
        match (attributes.kind, attributes.links) {
            (FileKind::Directory, 0) => Err(FsError::NotFound.into()),
            (FileKind::Directory, _) => Ok(inode),
            _ => Err(FsError::NotDirectory.into()),
        }
    }

    pub(super) fn entry(
        &self,
        directory: InodeNumber,
        name: &Name,
    ) -> Result<Option<DirentRecord>, StorageFault> {
        self.writer.get::<Dirents>(&DirentKey::new(directory, name))
    }

    pub(super) fn require_empty(&mut self, directory: InodeNumber) -> Result<(), Failure> {
        match self.inode(directory)?.attributes.size {
            0 => Ok(()),
            _ => Err(FsError::NotEmpty.into()),
        }
    }

    /// Adds an entry that does not exist. The caller updates the links of the inode.
    pub(super) fn add_entry(
        &mut self,
        directory: InodeNumber,
        name: &Name,
        entry: DirentRecord,
    ) -> Result<(), Failure> {
        self.writer
            .put::<Dirents>(&DirentKey::new(directory, name), &entry);
        let attributes = self.change_directory(directory)?;
        attributes.size += 1;
        if entry.kind == FileKind::Directory {
            attributes.links += 1;
        }
        Ok(())
    }

    /// Removes an entry that exists. The caller updates the links of the inode.
    pub(super) fn remove_entry(
        &mut self,
        directory: InodeNumber,
        name: &Name,
        entry: &DirentRecord,
    ) -> Result<(), Failure> {
        self.writer.remove::<Dirents>(&DirentKey::new(directory, name));
        let attributes = self.change_directory(directory)?;
        attributes.size -= 1;
        if entry.kind == FileKind::Directory {
            attributes.links -= 1;
        }
        Ok(())
    }

    /// Removes one link of the inode of `entry`. Returns whether it was the last; a directory has only one.
    pub(super) fn drop_link(&mut self, entry: &DirentRecord, held: Held) -> Result<bool, Failure> {
        let attributes = self.change(entry.inode)?;
        attributes.links = match entry.kind {
            FileKind::Directory => 0,
            _ => attributes.links - 1,
        };
        let last = attributes.links == 0;
        if last {
            self.make_orphan(entry.inode, held)?;
        }
        Ok(last)
    }

    /// Returns the attributes of a directory whose entries are being changed.
    fn change_directory(&mut self, directory: InodeNumber) -> Result<&mut Attributes, Failure> {
        let now = self.now;
        let attributes = self.change(directory)?;
        attributes.mtime = now;
        attributes.content_version += 1;
        Ok(attributes)
    }
}
