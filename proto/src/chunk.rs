//! Content: immutable chunks, and the extents of a file that lie in them.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::error::FsError;
use crate::ids::ChunkId;
use crate::limits::{BLOCK_BYTES, CHUNK_BYTES_MAX, FILE_BYTES_MAX};

/// The SHA-256 of a chunk (FIPS 180-4), computed once, by who wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// The digest of `payload`.
    pub fn of(payload: &[u8]) -> Sha256 {
        Sha256(sha2::Sha256::digest(payload).into())
    }
}

/// The CRC-32C (Castagnoli, RFC 3720 appendix B.4) of each 4 KiB block of `payload`; the last may be short.
pub fn block_crcs(payload: &[u8]) -> Vec<u32> {
    payload.chunks(BLOCK_BYTES as usize).map(crc32c::crc32c).collect()
}

/// Whether each block of `payload` has the CRC-32C given for it, and there is one for each.
pub fn blocks_match(payload: &[u8], block_crcs: &[u32]) -> bool {
    payload.len().div_ceil(BLOCK_BYTES as usize) == block_crcs.len()
        && payload
            .chunks(BLOCK_BYTES as usize)
            .zip(block_crcs)
            .all(|(block, crc)| crc32c::crc32c(block) == *crc)
}

/// Where the bytes of a chunk are that a command names for the first time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkBody {
    /// On the disks of f + 1 voters, put there before the command (P2).
    Stored,
    /// Here; each node moves them to its content store when it applies the command.
    Inline(Bytes),
}

/// A chunk that a command names for the first time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewChunk {
    /// Its identity; the session is the one that sends the command.
    pub id: ChunkId,
    /// Its bytes: 1 to [`CHUNK_BYTES_MAX`].
    pub length: u32,
    /// Their digest.
    pub sha256: Sha256,
    /// Where they are.
    pub body: ChunkBody,
}

impl NewChunk {
    /// [`FsError::InvalidArgument`] where the length is out of bounds or not that of the inline bytes.
    pub fn validate(&self) -> Result<(), FsError> {
        let inline_differs =
            matches!(&self.body, ChunkBody::Inline(bytes) if bytes.len() != self.length as usize);
        if self.length == 0 || self.length > CHUNK_BYTES_MAX || inline_differs {
            return Err(FsError::InvalidArgument);
        }
        Ok(())
    }
}

/// An extent: a part of a file, and the part of a chunk that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Where it begins in the file.
    pub file_offset: u64,
    /// How long it is, at least 1.
    pub length: u32,
    /// The chunk that holds the bytes.
    pub chunk: ChunkId,
    /// Where they begin in the chunk.
    pub chunk_offset: u32,
}

impl Extent {
    /// Where the extent ends in the file (exclusive).
    pub fn file_end(&self) -> u64 {
        self.file_offset + u64::from(self.length)
    }

    /// [`FsError::InvalidArgument`] where it is empty or reaches past the largest chunk,
    /// [`FsError::FileTooLarge`] where it ends past the largest file.
    pub fn validate(&self) -> Result<(), FsError> {
        if self.length == 0
            || self
                .chunk_offset
                .checked_add(self.length)
                .is_none_or(|end| end > CHUNK_BYTES_MAX)
        {
            return Err(FsError::InvalidArgument);
        }
        if self
            .file_offset
            .checked_add(u64::from(self.length))
            .is_none_or(|end| end > FILE_BYTES_MAX)
        {
            return Err(FsError::FileTooLarge);
        }
        Ok(())
    }
}
