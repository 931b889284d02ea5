//! What programs are told of a file that is open here, and when.
//!
//! Whoever is above (the kernel) keeps pages of open files. Where they are zero behind an end that the file has outgrown,
//! a larger size is told only after they are dropped ([`crate::caches::page_tail`]). Every answer with attributes goes
//! through [`Filesystem::present`] or one of its relatives, and every read through [`Filesystem::read`], which notes here
//! that it ended short.
//!
//! - Pages are dropped on a thread of tokio's blocking pool, never on one that serves requests: the kernel waits for reads
//!   under way. So no read, and no write through pages, may wait for it; attributes may.
//! - The kernel takes no size from an answer whose request is older than the dropping. It would go on with the old size
//!   until it asks again: a read at the old end would find nothing, a mapping would end there. So it is given the last
//!   byte of the file, which moves its end. Where a program of this mount may write through pages that is left out: the byte
//!   could overwrite a newer one.
//! - An answer with attributes that makes the file longer may do harm later: the kernel then makes zero what lies behind the
//!   new end in its page, and it may come to that only after a further append. The last byte moves the end without that,
//!   so it is given before the answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_proto::{Attributes, InodeNumber};
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::task::JoinHandle;

use super::{Cluster, Filesystem, OpenInode};
use crate::caches::page_tail::{PageTail, Reader};
use crate::handles::LastByte;

/// How long an answer waits for the last byte of the file.
const LAST_BYTE_TIMEOUT_MS: u64 = 1000;

/// How long the answer to a write waits until a page is dropped. The kernel may hold that page's lock until it has the
/// answer: then there are no zeros in it that a program can see, and nothing to wait for.
const WRITTEN_TIMEOUT_MS: u64 = 10;

/// Whoever keeps pages of files page_cache. All calls may block until reads under way are answered.
pub trait PageCache: Send + Sync {
    /// Drops the pages of `inode` from that of the byte `from` on.
    fn drop_from(&self, inode: InodeNumber, from: u64);
    /// Drops the page of `inode` that holds the byte `at`.
    fn drop_page_at(&self, inode: InodeNumber, at: u64);
    /// Returns when none of `readers`, whose answers are given, goes by a page any more that was dropped before this call.
    fn wait_for_readers(&self, readers: &[Reader]);
    /// Takes `byte`, at `at`, for the last one of `inode`, unless that is longer.
    fn store_last_byte(&self, inode: InodeNumber, at: u64, byte: u8);
}

impl<C: Cluster> Filesystem<C> {
    /// Who keeps pages page_cache. Without anybody no answer waits.
    pub fn set_page_cache(&self, pages: Arc<dyn PageCache>) {
        // There is one edge for one filesystem, so nobody has said so before.
        let _ = self.page_cache.set(pages);
    }

    /// `attributes`, newly told by the cluster, as programs of this mount see them. Returns when they may be told.
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

    /// As [`Filesystem::present`], for an answer that others wait behind: with the size that was told before, where the
    /// newest would have to wait.
    pub(super) fn present_in_listing(&self, attributes: Attributes) -> Attributes {
        self.present_now(attributes, |state, seen| {
            if !state.tail.try_report_attributes(seen.size) {
                seen.size = state.tail.reported_size().unwrap_or(seen.size);
            }
        })
    }

    /// As [`Filesystem::present`], for the answer to a change of the size: the kernel drops the pages itself, and holds
    /// back writing until it has the answer, so that dropping them here could wait for ever.
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

    /// Returns when programs may be told that `node` is `size` bytes long. The caller holds neither the file's lock nor
    /// anything that a read waits for.
    pub(super) async fn prepare_size(&self, node: &OpenInode<C>, size: u64) {
        if !node.state.lock().tail.try_report(size) {
            self.drop_and_report(node, size, PageTail::try_report).await;
        }
    }

    /// Drops what is in the way of telling `size`, unless `try_report` says meanwhile that nothing is.
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
        // It fails if the process is about to end, and then nobody is told anything.
        let _ = done.await;
    }

    /// As [`Filesystem::prepare_size`], for the answer to a write through pages up to `end`. Only one page can be in the
    /// way, in which a read ended that was sent after the write; the kernel may hold others of the write until it has
    /// the answer.
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

    /// The bytes of `node` from `from` on were changed beside the pages: returns when these are dropped.
    pub(super) async fn drop_pages(&self, node: &OpenInode<C>, from: u64) {
        let Some(page_cache) = self.page_cache.get().cloned() else {
            return;
        };
        let inode = node.inode;
        let _ = tokio::task::spawn_blocking(move || page_cache.drop_from(inode, from)).await;
    }
}

/// Which pages are dropped.
enum DropScope {
    /// All from where they may be zero: the size is told then, with the last byte of the file, if that is known.
    FromZeros { last: Option<LastByte> },
    /// The one in which that begins: what is told is for the caller to say.
    OnePage,
}

/// A dropping of pages that was decided on.
struct PageDrop {
    lock: OwnedMutexGuard<()>,
    page_cache: Arc<dyn PageCache>,
    /// Can be told after it.
    size: u64,
    scope: DropScope,
}

/// Drops pages of `node`, and waits for those who may have been about to take something from them. What is told is noted in
/// the step that ends the dropping: nothing is told in between. It is run to its end on a thread that may wait for the
/// kernel, even if nobody waits for it any more. Answers when the pages are dropped, and when all is done.
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
        // Whoever waited for this may have given up.
        let _ = dropped.send(());
        page_cache.wait_for_readers(&readers);
        if let DropScope::FromZeros { last: Some(last) } = &scope {
            let is_newest = {
                let state = node.state.lock();
                let is_newest = |view: &Attributes| view.content_version == last.version;
                state.page_writers == 0 && state.view.as_ref().is_some_and(is_newest)
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
