//! Inodes that programs of this mount have recently looked up and may be about to open.
//!
//! A call by name is two requests: a lookup, then an open (or a stat, a chmod, …) of that inode. If another session
//! removes the inode's last name in between, the call must not fail, because the name referred to it when the call
//! began. So the cluster is asked to keep recently looked-up inodes, and they can be opened without a name. Every open
//! of a file that is replaced again and again then sees one whole version.
//!
//! If a creation fails because the file exists, the kernel repeats the lookup. For the thread that tried to create it,
//! that lookup returns the existing file even if it has been unlinked meanwhile. Only that one lookup does: the open
//! may end without a request (EACCES, EISDIR), and later lookups of the thread must be current.
//!
//! Invariant: an inode that was reported to the cluster as not in use is not opened afterwards.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::{Attributes, InodeNumber};

/// Most inodes in each half of a set. Beyond it the older half is dropped earlier.
const INODES_MAX: usize = 64 << 10;

/// Longest time from a failed creation to the repeated lookup, which may wait for other changes of the directory.
const EXISTING_MS_MAX: u64 = 5_000;

/// Most threads with a failed creation.
const EXISTING_MAX: usize = 1024;

/// The kernel's id of the thread that makes a call; 0 if unknown.
pub type ThreadId = u32;

/// A set of inodes that forgets each after some time.
#[derive(Debug)]
struct RecentSet {
    newer: HashSet<InodeNumber>,
    older: HashSet<InodeNumber>,
    since: Instant,
    /// Shortest time for which an inode is kept; the longest is twice as much.
    kept: Duration,
}

impl RecentSet {
    fn new(kept_ms: u64) -> RecentSet {
        RecentSet {
            newer: HashSet::new(),
            older: HashSet::new(),
            since: Instant::now(),
            kept: Duration::from_millis(kept_ms),
        }
    }

    fn rotate(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.since);
        if age >= self.kept || self.newer.len() >= INODES_MAX {
            self.older = std::mem::take(&mut self.newer);
            self.since = now;
        }
        if age >= 2 * self.kept {
            self.older.clear();
        }
    }

    fn insert(&mut self, inode: InodeNumber, now: Instant) {
        self.rotate(now);
        self.newer.insert(inode);
    }

    fn contains(&mut self, inode: InodeNumber, now: Instant) -> bool {
        self.rotate(now);
        self.newer.contains(&inode) || self.older.contains(&inode)
    }

    fn remove(&mut self, inode: InodeNumber) {
        self.newer.remove(&inode);
        self.older.remove(&inode);
    }
}

/// The existing file that a failed creation found.
#[derive(Debug)]
struct ExistingFile {
    attributes: Attributes,
    /// Parent and name, until the repeated lookup. After it the inode can be opened and nothing else.
    name: Option<(InodeNumber, Vec<u8>)>,
    /// Time of the creation, or of the repeated lookup.
    at: Instant,
}

/// The recent lookups and failed creations of a mount. The lock is held for one access.
#[derive(Debug)]
pub(super) struct RecentLookups {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    looked_up: RecentSet,
    revoked: RecentSet,
    existing: HashMap<ThreadId, ExistingFile>,
}

impl ExistingFile {
    fn is_named(&self, parent: InodeNumber, name: &[u8]) -> bool {
        let own = self.name.as_ref();
        own.is_some_and(|(own_parent, own_name)| *own_parent == parent && own_name == name)
    }

    fn is_young(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < Duration::from_millis(EXISTING_MS_MAX)
    }
}

impl State {
    fn is_existing(&self, inode: InodeNumber, now: Instant) -> bool {
        let is_it = |found: &ExistingFile| found.attributes.inode == inode && found.is_young(now);
        self.existing.values().any(is_it)
    }

    /// Whether `inode` was looked up recently and not revoked since.
    fn is_recent(&mut self, inode: InodeNumber, now: Instant) -> bool {
        let is_looked_up = self.looked_up.contains(inode, now) || self.is_existing(inode, now);
        is_looked_up && !self.revoked.contains(inode, now)
    }
}

impl RecentLookups {
    /// Makes an empty table that keeps inodes for at least `kept_ms`.
    pub(super) fn new(kept_ms: u64) -> RecentLookups {
        RecentLookups {
            state: Mutex::new(State {
                looked_up: RecentSet::new(kept_ms),
                revoked: RecentSet::new(kept_ms.max(EXISTING_MS_MAX)),
                existing: HashMap::new(),
            }),
        }
    }

