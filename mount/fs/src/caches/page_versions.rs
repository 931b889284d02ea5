//! Which version of each file's content the kernel (or whoever caches above us) has seen.
//!
//! Owes: at open, whether what is cached above may be kept. Invariant: a version is settled only if every byte cached
//! above is of that version. That an open was told to drop what is cached is not enough: until its answer has arrived
//! the old bytes are still there, and a second open must not be told to keep them. The first request on the handle shows
//! that it has. Bounded by count; what falls out only costs a cache above us its pages.

use parking_lot::Mutex;
use quick_cache::unsync::Cache;
use quorumfs_proto::InodeNumber;

/// Files remembered: some 2 MiB at most.
const FILES_MAX: usize = 32_768;

/// Numbers the opens that drop what is cached above.
pub type DropId = u64;

/// What is cached above of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pages {
    version: u64,
    /// The open that first drops what is of another version, as long as nothing shows that it has.
    drop_id: Option<DropId>,
}

/// Versions by file. The lock is held for a look-up.
#[derive(Debug)]
pub struct PageVersions {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    files: Cache<InodeNumber, Pages>,
    last: DropId,
}

impl Default for PageVersions {
    fn default() -> PageVersions {
        PageVersions {
            state: Mutex::new(State {
                files: Cache::new(FILES_MAX),
                last: 0,
            }),
        }
    }
}

impl PageVersions {
    /// A file was opened at `version`. `None`: pages cached earlier are of that version. Else they must be dropped, and
    /// [`PageVersions::dropped`] is to be told the number once a request shows that they were.
    pub fn opened(&self, inode: InodeNumber, version: u64) -> Option<DropId> {
        let mut state = self.state.lock();
        if let Some(known) = state.files.get(&inode)
            && known.version == version
        {
            return known.drop_id;
        }
        state.last += 1;
        let drop_id = Some(state.last);
        state.files.insert(inode, Pages { version, drop_id });
        drop_id
    }

    /// A file was made at `version`: nothing of it is cached yet.
    pub fn created(&self, inode: InodeNumber, version: u64) {
        let drop_id = None;
        let pages = Pages { version, drop_id };
        self.state.lock().files.insert(inode, pages);
    }

    /// The open that was given this number, or another one with it, has taken place above.
    pub fn dropped(&self, inode: InodeNumber, drop_id: DropId) {
        if let Some(mut pages) = self.state.lock().files.get_mut(&inode)
            && pages.drop_id == Some(drop_id)
        {
            pages.drop_id = None;
        }
    }

    /// This mount itself moved the content from `before` to `after`, and pages above have the change.
    pub fn changed_here(&self, inode: InodeNumber, before: u64, after: u64) {
        if let Some(mut pages) = self.state.lock().files.get_mut(&inode)
            && pages.version == before
        {
            pages.version = after;
        }
    }

    /// Pages above may lack a change.
    pub fn forget(&self, inode: InodeNumber) {
        self.state.lock().files.remove(&inode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_kept_only_over_changes_made_here() {
        let versions = PageVersions::default();
        let file = InodeNumber(7);
        let first = versions.opened(file, 1).expect("never seen");
        versions.dropped(file, first);
        assert_eq!(versions.opened(file, 1), None);
        versions.changed_here(file, 1, 2);
        assert_eq!(versions.opened(file, 2), None);
        versions.changed_here(file, 3, 4);
        let fourth = versions
            .opened(file, 4)
            .expect("version 3 was made by somebody else");
        versions.dropped(file, fourth);
        versions.forget(file);
        assert!(versions.opened(file, 4).is_some());
    }

    #[test]
    fn pages_are_kept_only_after_the_older_ones_are_gone() {
        let versions = PageVersions::default();
        let file = InodeNumber(7);
        let first = versions.opened(file, 1);
        assert_eq!(versions.opened(file, 1), first, "the first may not have arrived");
        versions.changed_here(file, 1, 2);
        assert_eq!(
            versions.opened(file, 2),
            first,
            "what was there before is not gone by that"
        );
        let second = versions.opened(file, 3);
        versions.dropped(file, first.unwrap());
        assert_eq!(
            versions.opened(file, 3),
            second,
            "that one dropped what was there before version 3"
        );
        versions.dropped(file, second.unwrap());
        assert_eq!(versions.opened(file, 3), None);
        versions.created(InodeNumber(8), 1);
        assert_eq!(versions.opened(InodeNumber(8), 1), None);
    }
}
