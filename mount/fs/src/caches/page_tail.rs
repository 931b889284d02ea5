//! What the kernel (or whoever caches above us) has in its pages behind the end of one open file.
//!
//! The page that holds the end of a file is zero behind it. When the kernel is reported_size a larger size, a reader may see these
//! zeros before the kernel drops the page: bytes that nobody wrote. So before a larger size is reported_size, the pages from the
//! old end on are dropped.
//!
//! Owes: which answers with a size must wait for that, and from where on pages are dropped. Invariants, all under the lock
//! of the file's state:
//! - A read that ends short is noted here ([`PageTail::record_short_read`]) in the same step that finds the end of the file to be
//!   the newest one known. A read that is answered later covers every size that was reported_size before.
//! - A size is reported_size ([`PageTail::try_report`]) only if no page above is zero below it; with attributes
//!   ([`PageTail::try_report_attributes`]) only if it is no larger than what was reported_size before, or after a dropping.
//!
//! A program's write puts its bytes into the page first and is sent then. If the page is dropped, a read that is sent later
//! fills a new one, with zeros where the write goes. So a write replaces the zeros of a short read only if that was sent
//! before it ([`Order`]: requests are not answered in the order in which they are sent). Of a write of several pages the
//! first may be dropped and read before the write is sent; so it counts too whether any was dropped shortly before.
//!
//! A read that is under way above while pages are dropped delays the dropping: the kernel holds the lock of its pages until
//! the answer is there. It looks at the size only after that, when the reader has a processor again, and takes what it gives
//! from a page that may be dropped meanwhile. So between the dropping and the telling these readers are waited for
//! ([`PageTail::take_readers`]): filemap_read in mm/filemap.c has no other order. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long the kernel may take from when it puts the first bytes of a write into pages until the write arrives here: 1 MiB,
/// from memory that may have to be read from a disk first.
const WRITE_COPY_TIME_MAX: Duration = Duration::from_secs(1);

/// The smallest page.
const PAGE_BYTES: u64 = 4096;

/// When the kernel sent a request: one sent later has a larger number. (FUSE's `unique`: one counter for each connection.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Order(pub u64);

/// The thread that a read is for, as the kernel numbers it; 0 where it cannot be seen from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reader(pub u32);

/// A write through pages.
#[derive(Clone, Copy, Debug)]
pub struct PageWrite {
    /// When the kernel sent it.
    pub order: Order,
    /// When it arrived.
    pub arrived_at: Instant,
}

/// Readers that are remembered. Of more than so many the first have had their turn.
const READERS_MAX: usize = 64;

/// A reader has surely gone on so long after its answer.
const READER_TIME_MAX: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Default)]
pub struct PageTail {
    /// From where on pages above may be zero because the file ended there. `None`: there are no such pages.
    zeros_from: Option<u64>,
    /// Pages are being dropped: whatever is reported_size before that is done may come too early.
    dropping: bool,
    /// When the newest of the reads was sent that ended short.
    newest_short: Order,
    /// Who was answered with less than was asked for since pages were dropped, and when; the newest last.
    readers: VecDeque<(Reader, Instant)>,
    /// When pages were dropped last.
    dropped_at: Option<Instant>,
    /// The size that was reported_size last.
    reported_size: Option<u64>,
}

impl PageTail {
    /// The file was opened and pages of earlier opens are kept; the file ends at `size`.
    pub fn record_kept(&mut self, size: u64) {
        self.zeros_from = Some(self.zeros_from.map_or(size, |from| from.min(size)));
    }

    /// A read sent at `order` is answered that ends at the end of the file, `end`.
    pub fn record_short_read(&mut self, end: u64, order: Order) {
        self.record_kept(end);
        self.newest_short = self.newest_short.max(order);
    }

    /// `reader` is answered, at `now`, with a read that ends short.
    pub fn record_reader(&mut self, reader: Reader, now: Instant) {
        self.readers.retain(|(known, _)| *known != reader);
        if self.readers.len() == READERS_MAX {
            self.readers.pop_front();
        }
        self.readers.push_back((reader, now));
    }

