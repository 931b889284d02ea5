//! Inodes without a name that may still be in use on this mount.
//!
//! This crate knows which unlinked files are open (`OpenFiles`). Only the kernel knows of a FIFO, a working directory,
//! an O_PATH descriptor or an open in flight. Therefore:
//!
//! - A command of this mount that may remove a last name always asks the cluster to keep the inode (`Held::Open`).
//!   Whether it is open when the command is sent does not matter, because an open may arrive before the answer.
//! - The inode is released soon after, unless it is open or the kernel still knows it (`InUseCheck`). The kernel
//!   forgets an unlinked inode with its last user and cannot learn of it again, because no answer contains it. So
//!   polling these few inodes is enough; lookups need not be counted.
//! - An inode that another mount unlinked is held while it is open here, and while an open after a recent lookup may be
//!   in flight (`recent_lookups`). The kernel is not asked: it may remember unused names for days.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use quorumfs_proto::{InodeNumber, Operation};

use super::{Cluster, Filesystem};

/// Most inodes recorded of those that this mount unlinked, and of those that others unlinked. Beyond it an inode is
/// held only while it is open as a file, and the cluster asks about it again.
const UNLINKED_MAX: usize = 65_536;

/// Inodes in one `ReleaseUnlinked` command, which has about 10 KiB.
const INODES_PER_RELEASE_MAX: usize = 1000;

/// Returns whether the kernel may still use this inode. May block.
pub type InUseCheck = dyn Fn(InodeNumber) -> bool + Send + Sync;

/// Who removed the last name of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnlinkedBy {
    ThisMount,
    Another,
}

/// The unlinked inodes that are known to be kept by the cluster for this mount.
#[derive(Default)]
pub(super) struct Unlinked {
    inodes: Mutex<Inodes>,
    pending: Mutex<PendingCalls>,
    in_use: OnceLock<Arc<InUseCheck>>,
}

/// Invariant: an inode is in at most one of the two sets.
#[derive(Debug, Default)]
struct Inodes {
    by_this_mount: HashSet<InodeNumber>,
    by_others: HashSet<InodeNumber>,
}

/// Calls in progress after which this mount may have to hold an inode: commands that may remove a last name, creations
/// and lookups. Which inode it is, is unknown until the answer; the cluster may ask about it earlier.
#[derive(Default)]
struct PendingCalls {
    started: u64,
    unanswered: BTreeSet<u64>,
    /// The inodes of the cluster's last question, each with the number of calls started when it was first asked about.
    first_queried: HashMap<InodeNumber, u64>,
}

/// A call in [`PendingCalls`]; ends when its outcome is recorded.
pub(super) struct PendingCall<'a> {
    unlinked: &'a Unlinked,
    number: u64,
}

impl Drop for PendingCall<'_> {
    fn drop(&mut self) {
        self.unlinked.pending.lock().unanswered.remove(&self.number);
    }
}

impl PendingCalls {
    /// Returns those of `inodes` that no call in progress can affect: all calls started before the cluster's first
    /// question about them are answered.
    fn unaffected(&mut self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        let before = std::mem::take(&mut self.first_queried);
        let queried_at = |inode: &InodeNumber| (*inode, before.get(inode).copied().unwrap_or(self.started));
        self.first_queried = inodes.iter().map(queried_at).collect();
        let answered = self.unanswered.first().map_or(self.started, |oldest| oldest - 1);
        let is_unaffected = |inode: &&InodeNumber| self.first_queried[*inode] <= answered;
        inodes.iter().filter(is_unaffected).copied().collect()
    }
}

impl Unlinked {
    /// Registers a call that may remove a last name, create an inode or look one up. Must be called before the call is
    /// sent.
    pub(super) fn begin_call(&self) -> PendingCall<'_> {
        let mut pending = self.pending.lock();
        pending.started += 1;
        let number = pending.started;
        pending.unanswered.insert(number);
        PendingCall {
            unlinked: self,
            number,
        }
    }

    /// Records that `inode` has no name and is to be released when it is not in use.
    pub(super) fn add(&self, inode: InodeNumber, by: UnlinkedBy) {
        let mut inodes = self.inodes.lock();
        match by {
            UnlinkedBy::ThisMount if inodes.by_this_mount.len() < UNLINKED_MAX => {
                inodes.by_others.remove(&inode);
                inodes.by_this_mount.insert(inode);
            }
            UnlinkedBy::Another
                if inodes.by_others.len() < UNLINKED_MAX && !inodes.by_this_mount.contains(&inode) =>
            {
                inodes.by_others.insert(inode);
            }
            _ => {}
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        let inodes = self.inodes.lock();
        inodes.by_this_mount.is_empty() && inodes.by_others.is_empty()
    }

    /// Whether the cluster keeps `inode` until this mount releases it.
    pub(super) fn holds(&self, inode: InodeNumber) -> bool {
        self.inodes.lock().by_this_mount.contains(&inode)
    }

    /// Returns the inodes that this mount unlinked, and those that others unlinked.
    fn all(&self) -> (Vec<InodeNumber>, Vec<InodeNumber>) {
        let inodes = self.inodes.lock();
        let listed = |set: &HashSet<InodeNumber>| set.iter().copied().collect();
        (listed(&inodes.by_this_mount), listed(&inodes.by_others))
    }

    fn forget(&self, released: &[InodeNumber]) {
        let mut inodes = self.inodes.lock();
        for inode in released {
            inodes.by_this_mount.remove(inode);
            inodes.by_others.remove(inode);
        }
    }
}

