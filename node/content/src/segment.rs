//! One segment: a preallocated file of records, appended to until it is full, then sealed with a footer.
//!
//! Invariants:
//! - Records are only ever appended; what changes in place is the mark of a discarded one, and its state in the
//!   footer.
//! - As long as a segment is open its table is in memory and room for its footer is kept free in the file, so that
//!   sealing needs no new room. Sealing gives back what is left of the preallocation.
//! - `flushed` never says more than a successful flush has shown.
//!
//! Knows nothing of the index or of threads.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::pwritev;
use parking_lot::Mutex;

use super::error::ContentError;
use super::record::{
    DEAD_MARK, DEAD_STATE, Footer, Layout, PAGE_BYTES, SEGMENT_HEADER_BYTES, TRAILER_BYTES, Table, align_up,
    encode_segment_header,
};

/// Most records of a segment: bounds the table that an open one keeps in memory (25 bytes each) and what a discard
/// reads of a sealed one. 256 MiB of 4 KiB chunks are as many.
pub const SEGMENT_RECORDS_MAX: usize = 1 << 16;

/// Preallocations are multiples of this.
const SEGMENT_STEP_BYTES: u64 = 64 << 10;

/// `flushed` of a sealed segment: all of it.
const ALL: u64 = u64::MAX;

/// What a segment's table is in.
#[derive(Debug)]
pub enum SegmentState {
    /// Memory.
    Open(Table),
    /// The file's footer.
    Sealed(Footer),
}

/// A segment that is in use.
#[derive(Debug)]
pub struct Segment {
    /// Counts up; names the segment in the index.
    pub sequence: u32,
    /// Random; tells the segment's records from everything else.
    pub salt: u64,
    /// Where it lies.
    pub path: PathBuf,
    /// Held while the table changes, marks are written and the footer is.
    pub state: Mutex<SegmentState>,
    live_records: AtomicU32,
    live_bytes: AtomicU64,
    flushed: AtomicU64,
    removed: AtomicBool,
}

/// The name of a segment's file.
pub fn file_name(sequence: u32, salt: u64) -> String {
    format!("segment-{sequence:08x}-{salt:016x}")
}

/// The sequence and salt in a segment's file name.
pub fn parse_file_name(name: &str) -> Option<(u32, u64)> {
    let (sequence, salt) = name.strip_prefix("segment-")?.split_once('-')?;
    let parsed = (
        u32::from_str_radix(sequence, 16).ok()?,
        u64::from_str_radix(salt, 16).ok()?,
    );
    (file_name(parsed.0, parsed.1) == name).then_some(parsed)
}

impl Segment {
    /// A segment of which `flushed` bytes are on disk, and no live record is counted yet.
    pub fn new(path: PathBuf, sequence: u32, salt: u64, state: SegmentState, flushed: u64) -> Segment {
        let flushed = match &state {
            SegmentState::Open(_) => flushed,
            SegmentState::Sealed(_) => ALL,
        };
        Segment {
            sequence,
            salt,
            path,
            state: Mutex::new(state),
            live_records: AtomicU32::new(0),
            live_bytes: AtomicU64::new(0),
            flushed: AtomicU64::new(flushed),
            removed: AtomicBool::new(false),
        }
    }

