//! Tells sequential readers from random ones and says what a sequential one will want next.
//!
//! Invariants: what is said to be fetched next is never said twice while the reader goes on; the window begins with
//! one chunk and doubles as the reader proves itself, or is full at once if it is known where the reader ends. Pure: it must not know extents, caches or the cluster.

use std::ops::Range;

use quorumfs_proto::limits::CHUNK_BYTES_MAX;

/// Farthest that is fetched ahead of a reader, in chunks: three nodes with a few requests each in flight.
pub const READAHEAD_CHUNKS_MAX: u64 = 8;

const CHUNK: u64 = CHUNK_BYTES_MAX as u64;

/// Reads of a sequential reader arrive out of order by up to this much: the kernel sends several at once.
const DISORDER_BYTES_MAX: u64 = CHUNK;

/// How a file is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// From front to back: whole chunks are worth fetching.
    Sequential,
    /// Anywhere: only what is asked for is worth fetching.
    Random,
}

/// What one read tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// How the file is being read.
    pub pattern: Pattern,
    /// What should be fetched in the background now; may be empty or reach past the end of the file.
    pub ahead: Range<u64>,
}

/// What is worth fetching ahead of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadaheadLimits {
    /// Most chunks ahead, at least 1 and at most [`READAHEAD_CHUNKS_MAX`].
    pub chunks: u64,
    /// Offset at which the reader will end, if that is known: it then reads all before it, from front to back.
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

/// One reader of one file.
#[derive(Debug, Default)]
pub struct Readahead {
    /// The end of the farthest read of the current run.
    read_to: u64,
    /// Up to where was already said to be fetched.
    fetched_to: u64,
    /// Chunks ahead; 0 as long as the reader seems random.
    window_chunks: u64,
}

impl Readahead {
    /// Takes note of a read.
    pub fn observe(&mut self, offset: u64, length: u64, limits: ReadaheadLimits) -> Observation {
        let end = offset.saturating_add(length);
        let near = offset <= self.read_to.saturating_add(DISORDER_BYTES_MAX)
            && end.saturating_add(DISORDER_BYTES_MAX) >= self.read_to;
        let follows = offset == self.read_to || (self.window_chunks > 0 && near) || limits.end.is_some();
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
        let at_first = if limits.end.is_some() { limits.chunks } else { 1 };
        self.window_chunks = self.window_chunks.clamp(at_first, limits.chunks);
        // Ask again only when half of the window is used up, so that fetches come in groups.
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
    fn a_sequential_reader_gets_all_fetched_once_and_never_too_far() {
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
        assert!(readahead.observe(7 * CHUNK, CHUNK, limits).ahead.is_empty(), "nothing twice");
    }

    #[test]
    fn reads_that_arrive_in_disorder_stay_sequential() {
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
