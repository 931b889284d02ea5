//! Content: immutable chunks, and the extents of a file that lie in them.

use std::fmt;

use bytes::Bytes;
use hex::FromHex as _;
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

/// Why bytes are no chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChunk {
    /// There are none, or more than [`CHUNK_BYTES_MAX`].
    #[error("a chunk has 1 to {CHUNK_BYTES_MAX} bytes, not {0}")]
    Length(usize),
    /// A part of one does not begin where a block begins.
    #[error("it begins inside a block")]
    Offset,
    /// There is not one CRC for each block.
    #[error("it has not one CRC for each block")]
    CrcCount,
    /// A block does not match its CRC.
    #[error("a block does not match its CRC")]
    Crc,
}

/// A whole chunk: 1 to [`CHUNK_BYTES_MAX`] bytes, with their SHA-256 and the CRC-32C of each block. The bytes matched the
/// CRCs when it was made; the SHA-256 is its writer's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    id: ChunkId,
    sha256: Sha256,
    payload: Bytes,
    block_crcs: Vec<u32>,
}

impl Chunk {
    /// A chunk of `payload`, all checksums computed.
    ///
    /// # Errors
    /// [`BadChunk::Length`].
    pub fn new(id: ChunkId, payload: Bytes) -> Result<Chunk, BadChunk> {
        let sha256 = Sha256::of(&payload);
        Chunk::with_sha256(id, sha256, payload)
    }

    /// A chunk of trusted bytes whose SHA-256 is known, such as those that came inside a command.
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

    /// A chunk that came over a network or from a disk: its bytes must match the CRCs that came with them.
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

    /// Its identity.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// The digest its writer computed.
    pub fn sha256(&self) -> Sha256 {
        self.sha256
    }

    /// Its bytes.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The CRC-32C of each 4 KiB block of its bytes.
    pub fn block_crcs(&self) -> &[u32] {
        &self.block_crcs
    }

    /// How many bytes it has.
    pub fn length(&self) -> u32 {
        self.payload.len() as u32
    }
}

/// Whole blocks of a chunk, which matched their CRCs when this was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkRange {
    offset: u32,
    payload: Bytes,
    block_crcs: Vec<u32>,
}

impl ChunkRange {
    /// The blocks `payload`, which begin at `offset` in their chunk; they must match the CRCs that came with them.
    ///
    /// # Errors
    /// Any [`BadChunk`]. No bytes at all are a range.
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

    /// Where in the chunk it begins; a multiple of the block size.
    pub fn offset(&self) -> u32 {
        self.offset
    }

    /// The bytes.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The offset, the bytes and the CRC-32C of each block of them.
    pub fn into_parts(self) -> (u32, Bytes, Vec<u32>) {
        (self.offset, self.payload, self.block_crcs)
    }

    /// Exactly the bytes `offset..offset + length` of the chunk, if they are all in this range.
    pub fn exactly(&self, offset: u32, length: u32) -> Option<Bytes> {
        let begin = offset.checked_sub(self.offset)? as usize;
        let end = begin.checked_add(length as usize)?;
        (end <= self.payload.len()).then(|| self.payload.slice(begin..end))
    }

    /// The chunk of which this is all.
    ///
    /// # Errors
    /// [`BadChunk::Offset`] where it does not begin with the chunk, [`BadChunk::Length`] where there are no bytes.
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
