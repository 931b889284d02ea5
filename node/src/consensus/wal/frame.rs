//! The bytes of the log: batches of records, how they are written and how they are found again. Pure: no
//! files.
//!
//! ```text
//! file   = batch*  then zeros (preallocated)
//! batch  = magic[8]  file sequence u64  offset u64  body length u32  crc u32   then the body: record*
//! record = payload length u32  crc u32  kind u8  payload
//! ```
//!
//! All little-endian; each CRC-32C covers what follows or precedes it in its header, and the position (file
//! sequence and offset), so that bytes that belong elsewhere never pass.
//!
//! A batch is written with one write and flushed before the next is begun. So a whole batch header at an
//! offset is the **flushed watermark**: it proves that every byte before it was on stable storage. Only a
//! batch after which there is no header can be torn by a crash; damage that has a header after it is damage
//! to what had been flushed.

use std::ops::Range;

/// Begins each batch; the last byte is the version of this format.
pub const MAGIC: [u8; 8] = *b"QFSWALB\x01";
/// Bytes of a batch's header.
pub const BATCH_HEADER_BYTES: usize = 32;
/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = 9;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// First in each file: the state that earlier files leave, as they may be gone.
    Start,
    /// A log entry.
    Entry,
    /// The vote.
    Vote,
    /// Entries after this one are gone.
    Truncate,
    /// Entries up to this one are gone.
    Purge,
    /// Entries up to this one are committed. A hint: it is never waited for.
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

/// A batch being put together. Its place must be known from the start, since the checksums cover it.
#[derive(Debug)]
pub struct BatchWriter {
    file_sequence: u64,
    offset: u64,
    bytes: Vec<u8>,
}

impl BatchWriter {
    /// For a batch at `offset` of file `file_sequence`; `buffer` is reused.
    pub fn new(file_sequence: u64, offset: u64, mut buffer: Vec<u8>) -> BatchWriter {
        buffer.clear();
        buffer.resize(BATCH_HEADER_BYTES, 0);
        BatchWriter {
            file_sequence,
            offset,
            bytes: buffer,
        }
    }

    /// Adds a record whose payload `write` appends to the buffer; answers where in the file the record lies.
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

    /// The whole batch.
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

/// The body length of the batch whose whole, undamaged header lies at `at`.
fn batch_body_at(bytes: &[u8], file_sequence: u64, at: usize) -> Option<u32> {
    let header = bytes.get(at..at + BATCH_HEADER_BYTES)?;
    let whole = header[..8] == MAGIC
        && long(header, 8)? == file_sequence
        && long(header, 16)? == at as u64
        && word(header, 28)? == crc32c::crc32c(&header[..28]);
    if whole { word(header, 24) } else { None }
}

/// Checks the record in `bytes` (header and payload, nothing else) that lies at `at` of file `file_sequence`;
/// answers its kind and payload.
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

/// A record found in a file: its place, header included, and its payload's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundRecord {
    /// What it says.
    pub kind: Kind,
    /// Where it lies, header included.
    pub place: Range<usize>,
}

impl FoundRecord {
    /// Its payload, out of the bytes that were scanned.
    pub fn payload<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.place.start + RECORD_HEADER_BYTES..self.place.end]
    }
}

/// What a file holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Scan {
    /// The records of its whole batches.
    pub records: Vec<FoundRecord>,
    /// Where the last whole batch begins (0 if there is none).
    pub last_batch: usize,
    /// Where the last whole batch ends.
    pub end: usize,
    /// Where the first byte that is not as it was written may be looked for, if something that had been
    /// flushed is damaged (see the module's text).
    pub damaged_below_watermark: Option<usize>,
}

/// Reads all of a file.
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

/// The records of the batch at `at` and where it ends; else where it stops being one.
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

/// Whether a whole batch header lies anywhere from `from` on.
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
