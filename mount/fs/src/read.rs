//! Reading: dirty bytes of this mount, else the chunk cache, else a chunk from any node.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use quorumfs_proto::chunk::Extent;
use quorumfs_proto::limits::FILE_BYTES_MAX;
use quorumfs_proto::query::ExtentsPage;
use quorumfs_proto::{FsError, Query};

use super::{Cluster, Filesystem, Handle, OpenInode, Order, Put, Reader};
use crate::caches::extent_cache::clip;
use crate::commit_lock::lock_commits;
use crate::handles::{InodeState, LastByte, OpenFile, Scope, SharedInode};
use crate::interrupt::{check_interrupted, interruptible};
use crate::readahead::{Observation, Pattern, ReadaheadLimits};
use crate::write_buffer::{self, DirtyPart};

/// Most extents per query: those of 2 GiB written sequentially, about 40 KiB on the wire.
const EXTENTS_PER_QUERY_MAX: u32 = 2048;

/// Most attempts of a read that finds a chunk missing, and the pause between them, multiplied by the number of the
/// attempt.
const READ_ATTEMPTS_MAX: u32 = 5;
const READ_RETRY_MS: u64 = 50;

/// Lookups of one read that commits of this mount may outdate; the next lookup excludes commits.
const OUTDATED_LOOKUPS_MAX: u32 = 3;

/// Most retries of a short read because the file has grown meanwhile.
const GROWTH_RETRIES_MAX: u32 = 100;

/// Concurrent fetches of one read.
const CONCURRENT_FETCHES_MAX: usize = 16;

/// The content of a range as of one moment.
#[derive(Debug)]
struct Snapshot {
    /// The version of the committed content.
    version: u64,
    /// The requested range, cut at the end of the file.
    range: Range<u64>,
    /// Dirty parts, oldest first.
    dirty: Vec<DirtyPart>,
    /// Committed extents, each with the end of the used part of its chunk. Empty if the dirty parts cover the range.
    extents: Vec<(Extent, u32)>,
}

impl<C: Cluster> Filesystem<C> {
    /// Reads up to `length` bytes at `offset`, fewer only at the end of the file. `order` and `reader` are those of the
    /// kernel's request.
    ///
    /// # Errors
    /// [`FsError::Stale`] if there is no such handle or the file is gone; [`FsError::NotPermitted`] if it is not open
    /// for reading; [`FsError::Io`] if no node has a chunk that the file names.
    pub async fn read(
        self: &Arc<Self>,
        handle: Handle,
        offset: u64,
        length: u32,
        order: Order,
        reader: Reader,
    ) -> Result<Bytes, FsError> {
        let file = self.file_of_request(handle)?;
        if !file.flags.read {
            return Err(FsError::NotPermitted);
        }
        let range = offset..offset.saturating_add(u64::from(length)).min(FILE_BYTES_MAX);
        let observation = self.observe(&file, offset, length, ReadaheadLimits::default());
        let (mut attempt, mut growth_retries) = (1, 0);
        while attempt <= READ_ATTEMPTS_MAX {
            let snapshot = self.snapshot(&file.node, range.clone()).await?;
            let end = snapshot.range.end;
            match interruptible(self.assemble(snapshot, observation.pattern)).await {
                Ok(bytes) if end < range.end => {
                    let mut state = file.node.state.lock();
                    // A larger size may have been reported, and its reader would take the missing bytes for zeros.
                    if state.size() > end && growth_retries < GROWTH_RETRIES_MAX {
                        growth_retries += 1;
                        continue;
                    }
                    if !file.flags.append {
                        state.tail.record_short_read(end, order);
                        state.tail.record_reader(reader, Instant::now());
                    }
                    return Ok(bytes);
                }
                Err(FsError::Stale) => {
                    forget_extents(&file.node, attempt).await;
                    attempt += 1;
                }
                other => return other,
            }
        }
        Err(missing_chunk(&file.node, offset))
    }

    /// Reads up to `length` bytes at `offset`, fewer only at the end of the file, from the content with this `version`
    /// ([`quorumfs_proto::Attributes::content_version`]).
    ///
    /// # Errors
    /// [`FsError::Stale`] if the file has another version; versions are never mixed. [`FsError::Io`] if no node has a
    /// chunk that the file names.
    pub async fn read_version(
        self: &Arc<Self>,
        handle: Handle,
        version: u64,
        offset: u64,
        length: u32,
        ahead: ReadaheadLimits,
    ) -> Result<Bytes, FsError> {
        let file = self.file_of_request(handle)?;
        let range = offset..offset.saturating_add(u64::from(length)).min(FILE_BYTES_MAX);
        let observation = self.observe(&file, offset, length, ahead);
        for attempt in 1..=READ_ATTEMPTS_MAX {
            let snapshot = self.snapshot(&file.node, range.clone()).await?;
            if snapshot.version != version || !snapshot.dirty.is_empty() {
                return Err(FsError::Stale);
            }
            match interruptible(self.assemble(snapshot, observation.pattern)).await {
                Err(FsError::Stale) => forget_extents(&file.node, attempt).await,
                other => return other,
            }
        }
        Err(missing_chunk(&file.node, offset))
    }

