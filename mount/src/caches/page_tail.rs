//! What the kernel (or whoever caches above us) has in its pages behind the end of one open file.
//!
//! The page that holds the end of a file is zero behind it. When the kernel is told a larger size, a reader may see these
//! zeros before the kernel drops the page: bytes that nobody wrote. So before a larger size is told, the pages from the
//! old end on are dropped.
//!
//! Owes: which answers with a size must wait for that, and from where on pages are dropped. Invariants, all under the lock
//! of the file's state:
//! - A read that ends short is noted here ([`PageTail::read_short`]) in the same step that finds the end of the file to be
//!   the newest one known. A read that is answered later covers every size that was told before.
//! - A size is told ([`PageTail::tell`]) only if no page above is zero below it.
//!
//! A read that is under way above while pages are dropped delays the dropping: the kernel holds the lock of its pages. Pure.

/// See the module.
#[derive(Debug, Default)]
pub struct PageTail {
    /// From where on pages above may be zero because the file ended there. `None`: there are no such pages.
    zeros_from: Option<u64>,
    /// Pages are being dropped: whatever is told before that is done may come too early.
    dropping: bool,
    /// The size that was told last.
    told: u64,
}

impl PageTail {
    /// The file was opened and pages of earlier opens are kept; the file ends at `size`.
    pub fn kept(&mut self, size: u64) {
        self.zeros_from = Some(self.zeros_from.map_or(size, |from| from.min(size)));
    }

    /// A read is answered that ends at the end of the file, `end`.
    pub fn read_short(&mut self, end: u64) {
        self.kept(end);
    }

    /// A program of this mount wrote `offset..end` through the pages above, into a file of `size_before`: they have these
    /// bytes, and zeros only where the file has a hole.
    pub fn written(&mut self, size_before: u64, offset: u64, end: u64) {
        if let Some(from) = &mut self.zeros_from
            && (offset <= *from || size_before <= *from)
        {
            *from = end.max(*from);
        }
    }

    /// An answer is about to tell `size`. `false`: it must wait until pages are dropped ([`PageTail::begin`]).
    #[must_use]
    pub fn tell(&mut self, size: u64) -> bool {
        if self.dropping || self.zeros_from.is_some_and(|from| from < size) {
            return false;
        }
        self.tell_at_once(size);
        true
    }

    /// As [`PageTail::tell`], for what cannot wait.
    pub fn tell_at_once(&mut self, size: u64) {
        if size < self.told {
            // What was cut off the kernel makes zero before it drops the pages.
            self.kept(size);
        }
        self.told = size;
    }

    /// The size that was told last.
    pub fn told(&self) -> u64 {
        self.told
    }

    /// Pages are going to be dropped so that `size`, the newest known, can be told: answers from where on.
    pub fn begin(&mut self, size: u64) -> u64 {
        self.dropping = true;
        // A read that is answered from now on ends there at the earliest.
        self.zeros_from.replace(size).unwrap_or(size)
    }

    /// They are dropped.
    pub fn done(&mut self) {
        self.dropping = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_size_waits_for_the_pages_of_a_short_read() {
        let mut tail = PageTail::default();
        assert!(tail.tell(10), "nothing is cached");
        tail.read_short(10);
        assert!(tail.tell(10));
        assert!(!tail.tell(20));
        assert_eq!(tail.told(), 10);
        assert_eq!(tail.begin(20), 10);
        assert!(!tail.tell(20), "not yet");
        tail.read_short(20);
        tail.done();
        assert!(tail.tell(20));
        assert!(!tail.tell(21), "a page that was read meanwhile ends at 20");
    }

    #[test]
    fn a_short_read_while_pages_are_dropped_counts_for_the_next_size() {
        let mut tail = PageTail::default();
        tail.read_short(10);
        tail.begin(20);
        tail.read_short(15);
        tail.done();
        assert!(!tail.tell(20));
        assert_eq!(tail.begin(20), 15);
    }

    #[test]
    fn own_writes_replace_the_zeros() {
        let mut tail = PageTail::default();
        tail.read_short(10);
        tail.written(10, 10, 30);
        assert!(tail.tell(30));
        tail.written(30, 40, 50);
        assert!(tail.tell(50), "a hole of this mount's own");
        tail.written(70, 80, 90);
        assert!(!tail.tell(90), "others wrote between 50 and 70");
    }

    #[test]
    fn what_is_cut_off_is_zero_for_a_moment() {
        let mut tail = PageTail::default();
        assert!(tail.tell(100));
        assert!(tail.tell(40));
        assert!(!tail.tell(50));
    }
}
