//! Discarding: chunks are removed from the index, their records are marked dead in place, the marks are flushed, and
//! only then holes are punched. A segment without a live record is unlinked, a sparse one is rewritten.
//!
//! Only rewriting needs space on the disk, and it frees more than it takes. So a full disk can be emptied.
//!
//! After a crash a discarded chunk may be back if its mark had not been flushed, but never without its bytes; the
//! caller that decides which chunks are dead finds it again. A chunk whose mark was flushed and whose hole was not yet
//! punched stays discarded, and its space is freed when the store is opened, or with its segment.
//!
//! Invariants: no hole is punched under a record whose mark is not on disk. One discard, quarantine or rewriting runs
//! at a time.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use quorumfs_proto::{ChunkId, Sha256};

use super::error::ContentError;
use super::index::{RecordLocation, Removed};
use super::record::{Entry, Table};
use super::segment::{Sealing, Segment, holes, punch};
use super::store::ContentStore;

/// A segment is rewritten when at most 1/2 of what it occupies on disk is live.
const SPARSE_PART: u64 = 2;
/// Below this many bytes rewriting is not worth the I/O; the disk's own granularity may waste as much.
const SPARSE_BYTES_MIN: u64 = 64 << 10;

/// Most bytes of bad copies that are kept until good ones have been written; beyond it they are removed at once.
const ASIDE_BYTES_MAX: u64 = 256 << 20;

/// The result of [`ContentStore::quarantine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quarantined {
    /// The copy failed its check again. It is no longer held.
    SetAside,
    /// The copy is good: another one has been written meanwhile, or the disk returns the right bytes now.
    Healthy,
    /// This node has no copy.
    NotHeld,
}

/// The result of [`ContentStore::rewrite_sparse`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewritten {
    /// Segments rewritten and unlinked.
    pub segments: u64,
    /// Bytes of records that were copied.
    pub moved_bytes: u64,
    /// Bytes of disk that the old segments occupied.
    pub freed_bytes: u64,
    /// Chunks whose copy here is damaged; they are no longer held.
    pub damaged: Vec<ChunkId>,
}

/// Records marked dead, whose space can be freed when the marks are on disk.
struct Marked {
    segment: Arc<Segment>,
    file: Arc<File>,
    table: Table,
    positions: Vec<u32>,
}

impl ContentStore {
    /// Discards chunks and frees their space; ids that are not held are ignored. Blocks. Returns the number of bytes
    /// freed on disk. Even if it fails, this process no longer serves the chunks.
    pub fn discard(&self, ids: &[ChunkId]) -> Result<u64, ContentError> {
        self.writer.fault.check()?;
        let _one_at_a_time = self.reclaim.lock();
        let removed = self.index.remove(ids);
        self.release(removed)
    }

    /// Checks again a copy that failed its check. If the copy is bad, or does not have the digest `named`, it is no
    /// longer held, so that recovery fetches the chunk. Its record is kept until [`ContentStore::forget_aside`], or
    /// until the store is opened and has another copy. Blocks.
    pub fn quarantine(&self, id: ChunkId, named: Option<Sha256>) -> Result<Quarantined, ContentError> {
        self.writer.fault.check()?;
        // Prevents that another copy of the chunk is removed in between.
        let _one_at_a_time = self.reclaim.lock();
        let Some((place, _)) = self.index.get(id) else {
            return Ok(Quarantined::NotHeld);
        };
        match self.verify(id) {
            Ok((sha256, _)) if named.is_none_or(|named| named == sha256) => return Ok(Quarantined::Healthy),
            Err(ContentError::NotFound { .. }) => return Ok(Quarantined::NotHeld),
            Err(error) if !error.is_bad_copy() => return Err(error),
            Ok(_) | Err(_) => {}
        }
        let gone = self.index.set_aside(id, place, ASIDE_BYTES_MAX);
        if let Err(error) = self.release(gone) {
            // The space is freed with the segment.
            tracing::warn!(%error, chunk = %id, "cannot free the space of a bad copy; it is freed with its segment");
        }
        Ok(Quarantined::SetAside)
    }

    /// Frees the space of bad copies that were kept aside. Blocks.
    pub fn forget_aside(&self, ids: &[ChunkId]) -> Result<u64, ContentError> {
        self.writer.fault.check()?;
        let _one_at_a_time = self.reclaim.lock();
        let removed = self.index.take_aside(ids);
        if removed.is_empty() {
            return Ok(0);
        }
        self.release(removed)
    }

    /// Rewrites segments with few live records, the sparsest first, until about `budget_bytes` of records have moved;
    /// at least one segment if one is sparse. Blocks for as long as that takes.
    pub fn rewrite_sparse(&self, budget_bytes: u64) -> Result<Rewritten, ContentError> {
        self.writer.fault.check()?;
        let _one_at_a_time = self.reclaim.lock();
        let mut sparse = Vec::new();
        for segment in self.index.segments() {
            if !segment.is_sealed() || self.index.has_aside(&segment) {
                continue;
            }
            let taken = allocated_bytes(&segment)?;
            let live = segment.live_bytes();
            if live <= taken / SPARSE_PART && taken - live >= SPARSE_BYTES_MIN {
                sparse.push((live, segment));
            }
        }
        sparse.sort_by_key(|(live, segment)| (*live, segment.sequence));
        let mut done = Rewritten::default();
        for (live, segment) in sparse {
            if done.segments > 0 && done.moved_bytes + live > budget_bytes {
                break;
            }
            match self.rewrite(&segment) {
                Ok(damaged) => done.damaged.extend(damaged),
                // A segment that cannot be read must not prevent the rewriting of the others.
                Err(error @ ContentError::Io { .. }) => {
                    tracing::warn!(%error, path = %segment.path.display(), "cannot rewrite a sparse segment; it stays as it is");
                    continue;
                }
                Err(error) => return Err(error),
            }
            done.moved_bytes += live;
            done.segments += 1;
            done.freed_bytes += self.remove_empty_segments()?.freed_bytes;
        }
        Ok(done)
    }