    /// Records a read and starts the read-ahead that it calls for.
    fn observe(
        self: &Arc<Self>,
        file: &OpenFile<Put<C>>,
        offset: u64,
        length: u32,
        ahead: ReadaheadLimits,
    ) -> Observation {
        let observation = file.readahead.lock().observe(offset, u64::from(length), ahead);
        if !observation.ahead.is_empty() {
            self.read_ahead(&file.node, observation.ahead.clone());
        }
        observation
    }

    /// Takes a snapshot of `range`: dirty parts and extents without a commit in between.
    async fn snapshot(&self, node: &OpenInode<C>, range: Range<u64>) -> Result<Snapshot, FsError> {
        let mut outdated = 0;
        loop {
            if node.state.lock().held_append.is_some() {
                // The offset of an append is known after its commit. A failure is recorded for the handles.
                let _recorded = self.commit(node, Scope::Sealed).await;
                check_interrupted().await?;
                continue;
            }
            let from = match snapshot_of(&node.state.lock(), range.clone()) {
                Ok(snapshot) => return Ok(snapshot),
                Err(from) => from,
            };
            let is_current = if outdated < OUTDATED_LOOKUPS_MAX {
                self.look_up_extents(node, from, EXTENTS_PER_QUERY_MAX).await?
            } else {
                let _lock = lock_commits(node).await?;
                self.look_up_extents(node, from, EXTENTS_PER_QUERY_MAX).await?
            };
            if !is_current {
                outdated += 1;
            }
        }
    }

    /// Queries attributes and extents from the offset `from` on. Returns whether the answer is of the newest version
    /// known, and only then caches the extents.
    pub(super) async fn look_up_extents(
        &self,
        node: &OpenInode<C>,
        from: u64,
        extents_max: u32,
    ) -> Result<bool, FsError> {
        let query = Query::extents(node.inode, from, FILE_BYTES_MAX, extents_max);
        let ExtentsPage {
            attributes,
            extents,
            known_to,
        } = self.ask(query).await.map_err(stale_if_missing)?;
        if known_to <= from && from < attributes.size {
            tracing::error!(inode = %node.inode, from, "the cluster returned extents that end before the requested offset");
            return Err(FsError::Io);
        }
        let mut state = node.state.lock();
        state.update_attributes(&attributes);
        let is_current = state
            .committed
            .as_ref()
            .is_some_and(|committed| committed.content_version == attributes.content_version);
        if is_current {
            // Nothing follows the end of the file, so an answer up to the end is complete.
            let to = if known_to >= attributes.size {
                FILE_BYTES_MAX
            } else {
                known_to
            };
            state.extents.store(attributes.content_version, from..to, extents);
        }
        drop(state);
        self.open.bound_extents(node);
        Ok(is_current)
    }

    /// Returns the last byte of a file whose pages no program of this mount can write to. `None` if that cannot be
    /// decided or read.
    pub(super) async fn last_byte(&self, node: &OpenInode<C>) -> Option<LastByte> {
        for _ in 0..READ_ATTEMPTS_MAX {
            let version_and_size = |state: &InodeState<Put<C>>| {
                let committed = state.committed.as_ref()?;
                let is_read_only = state.page_writers == 0 && state.buffer.is_clean();
                is_read_only.then_some((committed.content_version, committed.size))
            };
            let (version, size) = {
                let state = node.state.lock();
                let newest = version_and_size(&state)?;
                if let Some(held) = &state.held_append {
                    // It need not be committed for that.
                    let (version, size) = newest;
                    let at = size + held.bytes() as u64 - 1;
                    let byte = *held.second.last().or(held.first.last())?;
                    return Some(LastByte { version, at, byte });
                }
                if let Some(last) = state.last_appended
                    && (last.version, last.at + 1) == newest
                {
                    return Some(last);
                }
                newest
            };
            let range = size.checked_sub(1)?..size;
            let snapshot = self.snapshot(node, range.clone()).await.ok()?;
            if snapshot.range != range || version_and_size(&node.state.lock()) != Some((version, size)) {
                continue;
            }
            let bytes = self.assemble(snapshot, Pattern::Sequential).await.ok()?;
            let (at, byte) = (range.start, *bytes.first()?);
            return Some(LastByte { version, at, byte });
        }
        None
    }

