//! Changes of attributes (setattr in all its forms) and of extended attributes.

use bytes::Bytes;
use quorumfs_proto::command::{AttributeChanges, Privileges, SetTime, Target, XattrMode};
use quorumfs_proto::limits::{XATTR_LIST_BYTES_MAX, XATTR_NAME_BYTES_MAX};
use quorumfs_proto::{FileKind, FsError, InodeNumber, OperationResult, Timestamp, XattrName};

use super::super::fault::{Failure, StorageFault};
use super::super::overlay::{Direction, KeyRange};
use super::super::tables::Xattrs;
use super::transaction::Transaction;

const SET_USER_ID: u16 = 0o4000;
const SET_GROUP_ID: u16 = 0o2000;
const GROUP_EXECUTE: u16 = 0o0010;
const MODE_BITS: u16 = 0o7777;
/// Most extended attributes of an inode. A command may have to read all their names.
const XATTRS_MAX: u32 = 1024;
/// File capabilities (capabilities(7)); the kernel asks for them before it executes a file.
const CAPABILITY: &[u8] = b"security.capability";

impl Transaction<'_> {
    /// Applies the changes in this order: truncation, owner (which drops privileges), then the mode and the times as
    /// given.
    pub(super) fn set_attributes(
        &mut self,
        target: Target,
        changes: &AttributeChanges,
    ) -> Result<OperationResult, Failure> {
        let inode = self.resolve(target)?;
        let now = self.now;
        let kind = self.inode(inode)?.attributes.kind;
        if let Some(size) = changes.size {
            self.truncate(inode, size)?;
            self.change(inode)?.mtime = now;
            self.lose_privileges(inode, Privileges::Keep)?;
        }
        let chown = changes.uid.is_some() || changes.gid.is_some();
        if chown {
            let attributes = self.change(inode)?;
            attributes.uid = changes.uid.unwrap_or(attributes.uid);
            attributes.gid = changes.gid.unwrap_or(attributes.gid);
        }
        if (chown && kind != FileKind::Directory) || changes.privileges == Some(Privileges::Drop) {
            self.drop_privileges(inode)?;
        }
        if let Some(mode) = changes.mode {
            if mode & !MODE_BITS != 0 {
                return Err(FsError::InvalidArgument.into());
            }
            self.change(inode)?.mode = mode;
        }
        let time = |set: SetTime| match set {
            SetTime::Now => now,
            SetTime::At(time) => time,
        };
        if let Some(atime) = changes.atime {
            self.change(inode)?.atime = valid_time(time(atime))?;
        }
        if let Some(mtime) = changes.mtime {
            self.change(inode)?.mtime = valid_time(time(mtime))?;
        }
        Ok(OperationResult::Entry {
            inode,
            created: false,
        })
    }

    /// Drops what a write, a truncation or a chown by a program removes: set-user-id, set-group-id if the group may
    /// execute (without that right the bit once meant mandatory locking and is kept, as on Linux), and file
    /// capabilities.
    pub(super) fn drop_privileges(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        let attributes = &self.inode(inode)?.attributes;
        if attributes.kind == FileKind::Directory {
            return Ok(());
        }
        let mut mode = attributes.mode & !SET_USER_ID;
        if mode & GROUP_EXECUTE != 0 {
            mode &= !SET_GROUP_ID;
        }
        self.drop_capability(inode)?;
        if mode != self.inode(inode)?.attributes.mode {
            self.change(inode)?.mode = mode;
        }
        Ok(())
    }

    /// Drops what a write or a truncation removes. Whether set-user-id is dropped too depends on the program that
    /// writes; file capabilities are always dropped, as on Linux.
    pub(super) fn lose_privileges(
        &mut self,
        inode: InodeNumber,
        privileges: Privileges,
    ) -> Result<(), Failure> {
        match privileges {
            Privileges::Drop => self.drop_privileges(inode),
            Privileges::Keep if self.bounded_work() => self.drop_capability(inode),
            Privileges::Keep => Ok(()),
        }
    }

    fn drop_capability(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        if !self.inode(inode)?.attributes.has_capability {
            return Ok(());
        }
        let key = (inode, capability_name()?);
        // An inode that is being freed may have lost the attribute already.
        let exists = !self.bounded_work() || self.writer.layers.contains::<Xattrs>(&key)?;
        self.writer.remove::<Xattrs>(&key);
        let attributes = self.change(inode)?;
        attributes.has_capability = false;
        if exists {
            attributes.xattr_count = attributes.xattr_count.wrapping_sub(1);
        }
        Ok(())
    }

    pub(super) fn set_xattr(
        &mut self,
        target: Target,
        name: &XattrName,
        value: &Bytes,
        mode: XattrMode,
    ) -> Result<OperationResult, Failure> {
        let inode = self.resolve(target)?;
        let count = self.inode(inode)?.attributes.xattr_count;
        if self.bounded_work() {
            name.require_known_namespace()?;
        }
        let key = (inode, name.clone());
        let exists = self.writer.layers.contains::<Xattrs>(&key)?;
        match (mode, exists) {
            (XattrMode::Create, true) => return Err(FsError::Exists.into()),
            (XattrMode::Replace, false) => return Err(FsError::NoAttribute.into()),
            _ => {}
        }
        if !exists {
            if count >= XATTRS_MAX && self.bounded_work() {
                return Err(FsError::NoSpace.into());
            }
            self.require_room_for(inode, count, name)?;
        }
        self.writer.put::<Xattrs>(&key, value);
        let attributes = self.change(inode)?;
        attributes.xattr_count = attributes.xattr_count.saturating_add(u32::from(!exists));
        attributes.has_capability |= name.as_bytes() == CAPABILITY;
        Ok(OperationResult::Entry {
            inode,
            created: false,
        })
    }

    pub(super) fn remove_xattr(
        &mut self,
        target: Target,
        name: &XattrName,
    ) -> Result<OperationResult, Failure> {
        let inode = self.resolve(target)?;
        self.inode(inode)?;
        let key = (inode, name.clone());
        if !self.writer.layers.contains::<Xattrs>(&key)? {
            return Err(FsError::NoAttribute.into());
        }
        self.writer.remove::<Xattrs>(&key);
        let attributes = self.change(inode)?;
        attributes.xattr_count = attributes.xattr_count.saturating_sub(1);
        attributes.has_capability &= name.as_bytes() != CAPABILITY;
        Ok(OperationResult::Entry {
            inode,
            created: false,
        })
    }

    /// Fails with [`FsError::NoSpace`] if listxattr(2) could no longer return all names.
    fn require_room_for(&self, inode: InodeNumber, count: u32, name: &XattrName) -> Result<(), Failure> {
        // This many attributes fit, whatever their names.
        if (count as usize + 1) * (XATTR_NAME_BYTES_MAX + 1) <= XATTR_LIST_BYTES_MAX {
            return Ok(());
        }
        let mut list_bytes = name.as_bytes().len() + 1;
        let range = KeyRange::prefix(&inode.0.to_be_bytes());
        for key in self.writer.layers.scan_keys::<Xattrs>(range, Direction::Up)? {
            let (_, name) = key?;
            list_bytes += name.as_bytes().len() + 1;
        }
        match list_bytes <= XATTR_LIST_BYTES_MAX {
            true => Ok(()),
            false => Err(FsError::NoSpace.into()),
        }
    }
}

fn capability_name() -> Result<XattrName, StorageFault> {
    XattrName::new(CAPABILITY).map_err(|error| StorageFault::inconsistent(format!("capability: {error}")))
}

/// Checks that a time given by a client is valid.
pub(super) fn valid_time(time: Timestamp) -> Result<Timestamp, FsError> {
    match time.nanoseconds < 1_000_000_000 {
        true => Ok(time),
        false => Err(FsError::InvalidArgument),
    }
}
