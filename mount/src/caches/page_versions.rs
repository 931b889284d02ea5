//! Which version of each file's content the kernel (or whoever caches above us) has seen.
//!
//! Owes: at open, whether what is cached above may be kept. Invariant: a version is remembered only if every byte
//! cached above is of that version. Bounded by count; what falls out only costs a cache above us its pages.

use quick_cache::sync::Cache;
use quorumfs_proto::InodeNumber;

/// Files remembered: some 2 MiB at most.
const FILES_MAX: usize = 32_768;

/// Versions by file.
#[derive(Debug)]
pub struct PageVersions {
    versions: Cache<InodeNumber, u64>,
}

impl Default for PageVersions {
    fn default() -> PageVersions {
        PageVersions {
            versions: Cache::new(FILES_MAX),
        }
    }
}

impl PageVersions {
    /// A file was opened at `version`: whether pages cached earlier are of that version.
    pub fn opened(&self, inode: InodeNumber, version: u64) -> bool {
        let known = self.versions.get(&inode) == Some(version);
        if !known {
            self.versions.insert(inode, version);
        }
        known
    }

    /// This mount itself moved the content from `before` to `after`, and pages above have the change.
    pub fn changed_here(&self, inode: InodeNumber, before: u64, after: u64) {
        if self.versions.get(&inode) == Some(before) {
            self.versions.insert(inode, after);
        }
    }

    /// Pages above may lack a change.
    pub fn forget(&self, inode: InodeNumber) {
        self.versions.remove(&inode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_kept_only_over_changes_made_here() {
        let versions = PageVersions::default();
        let file = InodeNumber(7);
        assert!(!versions.opened(file, 1), "never seen");
        assert!(versions.opened(file, 1));
        versions.changed_here(file, 1, 2);
        assert!(versions.opened(file, 2));
        versions.changed_here(file, 3, 4);
        assert!(!versions.opened(file, 4), "version 3 was made by somebody else");
        versions.forget(file);
        assert!(!versions.opened(file, 4));
    }
}
