//! The kernel's pages beyond the end of one open file.
//!
//! The page with the end of a file is zero beyond it. When the kernel is told a larger size, a reader may see these
//! zeros before the kernel drops the page: bytes that no program wrote. So before a larger size is reported, the pages
//! from the old end on are dropped.
//!
//! This module decides which answers with a size must wait for that, and from which offset pages are dropped.
//! Invariants, all under the lock of the file's state:
//! - A short read is recorded ([`PageTail::record_short_read`]) in the same step that finds its end to be the newest
//!   known size. A read that is answered later covers every size reported before.
//! - A size is reported ([`PageTail::try_report`]) only if no page is zero below it; with attributes
//!   ([`PageTail::try_report_attributes`]) only if it is no larger than the size reported before, or after a drop.
//!
//! The kernel copies a program's bytes into the page before it sends the WRITE. If the page is dropped, a read that is
//! sent later fills a new one, with zeros in place of the write. So a write replaces the zeros of a short read only if
//! that read was sent before it ([`Order`]: answers are not in the order of the requests). The first page of a longer
//! write may be dropped and read again before the WRITE is sent, so such a write also replaces no zeros shortly after a
//! drop.
//!
//! A read in progress delays a drop, because the kernel holds the lock of its pages until the answer. After it, when
//! the reader gets a processor, it first looks at the size and then copies from the page, which may be dropped
//! meanwhile (filemap_read in mm/filemap.c). So between a drop and the report these readers are waited for
//! ([`PageTail::take_readers`]). Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Longest time from the kernel's copy of the first bytes of a write until the WRITE arrives: for 1 MiB, from memory
/// that may have to be read from a disk first.
const WRITE_COPY_TIME_MAX: Duration = Duration::from_secs(1);

/// The smallest page size.
const PAGE_BYTES: u64 = 4096;

/// The order in which the kernel sent requests: later ones have larger numbers. (FUSE's `unique`, one counter per
/// connection.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Order(pub u64);

/// The kernel's id of the thread of a read; 0 if it is not visible from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reader(pub u32);

/// A write through the kernel's pages.
#[derive(Clone, Copy, Debug)]
pub struct PageWrite {
    /// The order of the request.
    pub order: Order,
    /// The time of its arrival.
    pub arrived_at: Instant,
}

/// Most readers recorded; beyond it the oldest is dropped.
const READERS_MAX: usize = 64;

/// Time after which a reader has certainly copied its bytes.
const READER_TIME_MAX: Duration = Duration::from_secs(10);

/// The state of one file's pages; see the module documentation.
#[derive(Debug, Default)]
pub struct PageTail {
    /// The offset from which pages may be zero because the file ended there. `None` if there are no such pages.
    zeros_from: Option<u64>,
    /// Whether a drop is in progress; no size may be reported then.
    dropping: bool,
    /// The order of the newest short read.
    newest_short: Order,
    /// The readers of short reads since the last drop, with the time of the answer; the newest last.
    readers: VecDeque<(Reader, Instant)>,
    /// The time of the last drop.
    dropped_at: Option<Instant>,
    /// The last reported size.
    reported_size: Option<u64>,
}

impl PageTail {
    /// Records an open that keeps the pages of earlier opens of a file of `size`.
    pub fn record_kept(&mut self, size: u64) {
        self.zeros_from = Some(self.zeros_from.map_or(size, |from| from.min(size)));
    }

    /// Records a read, sent at `order`, that ends at the end of the file, `end`.
    pub fn record_short_read(&mut self, end: u64, order: Order) {
        self.record_kept(end);
        self.newest_short = self.newest_short.max(order);
    }

    /// Records that `reader` receives a short read at `now`.
    pub fn record_reader(&mut self, reader: Reader, now: Instant) {
        self.readers.retain(|(known, _)| *known != reader);
        if self.readers.len() == READERS_MAX {
            self.readers.pop_front();
        }
        self.readers.push_back((reader, now));
    }

    /// Returns the readers that may still copy from a page dropped by the drop that began at `now`; clears the list.
    pub fn take_readers(&mut self, now: Instant) -> Vec<Reader> {
        let recent = |at: Instant| now.saturating_duration_since(at) < READER_TIME_MAX;
        self.readers
            .drain(..)
            .filter(|(_, at)| recent(*at))
            .map(|(reader, _)| reader)
            .collect()
    }

