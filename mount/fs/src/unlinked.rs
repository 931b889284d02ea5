//! Inodes without a name that may still be in use on this mount.
//!
//! Which removed files are open is known here (`OpenFiles`). A FIFO, a working directory, an O_PATH descriptor or an open
//! that is on its way are known above only: to the kernel. So:
//!
//! - What this mount removes it always asks the cluster to keep (`Held::Open`); nothing is judged by what is open when
//!   the command is sent, for an open may arrive while it is under way.
//! - It is released a moment later, unless it is open, or whoever is above (`InUseCheck`) still knows the inode. The kernel
//!   forgets an inode without a name together with its last user, and cannot come to know it again, as no answer names
//!   it any more. So it is enough to ask now and then, about these few inodes; lookups need not be counted.
//! - What another mount removed is held for the files open here, and for as long as an open of what was looked up may be on
//!   its way (`recent_lookups`): the kernel may remember unused names for days.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use quorumfs_proto::{InodeNumber, Operation};

use super::{Cluster, Filesystem};

/// Inodes that this mount removed, and that others removed, which are remembered. Of what does not fit only those that are
/// open as files are held, and the cluster asks about them again.
const UNLINKED_MAX: usize = 65_536;

/// Inodes in one `ReleaseUnlinked`: a command of some 10 KiB.
const INODES_PER_RELEASE_MAX: usize = 1000;

/// Whether anybody above may still use this inode. It may block.
pub type InUseCheck = dyn Fn(InodeNumber) -> bool + Send + Sync;

/// Who took an inode's last name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnlinkedBy {
    ThisMount,
    Another,
}

/// The removed inodes that the cluster keeps for this mount, as far as they are known here.
#[derive(Default)]
pub(super) struct Unlinked {
    inodes: Mutex<Inodes>,
    pending: Mutex<PendingCalls>,
    in_use: OnceLock<Arc<InUseCheck>>,
}

/// Each in one of both.
#[derive(Debug, Default)]
struct Inodes {
    by_this_mount: HashSet<InodeNumber>,
    by_others: HashSet<InodeNumber>,
}

/// Calls under way after which this mount may have to hold an inode: commands that may take a last name, creations
/// and look-ups. Until they are answered it is not known here which inode; the cluster may ask about it before.
#[derive(Default)]
struct PendingCalls {
    started: u64,
    unanswered: BTreeSet<u64>,
    /// What the cluster asks about, and how many calls had started when it first did.
    first_queried: HashMap<InodeNumber, u64>,
}

/// One of [`PendingCalls`], until its outcome is noted.
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
    /// Those of `inodes` that none of the calls under way can be about: all that had started when the cluster first asked
    /// are answered.
    fn unaffected(&mut self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        let before = std::mem::take(&mut self.first_queried);
        let first_asked = |inode: &InodeNumber| (*inode, before.get(inode).copied().unwrap_or(self.started));
        self.first_queried = inodes.iter().map(first_asked).collect();
        let answered = self.unanswered.first().map_or(self.started, |oldest| oldest - 1);
        let is_unaffected = |inode: &&InodeNumber| self.first_queried[*inode] <= answered;
        inodes.iter().filter(is_unaffected).copied().collect()
    }
}

impl Unlinked {
    /// A call is about to be sent that may take a last name, make a file or look one up.
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

    /// `inode` has no name any more, and is to be released when nobody uses it.
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

    /// Whether the cluster keeps `inode` for this mount until it is told otherwise.
    pub(super) fn holds(&self, inode: InodeNumber) -> bool {
        self.inodes.lock().by_this_mount.contains(&inode)
    }

    /// What this mount removed, and what others removed.
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
    /// Who is asked whether removed inodes are still in use. Without anybody only open files are.
    pub fn set_in_use_check(&self, in_use: Arc<InUseCheck>) {
        // There is one edge for one filesystem, so nobody has said so before.
        let _ = self.unlinked.in_use.set(in_use);
    }

    /// Those of `inodes`, which have no name, that are not held here: the answer to the cluster's question.
    pub(super) fn not_held(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        // First, so that what a call noted just now is seen.
        let mut unaffected = self.unlinked.pending.lock().unaffected(inodes);
        unaffected.retain(|inode| !self.unlinked.holds(*inode));
        let not_held = self.revoke_closed(&self.recent_lookups.not_recent(&unaffected));
        // Whatever else is held is released as soon as it can be, not when the cluster asks the next time.
        let free: HashSet<InodeNumber> = not_held.iter().copied().collect();
        for inode in unaffected.into_iter().filter(|inode| !free.contains(inode)) {
            self.unlinked.add(inode, UnlinkedBy::Another);
        }
        not_held
    }

    /// Those of `inodes`, which have no name, that are not open here, nor will be any more.
    fn revoke_closed(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        // In this order: an open holds the inode first, and then sees that it was given up.
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

    /// Tells the cluster which removed inodes it need not keep for this mount. What cannot be told now the cluster asks
    /// for later.
    pub(super) async fn release_unlinked(&self) {
        for inodes in self.unused().await.chunks(INODES_PER_RELEASE_MAX) {
            // From now on the answer to the cluster's question is the same.
            self.unlinked.forget(inodes);
            let released = Operation::ReleaseUnlinked {
                inodes: inodes.to_vec(),
            };
            if let Err(error) = self.mutate(released).await {
                tracing::debug!(%error, "release unlinked inodes");
                return;
            }
        }
    }

    /// The removed inodes that nobody uses.
    async fn unused(&self) -> Vec<InodeNumber> {
        let (by_this_mount, by_others) = self.unlinked.all();
        // Before the others are asked about: what is opened in between is known above. Whoever looked up what this mount
        // removed is known above, except for one who is about to look it up again.
        let by_this_mount = self
            .recent_lookups
            .without_existing(&self.open.not_open(&by_this_mount));
        let mut unused = self.recent_lookups.not_recent(&self.open.not_open(&by_others));
        match self.unlinked.in_use.get().cloned() {
            None => unused.extend(by_this_mount),
            // Whoever was the last to use an inode waits there until it is gone. A panic releases nothing.
            Some(in_use) => {
                let is_unused = move |inode: &InodeNumber| !in_use(*inode);
                let asked = tokio::task::spawn_blocking(move || {
                    by_this_mount.into_iter().filter(is_unused).collect::<Vec<_>>()
                });
                unused.extend(asked.await.unwrap_or_default());
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
        assert_eq!(unaffected(&[early]), [early], "nothing is under way");
        let first = unlinked.begin_call();
        assert_eq!(
            unaffected(&[early, late]),
            [early],
            "the first removal may be that of the late one"
        );
        let _second = unlinked.begin_call();
        assert!(unaffected(&[late]).is_empty());
        drop(first);
        assert_eq!(unaffected(&[late]), [late], "the second began after the question");
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
