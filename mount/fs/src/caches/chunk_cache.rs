//! Bytes of chunks, with a limit in bytes.
//!
//! For a sequential reader a chunk is fetched and cached whole (from its start to the last byte that the file uses);
//! for a random reader in blocks of [`BLOCK_FETCH_BYTES`]. Each entry is an allocation of its own, so its weight is the
//! memory it takes. Concurrent readers of the same bytes share one fetch.
//!
//! Chunks are immutable, so entries are never stale. This module must not know files or the network: its caller passes
//! the fetch.

use std::future::Future;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::statistics::CacheStatistics;
use quorumfs_proto::{ChunkId, FsError};

use crate::readahead::Pattern;

/// Smallest fetch of a random read: the neighbours are likely next, and it costs about as much as 4 KiB.
pub const BLOCK_FETCH_BYTES: u32 = 64 << 10;

/// Share of the cache for entries that were used more than once. The rest must hold the read-ahead of several readers.
const HOT_SHARE: f64 = 0.5;

/// Bytes of one shard: large enough that the largest entry is a small part of it.
const SHARD_BYTES: u64 = 32 << 20;

/// Memory of an entry in addition to its bytes.
const ENTRY_OVERHEAD_BYTES: u64 = 128;

/// Most attempts with a shared entry that is too short; then a reader fetches for itself.
const SHORT_ENTRIES_MAX: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Span {
    /// The chunk from its start.
    Whole,
    /// The block at this multiple of [`BLOCK_FETCH_BYTES`].
    Block(u32),
}

#[derive(Clone, Debug)]
struct ByteWeighter;

impl Weighter<(ChunkId, Span), Bytes> for ByteWeighter {
    fn weight(&self, _: &(ChunkId, Span), bytes: &Bytes) -> u64 {
        bytes.len() as u64 + ENTRY_OVERHEAD_BYTES
    }
}

/// The chunk cache of a mount.
#[derive(Debug)]
pub struct ChunkCache {
    lookups: AtomicU64,
    fetches: AtomicU64,
    entries: Cache<(ChunkId, Span), Bytes, ByteWeighter>,
}

impl ChunkCache {
    /// Makes a cache of at most `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> ChunkCache {
        let options = OptionsBuilder::new()
            .estimated_items_capacity((bytes_max / u64::from(BLOCK_FETCH_BYTES)).max(64) as usize)
            .weight_capacity(bytes_max)
            .shards((bytes_max / SHARD_BYTES).max(1) as usize)
            .hot_allocation(HOT_SHARE)
            .build()
            .expect("both capacities are given");
        ChunkCache {
            lookups: AtomicU64::new(0),
            fetches: AtomicU64::new(0),
            entries: Cache::with_options(
                options,
                ByteWeighter,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
        }
    }

    /// Returns hits, misses and cached bytes. A read that shares a fetch counts as a hit.
    pub fn statistics(&self) -> CacheStatistics {
        let misses = self.fetches.load(Ordering::Relaxed);
        CacheStatistics {
            hits: self.lookups.load(Ordering::Relaxed).saturating_sub(misses),
            misses,
            bytes: self.entries.weight(),
        }
    }

    /// Returns the bytes `range` of `chunk`, from the cache or from `fetch(offset, length)`. The file is known to use
    /// the chunk up to `used_end`; no byte after it is fetched.
    ///
    /// # Errors
    /// Those of `fetch`; [`FsError::Io`] if it returns too few bytes.
    pub async fn read<F, Fetching>(
        &self,
        chunk: ChunkId,
        range: Range<u32>,
        used_end: u32,
        pattern: Pattern,
        fetch: F,
    ) -> Result<Bytes, FsError>
    where
        F: Fn(u32, u32) -> Fetching + Sync,
        Fetching: Future<Output = Result<Bytes, FsError>> + Send,
    {
        debug_assert!(range.end <= used_end && used_end <= CHUNK_BYTES_MAX);
        if let Some(whole) = self.entries.get(&(chunk, Span::Whole))
            && whole.len() >= range.end as usize
        {
            self.lookups.fetch_add(1, Ordering::Relaxed);
            return Ok(whole.slice(range.start as usize..range.end as usize));
        }
        if pattern == Pattern::Sequential || used_end <= BLOCK_FETCH_BYTES {
            return self
                .read_entry((chunk, Span::Whole), range, used_end, &fetch)
                .await;
        }
        let blocks = range.start / BLOCK_FETCH_BYTES..range.end.div_ceil(BLOCK_FETCH_BYTES);
        let mut parts = try_join_all(blocks.map(|number| {
            let start = number * BLOCK_FETCH_BYTES;
            let end = (start + BLOCK_FETCH_BYTES).min(used_end);
            let part = range.start.max(start)..range.end.min(end);
            self.read_entry((chunk, Span::Block(number)), part, end, &fetch)
        }))
        .await?;
        if parts.len() == 1
            && let Some(part) = parts.pop()
        {
            return Ok(part);
        }
        let mut joined = BytesMut::with_capacity(range.len());
        parts.iter().for_each(|part| joined.extend_from_slice(part));
        Ok(joined.freeze())
    }

