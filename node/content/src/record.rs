//! The bytes of a segment: how records, the segment's header and its footer are encoded and recognised.
//!
//! ```text
//! segment  = header (64 bytes)  record*  [footer]
//! record   = mark  salt  session  counter  length  position  flushed  crc  sha256     80 bytes
//!            CRC-32C of each 4 KiB block                                               4 bytes each
//!            [zeros up to the next page, if the payload has 64 KiB or more]  payload  [zeros up to 8 bytes]
//! footer   = entry* (24 bytes each)  state* (one byte each)  [zeros up to 8 bytes]  trailer (64 bytes)
//! ```
//!
//! All numbers are little-endian; positions are counted in units of 8 bytes, to which records are aligned. Small
//! records are packed closely (a payload of 1 KiB costs 84 bytes more, not a page). A large payload begins on a page,
//! so that reading a block touches one page and a dead payload can be punched out whole; that costs at most one page in
//! 16.
//!
//! Invariants:
//! - A record is recognised by its salt (random, in the segment's file name), its own position and a CRC over header
//!   and block CRCs. So bytes of a payload that look like a record, even a copy of a segment, are never taken for one.
//! - Only the mark is outside the CRC: it changes in place when the chunk is discarded. It is eight aligned bytes in
//!   one sector, so it is always one of the two marks. Discarding therefore needs no space on the disk.
//! - `flushed` is the length of the segment that was known to be on disk when the record was written: only records
//!   above the highest such value may be torn.
//! - A footer's states are outside its CRC for the same reason.
//!
//! This module does not know files.

use quorumfs_proto::limits::{BLOCK_BYTES, CHUNK_BYTES_MAX};
use quorumfs_proto::{ChunkId, SessionId, Sha256};

/// Version of the whole format.
pub const FORMAT_VERSION: u32 = 1;
/// Alignment of records, and the unit of positions.
pub const UNIT_BYTES: u64 = 8;
/// Page size and filesystem block size: the granularity of holes.
pub const PAGE_BYTES: u64 = 4096;
/// Size of a segment's header.
pub const SEGMENT_HEADER_BYTES: u64 = 64;
/// Size of a record's header.
pub const RECORD_HEADER_BYTES: usize = 80;
/// Payloads of this size and more begin on a page.
pub const PAGE_ALIGNED_FROM_BYTES: u32 = 64 << 10;
/// Size of a footer's trailer.
pub const TRAILER_BYTES: usize = 64;
/// Size of a footer's entry.
const ENTRY_BYTES: usize = 24;

const SEGMENT_MAGIC: u64 = u64::from_le_bytes(*b"QFSsegmt");
const TRAILER_MAGIC: u64 = u64::from_le_bytes(*b"QFSfoot1");
const LIVE_MARK: u64 = u64::from_le_bytes(*b"QFSlive1");
/// The first 8 bytes of a discarded record.
pub const DEAD_MARK: [u8; 8] = *b"QFSdead1";
/// The state of a discarded record in the footer.
pub const DEAD_STATE: u8 = 0xDD;

/// Length of the mark; the CRC covers what follows.
const MARK_BYTES: usize = 8;
const CRC_AT: usize = 44;

/// Rounds up to a multiple of `step`, a power of two.
pub const fn align_up(value: u64, step: u64) -> u64 {
    (value + step - 1) & !(step - 1)
}

/// Returns the number of blocks, and so of CRCs, of a payload.
pub const fn blocks(length: u32) -> usize {
    length.div_ceil(BLOCK_BYTES) as usize
}

/// The positions of the parts of a record in its segment. They follow from its position and its payload's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Position of the record's header, in bytes.
    pub position: u64,
    /// Length of the payload, in bytes.
    pub length: u32,
}

impl Layout {
    /// Returns the size of header and block CRCs.
    pub const fn head_bytes(&self) -> usize {
        RECORD_HEADER_BYTES + 4 * blocks(self.length)
    }