    /// Records a lookup of `inode`.
    pub(super) fn add(&self, inode: InodeNumber) {
        self.state.lock().looked_up.insert(inode, Instant::now());
    }

    /// Whether `inode` can be opened although it has no name and is not open here.
    pub(super) fn may_open(&self, inode: InodeNumber) -> bool {
        self.state.lock().is_recent(inode, Instant::now())
    }

    /// Returns those of `inodes` for which no lookup after a failed creation is pending.
    pub(super) fn without_existing(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        let (state, now) = (self.state.lock(), Instant::now());
        inodes
            .iter()
            .filter(|inode| !state.is_existing(**inode, now))
            .copied()
            .collect()
    }

    /// Returns those of `inodes` that were not looked up recently or were revoked since.
    pub(super) fn not_recent(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        let (mut state, now) = (self.state.lock(), Instant::now());
        inodes
            .iter()
            .filter(|inode| !state.is_recent(**inode, now))
            .copied()
            .collect()
    }

    /// Forbids further opens of `inodes`.
    pub(super) fn revoke(&self, inodes: &[InodeNumber]) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        for inode in inodes {
            state.revoked.insert(*inode, now);
        }
    }

    /// Undoes [`RecentLookups::revoke`].
    pub(super) fn restore(&self, inodes: &[InodeNumber]) {
        let mut state = self.state.lock();
        for inode in inodes {
            state.revoked.remove(*inode);
        }
    }

    /// Records that `caller` could not create `name` because it refers to the inode of `attributes`.
    pub(super) fn record_existing(
        &self,
        caller: ThreadId,
        parent: InodeNumber,
        name: &[u8],
        attributes: Attributes,
    ) {
        let (mut state, at) = (self.state.lock(), Instant::now());
        // Removes expired entries; most threads never come back for theirs.
        state.existing.retain(|_, found| found.is_young(at));
        if caller != 0 && state.existing.len() < EXISTING_MAX {
            let found = ExistingFile {
                attributes,
                name: Some((parent, name.to_vec())),
                at,
            };
            state.existing.insert(caller, found);
        }
    }

    /// Returns the existing file that the creation of `name` by `caller` found, once.
    pub(super) fn take_existing(
        &self,
        caller: ThreadId,
        parent: InodeNumber,
        name: &[u8],
    ) -> Option<Attributes> {
        let (mut state, now) = (self.state.lock(), Instant::now());
        let found = state.existing.get_mut(&caller)?;
        if !found.is_named(parent, name) || !found.is_young(now) {
            return None;
        }
        // Kept for the open, which follows at once or never.
        found.name = None;
        found.at = now;
        Some(found.attributes.clone())
    }

    /// Removes the existing file of `caller`, which has sent another request.
    pub(super) fn forget_existing(&self, caller: ThreadId) {
        let mut state = self.state.lock();
        if !state.existing.is_empty() {
            state.existing.remove(&caller);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT_MS: u64 = 2_000;

    #[test]
    fn a_looked_up_inode_can_be_opened_for_a_while_unless_it_is_revoked() {
        let mut recent = RecentSet::new(KEPT_MS);
        let (start, inode) = (recent.since, InodeNumber(7));
        let after = |ms| start + Duration::from_millis(ms);
        recent.insert(inode, after(KEPT_MS - 1));
        assert!(recent.contains(inode, after(KEPT_MS)));
        assert!(recent.contains(inode, after(2 * KEPT_MS - 1)));
        assert!(!recent.contains(inode, after(2 * KEPT_MS)));
        recent.insert(inode, after(3 * KEPT_MS));
        assert!(!recent.contains(inode, after(9 * KEPT_MS)), "it has expired");

        let looked_up = RecentLookups::new(KEPT_MS);
        assert!(!looked_up.may_open(inode));
        looked_up.add(inode);
        assert!(looked_up.may_open(inode));
        assert!(looked_up.not_recent(&[inode]).is_empty());
        looked_up.revoke(&[inode]);
        assert!(!looked_up.may_open(inode));
        assert_eq!(looked_up.not_recent(&[inode]), [inode]);
        looked_up.restore(&[inode]);
        assert!(looked_up.may_open(inode));
    }

    #[test]
    fn recorded_inodes_are_bounded() {
        let mut recent = RecentSet::new(KEPT_MS);
        let now = recent.since;
        for inode in 0..5 * INODES_MAX as u64 {
            recent.insert(InodeNumber(inode), now);
        }
        assert!(recent.newer.len() + recent.older.len() <= 2 * INODES_MAX);
        assert!(recent.contains(InodeNumber(4 * INODES_MAX as u64), now));
    }
}
