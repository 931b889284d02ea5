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
//!   its way (`looked_up`): the kernel may remember unused names for days.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use quorumfs_proto::{InodeNumber, Operation};

use super::{Cluster, Filesystem};

/// Inodes that this mount removed, and that others removed, which are remembered. Of what does not fit only those that are
/// open as files are held, and the cluster asks about them again.
const REMOVED_MAX: usize = 65_536;

/// Inodes in one `ReleaseUnlinked`: a command of some 10 KiB.
const RELEASES_AT_ONCE_MAX: usize = 1000;

/// Whether anybody above may still use this inode. It may block.
pub type InUseCheck = dyn Fn(InodeNumber) -> bool + Send + Sync;

/// Who took an inode's last name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RemovedBy {
    ThisMount,
    Another,
}

/// The removed inodes that the cluster keeps for this mount, as far as they are known here.
#[derive(Default)]
pub(super) struct Removed {
    inodes: Mutex<Inodes>,
    removals: Mutex<Removals>,
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
struct Removals {
    begun: u64,
    under_way: BTreeSet<u64>,
    /// What the cluster asks about, and how many calls had begun when it first did.
    asked: HashMap<InodeNumber, u64>,
}

/// One of [`Removals`], until its outcome is noted.
pub(super) struct Removal<'a> {
    removed: &'a Removed,
    number: u64,
}

impl Drop for Removal<'_> {
    fn drop(&mut self) {
        self.removed.removals.lock().under_way.remove(&self.number);
    }
}

impl Removals {
    /// Those of `inodes` that none of the calls under way can be about: all that had begun when the cluster first asked
    /// are answered.
    fn settled(&mut self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        let before = std::mem::take(&mut self.asked);
        let first_asked = |inode: &InodeNumber| (*inode, before.get(inode).copied().unwrap_or(self.begun));
        self.asked = inodes.iter().map(first_asked).collect();
        let answered = self.under_way.first().map_or(self.begun, |oldest| oldest - 1);
        let is_settled = |inode: &&InodeNumber| self.asked[*inode] <= answered;
        inodes.iter().filter(is_settled).copied().collect()
    }
}

impl Removed {
    /// A call is about to be sent that may take a last name, make a file or look one up.
    pub(super) fn may_hold(&self) -> Removal<'_> {
        let mut removals = self.removals.lock();
        removals.begun += 1;
        let number = removals.begun;
        removals.under_way.insert(number);
        Removal {
            removed: self,
            number,
        }
    }

    /// `inode` has no name any more, and is to be released when nobody uses it.
    pub(super) fn add(&self, inode: InodeNumber, by: RemovedBy) {
        let mut inodes = self.inodes.lock();
        match by {
            RemovedBy::ThisMount if inodes.by_this_mount.len() < REMOVED_MAX => {
                inodes.by_others.remove(&inode);
                inodes.by_this_mount.insert(inode);
            }
            RemovedBy::Another
                if inodes.by_others.len() < REMOVED_MAX && !inodes.by_this_mount.contains(&inode) =>
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
        let _ = self.removed.in_use.set(in_use);
    }

    /// Those of `inodes`, which have no name, that are not held here: the answer to the cluster's question.
    pub(super) fn not_held(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        // First, so that what a call noted just now is seen.
        let mut settled = self.removed.removals.lock().settled(inodes);
        settled.retain(|inode| !self.removed.holds(*inode));
        let not_held = self.give_up(&self.looked_up.not_recent(&settled));
        // Whatever else is held is released as soon as it can be, not when the cluster asks the next time.
        let free: HashSet<InodeNumber> = not_held.iter().copied().collect();
        for inode in settled.into_iter().filter(|inode| !free.contains(inode)) {
            self.removed.add(inode, RemovedBy::Another);
        }
        not_held
    }

    /// Those of `inodes`, which have no name, that are not open here, nor will be any more.
    fn give_up(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        // In this order: an open holds the inode first, and then sees that it was given up.
        self.looked_up.give_up(inodes);
        let not_open = self.open.not_open(inodes);
        if not_open.len() < inodes.len() {
            let closed: HashSet<InodeNumber> = not_open.iter().copied().collect();
            let mut open = inodes.to_vec();
            open.retain(|inode| !closed.contains(inode));
            self.looked_up.keep(&open);
        }
        not_open
    }

    /// Tells the cluster which removed inodes it need not keep for this mount. What cannot be told now the cluster asks
    /// for later.
    pub(super) async fn release_unlinked(&self) {
        for inodes in self.unused().await.chunks(RELEASES_AT_ONCE_MAX) {
            // From now on the answer to the cluster's question is the same.
            self.removed.forget(inodes);
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
        let (by_this_mount, by_others) = self.removed.all();
        // Before the others are asked about: what is opened in between is known above. Whoever looked up what this mount
        // removed is known above, except for one who is about to look it up again.
        let by_this_mount = self.looked_up.not_found(&self.open.not_open(&by_this_mount));
        let mut unused = self.looked_up.not_recent(&self.open.not_open(&by_others));
        match self.removed.in_use.get().cloned() {
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
        self.give_up(&unused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_removal_under_way_may_be_about_is_not_let_go() {
        let (early, late) = (InodeNumber(5), InodeNumber(6));
        let removed = Removed::default();
        let settled = |inodes: &[InodeNumber]| removed.removals.lock().settled(inodes);
        assert_eq!(settled(&[early]), [early], "nothing is under way");
        let first = removed.may_hold();
        assert_eq!(
            settled(&[early, late]),
            [early],
            "the first removal may be that of the late one"
        );
        let _second = removed.may_hold();
        assert!(settled(&[late]).is_empty());
        drop(first);
        assert_eq!(settled(&[late]), [late], "the second began after the question");
    }

    #[test]
    fn what_this_mount_removed_it_holds() {
        let removed = Removed::default();
        removed.add(InodeNumber(5), RemovedBy::Another);
        assert!(!removed.holds(InodeNumber(5)));
        removed.add(InodeNumber(5), RemovedBy::ThisMount);
        removed.add(InodeNumber(5), RemovedBy::Another);
        assert!(removed.holds(InodeNumber(5)));
        removed.forget(&[InodeNumber(5)]);
        assert!(removed.is_empty());
    }

    #[test]
    fn what_others_removed_takes_no_room_from_what_this_mount_removed() {
        let removed = Removed::default();
        for inode in 0..=REMOVED_MAX as u64 {
            removed.add(InodeNumber(inode), RemovedBy::Another);
        }
        removed.add(InodeNumber(u64::MAX), RemovedBy::ThisMount);
        assert!(removed.holds(InodeNumber(u64::MAX)));
    }
}
