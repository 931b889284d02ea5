//! What is certain while this mount holds the lease: attributes, and the complete names of some directories.
//!
//! Pure. What was cached under one lease is removed under the next, because other sessions may have changed everything
//! in between.
//!
//! Invariant: every existing name of a complete directory is recorded. Removed names may stay recorded, which only
//! costs a query.

use std::collections::{HashMap, HashSet};

use quick_cache::unsync::Cache;
use quorumfs_proto::{Attributes, InodeNumber, Name};

/// Most inodes with cached attributes, about 16 MiB.
const ATTRIBUTES_MAX: usize = 64 << 10;
/// Most bytes of names of all complete directories; beyond it all directories are removed.
const NAMES_BYTES_MAX: usize = 24 << 20;
/// Memory of a name in addition to its bytes.
const NAME_OVERHEAD_BYTES: usize = 64;
/// Most complete directories; beyond it all are removed.
const DIRECTORIES_MAX: usize = 16 << 10;

/// The number of a lease of this session.
pub type LeaseNumber = u64;

/// The cache of one lease.
pub struct LeaseView {
    lease: LeaseNumber,
    attributes: Cache<InodeNumber, Attributes>,
    directories: HashMap<InodeNumber, HashSet<Name>>,
    names_bytes: usize,
}

impl Default for LeaseView {
    fn default() -> LeaseView {
        LeaseView {
            lease: 0,
            attributes: Cache::new(ATTRIBUTES_MAX),
            directories: HashMap::new(),
            names_bytes: 0,
        }
    }
}

impl LeaseView {
    /// Clears the cache unless it is of `lease`.
    fn switch_to(&mut self, lease: LeaseNumber) {
        if self.lease != lease {
            self.lease = lease;
            self.attributes = Cache::new(ATTRIBUTES_MAX);
            self.forget_directories();
        }
    }

    fn forget_directories(&mut self) {
        self.directories = HashMap::new();
        self.names_bytes = 0;
    }

    /// Caches attributes that were queried and answered under `lease`. If answers cross, the newer attributes stay:
    /// every change increases ctime.
    pub fn insert(&mut self, lease: LeaseNumber, answered: &[Attributes]) {
        self.switch_to(lease);
        for attributes in answered {
            let known = self.attributes.peek(&attributes.inode);
            if known.is_none_or(|known| known.ctime <= attributes.ctime) {
                self.attributes.insert(attributes.inode, attributes.clone());
            }
        }
    }

    /// Removes the attributes of an inode that has changed or may have.
    pub fn forget(&mut self, inode: InodeNumber) {
        self.attributes.remove(&inode);
    }

    /// Records that this mount has just created `directory`, under `lease`; it is complete with no names.
    pub fn add_empty_directory(&mut self, lease: LeaseNumber, directory: InodeNumber) {
        self.switch_to(lease);
        if self.directories.len() >= DIRECTORIES_MAX {
            self.forget_directories();
        }
        self.directories.insert(directory, HashSet::new());
    }

    /// Records a name that may exist from now on, because this mount is about to create it.
    pub fn add_name(&mut self, directory: InodeNumber, name: &Name) {
        if let Some(names) = self.directories.get_mut(&directory)
            && names.insert(name.clone())
        {
            self.names_bytes += name.as_bytes().len() + NAME_OVERHEAD_BYTES;
            if self.names_bytes > NAMES_BYTES_MAX {
                self.forget_directories();
            }
        }
    }

    /// Returns the attributes of `inode`, if cached under `lease`.
    pub fn attributes(&mut self, lease: LeaseNumber, inode: InodeNumber) -> Option<Attributes> {
        self.switch_to(lease);
        self.attributes.get(&inode).cloned()
    }

    /// Whether it is certain under `lease` that the name does not exist.
    pub fn is_absent(&mut self, lease: LeaseNumber, directory: InodeNumber, name: &Name) -> bool {
        self.switch_to(lease);
        self.directories
            .get(&directory)
            .is_some_and(|names| !names.contains(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_proto::{FileKind, Timestamp};

    fn attributes(inode: u64, ctime: i64) -> Attributes {
        let time = |seconds| Timestamp {
            seconds,
            nanoseconds: 0,
        };
        Attributes {
            inode: InodeNumber(inode),
            kind: FileKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            links: 1,
            size: 0,
            allocated_bytes: 0,
            rdev: 0,
            atime: time(0),
            mtime: time(0),
            ctime: time(ctime),
            birth_time: time(0),
            content_version: 0,
            xattr_count: 0,
            has_capability: false,
            parent: InodeNumber(0),
        }
    }

    #[test]
    fn attributes_and_names_of_one_lease_are_gone_under_the_next() {
        let mut view = LeaseView::default();
        let name = Name::new(&b"a"[..]).unwrap();
        view.insert(1, &[attributes(5, 1)]);
        view.add_empty_directory(1, InodeNumber(9));
        assert!(view.attributes(1, InodeNumber(5)).is_some());
        assert!(view.is_absent(1, InodeNumber(9), &name));
        assert!(!view.is_absent(2, InodeNumber(9), &name));
        assert!(view.attributes(2, InodeNumber(5)).is_none());
    }

    #[test]
    fn of_answers_that_cross_the_newer_attributes_count() {
        let mut view = LeaseView::default();
        view.insert(1, &[attributes(5, 7)]);
        view.insert(1, &[attributes(5, 6)]);
        assert_eq!(view.attributes(1, InodeNumber(5)).unwrap().ctime.seconds, 7);
        view.forget(InodeNumber(5));
        assert!(view.attributes(1, InodeNumber(5)).is_none());
    }

    #[test]
    fn names_are_bounded_in_bytes() {
        let mut view = LeaseView::default();
        let directory = InodeNumber(9);
        view.add_empty_directory(1, directory);
        let long = "x".repeat(240);
        let names_max = NAMES_BYTES_MAX / 240;
        for number in 0..names_max {
            let name = Name::new(format!("{long}{number}").into_bytes()).unwrap();
            view.add_name(directory, &name);
            assert!(view.names_bytes <= NAMES_BYTES_MAX);
        }
        let other = Name::new(&b"a"[..]).unwrap();
        assert!(!view.is_absent(1, directory, &other), "it is removed");
    }

    #[test]
    fn a_name_that_may_exist_is_not_absent() {
        let mut view = LeaseView::default();
        let (a, b) = (Name::new(&b"a"[..]).unwrap(), Name::new(&b"b"[..]).unwrap());
        view.add_empty_directory(1, InodeNumber(9));
        view.add_name(InodeNumber(9), &a);
        assert!(!view.is_absent(1, InodeNumber(9), &a));
        assert!(view.is_absent(1, InodeNumber(9), &b));
        assert!(
            !view.is_absent(1, InodeNumber(8), &b),
            "a directory that is not complete"
        );
    }
}
