//! Inodes without a name that may still be in use on this mount.
//!
//! Which removed files are open is known here (`OpenFiles`). A FIFO, a working directory, an O_PATH descriptor or an open
//! that is on its way are known above only: to the kernel. So:
//!
//! - What this mount removes it always asks the cluster to keep (`Held::Open`); nothing is judged by what is open when
//!   the command is sent, for an open may arrive while it is under way.
//! - It is released a moment later, unless it is open, or whoever is above (`UsedAbove`) still knows the inode. The kernel
//!   forgets an inode without a name together with its last user, and cannot come to know it again, as no answer names
//!   it any more. So it is enough to ask now and then, about these few inodes; lookups need not be counted.
//! - What another mount removed is held for the files open here, and for as long as an open of what was looked up may be on
//!   its way (`looked_up`): the kernel may remember unused names for days.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use quorumfs_proto::{InodeNumber, Operation};

use super::{Cluster, Filesystem};

/// Removed inodes that are remembered; of what does not fit only those that are open as files are held.
const REMOVED_MAX: usize = 65_536;

/// Inodes in one `ReleaseUnlinked`: a command of some 10 KiB.
const RELEASES_AT_ONCE_MAX: usize = 1000;

/// Whether anybody above may still use this inode. It may block.
pub type UsedAbove = dyn Fn(InodeNumber) -> bool + Send + Sync;

/// Who took an inode's last name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RemovedBy {
    ThisMount,
    Another,
}

/// The removed inodes that the cluster keeps for this mount, as far as they are known here.
#[derive(Default)]
pub(super) struct Removed {
    inodes: Mutex<HashMap<InodeNumber, RemovedBy>>,
    removals: Mutex<Removals>,
    used_above: OnceLock<Arc<UsedAbove>>,
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
        if inodes.len() < REMOVED_MAX || inodes.contains_key(&inode) {
            let known = inodes.entry(inode).or_insert(by);
            if by == RemovedBy::ThisMount {
                *known = by;
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.inodes.lock().is_empty()
    }

    /// Whether the cluster keeps `inode` for this mount until it is told otherwise.
    pub(super) fn holds(&self, inode: InodeNumber) -> bool {
        self.inodes.lock().get(&inode) == Some(&RemovedBy::ThisMount)
    }

    fn all(&self) -> Vec<(InodeNumber, RemovedBy)> {
        self.inodes
            .lock()
            .iter()
            .map(|(inode, by)| (*inode, *by))
            .collect()
    }

    fn forget(&self, released: &[InodeNumber]) {
        let mut inodes = self.inodes.lock();
        for inode in released {
            inodes.remove(inode);
        }
    }
}

impl<C: Cluster> Filesystem<C> {
    /// Who is asked whether removed inodes are still in use. Without anybody only open files are.
    pub fn set_used_above(&self, used_above: Arc<UsedAbove>) {
        // There is one edge for one filesystem, so nobody has said so before.
        let _ = self.removed.used_above.set(used_above);
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
        let mut removed = self.removed.all();
        // Before the others are asked about: what is opened in between is known above.
        removed.retain(|(inode, _)| self.open.holds(*inode) == 0);
        removed.retain(|(inode, by)| match by {
            // Whoever looked it up is known above, except for one who is about to look it up again.
            RemovedBy::ThisMount => !self.looked_up.is_found(*inode),
            RemovedBy::Another => !self.looked_up.not_recent(&[*inode]).is_empty(),
        });
        let unused = move |used_above: Option<Arc<UsedAbove>>| {
            let is_used = |inode| used_above.as_ref().is_some_and(|used_above| used_above(inode));
            removed.retain(|(inode, by)| *by == RemovedBy::Another || !is_used(*inode));
            removed.into_iter().map(|(inode, _)| inode).collect::<Vec<_>>()
        };
        let unused = match self.removed.used_above.get().cloned() {
            None => unused(None),
            // Whoever was the last to use an inode waits there until it is gone. A panic releases nothing.
            some => tokio::task::spawn_blocking(move || unused(some))
                .await
                .unwrap_or_default(),
        };
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
}