    /// Returns the position of the payload.
    pub const fn payload_at(&self) -> u64 {
        let head_end = self.position + self.head_bytes() as u64;
        if self.length >= PAGE_ALIGNED_FROM_BYTES {
            align_up(head_end, PAGE_BYTES)
        } else {
            head_end
        }
    }

    /// Returns the first position at which the next record may begin.
    pub const fn end(&self) -> u64 {
        align_up(self.payload_at() + self.length as u64, UNIT_BYTES)
    }

    /// Returns the bytes that the record occupies.
    pub const fn record_bytes(&self) -> u64 {
        self.end() - self.position
    }
}

/// Whether a record's chunk is still held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The chunk is held.
    Live,
    /// The chunk is discarded; the payload may be gone.
    Dead,
}

/// A record's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// Whether the chunk is still held.
    pub mark: Mark,
    /// The chunk's id.
    pub id: ChunkId,
    /// The record's position and its payload's length.
    pub layout: Layout,
    /// The length of the segment that was known to be on disk.
    pub flushed: u64,
    /// The payload's digest.
    pub sha256: Sha256,
}

fn units(position: u64) -> u32 {
    debug_assert!(position.is_multiple_of(UNIT_BYTES));
    u32::try_from(position / UNIT_BYTES).expect("segments are bounded far below 32 GiB")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn record_crc(head: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&head[MARK_BYTES..CRC_AT]);
    crc32c::crc32c_append(crc, &head[CRC_AT + 4..])
}

impl RecordHeader {
    /// Encodes the bytes before the payload: header, block CRCs, and the padding that aligns the payload.
    pub fn encode(&self, salt: u64, block_crcs: &[u32]) -> Vec<u8> {
        let layout = self.layout;
        let before_payload = (layout.payload_at() - layout.position) as usize;
        let mut out = Vec::with_capacity(before_payload);
        match self.mark {
            Mark::Live => out.extend_from_slice(&LIVE_MARK.to_le_bytes()),
            Mark::Dead => out.extend_from_slice(&DEAD_MARK),
        }
        out.extend_from_slice(&salt.to_le_bytes());
        out.extend_from_slice(&self.id.session.0.to_le_bytes());
        out.extend_from_slice(&self.id.counter.to_le_bytes());
        out.extend_from_slice(&layout.length.to_le_bytes());
        out.extend_from_slice(&units(layout.position).to_le_bytes());
        out.extend_from_slice(&units(self.flushed).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.sha256.0);
        for crc in block_crcs {
            out.extend_from_slice(&crc.to_le_bytes());
        }
        let crc = record_crc(&out);
        out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out.resize(before_payload, 0);
        out
    }

    /// Decodes the first [`RECORD_HEADER_BYTES`] of a record at `position`, without a check of the CRC: that needs the
    /// length that is stated here.
    pub fn claimed(bytes: &[u8], salt: u64, position: u64) -> Option<RecordHeader> {
        if bytes.len() < RECORD_HEADER_BYTES || u64_at(bytes, 8) != salt {
            return None;
        }
        let mark = match u64_at(bytes, 0) {
            LIVE_MARK => Mark::Live,
            mark if mark.to_le_bytes() == DEAD_MARK => Mark::Dead,
            _ => return None,
        };
        let length = u32_at(bytes, 32);
        if length == 0 || length > CHUNK_BYTES_MAX || u64::from(u32_at(bytes, 36)) * UNIT_BYTES != position {
            return None;
        }
        Some(RecordHeader {
            mark,
            id: ChunkId {
                session: SessionId(u64_at(bytes, 16)),
                counter: u64_at(bytes, 24),
            },
            layout: Layout { position, length },
            flushed: u64::from(u32_at(bytes, 40)) * UNIT_BYTES,
            sha256: Sha256(bytes[48..80].try_into().expect("32 bytes")),
        })
    }

