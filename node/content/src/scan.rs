//! Opening a segment that an earlier process left.
//!
//! A sealed segment is described by its footer: one read suffices, and all of the segment is known to be on disk (see
//! `Segment::seal`). An unsealed one is read from record header to record header; payloads are skipped. Records above
//! the highest flushed watermark in it are not known to be on disk: their payloads are verified, records that do not
//! match are dropped as torn, the others are written again and flushed (a page that a failed flush left in the page
//! cache is clean, and a flush alone would not write it). Then the segment is sealed.
//!
//! A record that cannot be read costs only that record: the scan looks for the next one. Records are independent, so it
//! is correct to keep those after a torn one.
//!
//! Invariant: no record is returned as live that is not durable.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use quorumfs_blocks::is_medium_error;
use quorumfs_proto::chunk::blocks_match;

use super::error::{ContentError, Stopped};
use super::record::{
    Entry, FORMAT_VERSION, Footer, Layout, Mark, PAGE_BYTES, RECORD_HEADER_BYTES, RecordHeader,
    SEGMENT_HEADER_BYTES, TRAILER_BYTES, Table, UNIT_BYTES, segment_version,
};
use super::segment::{Segment, SegmentState, punch_leftovers, read_exact_at, read_table, write_record};

/// An opened segment.
pub struct Found {
    /// The segment, open for reading and for marks in place; its live records are not counted yet.
    pub segment: Segment,
    /// The segment's file.
    pub file: File,
    /// The segment's records.
    pub table: Table,
    /// The end of the last record.
    pub end: u64,
    /// The condition of the segment.
    pub condition: Condition,
}

/// The condition in which a segment was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// The segment had no usable footer and was scanned.
    pub scanned: bool,
    /// The segment's header did not match its checksum.
    pub header_damaged: bool,
    /// Records that were not known to be on disk, matched their checksums, and were written again.
    pub rewritten_records: u64,
    /// Records that were not known to be on disk and did not match their checksums.
    pub torn_records: u64,
}