    /// Moves the live records of `segment`; returns the chunks whose records are damaged.
    fn rewrite(&self, segment: &Arc<Segment>) -> Result<Vec<ChunkId>, ContentError> {
        let table = segment.table(&*self.file(segment)?)?;
        let mut damaged = Vec::new();
        let mut copies: Vec<(Entry, Arc<Segment>, Entry)> = Vec::new();
        let copied = table.live().try_for_each(|entry| {
            let place = RecordLocation::new(segment.sequence, entry);
            if self.index.get(entry.id).is_none_or(|(now, _)| now != place) {
                return Ok(());
            }
            match self.read_whole(entry.id) {
                Ok(chunk) => {
                    let (to, copy) = self.writer.append_copy(&chunk)?;
                    copies.push((*entry, to, copy));
                    Ok(())
                }
                Err(ContentError::Corrupt { .. }) => {
                    damaged.push(entry.id);
                    Ok(())
                }
                Err(error) => Err(error),
            }
        });
        if let Err(error) = copied.and_then(|()| self.sync()) {
            // The copies are dropped; the originals stay in the index.
            let useless = copies.into_iter().map(|(_, to, copy)| Removed {
                segment: to,
                positions: vec![copy.position_units],
            });
            self.release(useless.collect())?;
            return Err(error);
        }
        for (entry, to, copy) in &copies {
            self.index.relocate(segment, entry, to, copy);
        }
        // Their records are removed with the segment.
        self.index.remove(&damaged);
        Ok(damaged)
    }

    /// Completes opening, after the index has been rebuilt: frees records that a later one supersedes, and removes
    /// empty segments. Returns the number of segments removed.
    pub(super) fn tidy_after_open(&self, superseded: Vec<Removed>) -> Result<u64, ContentError> {
        match self.release(superseded) {
            Err(error @ ContentError::Fatal { .. }) => return Err(error),
            // The space is freed with the segments.
            Err(error) => {
                tracing::warn!(%error, "cannot free the space of superseded copies; it is freed with their segments")
            }
            Ok(_) => {}
        }
        Ok(self.remove_empty_segments()?.segments)
    }

    /// Marks records that the index no longer refers to, and frees their space.
    fn release(&self, removed: Vec<Removed>) -> Result<u64, ContentError> {
        let mut failure = None;
        let mut marked = Vec::new();
        for Removed { segment, positions } in removed {
            // The segment is unlinked below.
            if segment.live_records() == 0 && segment.is_sealed() {
                continue;
            }
            match self.mark(&segment, &positions) {
                Ok((file, table)) => marked.push(Marked {
                    segment,
                    file,
                    table,
                    positions,
                }),
                Err(error @ ContentError::Fatal { .. }) => return Err(error),
                Err(error) => failure = Some(error),
            }
        }
        self.sync()?;
        let mut freed_bytes = 0;
        for Marked {
            segment,
            file,
            table,
            positions,
        } in marked
        {
            for (from, to) in holes(&table, &positions) {
                match punch(&file, from, to) {
                    Ok(bytes) => freed_bytes += bytes,
                    Err(source) => {
                        failure = Some(ContentError::io("punch a hole into", &segment.path, source))
                    }
                }
            }
        }
        freed_bytes += self.remove_empty_segments()?.freed_bytes;
        failure.map_or(Ok(freed_bytes), Err)
    }

    /// Marks records dead. If the segment is sealed, the marks are on disk when this returns; else after the next group
    /// flush.
    fn mark(&self, segment: &Segment, positions: &[u32]) -> Result<(Arc<File>, Table), ContentError> {
        let file = self.file(segment)?;
        let (table, sealing) = segment.mark_dead(&file, positions)?;
        match sealing {
            Sealing::Sealed => self.writer.fault.flush(&file, &segment.path)?,
            Sealing::Open => self.writer.count_change(),
        }
        Ok((file, table))
    }

    /// Unlinks the sealed segments without a live record.
    fn remove_empty_segments(&self) -> Result<Removal, ContentError> {
        let mut removal = Removal::default();
        for segment in self.index.segments() {
            if segment.live_records() > 0
                || !segment.is_sealed()
                || !self.index.remove_segment_if_empty(&segment)
            {
                continue;
            }
            let bytes = allocated_bytes(&segment).unwrap_or(0);
            match std::fs::remove_file(&segment.path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(ContentError::io("remove", &segment.path, source));
                }
                // The file is already gone, as intended.
                _ => {}
            }
            self.forget_file(&segment);
            removal.segments += 1;
            removal.freed_bytes += bytes;
        }
        if removal.segments > 0 {
            self.writer
                .fault
                .flush_folder(&self.writer.folder, &self.writer.directory)?;
        }
        Ok(removal)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Removal {
    segments: u64,
    freed_bytes: u64,
}

/// Returns the bytes that a segment occupies on disk.
fn allocated_bytes(segment: &Segment) -> Result<u64, ContentError> {
    // st_blocks counts units of 512 bytes, whatever the filesystem's block size is.
    std::fs::metadata(&segment.path)
        .map(|metadata| metadata.blocks() * 512)
        .map_err(|source| ContentError::io("inspect", &segment.path, source))
}
