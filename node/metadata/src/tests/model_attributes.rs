//! Attributes and privileges in the model.

use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::model::{Model, Verdict};

impl Model {
    pub(super) fn set_attributes(
        &mut self,
        number: InodeNumber,
        changes: &AttributeChanges,
    ) -> Verdict<OperationResult> {
        let now = self.now;
        self.get(number)?;
        if let Some(size) = changes.size {
            self.file(number)?.bytes.resize(size as usize, None);
            self.touch(number);
            self.get(number)?.attributes.mtime = now;
            self.wrote(number, Privileges::Keep);
        }
        let chown = changes.uid.or(changes.gid).is_some();
        if chown {
            let attributes = &mut self.get(number)?.attributes;
            attributes.uid = changes.uid.unwrap_or(attributes.uid);
            attributes.gid = changes.gid.unwrap_or(attributes.gid);
            self.touch(number);
            self.kill(number, Privileges::Drop);
        }
        if let Some(privileges) = changes.privileges {
            self.kill(number, privileges);
        }
        if let Some(mode) = changes.mode {
            self.get(number)?.attributes.mode = mode;
            self.touch(number);
        }
        let time = |set| match set {
            SetTime::Now => now,
            SetTime::At(time) => time,
        };
        for (set, is_atime) in [(changes.atime, true), (changes.mtime, false)] {
            if let Some(set) = set {
                let attributes = &mut self.get(number)?.attributes;
                match is_atime {
                    true => attributes.atime = time(set),
                    false => attributes.mtime = time(set),
                }
                self.touch(number);
            }
        }
        Ok(OperationResult::Entry {
            inode: number,
            created: false,
        })
    }

    pub(super) fn wrote(&mut self, number: InodeNumber, privileges: Privileges) {
        self.kill(number, privileges);
        if self.writes_drop_capabilities {
            self.drop_capability(number);
        }
    }

    fn drop_capability(&mut self, number: InodeNumber) {
        let Some(inode) = self.inodes.get_mut(&number) else {
            return;
        };
        let before = inode.xattrs.len();
        inode
            .xattrs
            .retain(|name, _| name.as_bytes() != b"security.capability");
        if before != inode.xattrs.len() {
            self.touch(number);
        }
    }

    pub(super) fn kill(&mut self, number: InodeNumber, privileges: Privileges) {
        if privileges == Privileges::Keep || self.is_directory(number) {
            return;
        }
        let inode = self.inodes.get_mut(&number).unwrap();
        let before = (inode.attributes.mode, inode.xattrs.len());
        inode.attributes.mode &= !0o4000;
        if inode.attributes.mode & 0o010 != 0 {
            inode.attributes.mode &= !0o2000;
        }
        inode
            .xattrs
            .retain(|name, _| name.as_bytes() != b"security.capability");
        if before != (inode.attributes.mode, inode.xattrs.len()) {
            self.touch(number);
        }
    }
}
