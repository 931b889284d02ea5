//! The dirty bytes of a mount: which files have them, and how many there are.
//!
//! Invariant: a file is listed exactly while it has uncommitted bytes, with its memory footprint as charge. The lock is
//! the innermost: it is taken with a file's state locked, and no lock is taken under it.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use quorumfs_proto::InodeNumber;
use quorumfs_proto::command::Privileges;
use tokio::sync::Notify;

use crate::handles::{InodeState, SharedInode};

#[derive(Debug)]
struct Totals<Put> {
    bytes: u64,
    nodes: BTreeMap<InodeNumber, Arc<SharedInode<Put>>>,
}

/// The dirty files of a mount and the sum of their bytes.
#[derive(Debug)]
pub(super) struct DirtyBytes<Put> {
    totals: Mutex<Totals<Put>>,
    bytes_max: u64,
    freed: Notify,
}

impl<Put> DirtyBytes<Put> {
    pub(super) fn new(bytes_max: u64) -> DirtyBytes<Put> {
        DirtyBytes {
            totals: Mutex::new(Totals {
                bytes: 0,
                nodes: BTreeMap::new(),
            }),
            bytes_max,
            freed: Notify::new(),
        }
    }

    /// Updates the charge of `node` after a change of its buffer. `state` is the locked state of `node`.
    pub(super) fn update(&self, node: &Arc<SharedInode<Put>>, state: &mut InodeState<Put>) {
        let footprint_bytes = state.footprint_bytes();
        let mut totals = self.totals.lock();
        totals.bytes = totals.bytes - state.charged_bytes + footprint_bytes;
        if state.is_clean() {
            totals.nodes.remove(&node.inode);
            state.mtime = None;
            state.privileges = Privileges::Keep;
            state.dirty_since = None;
        } else if state.charged_bytes == 0 {
            totals.nodes.insert(node.inode, Arc::clone(node));
        }
        let freed = footprint_bytes < state.charged_bytes;
        state.charged_bytes = footprint_bytes;
        if freed {
            self.freed.notify_waiters();
        }
    }

    /// Returns the files with dirty bytes.
    pub(super) fn nodes(&self) -> Vec<Arc<SharedInode<Put>>> {
        self.totals.lock().nodes.values().cloned().collect()
    }

    /// Whether no file has dirty bytes.
    pub(super) fn is_empty(&self) -> bool {
        self.totals.lock().nodes.is_empty()
    }

    /// Returns the charged bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.totals.lock().bytes
    }

    /// Waits until the dirty bytes are below their limit. Calls `write_back_all` each time they are not.
    pub(super) async fn wait_for_room(&self, write_back_all: impl Fn()) {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if self.bytes() < self.bytes_max {
                return;
            }
            write_back_all();
            freed.await;
        }
    }
}
