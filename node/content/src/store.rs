//! The content store: what the rest of the node calls.
//!
//! Invariants:
//! - [`ContentStore::put`] and [`ContentStore::sync`] return when the disk has it, and [`ContentStore::holds`] speaks
//!   only of what the disk has.
//! - No byte leaves that was not verified against its CRC, and against a header that names its chunk.
//! - Nothing but a failed flush, or files taken away from under it, makes the store unusable; a full disk does not.

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use quorumfs_measure::Snapshot;
use quorumfs_proto::limits::BLOCK_BYTES;
use quorumfs_proto::{Chunk, ChunkId, ChunkRange, Sha256};

use super::aside::{Unreadable, files_set_aside, set_folder_aside};
use super::error::{ContentError, Stopped};
use super::index::{Index, RecordLocation};
use super::io_thread::IoThread;
use super::options::{ContentOptions, Unlisted};
use super::record::{Mark, RecordHeader, SEGMENT_HEADER_BYTES};
use super::scan::{Condition, open_segment};
use super::segment::{Segment, drop_cached, parse_file_name};
use super::space::Space;
use super::writer::{Appended, OpenSegment, SegmentWriter};

/// The folder is for the daemon's user alone: it holds all files' content.
const FOLDER_MODE: u32 = 0o700;
/// Most files kept open for reading; the rest are opened when needed. Far below the usual limit of 1024 per process.
const OPEN_FILES_MAX: usize = 256;
/// A chunk can move once while it is read (its segment was rewritten); more often is a fault.
const READ_ATTEMPTS_MAX: usize = 3;
/// A folder that cannot be listed may have been away for a moment: it is set aside only after so many attempts.
const LIST_ATTEMPTS_MAX: u32 = 5;
const LIST_PAUSE: Duration = Duration::from_millis(200);
/// Largest segment: positions are 32 bits of 8 bytes, and one file should not be a disk.
const SEGMENT_BYTES_MAX: u64 = 4 << 30;

/// What was found when a store was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Segments in use.
    pub segments: u64,
    /// Of these, how many had no usable footer and were scanned.
    pub scanned_segments: u64,
    /// Segments whose header does not match its checksum.
    pub damaged_headers: u64,
    /// Segments that the disk does not give back whole, set aside; what was found in them was written anew.
    pub unreadable_segments: u64,
    /// Of these, how many have so much that is unreadable that the rest was not looked at.
    pub partly_read_segments: u64,
    /// Segments without a live record, removed.
    pub removed_segments: u64,
    /// Chunks held.
    pub chunks: u64,
    /// The bytes of their payloads.
    pub payload_bytes: u64,
    /// Records that were not known to be on disk, matched their checksums, and were written and flushed again.
    pub rewritten_records: u64,
    /// Records that were not known to be on disk and did not match: dropped.
    pub torn_records: u64,
    /// How long it took.
    pub elapsed: Duration,
}

impl OpenReport {
    fn count(&mut self, condition: &Condition) {
        self.scanned_segments += u64::from(condition.scanned);
        self.damaged_headers += u64::from(condition.header_damaged);
        self.rewritten_records += condition.rewritten_records;
        self.torn_records += condition.torn_records;
    }
}

/// How often was flushed, for how many puts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushCounts {
    /// Flushes of segments.
    pub flushes: u64,
    /// Puts acknowledged.
    pub puts: u64,
}

/// A node's content. Dropping it stops its thread; what was appended and not synced is then flushed by nobody.
#[derive(Debug)]
pub struct ContentStore {
    pub(super) index: Arc<Index>,
    pub(super) writer: Arc<SegmentWriter>,
    /// Held by one discard, quarantine or rewriting at a time.
    pub(super) reclaim: Mutex<()>,
    files: Cache<u32, Arc<File>>,
    io_thread: IoThread,
}