    /// Records a write of this mount to `offset..end` through the kernel's pages, into a file of `size_before`: the
    /// pages have its bytes, and zeros only where the file has a hole. Must be called in the step that makes the bytes
    /// visible to reads.
    pub fn record_write(&mut self, size_before: u64, offset: u64, end: u64, write: PageWrite) {
        let is_one_page = offset / PAGE_BYTES == end.saturating_sub(1) / PAGE_BYTES;
        let is_early = |dropped_at: Instant| dropped_at + WRITE_COPY_TIME_MAX < write.arrived_at;
        let pages_were_kept = is_one_page || !self.dropping && self.dropped_at.is_none_or(is_early);
        if let Some(from) = &mut self.zeros_from
            && (offset <= *from || size_before <= *from)
            && self.newest_short <= write.order
            && pages_were_kept
        {
            *from = end.max(*from);
        }
    }

    /// Whether pages may be zero below `size`.
    pub fn has_zeros_below(&self, size: u64) -> bool {
        self.zeros_from.is_some_and(|from| from < size)
    }

    /// Records a drop by the kernel itself, at an open.
    pub fn record_drop(&mut self, now: Instant) {
        self.dropped_at = Some(now);
    }

    /// Records an open of a file of `size`.
    pub fn record_open(&mut self, size: u64) {
        self.reported_size.get_or_insert(size);
    }

    /// Reports `size` with attributes. Returns `false` if the answer must wait for a drop. A larger size than the
    /// reported one must wait even if no page is known to be zero: the kernel zeroes the page beyond the size, possibly
    /// only after a read in progress has filled more of it, unless the request is older than a drop.
    #[must_use]
    pub fn try_report_attributes(&mut self, size: u64) -> bool {
        self.reported_size.is_none_or(|reported| size <= reported) && self.try_report(size)
    }

    /// Reports `size`. Returns `false` if the answer must wait for a drop ([`PageTail::begin_drop`]).
    #[must_use]
    pub fn try_report(&mut self, size: u64) -> bool {
        if self.dropping || self.has_zeros_below(size) {
            return false;
        }
        self.report(size);
        true
    }

    /// Reports `size` in an answer that cannot wait.
    pub fn report(&mut self, size: u64) {
        if self.reported_size.is_some_and(|reported| size < reported) {
            // The kernel zeroes truncated bytes before it drops their pages.
            self.record_kept(size);
        }
        self.reported_size = Some(size);
    }

    /// Reports the answer to a write up to `end`, which cannot wait.
    pub fn report_write(&mut self, end: u64) {
        self.report(self.reported_size.map_or(end, |reported| end.max(reported)));
    }

    /// Returns the last reported size; if there is none, the offset from which pages may be zero.
    pub fn reported_size(&self) -> Option<u64> {
        self.reported_size.or(self.zeros_from)
    }

    /// Begins a drop after which `size`, the newest known, can be reported; returns the offset from which to drop.
    pub fn begin_drop(&mut self, size: u64) -> u64 {
        self.dropping = true;
        // A read that is answered from now on ends at `size` or later.
        self.zeros_from.replace(size).unwrap_or(size)
    }

