//! Opening a segment that an earlier process left.
//!
//! A sealed segment is its footer: one read, and all of it is known to be on disk (see `Segment::seal`). An unsealed one is read from record header to record header, payloads
//! skipped. What lies above the highest flushed watermark in it is not known to be on disk: its payloads are
//! verified, what does not match is dropped as torn, what does is written again and flushed (a page that a failed
//! flush left in the page cache is clean and would not be written by a flush alone); then the segment is sealed.
//!
//! A record that cannot be read costs that record: the scan looks for the next one. Records are independent, so
//! keeping those behind a torn one is right.
//!
//! Invariant: nothing is returned as live that is not durable.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use quorumfs_proto::chunk::blocks_match;

use super::error::{ContentError, Stopped};
use super::record::{
    Entry, FORMAT_VERSION, Footer, Layout, Mark, PAGE_BYTES, RECORD_HEADER_BYTES, RecordHeader,
    SEGMENT_HEADER_BYTES, TRAILER_BYTES, Table, UNIT_BYTES, segment_version,
};
use super::segment::{Segment, SegmentState, punch_leftovers, read_table, write_record};

/// A segment as it was found.
pub struct Found {
    /// The segment, open for reading and in-place marks; its live records are not counted yet.
    pub segment: Segment,
    /// Its file.
    pub file: File,
    /// Its records.
    pub table: Table,
    /// Where the last one ends.
    pub end: u64,
    /// How it was found.
    pub condition: Condition,
}

/// How a segment was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// It had no usable footer and was scanned.
    pub scanned: bool,
    /// Its header did not match its checksum.
    pub header_damaged: bool,
    /// Records that were not known to be on disk, matched their checksums, and were written again.
    pub rewritten_records: u64,
    /// Records that were not known to be on disk and did not match.
    pub torn_records: u64,
}

/// Opens the segment at `path`. `Ok(None)`: it was made but never used, and can go.
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
    file.read_exact_at(&mut header[..header_bytes], 0)
        .map_err(failed("read"))?;
    match segment_version(&header) {
        Some(FORMAT_VERSION) => {}
        Some(found) => return Err(ContentError::UnknownVersion { path, found }),
        None => condition.header_damaged = true,
    }

    if let Some((footer, table)) = read_footer(&file, salt, file_bytes).map_err(failed("read"))? {
        // Room that is not given back now is given back with the segment.
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
    // Without room for a footer (it is kept free, but a filesystem that cannot preallocate may have none) the
    // segment stays open, and is sealed later.
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
    file.read_exact_at(&mut trailer, file_bytes - TRAILER_BYTES as u64)?;
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

fn scan(file: &File, salt: u64, file_bytes: u64) -> io::Result<Scanned> {
    let mut window = Window::new(file, file_bytes);
    let mut records: Vec<RecordHeader> = Vec::new();
    let mut watermark = 0;
    let mut at = SEGMENT_HEADER_BYTES;
    while at + RECORD_HEADER_BYTES as u64 <= file_bytes {
        match window.record(at, salt)? {
            Some(header) => {
                watermark = watermark.max(header.flushed);
                at = header.layout.end();
                records.push(header);
            }
            None => match window.next_candidate(at)? {
                Some(next) => at = next,
                None => break,
            },
        }
    }

    let mut scanned = Scanned {
        table: Table::default(),
        rewritten: 0,
        torn: 0,
    };
    for header in records {
        let entry = Entry::new(header.id, header.layout);
        // A dead record has no payload to verify any more.
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

/// Writes a record again, in its place, if its payload is what it should be.
fn rewrite_verified(file: &File, layout: Layout, salt: u64) -> io::Result<bool> {
    let mut head = vec![0; (layout.payload_at() - layout.position) as usize];
    let mut payload = vec![0; layout.length as usize];
    let read = file
        .read_exact_at(&mut head, layout.position)
        .and_then(|()| file.read_exact_at(&mut payload, layout.payload_at()));
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

/// Reads ahead while records lie close together, and little where payloads are skipped.
struct Window<'file> {
    file: &'file File,
    file_bytes: u64,
    position: u64,
    bytes: Vec<u8>,
}

impl<'file> Window<'file> {
    /// Enough for a page-aligned record's header and block CRCs.
    const LEAST_BYTES: u64 = 8 << 10;
    /// What is read when the last window was used up.
    const MOST_BYTES: u64 = 256 << 10;

    fn new(file: &'file File, file_bytes: u64) -> Window<'file> {
        Window {
            file,
            file_bytes,
            position: 0,
            bytes: Vec::new(),
        }
    }

    /// `length` bytes at `at`, fewer at the end of the file.
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
            self.file.read_exact_at(&mut self.bytes, at)?;
        }
        let from = (at - self.position) as usize;
        Ok(&self.bytes[from..from + end.saturating_sub(at) as usize])
    }

    /// The record at `at`, if there is one.
    fn record(&mut self, at: u64, salt: u64) -> io::Result<Option<RecordHeader>> {
        let claimed = RecordHeader::claimed(self.at(at, RECORD_HEADER_BYTES as u64)?, salt, at);
        let Some(claimed) = claimed else {
            return Ok(None);
        };
        let head = self.at(at, claimed.layout.head_bytes() as u64)?;
        Ok(RecordHeader::decode(head, salt, at).map(|(header, _)| header))
    }

    /// Where after `at` a record may begin: skips pages of zeros, and holes without reading them.
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
            // Not every filesystem knows where its holes are.
            Err(Errno::EINVAL) => Ok(Some(page_end)),
            Err(errno) => Err(errno.into()),
        }
    }
}
