//! What the kernel is told about the size of an open file, and when.
//!
//! The kernel caches pages of open files. If such a page is zero beyond an end that the file has outgrown, a larger
//! size is reported only after the page is dropped ([`crate::caches::page_tail`]). Every answer with attributes goes
//! through [`Filesystem::present`] or a variant of it; every short read is recorded by [`Filesystem::read`].
//!
//! - Pages are dropped on a thread of tokio's blocking pool, never on one that serves requests, because the kernel
//!   waits for reads in progress. So no read, and no write through pages, may wait for a drop; answers with attributes
//!   may.
//! - The kernel ignores the size in an answer whose request is older than the drop. It would keep the old size until
//!   its next query: a read at the old end would return nothing, and a mapping would end there. So it is sent the last
//!   byte of the file, which moves its end. This is omitted if a program of this mount may write through pages: the
//!   byte could overwrite a newer one.
//! - An answer with attributes that extend the file can do harm later: the kernel zeroes its page beyond the new end,
//!   possibly only after a further append. The last byte moves the end without that, so it is sent before the answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_proto::{Attributes, InodeNumber};
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::task::JoinHandle;

use super::{Cluster, Filesystem, OpenInode};
use crate::caches::page_tail::{PageTail, Reader};
use crate::handles::LastByte;

/// Longest time that an answer waits for the last byte of the file.
const LAST_BYTE_TIMEOUT_MS: u64 = 1000;

/// Longest time that the answer to a write waits for the drop of a page. The kernel may hold the lock of that page
/// until the answer; then programs cannot see zeros in it, and there is nothing to wait for.
const WRITTEN_TIMEOUT_MS: u64 = 10;

/// The kernel's cache of file pages. All calls may block until reads in progress are answered.
pub trait PageCache: Send + Sync {
    /// Drops the pages of `inode` from the one with the byte `from` on.
    fn drop_from(&self, inode: InodeNumber, from: u64);
    /// Drops the page of `inode` with the byte `at`.
    fn drop_page_at(&self, inode: InodeNumber, at: u64);
    /// Returns when none of `readers`, whose reads are answered, still copies from a page that was dropped before this
    /// call.
    fn wait_for_readers(&self, readers: &[Reader]);
    /// Stores `byte` at the offset `at` of `inode` and extends the inode to it if it is shorter.
    fn store_last_byte(&self, inode: InodeNumber, at: u64, byte: u8);
}

impl<C: Cluster> Filesystem<C> {
    /// Sets the page cache. Without one no answer waits.
    pub fn set_page_cache(&self, pages: Arc<dyn PageCache>) {
        // A filesystem has one edge, so it was not set before.
        let _ = self.page_cache.set(pages);
    }

    /// Returns `attributes`, a new answer of the cluster, with the effect of uncommitted writes. Waits until they may
    /// be reported.
    pub(super) async fn present(&self, attributes: Attributes) -> Attributes {
        let Some(node) = self.open.find(attributes.inode) else {
            return attributes;
        };
        let seen = {
            let mut state = node.state.lock();
            state.update_attributes(&attributes);
            state.attributes().unwrap_or(attributes)
        };
        if !node.state.lock().tail.try_report_attributes(seen.size) {
            self.drop_and_report(&node, seen.size, PageTail::try_report_attributes)
                .await;
        }
        seen
    }

    /// Like [`Filesystem::present`], for an answer that must not wait: with the size reported before if the newest one
    /// would have to wait.
    pub(super) fn present_in_listing(&self, attributes: Attributes) -> Attributes {
        self.present_now(attributes, |state, seen| {
            if !state.tail.try_report_attributes(seen.size) {
                seen.size = state.tail.reported_size().unwrap_or(seen.size);
            }
        })
    }

    /// Like [`Filesystem::present`], for the answer to a change of the size. Does not wait: the kernel drops the pages
    /// itself, and delays writes until the answer, so waiting for a drop here could deadlock.
    pub(super) fn present_resized(&self, attributes: Attributes) -> Attributes {
        self.present_now(attributes, |state, seen| state.tail.report(seen.size))
    }

    fn present_now(
        &self,
        attributes: Attributes,
        report: impl FnOnce(&mut crate::handles::InodeState<super::Put<C>>, &mut Attributes),
    ) -> Attributes {
        let Some(node) = self.open.find(attributes.inode) else {
            return attributes;
        };
        let mut state = node.state.lock();
        state.update_attributes(&attributes);
        let mut seen = state.attributes().unwrap_or(attributes);
        report(&mut state, &mut seen);
        seen
    }

    /// Waits until `size` may be reported for `node`. The caller holds neither the commit lock nor anything that a read
    /// waits for.
    pub(super) async fn prepare_size(&self, node: &OpenInode<C>, size: u64) {
        if !node.state.lock().tail.try_report(size) {
            self.drop_and_report(node, size, PageTail::try_report).await;
        }
    }

