//! Distinguishes sequential from random readers, and decides what to fetch ahead.
//!
//! Invariants: no range is requested twice while a reader continues; the window begins with one chunk and doubles up to
//! its limit, or is full at once if the end of the reader is known. Pure: this module must not know extents, caches or
//! the cluster.

use std::ops::Range;

use quorumfs_proto::limits::CHUNK_BYTES_MAX;

/// Most chunks fetched ahead of a reader: a few concurrent requests to each of three nodes.
pub const READAHEAD_CHUNKS_MAX: u64 = 8;

const CHUNK: u64 = CHUNK_BYTES_MAX as u64;

/// Largest distance by which reads of a sequential reader arrive out of order: the kernel sends several at once.
const REORDER_BYTES_MAX: u64 = CHUNK;

/// The access pattern of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// From front to back: whole chunks are fetched.
    Sequential,
    /// Anywhere: only the requested bytes are fetched.
    Random,
}

/// The result of observing one read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// The access pattern.
    pub pattern: Pattern,
    /// The range to fetch now in the background; may be empty or extend beyond the end of the file.
    pub ahead: Range<u64>,
}

/// Limits of the read-ahead of one reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadaheadLimits {
    /// Most chunks ahead, from 1 to [`READAHEAD_CHUNKS_MAX`].
    pub chunks: u64,
    /// The offset at which the reader ends, if known: it then reads everything before it, in order.
    pub end: Option<u64>,
}

impl Default for ReadaheadLimits {
    fn default() -> ReadaheadLimits {
        ReadaheadLimits {
            chunks: READAHEAD_CHUNKS_MAX,
            end: None,
        }
    }
}

/// The state of one reader of one file.
#[derive(Debug, Default)]
pub struct Readahead {
    /// The end of the farthest read of the current run.
    read_to: u64,
    /// The end of the range already requested.
    fetched_to: u64,
    /// Chunks ahead; 0 while the reader is random.
    window_chunks: u64,
}

impl Readahead {
    /// Observes a read of `length` bytes at `offset`.
    pub fn observe(&mut self, offset: u64, length: u64, limits: ReadaheadLimits) -> Observation {
        let end = offset.saturating_add(length);
        let near = offset <= self.read_to.saturating_add(REORDER_BYTES_MAX)
            && end.saturating_add(REORDER_BYTES_MAX) >= self.read_to;
        // A part of at most one chunk is fetched in blocks: a whole chunk would be more than the reader wants.
        let is_long = limits.end.is_some_and(|end| end.saturating_sub(offset) > CHUNK);
        let follows = offset == self.read_to || (self.window_chunks > 0 && near) || is_long;
        if !follows {
            *self = Readahead {
                read_to: end,
                fetched_to: end,
                window_chunks: 0,
            };
            return Observation {
                pattern: Pattern::Random,
                ahead: end..end,
            };
        }
        self.read_to = self.read_to.max(end);
        let first_chunks = if limits.end.is_some() { limits.chunks } else { 1 };
        self.window_chunks = self.window_chunks.clamp(first_chunks, limits.chunks);
        // Only when half of the window is used up, so that fetches come in groups.
        let wanted_to = (self.read_to / CHUNK + 1 + self.window_chunks) * CHUNK;
        let from = self.fetched_to.max(self.read_to);
        if from + self.window_chunks * CHUNK / 2 > wanted_to {
            return Observation {
                pattern: Pattern::Sequential,
                ahead: from..from,
            };
        }
        self.fetched_to = wanted_to;
        self.window_chunks = (self.window_chunks * 2).min(limits.chunks);
        Observation {
            pattern: Pattern::Sequential,
            ahead: from..wanted_to.min(limits.end.unwrap_or(u64::MAX)).max(from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_fetched_once_and_within_the_window_of_a_sequential_reader() {
        let mut readahead = Readahead::default();
        let mut fetched_to = 0;
        for at in 0..512u64 {
            let read = 128 << 10;
            let seen = readahead.observe(at * read, read, ReadaheadLimits::default());
            assert_eq!(seen.pattern, Pattern::Sequential);
            let end = (at + 1) * read;
            if !seen.ahead.is_empty() {
                assert!(seen.ahead.start >= fetched_to, "nothing twice");
                assert!(
                    seen.ahead.start == fetched_to || fetched_to <= end,
                    "no gap ahead of the reader"
                );
                fetched_to = seen.ahead.end;
            }
            assert!(fetched_to > end, "the reader never catches up");
            assert!(fetched_to - end <= (READAHEAD_CHUNKS_MAX + 1) * CHUNK, "bounded");
        }
    }

    #[test]
    fn a_reader_whose_end_is_known_gets_the_whole_window_at_its_first_read() {
        let limits = ReadaheadLimits {
            chunks: 4,
            end: Some(12 * CHUNK),
        };
        let mut readahead = Readahead::default();
        let first = readahead.observe(6 * CHUNK, CHUNK, limits);
        assert_eq!(first.pattern, Pattern::Sequential);
        assert_eq!(first.ahead, 7 * CHUNK..12 * CHUNK);
        assert!(
            readahead.observe(7 * CHUNK, CHUNK, limits).ahead.is_empty(),
            "nothing twice"
        );
        let end = Some(6 * CHUNK + 4096);
        let short = Readahead::default().observe(6 * CHUNK, 4096, ReadaheadLimits { chunks: 4, end });
        assert_eq!(short.pattern, Pattern::Random, "a short part");
    }

    #[test]
    fn reordered_reads_stay_sequential() {
        let mut readahead = Readahead::default();
        let read = 128 << 10;
        for at in [0u64, 2, 1, 4, 3, 6, 7, 5, 9, 8] {
            assert_eq!(
                readahead
                    .observe(at * read, read, ReadaheadLimits::default())
                    .pattern,
                Pattern::Sequential,
                "{at}"
            );
        }
    }

    #[test]
    fn random_reads_fetch_nothing_until_a_run_begins() {
        let mut readahead = Readahead::default();
        for at in [70u64, 3, 900, 41] {
            let seen = readahead.observe(at * CHUNK * 3, 4096, ReadaheadLimits::default());
            assert_eq!(seen.pattern, Pattern::Random);
            assert!(seen.ahead.is_empty());
        }
        let after = 41 * CHUNK * 3 + 4096;
        let seen = readahead.observe(after, 4096, ReadaheadLimits::default());
        assert_eq!(seen.pattern, Pattern::Sequential);
        assert_eq!(seen.ahead.start, after + 4096);
    }
}