impl ContentStore {
    /// Opens the store in `directory`, made if need be, and rebuilds its index. What is held afterwards is durable.
    pub fn open(
        directory: &Path,
        options: ContentOptions,
    ) -> Result<(ContentStore, OpenReport), ContentError> {
        let began = Instant::now();
        let (folder, listed) = open_and_list(directory, options.unlisted)?;
        let mut report = OpenReport::default();
        let mut next_sequence = 0;
        let mut segments = Vec::new();
        let mut full = Vec::new();
        let mut entries = Vec::new();
        let mut unreadable = Vec::new();
        for (sequence, salt, path) in listed {
            next_sequence = sequence + 1;
            let found = match open_segment(path.clone(), sequence, salt) {
                Err(error) if error.is_bad_copy() => {
                    unreadable.push(Unreadable { path, salt, error });
                    continue;
                }
                found => found?,
            };
            let Some(found) = found else {
                std::fs::remove_file(&path).map_err(|source| ContentError::io("remove", &path, source))?;
                report.removed_segments += 1;
                continue;
            };
            report.count(&found.condition);
            let live = found.table.live();
            entries.extend(live.map(|entry| (entry.id, RecordLocation::new(sequence, entry))));
            let segment = Arc::new(found.segment);
            segments.push(Arc::clone(&segment));
            if !segment.is_sealed() {
                full.push(OpenSegment {
                    segment,
                    file: Arc::new(found.file),
                    end: found.end,
                    capacity: found.end,
                    records: found.table.entries.len(),
                });
            }
        }
        let (index, superseded) = Index::rebuild(segments, entries);
        let index = Arc::new(index);
        let writer = Arc::new(SegmentWriter::new(
            directory.to_path_buf(),
            folder,
            options.within_bounds(),
            Arc::clone(&index),
            next_sequence,
            full,
        ));
        let io_thread = IoThread::start(Arc::clone(&writer))
            .map_err(|source| ContentError::io("start the I/O thread of", directory, source))?;
        let store = ContentStore {
            index,
            writer,
            reclaim: Mutex::new(()),
            files: Cache::new(OPEN_FILES_MAX),
            io_thread,
        };
        report.removed_segments += store.tidy_after_open(superseded)?;
        let set_aside = store.salvage_all(unreadable)?;
        (report.unreadable_segments, report.partly_read_segments) = (set_aside.files, set_aside.partly_read);
        report.segments = store.index.segments().len() as u64;
        (report.chunks, report.payload_bytes) = store.index.counts();
        report.elapsed = began.elapsed();
        Ok((store, report))
    }

    /// Writes `chunk` without waiting for the disk; nothing happens if it is there already. Blocks, but not for long.
    pub fn append(&self, chunk: &Chunk) -> Result<(), ContentError> {
        if self.writer.append(chunk)? == Appended::SegmentFull {
            self.io_thread.flush_soon()?;
        }
        Ok(())
    }

    /// Writes `chunk`; on disk when it returns. Nothing happens if it is on disk already. Waits while the chunks that
    /// wait to be written are more than the queue's bound. Dropping the future does not take the chunk back.
    pub async fn put(&self, chunk: Chunk) -> Result<(), ContentError> {
        if self.index.holds_durably(chunk.id()) {
            return Ok(self.writer.fault.check()?);
        }
        self.io_thread.put(chunk).await
    }

    /// Blocks until all that was appended before the call is on disk.
    pub fn sync(&self) -> Result<(), ContentError> {
        self.writer.fault.check()?;
        if self.writer.is_flushed(self.writer.changes()) {
            return Ok(());
        }
        self.io_thread.flush()
    }

    /// The blocks of `id` that hold `offset..offset + length` (less where the chunk ends), verified. Blocks.
    pub fn read(&self, id: ChunkId, offset: u32, length: u32) -> Result<ChunkRange, ContentError> {
        self.with_place(id, |segment, place| {
            let record = self.read_record(id, segment, place, offset, length)?;
            Ok(record.range)
        })
    }

    /// All of `id`, verified block by block. Blocks.
    pub fn read_whole(&self, id: ChunkId) -> Result<Chunk, ContentError> {
        self.with_place(id, |segment, place| {
            let record = self.read_record(id, segment, place, 0, place.length)?;
            let whole = record.range.into_chunk(id, record.sha256);
            whole.map_err(|_| ContentError::Corrupt {
                id,
                what: "its length",
            })
        })
    }

    /// Reads all of `id` from the disk, not from memory, and compares it with its CRCs and with the SHA-256 that its
    /// writer computed, which is returned with the length. Blocks.
    pub fn verify(&self, id: ChunkId) -> Result<(Sha256, u32), ContentError> {
        let chunk = self.with_place(id, |segment, place| {
            let layout = place.layout(id);
            drop_cached(&*self.file(segment)?, layout.position, layout.record_bytes());
            let record = self.read_record(id, segment, place, 0, place.length)?;
            Ok((record.sha256, record.range.into_parts().1))
        });
        let (sha256, payload) = chunk?;
        if Sha256::of(&payload) != sha256 {
            return Err(ContentError::Corrupt { id, what: "SHA-256" });
        }
        Ok((sha256, payload.len() as u32))
    }

