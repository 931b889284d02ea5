//! A chunk as it is handed in and out: bytes with their checksums.
//!
//! Checked where it arrives ([`StoredChunk::received`]); what has one of these types was checked once.

use bytes::Bytes;
use quorumfs_proto::chunk::{block_crcs, blocks_match};
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::{ChunkId, Sha256};

use super::error::ContentError;

/// A whole chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// Its identity.
    pub id: ChunkId,
    /// The digest its writer computed.
    pub sha256: Sha256,
    /// Its bytes.
    pub payload: Bytes,
    /// The CRC-32C of each 4 KiB block of them.
    pub block_crcs: Vec<u32>,
}

impl StoredChunk {
    /// A chunk whose bytes are at hand and trusted, such as one that came inside a command.
    pub fn computed(id: ChunkId, sha256: Sha256, payload: Bytes) -> StoredChunk {
        let block_crcs = block_crcs(&payload);
        StoredChunk {
            id,
            sha256,
            payload,
            block_crcs,
        }
    }

    /// A chunk that came over the network: its bytes must match the checksums that came with them.
    pub fn received(
        id: ChunkId,
        sha256: Sha256,
        payload: Bytes,
        block_crcs: Vec<u32>,
    ) -> Result<StoredChunk, ContentError> {
        let chunk = StoredChunk {
            id,
            sha256,
            payload,
            block_crcs,
        };
        chunk.check_shape()?;
        if !blocks_match(&chunk.payload, &chunk.block_crcs) {
            return Err(ContentError::Corrupt {
                id,
                what: "a block as received",
            });
        }
        Ok(chunk)
    }

    /// The length of the payload; within bounds once [`StoredChunk::check_shape`] has passed.
    pub(super) fn length(&self) -> u32 {
        u32::try_from(self.payload.len()).unwrap_or(u32::MAX)
    }

    /// The length is within bounds and there is a CRC for each block.
    pub(super) fn check_shape(&self) -> Result<(), ContentError> {
        let malformed = |what| Err(ContentError::Malformed { id: self.id, what });
        if self.payload.is_empty() || self.length() > CHUNK_BYTES_MAX {
            return malformed("its length is out of bounds");
        }
        if self.block_crcs.len() != super::record::blocks(self.length()) {
            return malformed("it has not one CRC for each block");
        }
        Ok(())
    }
}

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
