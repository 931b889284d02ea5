//! All dirty bytes of a mount: who has them, and how many there may be.
//!
//! Invariant: a file is listed here exactly while its buffer is not clean, and counts for what its buffer stands for.
//! The lock is the innermost: it is taken with a file's state locked, and nothing is locked under it.

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

/// The account of dirty bytes.
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

    /// Totals what `node`'s buffer is now; `state` is `node`'s own, locked.
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

    /// The files that have dirty bytes.
    pub(super) fn nodes(&self) -> Vec<Arc<SharedInode<Put>>> {
        self.totals.lock().nodes.values().cloned().collect()
    }

    /// Whether no file has dirty bytes.
    pub(super) fn is_empty(&self) -> bool {
        self.totals.lock().nodes.is_empty()
    }

    /// Dirty bytes of the mount.
    pub(super) fn bytes(&self) -> u64 {
        self.totals.lock().bytes
    }

    /// Waits until there is room for a write; calls `write_back_all` whenever there is none.
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