    /// Drops the pages that prevent reporting `size`, unless `try_report` succeeds meanwhile.
    async fn drop_and_report(
        &self,
        node: &OpenInode<C>,
        size: u64,
        try_report: fn(&mut PageTail, u64) -> bool,
    ) {
        let lock = Arc::clone(&node.page_drop_lock).lock_owned().await;
        if try_report(&mut node.state.lock().tail, size) {
            return;
        }
        let Some(page_cache) = self.page_cache.get().cloned() else {
            let mut state = node.state.lock();
            state.tail.begin_drop(size);
            state.tail.end_drop(Instant::now());
            state.tail.report(size);
            return;
        };
        let limit = Duration::from_millis(LAST_BYTE_TIMEOUT_MS);
        let last = tokio::time::timeout(limit, self.last_byte(node)).await;
        let last = last.ok().flatten();
        let page_drop = PageDrop {
            lock,
            page_cache,
            size,
            scope: DropScope::FromZeros { last },
        };
        let (_, done) = spawn_drop::<C>(node, page_drop);
        // Fails only if the runtime shuts down, and then nothing is answered.
        let _ = done.await;
    }

    /// Like [`Filesystem::prepare_size`], for the answer to a write through pages up to `end`. Only one page can be in
    /// the way: one that a short read filled after the write was sent. The kernel may hold the locks of other pages of
    /// the write until the answer.
    pub(super) async fn prepare_write_answer(&self, node: &OpenInode<C>, end: u64) {
        {
            let mut state = node.state.lock();
            if !state.tail.has_zeros_below(end) {
                return state.tail.report_write(end);
            }
        }
        let Some(page_cache) = self.page_cache.get().cloned() else {
            return node.state.lock().tail.report_write(end);
        };
        let page_drop = async {
            let lock = Arc::clone(&node.page_drop_lock).lock_owned().await;
            if !node.state.lock().tail.has_zeros_below(end) {
                return None;
            }
            let page_drop = PageDrop {
                lock,
                page_cache,
                size: end,
                scope: DropScope::OnePage,
            };
            let (dropped, done) = spawn_drop::<C>(node, page_drop);
            dropped.await.ok().map(|()| done)
        };
        let limit = Duration::from_millis(WRITTEN_TIMEOUT_MS);
        if let Ok(Some(done)) = tokio::time::timeout(limit, page_drop).await {
            let _ = done.await;
        }
        node.state.lock().tail.report_write(end);
    }

    /// Drops pages of `node` from the offset `from` on, after a write that bypassed them.
    pub(super) async fn drop_pages(&self, node: &OpenInode<C>, from: u64) {
        let Some(page_cache) = self.page_cache.get().cloned() else {
            return;
        };
        let inode = node.inode;
        let _ = tokio::task::spawn_blocking(move || page_cache.drop_from(inode, from)).await;
    }
}

/// The pages to drop.
enum DropScope {
    /// All pages from the first zero on. Then the size is reported, and the last byte of the file is stored, if known.
    FromZeros { last: Option<LastByte> },
    /// The page with the first zero. The caller reports the size.
    OnePage,
}

/// The arguments of a drop of pages.
struct PageDrop {
    lock: OwnedMutexGuard<()>,
    page_cache: Arc<dyn PageCache>,
    /// The size that can be reported after the drop.
    size: u64,
    scope: DropScope,
}

/// Drops pages of `node`, and waits for readers that may still copy from them. The size is reported in the step that
/// ends the drop, so none is reported in between. Runs to completion on a thread that may wait for the kernel, even if
/// no caller waits any more. Returns a receiver that resolves when the pages are dropped, and the handle of the whole
/// task.
fn spawn_drop<C: Cluster>(
    node: &OpenInode<C>,
    page_drop: PageDrop,
) -> (oneshot::Receiver<()>, JoinHandle<()>) {
    let node = Arc::clone(node);
    let (dropped, is_dropped) = oneshot::channel();
    let done = tokio::task::spawn_blocking(move || {
        let PageDrop {
            lock,
            page_cache,
            size,
            scope,
        } = page_drop;
        let (from, readers) = {
            let mut state = node.state.lock();
            let newest = state.size().max(size);
            (
                state.tail.begin_drop(newest),
                state.tail.take_readers(Instant::now()),
            )
        };
        match scope {
            DropScope::FromZeros { .. } => page_cache.drop_from(node.inode, from),
            DropScope::OnePage => page_cache.drop_page_at(node.inode, from),
        }
        // The caller may have timed out.
        let _ = dropped.send(());
        page_cache.wait_for_readers(&readers);
        if let DropScope::FromZeros { last: Some(last) } = &scope {
            let is_newest = {
                let state = node.state.lock();
                let is_newest = |committed: &Attributes| committed.content_version == last.version;
                state.page_writers == 0 && state.committed.as_ref().is_some_and(is_newest)
            };
            if is_newest {
                page_cache.store_last_byte(node.inode, last.at, last.byte);
            }
        }
        {
            let mut state = node.state.lock();
            state.tail.end_drop(Instant::now());
            if let DropScope::FromZeros { .. } = scope {
                state.tail.report(size);
            }
        }
        drop(lock);
    });
    (is_dropped, done)
}
