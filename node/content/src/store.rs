//! The content store: its public interface.
//!
//! Invariants:
//! - [`ContentStore::put`] and [`ContentStore::sync`] return when the data is on disk, and [`ContentStore::holds`]
//!   reports only what is on disk.
//! - Every byte that is returned was verified against its CRC, and against a header with the chunk's id.
//! - Only a failed flush, or files removed from under the store, make it unusable; a full disk does not.

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

/// Only the daemon's user may access the folder: it has the content of all files.
const FOLDER_MODE: u32 = 0o700;
/// Most files kept open for reading; others are opened when needed. Far below the usual limit of 1024 per process.
const OPEN_FILES_MAX: usize = 256;
/// Attempts to read a chunk. It can move once during a read (its segment was rewritten); more often is a fault.
const READ_ATTEMPTS_MAX: usize = 3;
/// Attempts to list a folder before it is set aside: it may have been unavailable for a moment.
const LIST_ATTEMPTS_MAX: u32 = 5;
const LIST_PAUSE: Duration = Duration::from_millis(200);
/// Largest segment: positions are 32 bits in units of 8 bytes, and one file should not fill a disk.
const SEGMENT_BYTES_MAX: u64 = 4 << 30;

/// The result of opening a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Segments in use.
    pub segments: u64,
    /// Segments among them without a usable footer, which were scanned.
    pub scanned_segments: u64,
    /// Segments whose header does not match its checksum.
    pub damaged_headers: u64,
    /// Segments that the disk could not read whole. They were set aside, and their readable chunks copied.
    pub unreadable_segments: u64,
    /// Segments among them with so many unreadable pages that the rest was not read.
    pub partly_read_segments: u64,
    /// Segments without a live record, removed.
    pub removed_segments: u64,
    /// Number of chunks held.
    pub chunks: u64,
    /// Bytes of their payloads.
    pub payload_bytes: u64,
    /// Records that were not known to be on disk and matched their checksums. They were written and flushed again.
    pub rewritten_records: u64,
    /// Records that were not known to be on disk and did not match their checksums. They were dropped.
    pub torn_records: u64,
    /// Duration of the opening.
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

/// Counts of flushes and puts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushCounts {
    /// Flushes of segments.
    pub flushes: u64,
    /// Number of acknowledged puts.
    pub puts: u64,
}

/// A node's content store. Dropping it stops its thread; records that were appended and not synced are not flushed.
#[derive(Debug)]
pub struct ContentStore {
    pub(super) index: Arc<Index>,
    pub(super) writer: Arc<SegmentWriter>,
    /// Locked by one discard, quarantine or rewriting at a time.
    pub(super) reclaim: Mutex<()>,
    files: Cache<u32, Arc<File>>,
    io_thread: IoThread,
}

impl ContentStore {
    /// Opens the store in `directory`, which is created if it does not exist, and rebuilds the index. All chunks held
    /// afterwards are durable.
    ///
    /// # Errors
    /// [`ContentError`]: another process uses the folder, it cannot be listed, a segment has a newer format, or I/O
    /// failed.
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

    /// Writes `chunk` without waiting for the disk; does nothing if the store has it. Blocks briefly.
    pub fn append(&self, chunk: &Chunk) -> Result<(), ContentError> {
        if self.writer.append(chunk)? == Appended::SegmentFull {
            self.io_thread.flush_soon()?;
        }
        Ok(())
    }

    /// Writes `chunk`; it is on disk when this returns. Does nothing if it is on disk already. Waits while the queue of
    /// chunks is full. Dropping the future does not cancel the write.
    pub async fn put(&self, chunk: Chunk) -> Result<(), ContentError> {
        if self.index.holds_durably(chunk.id()) {
            return Ok(self.writer.fault.check()?);
        }
        self.io_thread.put(chunk).await
    }

    /// Blocks until everything that was appended before the call is on disk.
    pub fn sync(&self) -> Result<(), ContentError> {
        self.writer.fault.check()?;
        if self.writer.is_flushed(self.writer.changes()) {
            return Ok(());
        }
        self.io_thread.flush()
    }

    /// Returns the verified blocks of `id` that contain `offset..offset + length` (fewer at the end of the chunk).
    /// Blocks.
    pub fn read(&self, id: ChunkId, offset: u32, length: u32) -> Result<ChunkRange, ContentError> {
        self.with_place(id, |segment, place| {
            let record = self.read_record(id, segment, place, offset, length)?;
            Ok(record.range)
        })
    }

    /// Returns all of `id`, verified block by block. Blocks.
    pub fn read_whole(&self, id: ChunkId) -> Result<Chunk, ContentError> {
        self.with_place(id, |segment, place| {
            let record = self.read_record(id, segment, place, 0, place.length)?;
            let whole = record.range.into_chunk(id, record.sha256);
            whole.map_err(|_| ContentError::Corrupt {
                id,
                what: "its length is not that of its record",
            })
        })
    }

    /// Reads all of `id` from the disk, not from memory, and compares it with its CRCs and with the SHA-256 that its
    /// writer computed. Returns digest and length. Blocks.
    pub fn verify(&self, id: ChunkId) -> Result<(Sha256, u32), ContentError> {
        let chunk = self.with_place(id, |segment, place| {
            let layout = place.layout(id);
            drop_cached(&*self.file(segment)?, layout.position, layout.record_bytes());
            let record = self.read_record(id, segment, place, 0, place.length)?;
            Ok((record.sha256, record.range.into_parts().1))
        });
        let (sha256, payload) = chunk?;
        if Sha256::of(&payload) != sha256 {
            return Err(ContentError::Corrupt {
                id,
                what: "it does not match its SHA-256",
            });
        }
        Ok((sha256, payload.len() as u32))
    }

