//! Content: immutable chunks, and the extents of files that refer to them.

use std::fmt;

use bytes::Bytes;
use hex::FromHex as _;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::error::FsError;
use crate::ids::ChunkId;
use crate::limits::{BLOCK_BYTES, CHUNK_BYTES_MAX, FILE_BYTES_MAX};

/// The SHA-256 of a chunk (FIPS 180-4), computed once, by its writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// Returns the digest of `payload`.
    pub fn of(payload: &[u8]) -> Sha256 {
        Sha256(sha2::Sha256::digest(payload).into())
    }

    /// The digest that 64 hexadecimal digits stand for; `None` for anything else.
    pub fn from_hex(digits: &[u8]) -> Option<Sha256> {
        <[u8; 32]>::from_hex(digits).ok().map(Sha256)
    }
}

/// 64 hexadecimal digits, in small letters.
impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Returns the CRC-32C (Castagnoli, RFC 3720 appendix B.4) of each 4 KiB block of `payload`; the last block may be
/// short.
pub fn block_crcs(payload: &[u8]) -> Vec<u32> {
    payload.chunks(BLOCK_BYTES as usize).map(crc32c::crc32c).collect()
}

/// Whether `block_crcs` has one CRC-32C for each block of `payload`, and each matches.
pub fn blocks_match(payload: &[u8], block_crcs: &[u32]) -> bool {
    payload.len().div_ceil(BLOCK_BYTES as usize) == block_crcs.len()
        && payload
            .chunks(BLOCK_BYTES as usize)
            .zip(block_crcs)
            .all(|(block, crc)| crc32c::crc32c(block) == *crc)
}

/// Why bytes are not a valid chunk or part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChunk {
    /// It has no bytes, or more than [`CHUNK_BYTES_MAX`].
    #[error("a chunk has 1 to {CHUNK_BYTES_MAX} bytes, not {0}")]
    Length(usize),
    /// A part of a chunk does not begin at a block boundary.
    #[error("a part of a chunk begins inside a block")]
    Offset,
    /// The number of CRCs differs from the number of blocks.
    #[error("the number of CRCs differs from the number of blocks of the chunk")]
    CrcCount,
    /// A block does not match its CRC.
    #[error("a block of the chunk does not match its CRC")]
    Crc,
}

/// A whole chunk: 1 to [`CHUNK_BYTES_MAX`] bytes, their SHA-256, and the CRC-32C of each block. The bytes matched the
/// CRCs when the value was made. The SHA-256 is what the chunk's writer stated; it is not checked here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    id: ChunkId,
    sha256: Sha256,
    payload: Bytes,
    block_crcs: Vec<u32>,
}

impl Chunk {
    /// Makes a chunk of `payload` and computes all checksums.
    ///
    /// # Errors
    /// [`BadChunk::Length`].
    pub fn new(id: ChunkId, payload: Bytes) -> Result<Chunk, BadChunk> {
        let sha256 = Sha256::of(&payload);
        Chunk::with_sha256(id, sha256, payload)
    }

    /// Makes a chunk of trusted bytes whose SHA-256 is known, such as the bytes inside a command.
    ///
    /// # Errors
    /// [`BadChunk::Length`].
    pub fn with_sha256(id: ChunkId, sha256: Sha256, payload: Bytes) -> Result<Chunk, BadChunk> {
        check_length(&payload)?;
        let block_crcs = block_crcs(&payload);
        Ok(Chunk {
            id,
            sha256,
            payload,
            block_crcs,
        })
    }

    /// Makes a chunk of bytes that came over a network or from a disk, and checks them against the CRCs that came with
    /// them.
    ///
    /// # Errors
    /// Any [`BadChunk`].
    pub fn checked(
        id: ChunkId,
        sha256: Sha256,
        payload: Bytes,
        block_crcs: Vec<u32>,
    ) -> Result<Chunk, BadChunk> {
        ChunkRange::checked(0, payload, block_crcs)?.into_chunk(id, sha256)
    }

    /// Returns the chunk's id.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// Returns the digest that the chunk's writer computed.
    pub fn sha256(&self) -> Sha256 {
        self.sha256
    }

    /// Returns the chunk's bytes.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Returns the CRC-32C of each 4 KiB block.
    pub fn block_crcs(&self) -> &[u32] {
        &self.block_crcs
    }

    /// Returns the number of bytes.
    pub fn length(&self) -> u32 {
        self.payload.len() as u32
    }
}

/// Whole blocks of a chunk. They matched their CRCs when the value was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkRange {
    offset: u32,
    payload: Bytes,
    block_crcs: Vec<u32>,
}