    /// Returns `range` (an offset in the chunk) of the entry `key`, which is fetched up to `end`.
    async fn read_entry<F, Fetching>(
        &self,
        key: (ChunkId, Span),
        range: Range<u32>,
        end: u32,
        fetch: &F,
    ) -> Result<Bytes, FsError>
    where
        F: Fn(u32, u32) -> Fetching,
        Fetching: Future<Output = Result<Bytes, FsError>>,
    {
        let start = match key.1 {
            Span::Whole => 0,
            Span::Block(number) => number * BLOCK_FETCH_BYTES,
        };
        let in_entry = (range.start - start) as usize..(range.end - start) as usize;
        self.lookups.fetch_add(1, Ordering::Relaxed);
        for _ in 0..SHORT_ENTRIES_MAX {
            let fetched = async {
                self.fetches.fetch_add(1, Ordering::Relaxed);
                fetch(start, end - start).await
            };
            let bytes = self.entries.get_or_insert_async(&key, fetched).await?;
            if bytes.len() >= in_entry.end {
                return Ok(bytes.slice(in_entry));
            }
            // It was fetched for an extent that ends earlier in the same chunk. The next fetch is shared again.
            self.entries.remove_if(&key, |held| held.len() < in_entry.end);
        }
        let bytes = fetch(start, end - start).await?;
        if bytes.len() < in_entry.end {
            tracing::error!(chunk = %key.0, requested_bytes = end - start, returned_bytes = bytes.len(), "a node returned fewer bytes of a chunk than requested");
            return Err(FsError::Io);
        }
        Ok(bytes.slice(in_entry))
    }

    /// Returns the cached bytes.
    pub fn bytes(&self) -> u64 {
        self.entries.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use quorumfs_proto::SessionId;

    fn chunk(counter: u64) -> ChunkId {
        ChunkId {
            session: SessionId(1),
            counter,
        }
    }

    fn content(offset: u32, length: u32) -> Bytes {
        (offset..offset + length)
            .map(|at| (at / 7) as u8)
            .collect::<Vec<u8>>()
            .into()
    }

    #[tokio::test]
    async fn both_patterns_return_the_same_bytes_and_fetch_them_once() {
        let fetches = Mutex::new(Vec::new());
        let fetch = |offset, length| {
            fetches.lock().push((offset, length));
            async move { Ok(content(offset, length)) }
        };
        for pattern in [Pattern::Random, Pattern::Sequential] {
            let cache = ChunkCache::new(64 << 20);
            fetches.lock().clear();
            for range in [0..10, 65_000..200_000, 300_000..300_001] {
                for _ in 0..2 {
                    let read = cache.read(chunk(1), range.clone(), 300_001, pattern, fetch).await;
                    assert_eq!(read, Ok(content(range.start, range.len() as u32)));
                }
            }
            let expected = match pattern {
                Pattern::Sequential => vec![(0, 300_001)],
                Pattern::Random => {
                    vec![
                        (0, 65_536),
                        (65_536, 65_536),
                        (131_072, 65_536),
                        (196_608, 65_536),
                        (262_144, 37_857),
                    ]
                }
            };
            assert_eq!(*fetches.lock(), expected);
        }
    }

    #[tokio::test]
    async fn an_entry_that_ends_too_early_is_fetched_again() {
        let cache = ChunkCache::new(64 << 20);
        let fetch = |offset, length| async move { Ok(content(offset, length)) };
        cache
            .read(chunk(1), 0..10, 10, Pattern::Sequential, fetch)
            .await
            .unwrap();
        let later = cache.read(chunk(1), 5..50, 60, Pattern::Sequential, fetch).await;
        assert_eq!(later, Ok(content(5, 45)));
    }

    #[tokio::test]
    async fn a_failed_fetch_is_not_cached() {
        let cache = ChunkCache::new(64 << 20);
        let fails = |_, _| async { Err(FsError::Stale) };
        assert_eq!(
            cache.read(chunk(1), 0..10, 10, Pattern::Random, fails).await,
            Err(FsError::Stale)
        );
        let fetch = |offset, length| async move { Ok(content(offset, length)) };
        assert_eq!(
            cache.read(chunk(1), 0..10, 10, Pattern::Random, fetch).await,
            Ok(content(0, 10))
        );
    }

    #[tokio::test]
    async fn its_size_is_bounded() {
        let cache = ChunkCache::new(16 << 20);
        for counter in 0..100 {
            let fetch = |_, length: u32| async move { Ok(Bytes::from(vec![0; length as usize])) };
            cache
                .read(chunk(counter), 0..1, 1 << 20, Pattern::Sequential, fetch)
                .await
                .unwrap();
            assert!(cache.bytes() <= 16 << 20);
        }
        assert!(cache.bytes() >= 8 << 20, "and uses them");
    }
}