    /// Makes an empty segment of `wanted` bytes or, where the disk has less, fewer, but no fewer than `least`.
    /// Not durable: the caller flushes file and folder before it acknowledges anything in it.
    pub fn create(
        directory: &Path,
        sequence: u32,
        salt: u64,
        wanted: u64,
        least: u64,
    ) -> Result<(Segment, File, u64), ContentError> {
        let path = directory.join(file_name(sequence, salt));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| ContentError::io("create", &path, source))?;
        let prepared = preallocate(&file, wanted, least).and_then(|capacity| {
            file.write_all_at(&encode_segment_header(sequence, salt), 0)?;
            Ok(capacity)
        });
        match prepared {
            Ok(capacity) => {
                let state = SegmentState::Open(Table::default());
                Ok((Segment::new(path, sequence, salt, state, 0), file, capacity))
            }
            Err(source) => {
                // Nothing names the file yet; what cannot be removed is found empty, and removed, when the store is
                // opened next.
                let _ = std::fs::remove_file(&path);
                Err(ContentError::io("preallocate", &path, source))
            }
        }
    }

    /// Counts a live record.
    pub fn add_live(&self, layout: Layout) {
        self.live_records.fetch_add(1, Ordering::AcqRel);
        self.live_bytes.fetch_add(layout.record_bytes(), Ordering::AcqRel);
    }

    /// A live record is live no more.
    pub fn remove_live(&self, layout: Layout) {
        self.live_records.fetch_sub(1, Ordering::AcqRel);
        self.live_bytes.fetch_sub(layout.record_bytes(), Ordering::AcqRel);
    }

    /// How many records are live.
    pub fn live_records(&self) -> u32 {
        self.live_records.load(Ordering::Acquire)
    }

    /// What they take.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes.load(Ordering::Acquire)
    }

    /// Up to where the records are known to be on disk.
    pub fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Acquire)
    }

    /// A flush has succeeded that began when the segment ended at `end`.
    pub fn set_flushed(&self, end: u64) {
        self.flushed.fetch_max(end, Ordering::AcqRel);
    }

    /// Whether its file has been unlinked.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::SeqCst)
    }

    /// Its file has been unlinked.
    pub fn set_removed(&self) {
        self.removed.store(true, Ordering::SeqCst);
    }

    /// Whether it has its footer.
    pub fn is_sealed(&self) -> bool {
        matches!(*self.state.lock(), SegmentState::Sealed(_))
    }

    /// Flushes the segment, which ends at `end`, and seals it if its footer can be written now.
    ///
    /// The footer's trailer is written last, after the flush, and only if that succeeded: whoever finds it, be it in
    /// the page cache that a killed process left, knows that all before it is on disk. Were it lost, the segment
    /// would be scanned. Discards in this segment wait meanwhile.
    pub fn seal<E>(
        &self,
        file: &File,
        end: u64,
        flush: impl FnOnce() -> Result<(), E>,
    ) -> Result<Sealing, E> {
        let mut state = self.state.lock();
        let SegmentState::Open(table) = &*state else {
            return Ok(Sealing::Sealed);
        };
        let (footer, bytes) = Footer::encode(end, self.salt, table);
        let (body, trailer) = bytes.split_at(bytes.len() - TRAILER_BYTES);
        let written = file
            .write_all_at(body, end)
            .and_then(|()| file.set_len(footer.end()));
        flush()?;
        self.set_flushed(end);
        let sealed = written.and_then(|()| file.write_all_at(trailer, footer.end() - TRAILER_BYTES as u64));
        match sealed {
            Ok(()) => {
                *state = SegmentState::Sealed(footer);
                self.flushed.store(ALL, Ordering::Release);
                Ok(Sealing::Sealed)
            }
            // The records are whole and on disk; the footer is tried again with the next flush.
            Err(error) => {
                tracing::warn!(%error, path = %self.path.display(), "a content segment stays open");
                Ok(Sealing::Open)
            }
        }
    }

    /// Marks the records at `positions` (in units) dead, in place, and returns the table after that and whether the
    /// segment is sealed. Not durable yet.
    pub fn mark_dead(&self, file: &File, positions: &[u32]) -> Result<(Table, Sealing), ContentError> {
        let failed = |source| ContentError::io("mark discarded chunks in", &self.path, source);
        let mut state = self.state.lock();
        let (mut table, footer) = match &mut *state {
            SegmentState::Open(table) => (table.clone(), None),
            SegmentState::Sealed(footer) => (read_table(file, footer).map_err(failed)?, Some(*footer)),
        };
        for position in positions {
            let Some(index) = table.find(*position) else {
                continue;
            };
            let at = table.entries[index].layout().position;
            file.write_all_at(&DEAD_MARK, at).map_err(failed)?;
            if let Some(footer) = &footer {
                file.write_all_at(&[DEAD_STATE], footer.state_at(index))
                    .map_err(failed)?;
            }
            table.dead[index] = true;
        }
        if let SegmentState::Open(in_memory) = &mut *state {
            in_memory.dead.clone_from(&table.dead);
            return Ok((table, Sealing::Open));
        }
        Ok((table, Sealing::Sealed))
    }

    /// The table, wherever it is.
    pub fn table(&self, file: &File) -> Result<Table, ContentError> {
        match &*self.state.lock() {
            SegmentState::Open(table) => Ok(table.clone()),
            SegmentState::Sealed(footer) => read_table(file, footer)
                .map_err(|source| ContentError::io("read the footer of", &self.path, source)),
        }
    }
}

