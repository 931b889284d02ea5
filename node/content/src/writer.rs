//! Appending records and flushing them.
//!
//! Invariants:
//! - Records are written one after another under the lock of [`Tail`]. A failed write leaves the segment's end where it
//!   was, and the next record overwrites its remains.
//! - A flush covers everything that was appended, and every mark that was counted by [`SegmentWriter::count_change`],
//!   before it began. Only then does a segment's `flushed` grow.
//! - A failed flush is recorded by [`Fault`] and never retried: the kernel may have dropped the pages and would report
//!   success the second time.
//!
//! This module does not know queues, threads or callers.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use quorumfs_measure::{Distribution, Snapshot};
use quorumfs_proto::limits::CHUNK_BYTES_MAX;

use super::error::{ContentError, Stopped};
use super::fault::Fault;
use super::index::Index;
use super::options::ContentOptions;
use super::record::{Entry, Footer, Layout, Mark, RecordHeader, SEGMENT_HEADER_BYTES};
use super::segment::{SEGMENT_RECORDS_MAX, Sealing, Segment, SegmentState, begin_writing_out, write_record};
use super::space::Space;
use quorumfs_proto::Chunk;

/// Most segments that are full and wait for their footer. It bounds dirty data and tables in memory. The I/O thread
/// seals a segment as soon as it is full, so more than one means that the disk is too slow.
const FULL_SEGMENTS_MAX: usize = 4;

/// From this size on, write-out of a record starts at once. Smaller records share pages, which would be written twice.
const WRITE_OUT_FROM_BYTES: u64 = 256 << 10;

/// A new segment takes at most this part of the free space, so that it does not fill a small disk at once.
const SEGMENT_PART_OF_ROOM: u64 = 4;

/// The reserve is at most this part of the disk, so that a small disk has space for content too.
const RESERVE_PART_OF_CAPACITY: u64 = 16;

/// A segment that takes, or has taken, records.
#[derive(Clone, Debug)]
pub struct OpenSegment {
    /// The segment itself.
    pub segment: Arc<Segment>,
    /// The one open file description that is flushed: another one would not report a failure that this one has
    /// reported.
    pub file: Arc<File>,
    /// The position of the next record.
    pub end: u64,
    /// The length of the file.
    pub capacity: u64,
    /// The number of records.
    pub records: usize,
}

impl OpenSegment {
    fn fits(&self, layout: Layout) -> bool {
        self.records < SEGMENT_RECORDS_MAX && layout.end() + Footer::bytes(self.records + 1) <= self.capacity
    }
}

/// The end of the content, where records are appended.
#[derive(Debug, Default)]
struct Tail {
    active: Option<OpenSegment>,
    full: Vec<OpenSegment>,
    next_sequence: u32,
    folder_changed: bool,
}

/// Whether an append left work for the I/O thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// There is no work for it.
    Quietly,
    /// A segment is full and needs its footer.
    SegmentFull,
}

/// Appends and flushes.
#[derive(Debug)]
pub struct SegmentWriter {
    /// The path of the folder.
    pub directory: PathBuf,
    /// The folder's file. Flushed when an entry of the folder has changed; locked as long as the store is open.
    pub folder: File,
    /// The first failed flush.
    pub fault: Arc<Fault>,
    options: ContentOptions,
    index: Arc<Index>,
    tail: Mutex<Tail>,
    changes: AtomicU64,
    flushed_changes: AtomicU64,
    flushes: AtomicU64,
    flush_times: Distribution,
}

impl SegmentWriter {
    /// Makes a writer whose next segment is `next_sequence`; `full` are segments that could not be sealed yet.
    pub fn new(
        directory: PathBuf,
        folder: File,
        options: ContentOptions,
        index: Arc<Index>,
        next_sequence: u32,
        full: Vec<OpenSegment>,
    ) -> SegmentWriter {
        SegmentWriter {
            directory,
            folder,
            fault: Arc::new(Fault::new()),
            options,
            index,
            tail: Mutex::new(Tail {
                active: None,
                full,
                next_sequence,
                folder_changed: false,
            }),
            changes: AtomicU64::new(0),
            flushed_changes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            flush_times: Distribution::new(),
        }
    }

