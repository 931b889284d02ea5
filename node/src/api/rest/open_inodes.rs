//! Which inodes this node's session has open: downloads under way and uploads not yet linked.
//!
//! The cluster keeps an unlinked inode until every session has said "not open here"; this table is what the node
//! says it from. It never says so of an inode that a request holds, or may just be about to hold:
//!
//! - A request that will come to hold an inode (it looks a path up, or has one created) says so *before* it asks the
//!   cluster ([`OpenInodes::begin`]), and holds it before it takes that back ([`Opening::hold`], one step).
//! - An inode that waits for our answer has no name any more, so only requests that began before we first heard of it
//!   can still come to hold it. When the last of those is done and none holds it, it is released.
//!
//! Knows nothing of the cluster, of HTTP and of time.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use quorumfs_proto::InodeNumber;

/// The table. Its locks are held for a few map operations.
#[derive(Debug, Default)]
pub(super) struct OpenInodes(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    holders: HashMap<InodeNumber, u32>,
    /// Requests that may come to hold an inode, by the order in which they began. Bounded with the requests.
    openings: BTreeSet<u64>,
    next_opening: u64,
    /// Unlinked inodes that nobody holds, and the first opening that began after we heard of each. Bounded by the
    /// cluster's question (1,000 inodes).
    doomed: HashMap<InodeNumber, u64>,
}

impl OpenInodes {
    /// A request begins that may come to hold an inode.
    pub(super) fn begin(self: &Arc<OpenInodes>) -> Opening {
        let mut table = self.0.lock();
        let number = table.next_opening;
        table.next_opening += 1;
        table.openings.insert(number);
        Opening {
            table: Arc::clone(self),
            number,
        }
    }

    /// Which of `unlinked`, all of which the cluster would reclaim, are not open here and never will be again.
    pub(super) fn releasable(&self, unlinked: &[InodeNumber]) -> Vec<InodeNumber> {
        let mut table = self.0.lock();
        let Table {
            holders,
            openings,
            next_opening,
            doomed,
        } = &mut *table;
        let mut still_doomed = HashMap::new();
        let mut released = Vec::new();
        for &inode in unlinked.iter().filter(|inode| !holders.contains_key(inode)) {
            let heard_of = doomed.get(&inode).copied().unwrap_or(*next_opening);
            match openings.first() {
                Some(&oldest) if oldest < heard_of => {
                    still_doomed.insert(inode, heard_of);
                }
                _ => released.push(inode),
            }
        }
        *doomed = still_doomed;
        released
    }

    /// Which of `unlinked` can be released at this moment; unlike [`OpenInodes::releasable`] it remembers nothing, and
    /// says none while any request may come to hold one.
    pub(super) fn releasable_now(&self, unlinked: Vec<InodeNumber>) -> Vec<InodeNumber> {
        let table = self.0.lock();
        if !table.openings.is_empty() {
            return Vec::new();
        }
        let free = |inode: &InodeNumber| !table.holders.contains_key(inode);
        unlinked.into_iter().filter(free).collect()
    }
}

/// Files that were removed and are still to be released, gathered so that many go with one command. What is lost here
/// (an error, the end of the process) the keep-alive finds again.
#[derive(Debug, Default)]
pub(super) struct RemovedInodes(Mutex<Vec<InodeNumber>>);

impl RemovedInodes {
    /// So many are released at once; few enough that they wait no longer than the keep-alive would.
    const BATCH: usize = 64;

    /// Adds one; the batch, if that fills it.
    pub(super) fn add(&self, inode: InodeNumber) -> Vec<InodeNumber> {
        let mut gathered = self.0.lock();
        gathered.push(inode);
        if gathered.len() < RemovedInodes::BATCH {
            return Vec::new();
        }
        std::mem::take(&mut gathered)
    }
}

/// A request that may come to hold an inode. Dropped: it does not.
#[derive(Debug)]
pub(super) struct Opening {
    table: Arc<OpenInodes>,
    number: u64,
}

impl Opening {
    /// The request holds `inode` from now on.
    pub(super) fn hold(self, inode: InodeNumber) -> HeldInode {
        let mut table = self.table.0.lock();
        *table.holders.entry(inode).or_insert(0) += 1;
        // Before the lock is let go of; `drop` removes it again, which does nothing.
        table.openings.remove(&self.number);
        drop(table);
        HeldInode {
            table: Arc::clone(&self.table),
            inode,
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.table.0.lock().openings.remove(&self.number);
    }
}

/// A request holds an inode, until this is dropped.
#[derive(Debug)]
pub(super) struct HeldInode {
    table: Arc<OpenInodes>,
    inode: InodeNumber,
}

impl HeldInode {
    /// Which.
    pub(super) fn inode(&self) -> InodeNumber {
        self.inode
    }
}

impl Drop for HeldInode {
    fn drop(&mut self) {
        let mut table = self.table.0.lock();
        if let Some(holders) = table.holders.get_mut(&self.inode) {
            *holders -= 1;
            if *holders == 0 {
                table.holders.remove(&self.inode);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: InodeNumber = InodeNumber(7);
    const B: InodeNumber = InodeNumber(8);

    #[test]
    fn what_is_held_is_kept_until_its_last_holder_is_gone() {
        let table = Arc::new(OpenInodes::default());
        let first = table.begin().hold(A);
        let second = table.begin().hold(A);
        assert_eq!(table.releasable(&[A, B]), [B]);
        drop(first);
        assert_eq!(table.releasable(&[A]), []);
        drop(second);
        assert_eq!(table.releasable(&[A]), [A]);
    }

    #[test]
    fn what_a_request_may_be_about_to_hold_is_kept() {
        let table = Arc::new(OpenInodes::default());
        let early = table.begin();
        assert_eq!(
            table.releasable(&[A, B]),
            [],
            "the early request may have looked A up"
        );
        let late = table.begin();
        let held = early.hold(A);
        assert_eq!(
            table.releasable(&[A, B]),
            [B],
            "the late request began when B had no name any more, so it does not keep it"
        );
        drop(held);
        assert_eq!(
            table.releasable(&[A]),
            [],
            "A was forgotten as doomed while it was held"
        );
        drop(late);
        assert_eq!(table.releasable(&[A]), [A]);
    }

    #[test]
    fn what_was_removed_is_released_in_batches_when_nobody_can_hold_it() {
        let removed = RemovedInodes::default();
        let batches: Vec<Vec<InodeNumber>> = (0..130).map(|n| removed.add(InodeNumber(n))).collect();
        let sizes: Vec<usize> = batches.iter().map(Vec::len).filter(|&size| size > 0).collect();
        assert_eq!(sizes, [64, 64]);

        let table = Arc::new(OpenInodes::default());
        let opening = table.begin();
        assert_eq!(table.releasable_now(vec![A, B]), []);
        let _held = opening.hold(A);
        assert_eq!(table.releasable_now(vec![A, B]), [B]);
    }

    #[test]
    fn a_request_that_gives_up_keeps_nothing() {
        let table = Arc::new(OpenInodes::default());
        drop(table.begin());
        assert_eq!(table.releasable(&[A]), [A]);
    }
}
