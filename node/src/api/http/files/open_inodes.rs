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
    /// cluster's question (a few thousand inodes).
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
    fn a_request_that_gives_up_keeps_nothing() {
        let table = Arc::new(OpenInodes::default());
        drop(table.begin());
        assert_eq!(table.releasable(&[A]), [A]);
    }
}