    /// Writes `chunk`, unless the store has it. Not durable.
    pub fn append(&self, chunk: &Chunk) -> Result<Appended, ContentError> {
        self.fault.check()?;
        let mut tail = self.tail.lock();
        if self.index.contains(chunk.id()) {
            return Ok(Appended::Quietly);
        }
        let full_before = tail.full.len();
        let (segment, entry) = self.write(&mut tail, chunk)?;
        self.index.insert(&segment, &entry);
        self.changes.fetch_add(1, Ordering::AcqRel);
        Ok(if tail.full.len() > full_before {
            Appended::SegmentFull
        } else {
            Appended::Quietly
        })
    }

    /// Writes a second record of `chunk` that is not entered in the index. Not durable.
    pub fn append_copy(&self, chunk: &Chunk) -> Result<(Arc<Segment>, Entry), ContentError> {
        self.fault.check()?;
        let mut tail = self.tail.lock();
        let written = self.write(&mut tail, chunk)?;
        self.changes.fetch_add(1, Ordering::AcqRel);
        Ok(written)
    }

    /// Counts a mark written in an open segment, so that the next flush covers it.
    pub fn count_change(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns the number of changes so far, for [`SegmentWriter::is_flushed`].
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Whether everything written when [`SegmentWriter::changes`] returned `changes` is on disk.
    pub fn is_flushed(&self, changes: u64) -> bool {
        self.flushed_changes.load(Ordering::Acquire) >= changes
    }

    /// Returns the number of flushes of segments.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Returns the durations of flushes of the active segment, in nanoseconds.
    pub fn flush_times(&self) -> Snapshot {
        self.flush_times.snapshot()
    }

    /// Flushes everything that was appended before the call, and seals full segments. Called by one thread.
    pub fn flush(&self) -> Result<(), Stopped> {
        self.fault.check()?;
        let (changes, full, active, folder_changed) = {
            let mut tail = self.tail.lock();
            (
                self.changes(),
                std::mem::take(&mut tail.full),
                tail.active.clone(),
                std::mem::take(&mut tail.folder_changed),
            )
        };
        if folder_changed {
            self.fault.flush_folder(&self.folder, &self.directory)?;
        }
        let mut unsealed = Vec::new();
        for segment in full {
            if self.seal(&segment)? == Sealing::Open {
                unsealed.push(segment);
            }
        }
        if let Some(active) = active {
            let began = Instant::now();
            self.fault.flush(&active.file, &active.segment.path)?;
            self.flush_times.record_duration(began.elapsed());
            self.flushes.fetch_add(1, Ordering::Relaxed);
            active.segment.set_flushed(active.end);
        }
        self.tail.lock().full.append(&mut unsealed);
        self.flushed_changes.fetch_max(changes, Ordering::AcqRel);
        Ok(())
    }

    /// Returns the space on the disk.
    pub fn space(&self) -> Result<Space, ContentError> {
        let (capacity_bytes, available_bytes) = self.disk_space()?;
        let reserve = self.reserve_bytes(capacity_bytes);
        let preallocated = {
            let tail = self.tail.lock();
            tail.active
                .as_ref()
                .map_or(0, |active| active.capacity - active.end)
        };
        Ok(Space {
            capacity_bytes,
            available_bytes,
            room_bytes: available_bytes.saturating_sub(reserve) + preallocated,
        })
    }

    fn reserve_bytes(&self, capacity_bytes: u64) -> u64 {
        self.options
            .reserve_bytes
            .min(capacity_bytes / RESERVE_PART_OF_CAPACITY)
    }

    fn disk_space(&self) -> Result<(u64, u64), ContentError> {
        let stat = nix::sys::statvfs::fstatvfs(&self.folder)
            .map_err(|errno| ContentError::io("get the free space of", &self.directory, errno.into()))?;
        let unit = stat.fragment_size();
        Ok((stat.blocks() * unit, stat.blocks_available() * unit))
    }

    /// Writes the record to the end of the active segment, or of a new one if it does not fit.
    fn write(&self, tail: &mut Tail, chunk: &Chunk) -> Result<(Arc<Segment>, Entry), ContentError> {
        let length = chunk.length();
        let fits = tail.active.as_ref().is_some_and(|active| {
            active.fits(Layout {
                position: active.end,
                length,
            })
        });
        if !fits {
            tail.full.extend(tail.active.take());
            tail.active = Some(self.next_segment(tail, length)?);
        }
        let active = tail.active.as_mut().expect("made above where there was none");
        let layout = Layout {
            position: active.end,
            length,
        };
        let header = RecordHeader {
            mark: Mark::Live,
            id: chunk.id(),
            layout,
            flushed: active.segment.flushed(),
            sha256: chunk.sha256(),
        };
        let head = header.encode(active.segment.salt, chunk.block_crcs());
        write_record(&active.file, layout, &head, chunk.payload())
            .map_err(|source| ContentError::io("append to", &active.segment.path, source))?;
        if layout.record_bytes() >= WRITE_OUT_FROM_BYTES {
            begin_writing_out(&active.file, layout.position, layout.record_bytes());
        }
        let entry = Entry::new(chunk.id(), layout);
        if let SegmentState::Open(table) = &mut *active.segment.state.lock() {
            table.push(entry, Mark::Live);
        }
        active.end = layout.end();
        active.records += 1;
        Ok((Arc::clone(&active.segment), entry))
    }

    /// Makes a new segment with space for a payload of `length`.
    fn next_segment(&self, tail: &mut Tail, length: u32) -> Result<OpenSegment, ContentError> {
        if tail.full.len() >= FULL_SEGMENTS_MAX {
            self.seal_full(tail)?;
            if tail.full.len() >= FULL_SEGMENTS_MAX {
                return Err(ContentError::NoSpace);
            }
        }
        match self.create_segment(tail, length) {
            // The unused preallocation of full segments may suffice.
            Err(ContentError::NoSpace) if !tail.full.is_empty() => {
                self.seal_full(tail)?;
                self.create_segment(tail, length)
            }
            result => result,
        }
    }

    fn create_segment(&self, tail: &mut Tail, length: u32) -> Result<OpenSegment, ContentError> {
        let first = Layout {
            position: SEGMENT_HEADER_BYTES,
            length,
        };
        let least = first.end() + Footer::bytes(1);
        let (capacity, available) = self.disk_space()?;
        let room = available.saturating_sub(self.reserve_bytes(capacity));
        if room < least {
            return Err(ContentError::NoSpace);
        }
        let wanted = (room / SEGMENT_PART_OF_ROOM)
            .max(u64::from(4 * CHUNK_BYTES_MAX).min(room))
            .min(self.options.segment_bytes)
            .max(least);
        let sequence = tail.next_sequence;
        let created = Segment::create(&self.directory, sequence, rand::random(), wanted, least);
        let (segment, file, capacity) = created.map_err(|error| match error {
            ContentError::Io { error, .. } if error.kind() == std::io::ErrorKind::NotFound => {
                self.fault.files_gone(&self.directory).into()
            }
            error => error,
        })?;
        tail.next_sequence += 1;
        tail.folder_changed = true;
        let segment = Arc::new(segment);
        self.index.add_segment(Arc::clone(&segment));
        Ok(OpenSegment {
            segment,
            file: Arc::new(file),
            end: SEGMENT_HEADER_BYTES,
            capacity,
            records: 0,
        })
    }

    /// Seals full segments in the appending thread: only if appending is impossible otherwise.
    fn seal_full(&self, tail: &mut Tail) -> Result<(), Stopped> {
        // The names of the files must be on disk before their records count as flushed.
        if std::mem::take(&mut tail.folder_changed) {
            self.fault.flush_folder(&self.folder, &self.directory)?;
        }
        let mut unsealed = Vec::new();
        for segment in std::mem::take(&mut tail.full) {
            if self.seal(&segment)? == Sealing::Open {
                unsealed.push(segment);
            }
        }
        tail.full = unsealed;
        Ok(())
    }

    /// Flushes a full segment, with its footer if that can be written now.
    fn seal(&self, open: &OpenSegment) -> Result<Sealing, Stopped> {
        let sealing = open.segment.seal(&open.file, open.end, || {
            self.fault.flush(&open.file, &open.segment.path)
        })?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(sealing)
    }
}