    /// Those who may still go by a page that was dropped when [`PageTail::begin_drop`] was called at `now`.
    pub fn take_readers(&mut self, now: Instant) -> Vec<Reader> {
        let recent = |at: Instant| now.saturating_duration_since(at) < READER_TIME_MAX;
        self.readers
            .drain(..)
            .filter(|(_, at)| recent(*at))
            .map(|(reader, _)| reader)
            .collect()
    }

    /// A program of this mount wrote `offset..end` through the pages above, into a file of `size_before`: the pages have
    /// these bytes, and zeros only where the file has a hole. To be called in the step that shows the bytes to reads.
    pub fn record_write(&mut self, size_before: u64, offset: u64, end: u64, sent: PageWrite) {
        let is_one_page = offset / PAGE_BYTES == end.saturating_sub(1) / PAGE_BYTES;
        let is_early = |dropped_at: Instant| dropped_at + WRITE_COPY_TIME_MAX < sent.arrived_at;
        let pages_were_kept = is_one_page || !self.dropping && self.dropped_at.is_none_or(is_early);
        if let Some(from) = &mut self.zeros_from
            && (offset <= *from || size_before <= *from)
            && self.newest_short <= sent.order
            && pages_were_kept
        {
            *from = end.max(*from);
        }
    }

    /// Whether pages above are zero below `size`.
    pub fn has_zeros_below(&self, size: u64) -> bool {
        self.zeros_from.is_some_and(|from| from < size)
    }

    /// The kernel drops pages of its own accord, at an open.
    pub fn record_drop(&mut self, now: Instant) {
        self.dropped_at = Some(now);
    }

    /// The file was opened and `size` bytes long then.
    pub fn record_open(&mut self, size: u64) {
        self.reported_size.get_or_insert(size);
    }

    /// An answer with attributes is about to tell `size`. `false`: it must wait until pages are dropped. A larger size than was
    /// reported_size before waits also where no page is known to be zero: the kernel makes zero what lies behind it, maybe only after
    /// a read that is under way has filled the page further, unless its request is older than a dropping.
    #[must_use]
    pub fn try_report_attributes(&mut self, size: u64) -> bool {
        self.reported_size.is_none_or(|reported| size <= reported) && self.try_report(size)
    }

    /// An answer is about to tell `size`. `false`: it must wait until pages are dropped ([`PageTail::begin_drop`]).
    #[must_use]
    pub fn try_report(&mut self, size: u64) -> bool {
        if self.dropping || self.has_zeros_below(size) {
            return false;
        }
        self.report(size);
        true
    }

    /// As [`PageTail::try_report`], for what cannot wait.
    pub fn report(&mut self, size: u64) {
        if self.reported_size.is_some_and(|reported| size < reported) {
            // What was cut off the kernel makes zero before it drops the pages.
            self.record_kept(size);
        }
        self.reported_size = Some(size);
    }

    /// As [`PageTail::report`], of a write up to `end`.
    pub fn report_write(&mut self, end: u64) {
        self.report(self.reported_size.map_or(end, |reported| end.max(reported)));
    }

    /// The size that was reported_size last; before that, the one at which pages end.
    pub fn reported_size(&self) -> Option<u64> {
        self.reported_size.or(self.zeros_from)
    }

    /// Pages are going to be dropped so that `size`, the newest known, can be reported_size: answers from where on.
    pub fn begin_drop(&mut self, size: u64) -> u64 {
        self.dropping = true;
        // A read that is answered from now on ends there at the earliest.
        self.zeros_from.replace(size).unwrap_or(size)
    }

    /// They are dropped.
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
        assert!(!tail.try_report_attributes(20), "a read may be under way");
        assert!(tail.try_report(20), "the answer to a write makes nothing zero");
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
    fn own_writes_replace_the_zeros() {
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
    fn before_any_size_is_told_pages_end_where_they_were_read_to() {
        let mut tail = PageTail::default();
        assert_eq!(tail.reported_size(), None);
        tail.record_short_read(10, EARLY);
        assert!(!tail.try_report(20));
        assert_eq!(tail.reported_size(), Some(10));
    }

    #[test]
    fn what_is_cut_off_is_zero_for_a_moment() {
        let mut tail = PageTail::default();
        assert!(tail.try_report(100));
        assert!(tail.try_report(40));
        assert!(!tail.try_report(50));
    }

    #[test]
    fn readers_are_waited_for_once_and_not_for_ever() {
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