    /// Decodes the header and block CRCs in `head`, which has [`Layout::head_bytes`] bytes; `None` if they are not
    /// valid.
    pub fn decode(head: &[u8], salt: u64, position: u64) -> Option<(RecordHeader, Vec<u32>)> {
        let header = RecordHeader::claimed(head, salt, position)?;
        let head = head.get(..header.layout.head_bytes())?;
        if record_crc(head) != u32_at(head, CRC_AT) {
            return None;
        }
        let crcs = head[RECORD_HEADER_BYTES..]
            .chunks_exact(4)
            .map(|crc| u32_at(crc, 0))
            .collect();
        Some((header, crcs))
    }
}

/// Encodes a segment's header. It only identifies the file; everything else is in its name and its records.
pub fn encode_segment_header(sequence: u32, salt: u64) -> [u8; SEGMENT_HEADER_BYTES as usize] {
    let mut out = [0; SEGMENT_HEADER_BYTES as usize];
    out[..8].copy_from_slice(&SEGMENT_MAGIC.to_le_bytes());
    out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&sequence.to_le_bytes());
    out[16..24].copy_from_slice(&salt.to_le_bytes());
    let crc = crc32c::crc32c(&out[..24]);
    out[24..28].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Returns the format version in a segment's header; `None` if the header is damaged or was never written.
pub fn segment_version(header: &[u8]) -> Option<u32> {
    let header = header.get(..SEGMENT_HEADER_BYTES as usize)?;
    (u64_at(header, 0) == SEGMENT_MAGIC && crc32c::crc32c(&header[..24]) == u32_at(header, 24))
        .then(|| u32_at(header, 8))
}

/// A record as listed in the footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Id of the chunk.
    pub id: ChunkId,
    /// The record's position, in units.
    pub position_units: u32,
    /// The payload's length, in bytes.
    pub length: u32,
}

impl Entry {
    /// Returns the entry of the record at `layout`.
    pub fn new(id: ChunkId, layout: Layout) -> Entry {
        Entry {
            id,
            position_units: units(layout.position),
            length: layout.length,
        }
    }

    /// Returns the record's layout.
    pub fn layout(&self) -> Layout {
        Layout {
            position: u64::from(self.position_units) * UNIT_BYTES,
            length: self.length,
        }
    }
}

/// All records of a segment by position, and whether each is dead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The records, by ascending position.
    pub entries: Vec<Entry>,
    /// For each entry, whether it is dead.
    pub dead: Vec<bool>,
}

impl Table {
    /// Adds a record after all others.
    pub fn push(&mut self, entry: Entry, mark: Mark) {
        debug_assert!(
            self.entries
                .last()
                .is_none_or(|last| last.position_units < entry.position_units)
        );
        self.entries.push(entry);
        self.dead.push(mark == Mark::Dead);
    }

    /// Returns the index of the entry at `position_units`.
    pub fn find(&self, position_units: u32) -> Option<usize> {
        self.entries
            .binary_search_by_key(&position_units, |entry| entry.position_units)
            .ok()
    }

    /// Returns the live entries by position.
    pub fn live(&self) -> impl Iterator<Item = &Entry> {
        self.entries
            .iter()
            .zip(&self.dead)
            .filter(|(_, dead)| !**dead)
            .map(|(entry, _)| entry)
    }
}

/// The positions of the parts of a footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Position of the footer: after the last record.
    pub position: u64,
    /// Number of entries.
    pub count: u32,
}

impl Footer {
    /// Returns the size of a footer of `count` entries.
    pub const fn bytes(count: usize) -> u64 {
        align_up((count * (ENTRY_BYTES + 1)) as u64, UNIT_BYTES) + TRAILER_BYTES as u64
    }

    /// Returns the position of the state of entry `index`.
    pub fn state_at(&self, index: usize) -> u64 {
        self.position + (self.count as usize * ENTRY_BYTES + index) as u64
    }