impl<C: Cluster> Filesystem<C> {
    /// Sets the check for other uses than open files. Without it only open files count.
    pub fn set_in_use_check(&self, in_use: Arc<InUseCheck>) {
        // A filesystem has one edge, so it was not set before.
        let _ = self.unlinked.in_use.set(in_use);
    }

    /// Returns those of `inodes`, which have no name, that are not held here. Answers the cluster's question.
    pub(super) fn not_held(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        // First, so that outcomes recorded just before are seen below.
        let mut unaffected = self.unlinked.pending.lock().unaffected(inodes);
        unaffected.retain(|inode| !self.unlinked.holds(*inode));
        let not_held = self.revoke_closed(&self.recent_lookups.not_recent(&unaffected));
        // The others are released as soon as possible, not at the cluster's next question.
        let free: HashSet<InodeNumber> = not_held.iter().copied().collect();
        for inode in unaffected.into_iter().filter(|inode| !free.contains(inode)) {
            self.unlinked.add(inode, UnlinkedBy::Another);
        }
        not_held
    }

    /// Returns those of `inodes`, which have no name, that are not open here, and revokes them: they cannot be opened
    /// any more.
    fn revoke_closed(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        // In this order: an open acquires the inode first, and then sees that it is revoked.
        self.recent_lookups.revoke(inodes);
        let not_open = self.open.not_open(inodes);
        if not_open.len() < inodes.len() {
            let closed: HashSet<InodeNumber> = not_open.iter().copied().collect();
            let mut open = inodes.to_vec();
            open.retain(|inode| !closed.contains(inode));
            self.recent_lookups.restore(&open);
        }
        not_open
    }

    /// Releases the unlinked inodes that are not in use. If a command fails, the cluster asks about its inodes later.
    pub(super) async fn release_unlinked(&self) {
        for inodes in self.unused().await.chunks(INODES_PER_RELEASE_MAX) {
            // From now on the cluster's question has the same answer.
            self.unlinked.forget(inodes);
            let released = Operation::ReleaseUnlinked {
                inodes: inodes.to_vec(),
            };
            if let Err(error) = self.mutate(released).await {
                tracing::debug!(%error, "cannot release unlinked inodes; the cluster asks for them later");
                return;
            }
        }
    }

    /// Returns the unlinked inodes that are not in use, revoked.
    async fn unused(&self) -> Vec<InodeNumber> {
        let (by_this_mount, by_others) = self.unlinked.all();
        // Before the kernel is asked: it knows of what is opened in between. It also knows of every lookup of what this
        // mount unlinked, except for one that a failed creation is about to repeat.
        let by_this_mount = self
            .recent_lookups
            .without_existing(&self.open.not_open(&by_this_mount));
        let mut unused = self.recent_lookups.not_recent(&self.open.not_open(&by_others));
        match self.unlinked.in_use.get().cloned() {
            None => unused.extend(by_this_mount),
            // The check waits for a last user that is just releasing the inode. After a panic nothing is released.
            Some(in_use) => {
                let is_unused = move |inode: &InodeNumber| !in_use(*inode);
                let checked = tokio::task::spawn_blocking(move || {
                    by_this_mount.into_iter().filter(is_unused).collect::<Vec<_>>()
                });
                unused.extend(checked.await.unwrap_or_default());
            }
        }
        self.revoke_closed(&unused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_that_a_pending_call_may_affect_is_not_released() {
        let (early, late) = (InodeNumber(5), InodeNumber(6));
        let unlinked = Unlinked::default();
        let unaffected = |inodes: &[InodeNumber]| unlinked.pending.lock().unaffected(inodes);
        assert_eq!(unaffected(&[early]), [early], "no call is pending");
        let first = unlinked.begin_call();
        assert_eq!(
            unaffected(&[early, late]),
            [early],
            "the first call may unlink the late one"
        );
        let _second = unlinked.begin_call();
        assert!(unaffected(&[late]).is_empty());
        drop(first);
        assert_eq!(
            unaffected(&[late]),
            [late],
            "the second call began after the question"
        );
    }

    #[test]
    fn an_inode_that_this_mount_unlinked_is_held() {
        let unlinked = Unlinked::default();
        unlinked.add(InodeNumber(5), UnlinkedBy::Another);
        assert!(!unlinked.holds(InodeNumber(5)));
        unlinked.add(InodeNumber(5), UnlinkedBy::ThisMount);
        unlinked.add(InodeNumber(5), UnlinkedBy::Another);
        assert!(unlinked.holds(InodeNumber(5)));
        unlinked.forget(&[InodeNumber(5)]);
        assert!(unlinked.is_empty());
    }

    #[test]
    fn inodes_that_others_unlinked_take_no_room_from_those_of_this_mount() {
        let unlinked = Unlinked::default();
        for inode in 0..=UNLINKED_MAX as u64 {
            unlinked.add(InodeNumber(inode), UnlinkedBy::Another);
        }
        unlinked.add(InodeNumber(u64::MAX), UnlinkedBy::ThisMount);
        assert!(unlinked.holds(InodeNumber(u64::MAX)));
    }
}