/// Opens the segment at `path`. Returns `Ok(None)` if it was created but never used, so that it can be removed.
pub fn open_segment(path: PathBuf, sequence: u32, salt: u64) -> Result<Option<Found>, ContentError> {
    let failed = |action| {
        let path = path.clone();
        move |source| ContentError::io(action, &path, source)
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(failed("open"))?;
    let file_bytes = file.metadata().map_err(failed("inspect"))?.len();
    let mut condition = Condition::default();
    let mut header = [0; SEGMENT_HEADER_BYTES as usize];
    let header_bytes = file_bytes.min(SEGMENT_HEADER_BYTES) as usize;
    read_exact_at(&file, &mut header[..header_bytes], 0).map_err(failed("read"))?;
    match segment_version(&header) {
        Some(FORMAT_VERSION) => {}
        Some(found) => return Err(ContentError::UnknownVersion { path, found }),
        None => condition.header_damaged = true,
    }

    if let Some((footer, table)) = read_footer(&file, salt, file_bytes).map_err(failed("read"))? {
        // Space that is not freed now is freed with the segment.
        if let Err(error) = punch_leftovers(&file, &table) {
            tracing::warn!(%error, path = %path.display(), "cannot punch holes for discarded chunks");
        }
        let segment = Segment::new(path, sequence, salt, SegmentState::Sealed(footer), 0);
        return Ok(Some(Found {
            segment,
            file,
            table,
            end: footer.position,
            condition,
        }));
    }

    condition.scanned = true;
    let scanned = scan(&file, salt, file_bytes).map_err(failed("scan"))?;
    condition.rewritten_records = scanned.rewritten;
    condition.torn_records = scanned.torn;
    if scanned.table.entries.is_empty() {
        return Ok(None);
    }
    let end = scanned
        .table
        .entries
        .last()
        .map_or(SEGMENT_HEADER_BYTES, |entry| entry.layout().end());
    let segment = Segment::new(path, sequence, salt, SegmentState::Open(scanned.table.clone()), 0);
    // If there is no space for a footer (space is reserved, except on a filesystem that cannot preallocate), the
    // segment stays open and is sealed later.
    segment.seal(&file, end, || {
        file.sync_data()
            .map_err(|source| Stopped::because("flush", &segment.path, &source))
    })?;
    Ok(Some(Found {
        segment,
        file,
        table: scanned.table,
        end,
        condition,
    }))
}

fn read_footer(file: &File, salt: u64, file_bytes: u64) -> io::Result<Option<(Footer, Table)>> {
    if file_bytes < SEGMENT_HEADER_BYTES + TRAILER_BYTES as u64 {
        return Ok(None);
    }
    let mut trailer = [0; TRAILER_BYTES];
    read_exact_at(file, &mut trailer, file_bytes - TRAILER_BYTES as u64)?;
    let Some(footer) = Footer::from_trailer(&trailer, salt, file_bytes) else {
        return Ok(None);
    };
    match read_table(file, &footer) {
        Ok(table) => Ok(Some((footer, table))),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(error),
    }
}

struct Scanned {
    table: Table,
    rewritten: u64,
    torn: u64,
}

/// How many pages of a file may be unreadable; they are treated as empty.
#[derive(Debug)]
pub struct Tolerance {
    unreadable_pages: u64,
    unreadable_pages_max: u64,
    /// The offset at which there were more; the rest was not read.
    gave_up_at: Option<u64>,
}

impl Tolerance {
    /// Tolerates up to this number of pages.
    pub fn pages(unreadable_pages_max: u64) -> Tolerance {
        Tolerance {
            unreadable_pages: 0,
            unreadable_pages_max,
            gave_up_at: None,
        }
    }

    /// Returns the offset from which the file was not read, because too many pages before it are unreadable.
    pub fn gave_up_at(&self) -> Option<u64> {
        self.gave_up_at
    }

    /// Returns the number of unreadable pages.
    pub fn unreadable_pages(&self) -> u64 {
        self.unreadable_pages
    }

    /// Reads `bytes` at `at`; unreadable pages become zeros.
    fn read(&mut self, file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let failed = match read_exact_at(file, bytes, at) {
            Err(error) if is_medium_error(&error) && self.unreadable_pages_max > 0 => error,
            result => return result,
        };
        let mut from = 0;
        while from < bytes.len() {
            let position = at + from as u64;
            let to = bytes
                .len()
                .min(from + (PAGE_BYTES - position % PAGE_BYTES) as usize);
            match read_exact_at(file, &mut bytes[from..to], position) {
                Err(error) if is_medium_error(&error) => {
                    if self.unreadable_pages >= self.unreadable_pages_max {
                        return Err(failed);
                    }
                    self.unreadable_pages += 1;
                    bytes[from..to].fill(0);
                }
                result => result?,
            }
            from = to;
        }
        Ok(())
    }
}

/// Returns the records of a segment by position, as far as `tolerance` allows.
pub fn readable_records(
    file: &File,
    salt: u64,
    file_bytes: u64,
    tolerance: &mut Tolerance,
) -> io::Result<Vec<RecordHeader>> {
    let gives_up = tolerance.unreadable_pages_max > 0;
    let mut window = Window::new(file, file_bytes, tolerance);
    let mut records: Vec<RecordHeader> = Vec::new();
    let mut at = SEGMENT_HEADER_BYTES;
    while at + RECORD_HEADER_BYTES as u64 <= file_bytes {
        let next = window.record(at, salt).and_then(|record| match record {
            Some(header) => {
                let end = header.layout.end();
                records.push(header);
                Ok(Some(end))
            }
            None => window.next_candidate(at),
        });
        match next {
            Ok(Some(next)) => at = next,
            Ok(None) => break,
            // The records found so far are returned.
            Err(error) if gives_up && is_medium_error(&error) => {
                window.tolerance.gave_up_at = Some(at);
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}

fn scan(file: &File, salt: u64, file_bytes: u64) -> io::Result<Scanned> {
    let records = readable_records(file, salt, file_bytes, &mut Tolerance::pages(0))?;
    let watermark = records.iter().map(|header| header.flushed).max().unwrap_or(0);

    let mut scanned = Scanned {
        table: Table::default(),
        rewritten: 0,
        torn: 0,
    };
    for header in records {
        let entry = Entry::new(header.id, header.layout);
        // The payload of a dead record is not verified: it may be gone.
        if header.mark == Mark::Live && header.layout.end() > watermark {
            if !rewrite_verified(file, header.layout, salt)? {
                scanned.torn += 1;
                continue;
            }
            scanned.rewritten += 1;
        }
        scanned.table.push(entry, header.mark);
    }
    Ok(scanned)
}

/// Writes a record again, in place, if its payload matches its checksums. Returns whether it does.
fn rewrite_verified(file: &File, layout: Layout, salt: u64) -> io::Result<bool> {
    let mut head = vec![0; (layout.payload_at() - layout.position) as usize];
    let mut payload = vec![0; layout.length as usize];
    let read = read_exact_at(file, &mut head, layout.position)
        .and_then(|()| read_exact_at(file, &mut payload, layout.payload_at()));
    match read {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(error) => return Err(error),
    }
    let matches = RecordHeader::decode(&head, salt, layout.position)
        .is_some_and(|(_, block_crcs)| blocks_match(&payload, &block_crcs));
    if matches {
        write_record(file, layout, &head, &payload)?;
    }
    Ok(matches)
}

/// A read-ahead window: large while records are close together, small where payloads are skipped.
struct Window<'file> {
    file: &'file File,
    tolerance: &'file mut Tolerance,
    file_bytes: u64,
    position: u64,
    bytes: Vec<u8>,
}

impl<'file> Window<'file> {
    /// Enough for the header and block CRCs of a page-aligned record.
    const LEAST_BYTES: u64 = 8 << 10;
    /// Size of the next window after one that was used up.
    const MOST_BYTES: u64 = 256 << 10;

    fn new(file: &'file File, file_bytes: u64, tolerance: &'file mut Tolerance) -> Window<'file> {
        Window {
            file,
            tolerance,
            file_bytes,
            position: 0,
            bytes: Vec::new(),
        }
    }

    /// Returns `length` bytes at `at`, fewer at the end of the file.
    fn at(&mut self, at: u64, length: u64) -> io::Result<&[u8]> {
        let held_end = self.position + self.bytes.len() as u64;
        let end = (at + length).min(self.file_bytes);
        if at < self.position || end > held_end {
            let close = at >= self.position && at <= held_end && !self.bytes.is_empty();
            let wanted = if close {
                Self::MOST_BYTES
            } else {
                Self::LEAST_BYTES
            };
            let take = wanted.max(length).min(self.file_bytes.saturating_sub(at));
            self.bytes.resize(take as usize, 0);
            self.position = at;
            if let Err(error) = self.tolerance.read(self.file, &mut self.bytes, at) {
                // The content of the window is unknown.
                self.bytes.clear();
                return Err(error);
            }
        }
        let from = (at - self.position) as usize;
        Ok(&self.bytes[from..from + end.saturating_sub(at) as usize])
    }

    /// Reads the record header at `at`, if there is one.
    fn record(&mut self, at: u64, salt: u64) -> io::Result<Option<RecordHeader>> {
        let claimed = RecordHeader::claimed(self.at(at, RECORD_HEADER_BYTES as u64)?, salt, at);
        let Some(claimed) = claimed else {
            return Ok(None);
        };
        let head = self.at(at, claimed.layout.head_bytes() as u64)?;
        Ok(RecordHeader::decode(head, salt, at).map(|(header, _)| header))
    }

    /// Returns the next position after `at` where a record may begin: skips pages of zeros, and holes without reading
    /// them.
    fn next_candidate(&mut self, at: u64) -> io::Result<Option<u64>> {
        let next = at + UNIT_BYTES;
        let page_end = ((at / PAGE_BYTES) + 1) * PAGE_BYTES;
        if next < page_end && self.at(next, page_end - next)?.iter().any(|byte| *byte != 0) {
            return Ok(Some(next));
        }
        if page_end >= self.file_bytes {
            return Ok(None);
        }
        match lseek(self.file, page_end as i64, Whence::SeekData) {
            Ok(data) => Ok(Some((data as u64 & !(UNIT_BYTES - 1)).max(page_end))),
            Err(Errno::ENXIO) => Ok(None),
            // Not every filesystem supports SEEK_DATA.
            Err(Errno::EINVAL) => Ok(Some(page_end)),
            Err(errno) => Err(errno.into()),
        }
    }
}
