//! Parts of chunks as they are handed out, and the room for chunks.

use bytes::Bytes;

/// Whole blocks of a chunk, verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkRange {
    /// Where in the chunk `payload` begins; a multiple of the block size.
    pub offset: u32,
    /// The bytes.
    pub payload: Bytes,
    /// The CRC-32C of each block of them.
    pub block_crcs: Vec<u32>,
}

impl ChunkRange {
    /// Exactly the bytes `offset..offset + length` of the chunk, if they are all in this range.
    pub fn exactly(&self, offset: u32, length: u32) -> Option<Bytes> {
        let begin = offset.checked_sub(self.offset)? as usize;
        let end = begin.checked_add(length as usize)?;
        (end <= self.payload.len()).then(|| self.payload.slice(begin..end))
    }
}

/// Room for content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// The size of the filesystem.
    pub capacity_bytes: u64,
    /// What it has free.
    pub available_bytes: u64,
    /// What of that the store would take for content: less its reserve, and with what it has preallocated.
    pub room_bytes: u64,
}