    /// Whether `id` is on disk here.
    pub fn holds(&self, id: ChunkId) -> bool {
        self.index.holds_durably(id)
    }

    /// Whether `id` is here, be it not on disk yet.
    pub fn contains(&self, id: ChunkId) -> bool {
        self.index.contains(id)
    }

    /// How long `id` is, if it is here.
    pub fn length(&self, id: ChunkId) -> Option<u32> {
        self.index.get(id).map(|(place, _)| place.length)
    }

    /// Up to `max` ids above `after`, ascending; with those that are appended and not yet flushed.
    pub fn ids_after(&self, after: Option<ChunkId>, max: usize) -> Vec<ChunkId> {
        self.index.ids_after(after, max)
    }

    /// How many chunks there are, and the bytes of their payloads.
    pub fn counts(&self) -> (u64, u64) {
        self.index.counts()
    }

    /// How often was flushed, for how many puts.
    pub fn flush_counts(&self) -> FlushCounts {
        FlushCounts {
            flushes: self.writer.flushes(),
            puts: self.io_thread.puts(),
        }
    }

    /// How long flushes took, in nanoseconds.
    pub fn flush_times(&self) -> Snapshot {
        self.writer.flush_times()
    }

    /// Room on the disk. Blocks.
    pub fn space(&self) -> Result<Space, ContentError> {
        self.writer.space()
    }