impl ChunkRange {
    /// Makes a range of the blocks `payload`, which begin at `offset` in their chunk, and checks them against the CRCs
    /// that came with them. A range may be empty.
    ///
    /// # Errors
    /// Any [`BadChunk`].
    pub fn checked(offset: u32, payload: Bytes, block_crcs: Vec<u32>) -> Result<ChunkRange, BadChunk> {
        if !offset.is_multiple_of(BLOCK_BYTES) {
            return Err(BadChunk::Offset);
        }
        if payload.len() > CHUNK_BYTES_MAX as usize {
            return Err(BadChunk::Length(payload.len()));
        }
        if payload.len().div_ceil(BLOCK_BYTES as usize) != block_crcs.len() {
            return Err(BadChunk::CrcCount);
        }
        match blocks_match(&payload, &block_crcs) {
            true => Ok(ChunkRange {
                offset,
                payload,
                block_crcs,
            }),
            false => Err(BadChunk::Crc),
        }
    }

    /// Returns the offset in the chunk; a multiple of the block size.
    pub fn offset(&self) -> u32 {
        self.offset
    }

    /// Returns the bytes.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Returns the offset, the bytes, and the CRC-32C of each of their blocks.
    pub fn into_parts(self) -> (u32, Bytes, Vec<u32>) {
        (self.offset, self.payload, self.block_crcs)
    }

    /// Returns the bytes `offset..offset + length` of the chunk, if this range has all of them.
    pub fn exactly(&self, offset: u32, length: u32) -> Option<Bytes> {
        let begin = offset.checked_sub(self.offset)? as usize;
        let end = begin.checked_add(length as usize)?;
        (end <= self.payload.len()).then(|| self.payload.slice(begin..end))
    }

    /// Converts a range that is a whole chunk.
    ///
    /// # Errors
    /// [`BadChunk::Offset`] if the range does not start at 0, [`BadChunk::Length`] if it is empty.
    pub fn into_chunk(self, id: ChunkId, sha256: Sha256) -> Result<Chunk, BadChunk> {
        if self.offset != 0 {
            return Err(BadChunk::Offset);
        }
        check_length(&self.payload)?;
        Ok(Chunk {
            id,
            sha256,
            payload: self.payload,
            block_crcs: self.block_crcs,
        })
    }
}

fn check_length(payload: &Bytes) -> Result<(), BadChunk> {
    match (1..=CHUNK_BYTES_MAX as usize).contains(&payload.len()) {
        true => Ok(()),
        false => Err(BadChunk::Length(payload.len())),
    }
}

/// Where the bytes of a chunk are when a command names it for the first time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkBody {
    /// On the disks of f + 1 voters, where the client put them before it sent the command (P2).
    Stored,
    /// In the command. Each node moves them to its content store when it applies the command.
    Inline(Bytes),
}

/// A chunk that a command names for the first time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewChunk {
    /// The chunk's id; its session is the one that sends the command.
    pub id: ChunkId,
    /// Number of bytes: 1 to [`CHUNK_BYTES_MAX`].
    pub length: u32,
    /// SHA-256 of the bytes.
    pub sha256: Sha256,
    /// Where the bytes are.
    pub body: ChunkBody,
}

impl NewChunk {
    /// Checks the bounds.
    ///
    /// # Errors
    /// [`FsError::InvalidArgument`] if the length is out of bounds or differs from that of the inline bytes.
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
    /// Offset in the file.
    pub file_offset: u64,
    /// Number of bytes, at least 1.
    pub length: u32,
    /// The chunk that holds the bytes.
    pub chunk: ChunkId,
    /// Offset of the bytes in the chunk.
    pub chunk_offset: u32,
}

impl Extent {
    /// Returns the end of the extent in the file (exclusive).
    pub fn file_end(&self) -> u64 {
        self.file_offset + u64::from(self.length)
    }

    /// Checks the bounds.
    ///
    /// # Errors
    /// [`FsError::InvalidArgument`] if the extent is empty or reaches past the largest chunk, [`FsError::FileTooLarge`]
    /// if it ends past the largest file.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_it_is_written() {
        let digest = Sha256::of(b"abc");
        // FIPS 180-4, appendix B.1.
        let digits = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), digits);
        assert_eq!(Sha256::from_hex(digits.as_bytes()), Some(digest));
        assert_eq!(Sha256::from_hex(digits.to_uppercase().as_bytes()), Some(digest));
        for wrong in [
            "",
            "ba",
            &digits[1..],
            &digits.replace("ba", "+a"),
            &digits.replace("ba", "zz"),
        ] {
            assert_eq!(Sha256::from_hex(wrong.as_bytes()), None, "{wrong:?}");
        }
    }
}
