//! The database's header. It is the only part that is written in place, and it is stored twice.
//!
//! - A header that has not been synced never overwrites the only synced one: until the next sync all headers go to the
//!   other slot. So a crash leaves the last synced header, or a newer one that is whole.
//! - After a sync the other slot gets the same header. If one is damaged later, the other is used.
//!
//! If both slots are whole, the one with the higher number is newer.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::layout::BLOCK_BYTES;

/// The first bytes of a block file. They differ from redb's, so that neither kind of file is taken for the other.
const MAGIC: [u8; 8] = *b"QFSblock";
/// The version of the layout.
const VERSION: u32 = 1;
/// Bytes of block 0 that are stored: redb uses the first 320.
const CONTENT_BYTES: usize = 1024;
/// Magic, version, number, content and checksum.
const SLOT_BYTES: usize = 8 + 4 + 4 + CONTENT_BYTES + 4;

/// What the slots of a file contain.
#[derive(Debug)]
pub enum Found {
    /// The newest whole header.
    Header(Box<Header>),
    /// A header written by a newer program.
    UnknownVersion(u32),
    /// Damage: neither slot is whole.
    Damaged,
}

/// The header in memory.
#[derive(Debug)]
pub struct Header {
    content: [u8; CONTENT_BYTES],
    number: u32,
    /// The slot that has the last synced header; the next header goes to the other one.
    synced_slot: u64,
    /// Whether the header was written since the last sync.
    is_unsynced: bool,
}

impl Header {
    /// Returns the header of a new file.
    pub fn new() -> Header {
        Header {
            content: [0; CONTENT_BYTES],
            number: 0,
            synced_slot: 1,
            is_unsynced: false,
        }
    }

    /// Reads both slots. The newest header is assumed to be synced: callers sync the file before they write.
    pub fn read(file: &File) -> io::Result<Found> {
        let mut newest: Option<Header> = None;
        let mut unknown = None;
        for slot in 0..2 {
            let mut bytes = [0; SLOT_BYTES];
            match file.read_exact_at(&mut bytes, slot * BLOCK_BYTES) {
                Ok(()) => {}
                // An unreadable slot is treated like a damaged one; the other slot may be whole.
                Err(error) if super::is_unreadable(&error) => continue,
                Err(error) => return Err(error),
            }
            match decode(&bytes) {
                Some((VERSION, number, content))
                    if newest.as_ref().is_none_or(|newest| newest.number < number) =>
                {
                    newest = Some(Header {
                        content,
                        number,
                        synced_slot: slot,
                        is_unsynced: false,
                    });
                }
                Some((VERSION, ..)) => {}
                Some((version, ..)) => unknown = Some(version),
                None => {}
            }
        }
        Ok(match (newest, unknown) {
            (_, Some(version)) => Found::UnknownVersion(version),
            (Some(header), None) => Found::Header(Box::new(header)),
            (None, None) => Found::Damaged,
        })
    }

    /// Returns the slot that the next header goes to.
    pub fn next_slot(&self) -> u64 {
        1 - self.synced_slot
    }

    /// Returns the number of the newest header. Blocks written from now on belong to the next one.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Copies bytes of block 0, to answer a read.
    pub fn copy_to(&self, offset: usize, out: &mut [u8]) {
        for (at, byte) in out.iter_mut().enumerate() {
            *byte = self.content.get(offset + at).copied().unwrap_or(0);
        }
    }

    /// Takes a write to block 0 and writes the header to the file.
    pub fn write(&mut self, file: &File, offset: usize, data: &[u8]) -> io::Result<()> {
        let place = self.content.get_mut(offset..offset + data.len());
        let place = place.ok_or_else(|| {
            let reason = format!("{} bytes at {offset} of a database's header", data.len());
            io::Error::new(io::ErrorKind::InvalidInput, reason)
        })?;
        place.copy_from_slice(data);
        self.number += 1;
        self.is_unsynced = true;
        self.put(file, self.next_slot())
    }

    /// Records that everything written has been synced.
    pub fn synced(&mut self, file: &File) -> io::Result<()> {
        if std::mem::take(&mut self.is_unsynced) {
            self.synced_slot = self.next_slot();
            self.put(file, self.next_slot())?;
        }
        Ok(())
    }

    fn put(&self, file: &File, slot: u64) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(SLOT_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&self.content);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        file.write_all_at(&bytes, slot * BLOCK_BYTES)
    }
}

/// Returns version, number and content of a slot; `None` if the slot is not whole.
fn decode(bytes: &[u8; SLOT_BYTES]) -> Option<(u32, u32, [u8; CONTENT_BYTES])> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) || !body.starts_with(&MAGIC) {
        return None;
    }
    let number_at = |at: usize| Some(u32::from_le_bytes(body.get(at..at + 4)?.try_into().ok()?));
    let content = body.last_chunk::<CONTENT_BYTES>()?;
    Some((number_at(8)?, number_at(12)?, *content))
}
