//! The relation between the kernel's inode numbers and the cluster's.
//!
//! To the kernel the root of a mount is always 1. If a sub-directory is mounted, its number in the cluster is another
//! one, so the two are exchanged; all other numbers are the same on both sides. The mapping is total and its own
//! inverse, but the kernel is never given the exchanged number of the cluster's root, which is outside of such a mount:
//! a forged number in a file handle must not lead there.
//!
//! The kernel may know a directory by several numbers (`places`): they differ in a tag above the inode's own bits.
//!
//! This module does not count the kernel's look-ups: cluster numbers are never reused, so forgetting one early does no
//! harm.

use fuser::INodeNo;
use quorumfs_proto::{FsError, InodeNumber};

/// Bits of an inode's own number. A cluster numbers its inodes from 1 and never creates that many.
pub const INODE_BITS: u32 = 48;

/// Returns the kernel's `inode` without the tag that says where it was found.
pub fn untagged(inode: INodeNo) -> INodeNo {
    INodeNo(inode.0 & ((1 << INODE_BITS) - 1))
}

/// The mapping of one mount.
#[derive(Clone, Copy, Debug)]
pub struct InodeMap {
    root: InodeNumber,
}

impl InodeMap {
    /// Makes the mapping of a mount whose root is the cluster's directory `root`.
    pub fn new(root: InodeNumber) -> InodeMap {
        InodeMap { root }
    }

    /// Returns the kernel's number of the cluster's `inode`.
    pub fn to_kernel(self, inode: InodeNumber) -> INodeNo {
        INodeNo(self.swap(inode).0)
    }

    /// Returns the cluster's number of the kernel's `inode`.
    ///
    /// # Errors
    /// [`FsError::Stale`] for an inode outside of this mount.
    pub fn to_cluster(self, inode: INodeNo) -> Result<InodeNumber, FsError> {
        let inode = InodeNumber(untagged(inode).0);
        if inode == self.root && self.root != InodeNumber::ROOT {
            return Err(FsError::Stale);
        }
        Ok(self.swap(inode))
    }

    fn swap(self, inode: InodeNumber) -> InodeNumber {
        if inode == InodeNumber::ROOT {
            self.root
        } else if inode == self.root {
            InodeNumber::ROOT
        } else {
            inode
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_mount_changes_no_number() {
        let map = InodeMap::new(InodeNumber::ROOT);
        for number in [1, 2, 7, (1 << INODE_BITS) - 1] {
            assert_eq!(map.to_kernel(InodeNumber(number)), INodeNo(number));
            assert_eq!(map.to_cluster(INodeNo(number)), Ok(InodeNumber(number)));
        }
    }

    #[test]
    fn a_sub_directory_is_the_kernels_root() {
        let map = InodeMap::new(InodeNumber(7));
        assert_eq!(map.to_kernel(InodeNumber(7)), INodeNo::ROOT);
        assert_eq!(map.to_cluster(INodeNo::ROOT), Ok(InodeNumber(7)));
        assert_eq!(map.to_cluster(INodeNo(8)), Ok(InodeNumber(8)));
        assert_eq!(map.to_cluster(INodeNo(8 | 3 << INODE_BITS)), Ok(InodeNumber(8)));
        assert_eq!(
            map.to_cluster(INodeNo(7)),
            Err(FsError::Stale),
            "the cluster's root is not part of this mount"
        );
    }
}