    /// Ends a drop.
    pub fn end_drop(&mut self, now: Instant) {
        self.dropping = false;
        self.record_drop(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EARLY: Order = Order(1);
    const LATE: Order = Order(2);

    fn sent(at: Instant, order: Order) -> PageWrite {
        PageWrite {
            order,
            arrived_at: at,
        }
    }

    #[test]
    fn a_larger_size_waits_for_the_pages_of_a_short_read() {
        let mut tail = PageTail::default();
        assert!(tail.try_report(10), "nothing is cached");
        tail.record_short_read(10, EARLY);
        assert!(tail.try_report(10));
        assert!(!tail.try_report(20));
        assert_eq!(tail.reported_size(), Some(10));
        assert_eq!(tail.begin_drop(20), 10);
        assert!(!tail.try_report(20), "not yet");
        tail.record_short_read(20, EARLY);
        tail.end_drop(Instant::now());
        assert!(tail.try_report(20));
        assert!(!tail.try_report(21), "a page that was read meanwhile ends at 20");
    }

    #[test]
    fn p3_attributes_that_make_the_file_longer_wait_even_if_no_page_is_known_to_be_zero() {
        let mut tail = PageTail::default();
        tail.record_open(10);
        assert!(tail.try_report_attributes(10), "as long as it was");
        assert!(!tail.try_report_attributes(20), "a read may be in progress");
        assert!(tail.try_report(20), "the answer to a write zeroes nothing");
        assert!(tail.try_report_attributes(20));
        tail.record_open(15);
        assert_eq!(tail.reported_size(), Some(20), "opened again");
    }

    #[test]
    fn a_short_read_while_pages_are_dropped_counts_for_the_next_size() {
        let mut tail = PageTail::default();
        tail.record_short_read(10, EARLY);
        tail.begin_drop(20);
        tail.record_short_read(15, EARLY);
        tail.end_drop(Instant::now());
        assert!(!tail.try_report(20));
        assert_eq!(tail.begin_drop(20), 15);
    }

    #[test]
    fn writes_of_this_mount_replace_the_zeros() {
        let (mut tail, now) = (PageTail::default(), Instant::now());
        tail.record_short_read(10, EARLY);
        tail.record_write(10, 10, 30, sent(now, LATE));
        assert!(tail.try_report(30));
        tail.record_write(30, 40, 50, sent(now, LATE));
        assert!(tail.try_report(50), "a hole of this mount's own");
        tail.record_write(70, 80, 90, sent(now, LATE));
        assert!(!tail.try_report(90), "others wrote between 50 and 70");
    }

    #[test]
    fn a_write_does_not_replace_zeros_in_a_page_that_was_read_after_it_was_sent() {
        let (mut tail, now) = (PageTail::default(), Instant::now());
        tail.record_short_read(10, LATE);
        tail.record_write(10, 10, 30, sent(now, EARLY));
        assert!(!tail.try_report(30));
        assert_eq!(tail.begin_drop(30), 10);
    }

    #[test]
    fn a_write_of_several_pages_does_not_replace_zeros_soon_after_one_was_dropped() {
        let (mut tail, dropped) = (PageTail::default(), Instant::now());
        tail.record_short_read(10, EARLY);
        assert_eq!(tail.begin_drop(10), 10);
        tail.end_drop(dropped);
        tail.record_short_read(10, EARLY);
        tail.record_write(10, 10, 5000, sent(dropped + WRITE_COPY_TIME_MAX / 2, LATE));
        assert!(
            !tail.try_report(5000),
            "its bytes may have gone into the dropped page"
        );
        tail.record_write(10, 10, 5000, sent(dropped + 2 * WRITE_COPY_TIME_MAX, LATE));
        assert!(tail.try_report(5000));
    }

    #[test]
    fn before_the_first_report_pages_end_at_the_short_read() {
        let mut tail = PageTail::default();
        assert_eq!(tail.reported_size(), None);
        tail.record_short_read(10, EARLY);
        assert!(!tail.try_report(20));
        assert_eq!(tail.reported_size(), Some(10));
    }

    #[test]
    fn truncated_bytes_are_zero_until_a_drop() {
        let mut tail = PageTail::default();
        assert!(tail.try_report(100));
        assert!(tail.try_report(40));
        assert!(!tail.try_report(50));
    }

    #[test]
    fn readers_are_waited_for_once_and_for_a_bounded_time() {
        let (mut tail, now) = (PageTail::default(), Instant::now());
        tail.record_reader(Reader(1), now);
        tail.record_reader(Reader(2), now);
        tail.record_reader(Reader(1), now + READER_TIME_MAX);
        assert_eq!(tail.take_readers(now + READER_TIME_MAX), [Reader(1)]);
        assert_eq!(tail.take_readers(now + READER_TIME_MAX), []);
        for thread in 0..2 * READERS_MAX as u32 {
            tail.record_reader(Reader(thread), now);
        }
        assert_eq!(tail.take_readers(now).len(), READERS_MAX);
    }
}