    /// Returns the end of the footer, which is the end of the segment.
    pub fn end(&self) -> u64 {
        self.position + Footer::bytes(self.count as usize)
    }

    /// Encodes a footer at `position` for `table`.
    pub fn encode(position: u64, salt: u64, table: &Table) -> (Footer, Vec<u8>) {
        let count = u32::try_from(table.entries.len()).expect("records of a segment are bounded");
        let footer = Footer { position, count };
        let mut out = Vec::with_capacity((footer.end() - position) as usize);
        for entry in &table.entries {
            out.extend_from_slice(&entry.id.session.0.to_le_bytes());
            out.extend_from_slice(&entry.id.counter.to_le_bytes());
            out.extend_from_slice(&entry.position_units.to_le_bytes());
            out.extend_from_slice(&entry.length.to_le_bytes());
        }
        let entries_crc = crc32c::crc32c(&out);
        out.extend(table.dead.iter().map(|dead| if *dead { DEAD_STATE } else { 0 }));
        out.resize(align_up(out.len() as u64, UNIT_BYTES) as usize, 0);
        let mut trailer = [0; TRAILER_BYTES];
        trailer[..8].copy_from_slice(&TRAILER_MAGIC.to_le_bytes());
        trailer[8..16].copy_from_slice(&salt.to_le_bytes());
        trailer[16..24].copy_from_slice(&position.to_le_bytes());
        trailer[24..28].copy_from_slice(&count.to_le_bytes());
        trailer[28..32].copy_from_slice(&entries_crc.to_le_bytes());
        let crc = crc32c::crc32c(&trailer[..32]);
        trailer[32..36].copy_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&trailer);
        (footer, out)
    }

    /// Decodes the footer from `trailer`, the last bytes of a file of `file_bytes`.
    pub fn from_trailer(trailer: &[u8], salt: u64, file_bytes: u64) -> Option<Footer> {
        let trailer = trailer.get(..TRAILER_BYTES)?;
        if u64_at(trailer, 0) != TRAILER_MAGIC
            || u64_at(trailer, 8) != salt
            || crc32c::crc32c(&trailer[..32]) != u32_at(trailer, 32)
        {
            return None;
        }
        let footer = Footer {
            position: u64_at(trailer, 16),
            count: u32_at(trailer, 24),
        };
        (footer.position < file_bytes && footer.end() == file_bytes).then_some(footer)
    }

    /// Decodes the table from `bytes`, the whole footer.
    pub fn decode(&self, bytes: &[u8]) -> Option<Table> {
        let count = self.count as usize;
        let trailer = &bytes.get(bytes.len().checked_sub(TRAILER_BYTES)?..)?;
        let entries = bytes.get(..count * ENTRY_BYTES)?;
        let states = bytes.get(count * ENTRY_BYTES..count * (ENTRY_BYTES + 1))?;
        if crc32c::crc32c(entries) != u32_at(trailer, 28) {
            return None;
        }
        let entries = entries
            .chunks_exact(ENTRY_BYTES)
            .map(|entry| Entry {
                id: ChunkId {
                    session: SessionId(u64_at(entry, 0)),
                    counter: u64_at(entry, 8),
                },
                position_units: u32_at(entry, 16),
                length: u32_at(entry, 20),
            })
            .collect();
        Some(Table {
            entries,
            dead: states.iter().map(|state| *state == DEAD_STATE).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use quorumfs_proto::chunk::block_crcs;

    use super::*;

    fn chunk_ids() -> impl Strategy<Value = ChunkId> {
        (any::<u64>(), any::<u64>()).prop_map(|(session, counter)| ChunkId {
            session: SessionId(session),
            counter,
        })
    }

    proptest! {
        #[test]
        fn a_record_is_read_as_it_was_written_and_no_changed_byte_passes(
            id in chunk_ids(),
            payload in prop::collection::vec(any::<u8>(), 1..20_000),
            salt: u64,
            position in 0u64..1 << 32,
            flushed in 0u64..1 << 32,
            change in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let layout = Layout { position: position * UNIT_BYTES, length: payload.len() as u32 };
            let header = RecordHeader {
                mark: Mark::Live,
                id,
                layout,
                flushed: flushed * UNIT_BYTES,
                sha256: Sha256::of(&payload),
            };
            let crcs = block_crcs(&payload);
            let mut head = header.encode(salt, &crcs);
            prop_assert_eq!(head.len() as u64, layout.payload_at() - layout.position);
            let decoded = RecordHeader::decode(&head, salt, layout.position);
            prop_assert_eq!(decoded, Some((header.clone(), crcs.clone())));
            prop_assert!(RecordHeader::decode(&head, salt ^ 1, layout.position).is_none());
            prop_assert!(RecordHeader::decode(&head, salt, layout.position + 8).is_none());

            head[..8].copy_from_slice(&DEAD_MARK);
            let dead = RecordHeader { mark: Mark::Dead, ..header };
            prop_assert_eq!(RecordHeader::decode(&head, salt, layout.position), Some((dead, crcs)));

            let at = change.index(layout.head_bytes());
            head[at] ^= 1 << bit;
            prop_assert!(RecordHeader::decode(&head, salt, layout.position).is_none(), "byte {}", at);
        }

        #[test]
        fn layouts_are_aligned_and_waste_little(position in 0u64..1 << 28, length in 1u32..=CHUNK_BYTES_MAX) {
            let layout = Layout { position: position * UNIT_BYTES, length };
            prop_assert!(layout.end().is_multiple_of(UNIT_BYTES));
            prop_assert!(layout.payload_at() >= layout.position + layout.head_bytes() as u64);
            let overhead = layout.record_bytes() - u64::from(length);
            if length >= PAGE_ALIGNED_FROM_BYTES {
                prop_assert!(layout.payload_at().is_multiple_of(PAGE_BYTES));
                prop_assert!(overhead < PAGE_BYTES + 8 + layout.head_bytes() as u64);
            } else {
                prop_assert!(overhead < 8 + layout.head_bytes() as u64);
            }
        }

        #[test]
        fn a_footer_is_read_as_it_was_written(
            records in prop::collection::vec((chunk_ids(), 1u32..10_000, any::<bool>()), 0..50),
            salt: u64,
            change in any::<prop::sample::Index>(),
        ) {
            let mut table = Table::default();
            let mut end = SEGMENT_HEADER_BYTES;
            for (id, length, dead) in records {
                let layout = Layout { position: end, length };
                table.push(Entry::new(id, layout), if dead { Mark::Dead } else { Mark::Live });
                end = layout.end();
            }
            let (footer, mut bytes) = Footer::encode(end, salt, &table);
            let file_bytes = end + bytes.len() as u64;
            prop_assert_eq!(footer.end(), file_bytes);
            let trailer = &bytes[bytes.len() - TRAILER_BYTES..];
            prop_assert_eq!(Footer::from_trailer(trailer, salt, file_bytes), Some(footer));
            prop_assert!(Footer::from_trailer(trailer, salt, file_bytes + 8).is_none());
            prop_assert_eq!(footer.decode(&bytes), Some(table.clone()));
            if !table.entries.is_empty() {
                let first = (footer.state_at(0) - end) as usize;
                prop_assert_eq!(bytes[first] == DEAD_STATE, table.dead[0]);
                let at = change.index(table.entries.len() * ENTRY_BYTES);
                bytes[at] ^= 1;
                prop_assert!(footer.decode(&bytes).is_none());
            }
        }
    }

    #[test]
    fn a_segment_header_names_its_version() {
        let mut header = encode_segment_header(7, 8);
        assert_eq!(segment_version(&header), Some(FORMAT_VERSION));
        header[9] ^= 1;
        assert_eq!(segment_version(&header), None);
    }
}