    async fn assemble(&self, snapshot: Snapshot, pattern: Pattern) -> Result<Bytes, FsError> {
        let Snapshot {
            range,
            dirty,
            extents,
            ..
        } = snapshot;
        let mut fetched = stream::iter(extents)
            .filter_map(|(extent, used_end)| {
                std::future::ready(clip(extent, range.clone()).map(|part| (part, used_end)))
            })
            .map(|(part, used_end)| self.fetch(part, used_end, pattern))
            .buffered(CONCURRENT_FETCHES_MAX)
            .try_collect::<Vec<(u64, Bytes)>>()
            .await?;
        let length = (range.end - range.start) as usize;
        if dirty.is_empty() && fetched.len() == 1 && fetched[0].1.len() == length {
            return Ok(fetched.swap_remove(0).1);
        }
        let mut bytes = BytesMut::zeroed(length);
        let dirty = dirty.into_iter().map(|part| (part.offset, part.bytes));
        for (offset, part) in fetched.into_iter().chain(dirty) {
            let at = (offset - range.start) as usize;
            bytes[at..at + part.len()].copy_from_slice(&part);
        }
        Ok(bytes.freeze())
    }

    /// Returns the bytes of `part` and their offset in the file. The file uses its chunk up to `used_end`.
    async fn fetch(&self, part: Extent, used_end: u32, pattern: Pattern) -> Result<(u64, Bytes), FsError> {
        let range = part.chunk_offset..part.chunk_offset + part.length;
        let get = |offset, length| self.cluster.get_chunk(part.chunk, offset, length);
        let bytes = self
            .chunks
            .read(part.chunk, range, used_end, pattern, get)
            .await?;
        Ok((part.file_offset, bytes))
    }

    /// Fetches the chunks of `range` into the cache, in the background. The read that needs a chunk repeats and reports
    /// a failed fetch.
    fn read_ahead(self: &Arc<Self>, node: &OpenInode<C>, range: Range<u64>) {
        let size = node
            .state
            .lock()
            .committed
            .as_ref()
            .map_or(0, |committed| committed.size);
        let range = range.start..range.end.min(size);
        if range.is_empty() {
            return;
        }
        let (filesystem, node) = (Arc::clone(self), Arc::clone(node));
        tokio::spawn(async move {
            // At most one query: with very many extents, read-ahead does not pay.
            let known = snapshot_of(&node.state.lock(), range.clone());
            let known = match known {
                Ok(snapshot) => Ok(snapshot),
                Err(from) => match filesystem
                    .look_up_extents(&node, from, EXTENTS_PER_QUERY_MAX)
                    .await
                {
                    Ok(_) => snapshot_of(&node.state.lock(), range),
                    Err(_) => return,
                },
            };
            let Ok(snapshot) = known else { return };
            let fetches = snapshot.extents.into_iter().map(|(extent, used_end)| {
                let filesystem = Arc::clone(&filesystem);
                async move {
                    let Ok(_permit) = filesystem.readahead_permits.acquire().await else {
                        return;
                    };
                    let first_byte = Extent { length: 1, ..extent };
                    if let Err(error) = filesystem.fetch(first_byte, used_end, Pattern::Sequential).await {
                        tracing::debug!(chunk = %extent.chunk, %error, "cannot fetch a chunk ahead of its reader");
                    }
                }
            });
            stream::iter(fetches)
                .buffer_unordered(CONCURRENT_FETCHES_MAX)
                .collect::<()>()
                .await;
        });
    }
}

/// Clears the cached extents, so that they are queried again: a chunk is missing, so the content has changed or has
/// moved to other chunks.
async fn forget_extents<Put>(node: &SharedInode<Put>, attempt: u32) {
    tracing::debug!(inode = %node.inode, attempt, "no node has a chunk; the extents are queried again");
    node.state.lock().extents.clear();
    if attempt > 1 {
        tokio::time::sleep(Duration::from_millis(READ_RETRY_MS * u64::from(attempt))).await;
    }
}

fn missing_chunk<Put>(node: &SharedInode<Put>, offset: u64) -> FsError {
    tracing::error!(inode = %node.inode, offset, "no node has a chunk that the file names");
    FsError::Io
}

/// Takes a snapshot of `range`; if extents are unknown, the error is the offset of the first unknown one.
fn snapshot_of<Put>(state: &InodeState<Put>, range: Range<u64>) -> Result<Snapshot, u64> {
    let (size, version) = state
        .committed
        .as_ref()
        .map_or((0, 0), |committed| (committed.size, committed.content_version));
    let end = range.end.min(size.max(state.buffer.end()));
    let range = range.start.min(end)..end;
    let dirty = state.buffer.overlay(range.clone());
    let extents = if write_buffer::covers(&dirty, range.clone()) {
        Vec::new()
    } else {
        let committed = range.start..range.end.min(size).max(range.start);
        let extents = state.extents.lookup(version, committed)?;
        let used = |extent| (extent, state.extents.chunk_end(&extent));
        extents.into_iter().map(used).collect()
    };
    Ok(Snapshot {
        version,
        range,
        dirty,
        extents,
    })
}

/// Maps a missing inode to a stale one, because it is open here.
fn stale_if_missing(error: FsError) -> FsError {
    match error {
        FsError::NotFound => FsError::Stale,
        other => other,
    }
}