    /// Whether `id` is on disk here.
    pub fn holds(&self, id: ChunkId) -> bool {
        self.index.holds_durably(id)
    }

    /// Whether `id` is here, on disk or not.
    pub fn contains(&self, id: ChunkId) -> bool {
        self.index.contains(id)
    }

    /// Returns the length of `id`, if it is here.
    pub fn length(&self, id: ChunkId) -> Option<u32> {
        self.index.get(id).map(|(place, _)| place.length)
    }

    /// Returns up to `max` ids above `after`, ascending, including chunks that are appended and not yet flushed.
    pub fn ids_after(&self, after: Option<ChunkId>, max: usize) -> Vec<ChunkId> {
        self.index.ids_after(after, max)
    }

    /// Returns the number of chunks and the bytes of their payloads.
    pub fn counts(&self) -> (u64, u64) {
        self.index.counts()
    }

    /// Returns the counts of flushes and puts.
    pub fn flush_counts(&self) -> FlushCounts {
        FlushCounts {
            flushes: self.writer.flushes(),
            puts: self.io_thread.puts(),
        }
    }

    /// Returns the durations of flushes, in nanoseconds.
    pub fn flush_times(&self) -> Snapshot {
        self.writer.flush_times()
    }

    /// Returns the space on the disk. Blocks.
    pub fn space(&self) -> Result<Space, ContentError> {
        self.writer.space()
    }

    /// Checks that all files exist (operations on open files would not notice), and stops the store if one is missing.
    /// Blocks.
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

    /// Called if the file of `segment` does not exist: an error unless the store itself has removed it.
    fn is_gone(&self, segment: &Segment) -> Result<(), ContentError> {
        if segment.is_removed() || !self.index.has_segment(segment) {
            return Ok(());
        }
        Err(self.writer.fault.files_gone(&segment.path).into())
    }

    /// Returns the files that the disk could not read whole and that were set aside, now or by an earlier process.
    /// Blocks.
    pub fn files_set_aside(&self) -> Vec<PathBuf> {
        files_set_aside(&self.writer.directory)
    }

    /// Resolves with the reason when the store has stopped: the node must stop.
    pub fn fatal(&self) -> impl Future<Output = Stopped> + Send + use<> {
        let fault = Arc::clone(&self.writer.fault);
        async move { fault.failure().await }
    }

    /// Calls `with` with the location of `id`; again if the chunk has moved meanwhile.
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
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(corrupt("its segment was cut off"))
            }
            Err(source) => Err(ContentError::io("read", &segment.path, source)),
        };
        let layout = place.layout(id);
        let mut head = vec![0; layout.head_bytes()];
        read(&mut head, layout.position)?;
        let (header, mut block_crcs) = RecordHeader::decode(&head, segment.salt, layout.position)
            .filter(|(header, _)| header.id == id && header.layout == layout && header.mark == Mark::Live)
            .ok_or_else(|| corrupt("its header does not match its checksum"))?;
        let first_block = offset / BLOCK_BYTES;
        let end = offset.saturating_add(length).min(place.length);
        let end_block = end.div_ceil(BLOCK_BYTES);
        let begin = first_block * BLOCK_BYTES;
        let end = (end_block * BLOCK_BYTES).clamp(begin, place.length);
        let mut payload = vec![0; (end - begin) as usize];
        read(&mut payload, layout.payload_at() + u64::from(begin))?;
        block_crcs.truncate(end_block as usize);
        block_crcs.drain(..first_block.min(end_block) as usize);
        let range = ChunkRange::checked(begin, payload.into(), block_crcs)
            .map_err(|_| corrupt("a block does not match its checksum"))?;
        Ok(Record {
            sha256: header.sha256,
            range,
        })
    }

    /// Returns the file of `segment`, for reading and for marks.
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
        // The segment may have been removed while its file was opened: an open file would keep its space.
        if segment.is_removed() {
            self.files.remove(&segment.sequence);
        }
        Ok(file)
    }

    /// Closes the file of `segment`, which has been removed.
    pub(super) fn forget_file(&self, segment: &Segment) {
        segment.set_removed();
        self.files.remove(&segment.sequence);
    }
}

/// A record as read.
pub(super) struct Record {
    /// The digest that its writer computed.
    pub sha256: Sha256,
    /// The requested blocks.
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

/// Opens and locks the folder, and lists its segments. A folder that cannot be listed is set aside if other nodes have
/// its content, which is then fetched into an empty one.
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
            error: Box::new(error),
        });
    }
    let aside = set_folder_aside(directory)?;
    drop(folder);
    tracing::error!(%error, set_aside = %aside.display(), "the content folder cannot be listed: it was set aside, and all content is fetched from other nodes. Check the disk");
    let folder = open_folder(directory)?;
    Ok((folder, list_segments(directory)?))
}

/// Creates the folder if it does not exist, and locks it against other processes.
fn open_folder(directory: &Path) -> Result<File, ContentError> {
    if !directory.is_dir() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(FOLDER_MODE)
            .create(directory)
            .map_err(|source| ContentError::io("create", directory, source))?;
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

/// Lists the segments in `directory`: sequence, salt and path, oldest first.
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
