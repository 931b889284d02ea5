//! The content version of the kernel's pages of each file.
//!
//! It decides at open whether the kernel may keep its pages. Invariant: a version is confirmed only if every cached
//! byte is of that version. An open that drops the pages does not confirm it: until its answer has arrived, the old
//! bytes are still cached, and a second open must not keep them. The first request of the handle confirms it. The
//! number of files is bounded; a file that falls out only costs the kernel its pages.

use parking_lot::Mutex;
use quick_cache::unsync::Cache;
use quorumfs_proto::InodeNumber;

/// Most files recorded, about 2 MiB.
const FILES_MAX: usize = 32_768;

/// The number of an open that drops pages.
pub type DropId = u64;

/// The kernel's pages of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pages {
    version: u64,
    /// The open that drops pages of another version, until that is confirmed.
    drop_id: Option<DropId>,
}

/// The versions by file. The lock is held for one access.
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
    /// Records an open at `version`. Returns `None` if cached pages are of that version; otherwise they must be
    /// dropped, and [`PageVersions::dropped`] be called with the number once a request confirms it.
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

    /// Records the creation of a file at `version`, of which no page is cached.
    pub fn created(&self, inode: InodeNumber, version: u64) {
        let drop_id = None;
        let pages = Pages { version, drop_id };
        self.state.lock().files.insert(inode, pages);
    }

    /// Records that the answer to the open with this number, or to another one with it, has arrived.
    pub fn dropped(&self, inode: InodeNumber, drop_id: DropId) {
        if let Some(mut pages) = self.state.lock().files.get_mut(&inode)
            && pages.drop_id == Some(drop_id)
        {
            pages.drop_id = None;
        }
    }

    /// Records that this mount changed the content from version `before` to `after`, and that the kernel's pages
    /// contain the change.
    pub fn changed_here(&self, inode: InodeNumber, before: u64, after: u64) {
        if let Some(mut pages) = self.state.lock().files.get_mut(&inode)
            && pages.version == before
        {
            pages.version = after;
        }
    }

    /// Records that the kernel's pages may lack a change.
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
            .expect("version 3 was made by another mount");
        versions.dropped(file, fourth);
        versions.forget(file);
        assert!(versions.opened(file, 4).is_some());
    }

    #[test]
    fn pages_are_kept_only_after_the_older_ones_are_gone() {
        let versions = PageVersions::default();
        let file = InodeNumber(7);
        let first = versions.opened(file, 1);
        assert_eq!(
            versions.opened(file, 1),
            first,
            "the answer to the first may not have arrived"
        );
        versions.changed_here(file, 1, 2);
        assert_eq!(
            versions.opened(file, 2),
            first,
            "a local change does not drop older pages"
        );
        let second = versions.opened(file, 3);
        versions.dropped(file, first.unwrap());
        assert_eq!(
            versions.opened(file, 3),
            second,
            "that open dropped only pages older than version 3"
        );
        versions.dropped(file, second.unwrap());
        assert_eq!(versions.opened(file, 3), None);
        versions.created(InodeNumber(8), 1);
        assert_eq!(versions.opened(InodeNumber(8), 1), None);
    }
}
