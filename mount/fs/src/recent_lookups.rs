//! What programs of this mount have just looked up, and so may be about to open.
//!
//! A call by name is two requests: a look-up, then an open (or a stat, a chmod, …) of the inode that was found. When
//! another session takes the last name of that inode in between, the call must not fail: the name led there when the call
//! began. So the cluster is asked to keep what was looked up within the last seconds, and such an inode can be opened
//! although it has no name. Each open gives one whole version of a file that is replaced again and again.
//!
//! A creation that finds a file is the other way round: the kernel must look the name up again, and then finds that file,
//! for the thread that tried to create it, even if it has lost its name meanwhile. Only that look-up does: the open may
//! end without a request of its own (EACCES, EISDIR), and what the thread looks up later must be as new as any.
//!
//! Invariant: an inode of which the cluster was told that it need not keep it for this mount is not opened any more.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::{Attributes, InodeNumber};

/// Inodes looked up in the time that they are kept, and inodes given up: beyond it the older ones are kept for less.
const INODES_MAX: usize = 64 << 10;

/// How long the kernel may take to look a name up again that a creation found: it waits for other changes of the
/// directory first.
const EXISTING_MS_MAX: u64 = 5_000;

/// Threads that are to look a name up again.
const EXISTING_MAX: usize = 1024;

/// The thread that makes a call, as the kernel names it. 0: a thread that cannot be named.
pub type ThreadId = u32;

/// Inodes of the last seconds.
#[derive(Debug)]
struct RecentSet {
    newer: HashSet<InodeNumber>,
    older: HashSet<InodeNumber>,
    since: Instant,
    /// How long at least an inode stays; twice as long at most.
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

/// What a creation found.
#[derive(Debug)]
struct ExistingFile {
    attributes: Attributes,
    /// Under which name, until that is looked up again. From then on the inode may be opened, and nothing else.
    name: Option<(InodeNumber, Vec<u8>)>,
    /// When it was found, or looked up again.
    at: Instant,
}

/// See the module. The lock is held for a look-up.
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

    /// Whether it was looked up lately and not given up since.
    fn is_recent(&mut self, inode: InodeNumber, now: Instant) -> bool {
        let is_looked_up = self.looked_up.contains(inode, now) || self.is_existing(inode, now);
        is_looked_up && !self.revoked.contains(inode, now)
    }
}

impl RecentLookups {
    /// Nothing is looked up yet. What is stays for `kept_ms`.
    pub(super) fn new(kept_ms: u64) -> RecentLookups {
        RecentLookups {
            state: Mutex::new(State {
                looked_up: RecentSet::new(kept_ms),
                revoked: RecentSet::new(kept_ms.max(EXISTING_MS_MAX)),
                existing: HashMap::new(),
            }),
        }
    }

    /// Programs are told of `inode`.
    pub(super) fn add(&self, inode: InodeNumber) {
        self.state.lock().looked_up.insert(inode, Instant::now());
    }

    /// Whether `inode` may be opened although it has no name, and nobody here has it open.
    pub(super) fn may_open(&self, inode: InodeNumber) -> bool {
        self.state.lock().is_recent(inode, Instant::now())
    }

    /// Those of `inodes` that no thread is about to look up again, because its creation found it.
    pub(super) fn without_existing(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        let (state, now) = (self.state.lock(), Instant::now());
        inodes
            .iter()
            .filter(|inode| !state.is_existing(**inode, now))
            .copied()
            .collect()
    }

    /// Those of `inodes` that were not looked up lately, or were given up since.
    pub(super) fn not_recent(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        let (mut state, now) = (self.state.lock(), Instant::now());
        inodes
            .iter()
            .filter(|inode| !state.is_recent(**inode, now))
            .copied()
            .collect()
    }

    /// From now on `inodes` are not opened any more.
    pub(super) fn revoke(&self, inodes: &[InodeNumber]) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        for inode in inodes {
            state.revoked.insert(*inode, now);
        }
    }

    /// They are after all.
    pub(super) fn restore(&self, inodes: &[InodeNumber]) {
        let mut state = self.state.lock();
        for inode in inodes {
            state.revoked.remove(*inode);
        }
    }

    /// `caller` could not create `name`, because it leads to the inode of `attributes`.
    pub(super) fn record_existing(
        &self,
        caller: ThreadId,
        parent: InodeNumber,
        name: &[u8],
        attributes: Attributes,
    ) {
        let (mut state, at) = (self.state.lock(), Instant::now());
        // Few, and most threads never come back for theirs.
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

    /// What `caller`'s creation of `name` found a moment ago; told once.
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
        // It is kept for the open, which comes now or never.
        found.name = None;
        found.at = now;
        Some(found.attributes.clone())
    }

    /// `caller` goes on: what its creation found is of no use any more.
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
        assert!(
            !recent.contains(inode, after(9 * KEPT_MS)),
            "nothing came for long"
        );

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
    fn the_inodes_that_are_remembered_are_bounded() {
        let mut recent = RecentSet::new(KEPT_MS);
        let now = recent.since;
        for inode in 0..5 * INODES_MAX as u64 {
            recent.insert(InodeNumber(inode), now);
        }
        assert!(recent.newer.len() + recent.older.len() <= 2 * INODES_MAX);
        assert!(recent.contains(InodeNumber(4 * INODES_MAX as u64), now));
    }
}
