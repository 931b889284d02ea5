//! The bytes of the log: how batches of records are written and found again. Pure: no files.
//!
//! ```text
//! file   = batch*  then zeros (preallocated)
//! batch  = magic[8]  file sequence u64  offset u64  body length u32  crc u32   then the body: record*
//! record = payload length u32  crc u32  kind u8  payload
//! ```
//!
//! All numbers are little-endian. Each CRC-32C covers the rest of its header or record and the position (file sequence
//! and offset), so that bytes from another position are never accepted.
//!
//! A batch is written with one write and flushed before the next is begun. So a whole batch header at an offset is the
//! **flushed watermark**: it proves that every byte before it was on stable storage. Only a batch without a later
//! header can be torn by a crash; damage before a header is damage to flushed data.

use std::ops::Range;

/// First bytes of each batch; the last one is the version of this format.
pub const MAGIC: [u8; 8] = *b"QFSWALB\x01";
/// Bytes of a batch's header.
pub const BATCH_HEADER_BYTES: usize = 32;
/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = 9;

/// The kind of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// First in each file: the state that earlier files leave, since they may be gone.
    Start,
    /// A log entry.
    Entry,
    /// The vote of the node.
    Vote,
    /// Entries after this one are removed.
    Truncate,
    /// Entries up to this one are purged.
    Purge,
    /// Entries up to this one are committed. This is a hint and is never waited for.
    Committed,
}

impl Kind {
    fn to_byte(self) -> u8 {
        match self {
            Kind::Start => 1,
            Kind::Entry => 2,
            Kind::Vote => 3,
            Kind::Truncate => 4,
            Kind::Purge => 5,
            Kind::Committed => 6,
        }
    }

    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Start,
            2 => Kind::Entry,
            3 => Kind::Vote,
            4 => Kind::Truncate,
            5 => Kind::Purge,
            6 => Kind::Committed,
            _ => return None,
        })
    }
}

/// A batch that is being built. Its position must be known from the start, since the checksums cover it.
#[derive(Debug)]
pub struct BatchWriter {
    file_sequence: u64,
    offset: u64,
    bytes: Vec<u8>,
}

impl BatchWriter {
    /// Begins a batch at `offset` of file `file_sequence`; `buffer` is reused.
    pub fn new(file_sequence: u64, offset: u64, mut buffer: Vec<u8>) -> BatchWriter {
        buffer.clear();
        buffer.resize(BATCH_HEADER_BYTES, 0);
        BatchWriter {
            file_sequence,
            offset,
            bytes: buffer,
        }
    }

    /// Adds a record whose payload `write` appends to the buffer; returns the record's range in the file.
    pub fn record(&mut self, kind: Kind, write: impl FnOnce(&mut Vec<u8>)) -> Range<u64> {
        let start = self.bytes.len();
        self.bytes.resize(start + RECORD_HEADER_BYTES, 0);
        write(&mut self.bytes);
        let length = (self.bytes.len() - start - RECORD_HEADER_BYTES) as u32;
        let at = self.offset + start as u64;
        self.bytes[start + 8] = kind.to_byte();
        self.bytes[start..start + 4].copy_from_slice(&length.to_le_bytes());
        let crc = record_crc(self.file_sequence, at, length, &self.bytes[start + 8..]);
        self.bytes[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
        at..self.offset + self.bytes.len() as u64
    }

    /// Returns the bytes of the batch.
    pub fn finish(mut self) -> Vec<u8> {
        let body = (self.bytes.len() - BATCH_HEADER_BYTES) as u32;
        self.bytes[..8].copy_from_slice(&MAGIC);
        self.bytes[8..16].copy_from_slice(&self.file_sequence.to_le_bytes());
        self.bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        self.bytes[24..28].copy_from_slice(&body.to_le_bytes());
        let crc = crc32c::crc32c(&self.bytes[..28]);
        self.bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        self.bytes
    }
}

fn record_crc(file_sequence: u64, at: u64, length: u32, kind_and_payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&file_sequence.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &at.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &length.to_le_bytes());
    crc32c::crc32c_append(crc, kind_and_payload)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Returns the body length of the batch whose whole, undamaged header is at `at`.
fn batch_body_at(bytes: &[u8], file_sequence: u64, at: usize) -> Option<u32> {
    let header = bytes.get(at..at + BATCH_HEADER_BYTES)?;
    let whole = header[..8] == MAGIC
        && long(header, 8)? == file_sequence
        && long(header, 16)? == at as u64
        && word(header, 28)? == crc32c::crc32c(&header[..28]);
    if whole { word(header, 24) } else { None }
}

/// Checks the record in `bytes` (header and payload, nothing else) at `at` of file `file_sequence`; returns its kind
/// and payload.
pub fn open_record(bytes: &[u8], file_sequence: u64, at: u64) -> Option<(Kind, &[u8])> {
    let length = word(bytes, 0)?;
    if bytes.len() != RECORD_HEADER_BYTES + length as usize {
        return None;
    }
    if word(bytes, 4)? != record_crc(file_sequence, at, length, &bytes[8..]) {
        return None;
    }
    Some((Kind::from_byte(bytes[8])?, &bytes[RECORD_HEADER_BYTES..]))
}

/// A record found in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundRecord {
    /// Kind of the record.
    pub kind: Kind,
    /// Its range in the file, header included.
    pub place: Range<usize>,
}

