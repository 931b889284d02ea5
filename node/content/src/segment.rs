//! One segment: a preallocated file of records. Records are appended until it is full; then it is sealed with a footer.
//!
//! Invariants:
//! - Records are only appended. In place change only the mark of a discarded record, and its state in the footer.
//! - While a segment is open, its table is in memory and space for its footer is reserved in the file, so that sealing
//!   needs no new space. Sealing frees the unused part of the preallocation.
//! - `flushed` never exceeds what a successful flush covered.
//!
//! This module does not know the index or threads.

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

/// Most records of a segment. It bounds the table that an open segment keeps in memory (25 bytes each) and the bytes
/// that a discard reads of a sealed one. 256 MiB hold as many chunks of 4 KiB.
pub const SEGMENT_RECORDS_MAX: usize = 1 << 16;

/// Preallocations are multiples of this.
const SEGMENT_STEP_BYTES: u64 = 64 << 10;

/// `flushed` of a sealed segment: the whole file.
const ALL: u64 = u64::MAX;

/// Where a segment's table is.
#[derive(Debug)]
pub enum SegmentState {
    /// The table is in memory.
    Open(Table),
    /// In the file's footer.
    Sealed(Footer),
}

/// A segment in use.
#[derive(Debug)]
pub struct Segment {
    /// The sequence number, which identifies the segment in the index; it counts up.
    pub sequence: u32,
    /// Random number in the segment's records, which distinguishes them from other bytes.
    pub salt: u64,
    /// Path of the file.
    pub path: PathBuf,
    /// Locked while the table changes and while marks or the footer are written.
    pub state: Mutex<SegmentState>,
    live_records: AtomicU32,
    live_bytes: AtomicU64,
    flushed: AtomicU64,
    removed: AtomicBool,
}

/// Returns the file name of a segment.
pub fn file_name(sequence: u32, salt: u64) -> String {
    format!("segment-{sequence:08x}-{salt:016x}")
}

/// Parses sequence and salt from a segment's file name.
pub fn parse_file_name(name: &str) -> Option<(u32, u64)> {
    let (sequence, salt) = name.strip_prefix("segment-")?.split_once('-')?;
    let parsed = (
        u32::from_str_radix(sequence, 16).ok()?,
        u64::from_str_radix(salt, 16).ok()?,
    );
    (file_name(parsed.0, parsed.1) == name).then_some(parsed)
}

impl Segment {
    /// Makes a segment of which `flushed` bytes are on disk; no live record is counted yet.
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

    /// Creates an empty segment of `wanted` bytes, or of fewer if the disk has less space, but at least `least`. It is
    /// not durable: the caller flushes file and folder before it acknowledges anything in it.
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
                // Nothing refers to the file yet. If it cannot be removed, the next opening of the store finds it empty
                // and removes it.
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

    /// Removes a live record from the counts.
    pub fn remove_live(&self, layout: Layout) {
        self.live_records.fetch_sub(1, Ordering::AcqRel);
        self.live_bytes.fetch_sub(layout.record_bytes(), Ordering::AcqRel);
    }

    /// Returns the number of live records.
    pub fn live_records(&self) -> u32 {
        self.live_records.load(Ordering::Acquire)
    }

    /// Returns the bytes of the live records.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes.load(Ordering::Acquire)
    }

    /// Returns the position up to which records are known to be on disk.
    pub fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Acquire)
    }

    /// Records that a flush succeeded that began when the segment ended at `end`.
    pub fn set_flushed(&self, end: u64) {
        self.flushed.fetch_max(end, Ordering::AcqRel);
    }

    /// Whether the file has been unlinked.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::SeqCst)
    }

    /// Records that the file has been unlinked.
    pub fn set_removed(&self) {
        self.removed.store(true, Ordering::SeqCst);
    }

    /// Whether the segment has its footer.
    pub fn is_sealed(&self) -> bool {
        matches!(*self.state.lock(), SegmentState::Sealed(_))
    }

    /// Flushes the segment, which ends at `end`, and seals it if its footer can be written now.
    ///
    /// The footer's trailer is written last, after the flush, and only if the flush succeeded. So a reader that finds
    /// the trailer, even in the page cache that a killed process left, knows that everything before it is on disk. If
    /// the trailer is lost, the segment is scanned. Discards in this segment wait meanwhile.
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
            // The records are whole and on disk; the next flush tries to write the footer again.
            Err(error) => {
                tracing::warn!(%error, path = %self.path.display(), "cannot write the footer of a content segment; it stays open, and the next flush tries again");
                Ok(Sealing::Open)
            }
        }
    }

    /// Marks the records at `positions` (in units) dead in place. Returns the new table and whether the segment is
    /// sealed. The marks are not durable yet.
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

    /// Returns the table, from memory or from the file.
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
    /// Not yet; the next group flush reaches it.
    Open,
    /// Yes; a caller that changes the segment flushes it.
    Sealed,
}

/// Reads exactly `bytes` at `at`. All reads of a segment except those of single chunks use this function.
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

/// Writes a record without copying the payload: head, payload, and the padding up to the next record.
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

/// Starts write-out of the bytes just written, so that the disk works while the next records are copied and the flush
/// has less to do. This is a hint: failures are reported by the flush.
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

/// Drops the cached pages of this range, so that the next read goes to the disk. Pages not yet written stay. This is a
/// hint.
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

/// Preallocates `file` as near to `wanted` bytes as the disk allows, at least `least`. Returns the size.
fn preallocate(file: &File, wanted: u64, least: u64) -> io::Result<u64> {
    let least = align_up(least, SEGMENT_STEP_BYTES);
    let mut size = align_up(wanted, SEGMENT_STEP_BYTES).max(least);
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, size as i64) {
            Ok(()) => return Ok(size),
            // The filesystem cannot preallocate: the file is sparse, and a full disk is detected when a record is
            // written.
            Err(Errno::EOPNOTSUPP) => {
                file.set_len(size)?;
                return Ok(size);
            }
            Err(Errno::ENOSPC | Errno::EDQUOT) if size > least => {
                // Frees what was allocated before the failure.
                file.set_len(0)?;
                size = align_up(size / 2, SEGMENT_STEP_BYTES).max(least);
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Frees the whole pages between `from` and `to`; returns the number of bytes freed. If the filesystem cannot punch
/// holes, that is 0, and the space is freed when the segment is removed.
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

/// Punches the space that dead records of a sealed segment still occupy, if it is more than the disk's own granularity
/// explains: a process ended between marking and punching. The marks are flushed first.
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

/// Returns the ranges that become free when the records at `newly_dead` (ascending positions, in units) are discarded.
/// They are whole pages: a page that dead records share with a live one stays.
pub fn holes(table: &Table, newly_dead: &[u32]) -> Vec<(u64, u64)> {
    let page_of = |at: u64| at & !(PAGE_BYTES - 1);
    let mut holes: Vec<(u64, u64)> = Vec::new();
    for index in newly_dead.iter().filter_map(|position| table.find(*position)) {
        let layout = table.entries[index].layout();
        // The range is extended to the page boundaries if the neighbours there are dead too.
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