/// Whether a segment has its footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealing {
    /// Not yet: the group flush reaches it.
    Open,
    /// Yes: who changes it flushes it.
    Sealed,
}

/// Reads all of `bytes` at `at`; every read of a segment but those of single chunks goes through here.
pub fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    #[cfg(test)]
    super::tests::bad_sectors::check(file, at, bytes.len() as u64)?;
    file.read_exact_at(bytes, at)
}

/// Reads a sealed segment's table.
pub fn read_table(file: &File, footer: &Footer) -> io::Result<Table> {
    let mut bytes = vec![0; (footer.end() - footer.position) as usize];
    read_exact_at(file, &mut bytes, footer.position)?;
    footer
        .decode(&bytes)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its checksum does not match"))
}

/// Writes a record: what lies before the payload, the payload, and what aligns the next one; without copying.
pub fn write_record(file: &File, layout: Layout, head: &[u8], payload: &[u8]) -> io::Result<()> {
    const ZEROS: [u8; 8] = [0; 8];
    let padding = (layout.record_bytes() as usize) - head.len() - payload.len();
    let mut parts = [head, payload, &ZEROS[..padding]];
    let mut at = layout.position;
    loop {
        let slices: Vec<IoSlice> = parts
            .iter()
            .filter(|part| !part.is_empty())
            .map(|part| IoSlice::new(part))
            .collect();
        if slices.is_empty() {
            return Ok(());
        }
        let mut written = match pwritev(file, &slices, at as i64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => written,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        at += written as u64;
        for part in &mut parts {
            let taken = written.min(part.len());
            *part = &part[taken..];
            written -= taken;
        }
    }
}

/// Lets the disk begin with what was just written, so that it works while the next records are copied and the flush
/// finds less to do. A hint: failures show in the flush.
pub fn begin_writing_out(file: &File, from: u64, bytes: u64) {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and no memory is handed over.
    unsafe {
        libc::sync_file_range(
            file.as_raw_fd(),
            from as i64,
            bytes as i64,
            libc::SYNC_FILE_RANGE_WRITE,
        );
    }
}

/// Forgets what memory holds of this range, so that the next read asks the disk. What is not written yet stays. A hint.
pub fn drop_cached(file: &File, from: u64, bytes: u64) {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and no memory is handed over.
    unsafe {
        libc::posix_fadvise(
            file.as_raw_fd(),
            from as i64,
            bytes as i64,
            libc::POSIX_FADV_DONTNEED,
        );
    }
}

/// Gives `file` its size, as near to `wanted` as the disk allows; it has to be `least` at the least.
fn preallocate(file: &File, wanted: u64, least: u64) -> io::Result<u64> {
    let least = align_up(least, SEGMENT_STEP_BYTES);
    let mut size = align_up(wanted, SEGMENT_STEP_BYTES).max(least);
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, size as i64) {
            Ok(()) => return Ok(size),
            // The filesystem cannot preallocate: the file is sparse, and a full disk shows when a record is written.
            Err(Errno::EOPNOTSUPP) => {
                file.set_len(size)?;
                return Ok(size);
            }
            Err(Errno::ENOSPC | Errno::EDQUOT) if size > least => {
                // What was allocated before it failed is given back.
                file.set_len(0)?;
                size = align_up(size / 2, SEGMENT_STEP_BYTES).max(least);
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Gives the whole pages between `from` and `to` back to the filesystem; returns how many bytes they were. Where the
/// filesystem cannot, that is 0: the room comes back when the segment goes.
pub fn punch(file: &File, from: u64, to: u64) -> io::Result<u64> {
    let from = align_up(from.max(SEGMENT_HEADER_BYTES), PAGE_BYTES);
    let to = to & !(PAGE_BYTES - 1);
    if to <= from {
        return Ok(0);
    }
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    loop {
        match fallocate(file, mode, from as i64, (to - from) as i64) {
            Ok(()) => return Ok(to - from),
            Err(Errno::EINTR) => {}
            Err(Errno::EOPNOTSUPP) => return Ok(0),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Punches what dead records of a sealed segment still take, if it is more than the disk's own granularity explains:
/// a process ended between marking and punching. Their marks are flushed first.
pub fn punch_leftovers(file: &File, table: &Table) -> io::Result<()> {
    const SLACK_BYTES: u64 = 256 << 10;
    let dead: Vec<u32> = table
        .entries
        .iter()
        .zip(&table.dead)
        .filter_map(|(entry, dead)| dead.then_some(entry.position_units))
        .collect();
    if dead.is_empty() {
        return Ok(());
    }
    let metadata = file.metadata()?;
    let holes = holes(table, &dead);
    let hole_bytes: u64 = holes.iter().map(|(from, to)| to - from).sum();
    if metadata.blocks() * 512 + hole_bytes <= metadata.len() + SLACK_BYTES {
        return Ok(());
    }
    file.sync_data()?;
    for (from, to) in holes {
        punch(file, from, to)?;
    }
    Ok(())
}

/// The ranges that discarding the records at `newly_dead` (ascending positions, in units) sets free, whole pages
/// only: a page that dead records share with a live one stays.
pub fn holes(table: &Table, newly_dead: &[u32]) -> Vec<(u64, u64)> {
    let page_of = |at: u64| at & !(PAGE_BYTES - 1);
    let mut holes: Vec<(u64, u64)> = Vec::new();
    for index in newly_dead.iter().filter_map(|position| table.find(*position)) {
        let layout = table.entries[index].layout();
        // Outwards to the page's ends, as far as neighbours there are dead as well.
        let mut from = layout.position;
        for before in (0..index).rev() {
            if from <= page_of(layout.position) {
                break;
            }
            if !table.dead[before] {
                from = table.entries[before].layout().end();
                break;
            }
            from = table.entries[before].layout().position;
            if before == 0 {
                from = SEGMENT_HEADER_BYTES;
            }
        }
        let mut to = layout.end();
        for after in index + 1..table.entries.len() {
            if to >= align_up(layout.end(), PAGE_BYTES) || !table.dead[after] {
                break;
            }
            to = table.entries[after].layout().end();
        }
        let from = align_up(from.max(page_of(layout.position)), PAGE_BYTES);
        let to = page_of(to.min(align_up(layout.end(), PAGE_BYTES)));
        match holes.last_mut() {
            Some((_, end)) if from <= *end => *end = to.max(*end),
            _ if from < to => holes.push((from, to)),
            _ => {}
        }
    }
    holes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_as_they_are_made() {
        let name = file_name(0x2a, 0xfeed);
        assert_eq!(parse_file_name(&name), Some((0x2a, 0xfeed)));
        for other in [
            "segment-2a-feed",
            "segment-",
            "metadata.redb",
            &format!("{name}.old"),
            &name.to_uppercase(),
        ] {
            assert_eq!(parse_file_name(other), None, "{other}");
        }
    }
}