impl FoundRecord {
    /// Returns the payload from the scanned bytes.
    pub fn payload<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.place.start + RECORD_HEADER_BYTES..self.place.end]
    }
}

/// The contents of a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Scan {
    /// The records of its whole batches.
    pub records: Vec<FoundRecord>,
    /// Start of the last whole batch (0 if there is none).
    pub last_batch: usize,
    /// End of the last whole batch.
    pub end: usize,
    /// If flushed data is damaged (see the module documentation): the offset from which the first damaged byte is to be
    /// looked for.
    pub damaged_below_watermark: Option<usize>,
}

/// Scans a whole file.
pub fn scan(bytes: &[u8], file_sequence: u64) -> Scan {
    let mut scan = Scan {
        records: Vec::new(),
        last_batch: 0,
        end: 0,
        damaged_below_watermark: None,
    };
    loop {
        match scan_batch(bytes, file_sequence, scan.end) {
            Ok((mut records, end)) => {
                scan.records.append(&mut records);
                scan.last_batch = scan.end;
                scan.end = end;
            }
            Err(damage) => {
                if header_after(bytes, file_sequence, scan.end + 1) {
                    scan.damaged_below_watermark = Some(damage);
                }
                return scan;
            }
        }
    }
}

/// Returns the records of the batch at `at` and its end; as the error, the offset at which it is malformed.
fn scan_batch(bytes: &[u8], file_sequence: u64, at: usize) -> Result<(Vec<FoundRecord>, usize), usize> {
    let body = batch_body_at(bytes, file_sequence, at).ok_or(at)?;
    let end = at + BATCH_HEADER_BYTES + body as usize;
    if end > bytes.len() {
        return Err(at);
    }
    let mut records = Vec::new();
    let mut next = at + BATCH_HEADER_BYTES;
    while next < end {
        let length = word(bytes, next).ok_or(next)?;
        let place = next..next + RECORD_HEADER_BYTES + length as usize;
        if place.end > end {
            return Err(next);
        }
        let (kind, _) = open_record(&bytes[place.clone()], file_sequence, next as u64).ok_or(next)?;
        next = place.end;
        records.push(FoundRecord { kind, place });
    }
    Ok((records, end))
}

/// Whether a whole batch header exists at or after `from`.
fn header_after(bytes: &[u8], file_sequence: u64, from: usize) -> bool {
    let mut at = from;
    while let Some(found) = bytes
        .get(at..)
        .and_then(|rest| rest.iter().position(|byte| *byte == MAGIC[0]))
    {
        if batch_body_at(bytes, file_sequence, at + found).is_some() {
            return true;
        }
        at += found + 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(batches: &[&[&[u8]]]) -> Vec<u8> {
        let mut file = Vec::new();
        for records in batches {
            let mut batch = BatchWriter::new(7, file.len() as u64, Vec::new());
            for payload in *records {
                batch.record(Kind::Entry, |out| out.extend_from_slice(payload));
            }
            file.extend(batch.finish());
        }
        file
    }

    #[test]
    fn what_is_written_is_found() {
        let mut bytes = file(&[&[b"one", b""], &[b"three"]]);
        let end = bytes.len();
        bytes.resize(end + 1000, 0);
        let found = scan(&bytes, 7);
        let payloads: Vec<&[u8]> = found.records.iter().map(|r| r.payload(&bytes)).collect();
        assert_eq!(payloads, [&b"one"[..], b"", b"three"]);
        assert_eq!((found.end, found.damaged_below_watermark), (end, None));
        assert_eq!(scan(&bytes, 8).end, 0, "bytes of another file never pass");
    }

    #[test]
    fn damage_with_a_batch_after_it_is_told_from_a_torn_end() {
        let whole = file(&[&[b"first"], &[b"second", b"third"], &[b"fourth"]]);
        let ends: Vec<usize> = {
            let one = file(&[&[b"first"]]).len();
            let two = file(&[&[b"first"], &[b"second", b"third"]]).len();
            vec![one, two, whole.len()]
        };
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            let found = scan(&damaged, 7);
            let batch = ends.iter().position(|end| at < *end).unwrap();
            assert_eq!(
                found.end,
                if batch == 0 { 0 } else { ends[batch - 1] },
                "byte {at}"
            );
            assert_eq!(found.damaged_below_watermark.is_some(), batch < 2, "byte {at}");
        }
    }
}