    /// Looks whether the files are all there, which who works with open files does not see; stops the store where they are
    /// not. Blocks.
    pub fn check_files(&self) -> Result<(), ContentError> {
        self.writer.fault.check()?;
        for segment in self.index.segments() {
            match std::fs::symlink_metadata(&segment.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.is_gone(&segment)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// The file of `segment` is not there: it is in order only where the store itself has removed it.
    fn is_gone(&self, segment: &Segment) -> Result<(), ContentError> {
        if segment.is_removed() || !self.index.has_segment(segment) {
            return Ok(());
        }
        Err(self.writer.fault.files_gone(&segment.path).into())
    }

    /// Files that the disk did not give back whole and that were set aside, now or by an earlier process. Blocks.
    pub fn files_set_aside(&self) -> Vec<PathBuf> {
        files_set_aside(&self.writer.directory)
    }

    /// Resolves when the store has stopped, with the reason: the node must stop.
    pub fn fatal(&self) -> impl Future<Output = Stopped> + Send + use<> {
        let fault = Arc::clone(&self.writer.fault);
        async move { fault.failure().await }
    }

    /// Does `with` at the place of `id`; again where the chunk has moved meanwhile.
    fn with_place<T>(
        &self,
        id: ChunkId,
        with: impl Fn(&Segment, RecordLocation) -> Result<T, ContentError>,
    ) -> Result<T, ContentError> {
        self.writer.fault.check()?;
        let mut attempt = 1;
        loop {
            let (place, segment) = self.index.get(id).ok_or(ContentError::NotFound { id })?;
            let result = with(&segment, place);
            let moved = result.is_err() && self.index.get(id).is_none_or(|(now, _)| now != place);
            if !moved || attempt == READ_ATTEMPTS_MAX {
                return result;
            }
            attempt += 1;
        }
    }

    pub(super) fn read_record(
        &self,
        id: ChunkId,
        segment: &Segment,
        place: RecordLocation,
        offset: u32,
        length: u32,
    ) -> Result<Record, ContentError> {
        let corrupt = |what| ContentError::Corrupt { id, what };
        if offset >= place.length {
            return Err(ContentError::OutOfRange {
                id,
                offset,
                held: place.length,
            });
        }
        let file = self.file(segment)?;
        let read = |bytes: &mut [u8], at| match file.read_exact_at(bytes, at) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(corrupt("its segment was cut")),
            Err(source) => Err(ContentError::io("read", &segment.path, source)),
        };
        let layout = place.layout(id);
        let mut head = vec![0; layout.head_bytes()];
        read(&mut head, layout.position)?;
        let (header, mut block_crcs) = RecordHeader::decode(&head, segment.salt, layout.position)
            .filter(|(header, _)| header.id == id && header.layout == layout && header.mark == Mark::Live)
            .ok_or_else(|| corrupt("its header"))?;
        let first_block = offset / BLOCK_BYTES;
        let end = offset.saturating_add(length).min(place.length);
        let end_block = end.div_ceil(BLOCK_BYTES);
        let begin = first_block * BLOCK_BYTES;
        let end = (end_block * BLOCK_BYTES).clamp(begin, place.length);
        let mut payload = vec![0; (end - begin) as usize];
        read(&mut payload, layout.payload_at() + u64::from(begin))?;
        block_crcs.truncate(end_block as usize);
        block_crcs.drain(..first_block.min(end_block) as usize);
        let range = ChunkRange::checked(begin, payload.into(), block_crcs).map_err(|_| corrupt("a block"))?;
        Ok(Record {
            sha256: header.sha256,
            range,
        })
    }

    /// The file of `segment`, for reading and for marks.
    pub(super) fn file(&self, segment: &Segment) -> Result<Arc<File>, ContentError> {
        let file = self.files.get_or_insert_with(&segment.sequence, || {
            File::options()
                .read(true)
                .write(true)
                .open(&segment.path)
                .map(Arc::new)
                .map_err(|source| match source.kind() {
                    io::ErrorKind::NotFound => self
                        .is_gone(segment)
                        .err()
                        .unwrap_or_else(|| ContentError::io("open", &segment.path, source)),
                    _ => ContentError::io("open", &segment.path, source),
                })
        })?;
        // The segment may have gone while its file was opened: an open file would keep its room.
        if segment.is_removed() {
            self.files.remove(&segment.sequence);
        }
        Ok(file)
    }

    /// `segment` is gone.
    pub(super) fn forget_file(&self, segment: &Segment) {
        segment.set_removed();
        self.files.remove(&segment.sequence);
    }
}

/// A record as it was read.
pub(super) struct Record {
    /// The digest its writer computed.
    pub sha256: Sha256,
    /// The blocks asked for.
    pub range: ChunkRange,
}

impl ContentOptions {
    fn within_bounds(mut self) -> ContentOptions {
        self.segment_bytes = self.segment_bytes.clamp(SEGMENT_HEADER_BYTES, SEGMENT_BYTES_MAX);
        self
    }
}

/// A segment's sequence, salt and path.
type Listed = (u32, u64, PathBuf);

/// The folder, locked, and the segments in it. One that the disk cannot list is set aside, where others have its content:
/// that is fetched into an empty one.
fn open_and_list(directory: &Path, unlisted: Unlisted) -> Result<(File, Vec<Listed>), ContentError> {
    let folder = open_folder(directory)?;
    let mut attempt = 1;
    let error = loop {
        match list_segments(directory) {
            Err(error) if error.is_bad_copy() && attempt == LIST_ATTEMPTS_MAX => break error,
            Err(error) if error.is_bad_copy() => attempt += 1,
            listed => return Ok((folder, listed?)),
        }
        std::thread::sleep(LIST_PAUSE);
    };
    if unlisted == Unlisted::Refuse {
        return Err(ContentError::Unlisted {
            path: directory.to_path_buf(),
            source: Box::new(error),
        });
    }
    let aside = set_folder_aside(directory)?;
    drop(folder);
    tracing::error!(%error, set_aside = %aside.display(), "the content folder cannot be listed; all content is fetched from other nodes. The disk fails");
    let folder = open_folder(directory)?;
    Ok((folder, list_segments(directory)?))
}

/// Makes the folder if need be, and locks it against other processes.
fn open_folder(directory: &Path) -> Result<File, ContentError> {
    if !directory.is_dir() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(FOLDER_MODE)
            .create(directory)
            .map_err(|source| ContentError::io("make", directory, source))?;
        if let Some(parent) = directory.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(parent)
                .and_then(|parent| parent.sync_all())
                .map_err(|source| ContentError::io("flush", parent, source))?;
        }
    }
    let folder = File::open(directory).map_err(|source| ContentError::io("open", directory, source))?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(std::fs::TryLockError::WouldBlock) => Err(ContentError::InUse {
            path: directory.to_path_buf(),
        }),
        Err(std::fs::TryLockError::Error(source)) => Err(ContentError::io("lock", directory, source)),
    }
}

/// The segments in `directory`: sequence, salt, path; oldest first.
fn list_segments(directory: &Path) -> Result<Vec<Listed>, ContentError> {
    let failed = |source| ContentError::io("list", directory, source);
    #[cfg(test)]
    super::tests::bad_sectors::check_folder(directory).map_err(failed)?;
    let mut segments = Vec::new();
    for file in std::fs::read_dir(directory).map_err(failed)? {
        let file = file.map_err(failed)?;
        if let Some((sequence, salt)) = file.file_name().to_str().and_then(parse_file_name) {
            segments.push((sequence, salt, file.path()));
        }
    }
    segments.sort_unstable();
    Ok(segments)
}
