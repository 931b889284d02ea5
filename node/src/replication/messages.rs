//! Chunks as they travel: conversions from and to the generated messages, checked once on receipt.

use bytes::Bytes;
use quorumfs_proto::chunk::blocks_match;
use quorumfs_proto::limits::{BLOCK_BYTES, CHUNK_BYTES_MAX};
use quorumfs_proto::{ChunkId, Sha256};
use quorumfs_wire::{ChunkStatus, GetChunkRequest, GetChunkResponse, PutChunkRequest, PutChunkResponse};

use quorumfs_content::ContentError;
use quorumfs_content::{ChunkRange, StoredChunk};

/// A message that is no chunk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedChunk {
    /// A field is missing or out of bounds.
    #[error("malformed: {0}")]
    Invalid(&'static str),
    /// The bytes do not match the checksums they came with.
    #[error("damaged on its way: {0}")]
    Corrupt(&'static str),
}

impl MalformedChunk {
    /// What its sender is told.
    pub fn status(&self) -> ChunkStatus {
        match self {
            MalformedChunk::Invalid(_) => ChunkStatus::Invalid,
            MalformedChunk::Corrupt(_) => ChunkStatus::Corrupt,
        }
    }
}

/// The message that carries `chunk`; its bytes are shared, not copied.
pub fn put_request(call_id: u64, chunk: &StoredChunk) -> PutChunkRequest {
    PutChunkRequest {
        call_id,
        chunk: Some(chunk.id.into()),
        sha256: Bytes::copy_from_slice(&chunk.sha256.0),
        payload: chunk.payload.clone(),
        block_crcs: chunk.block_crcs.clone(),
    }
}

/// The chunk that `request` carries, verified block by block.
pub fn stored_chunk(request: PutChunkRequest) -> Result<StoredChunk, MalformedChunk> {
    let id = request
        .chunk
        .ok_or(MalformedChunk::Invalid("no chunk id"))?
        .into();
    let sha256: [u8; 32] = request
        .sha256
        .as_ref()
        .try_into()
        .map_err(|_| MalformedChunk::Invalid("a SHA-256 has 32 bytes"))?;
    StoredChunk::received(id, Sha256(sha256), request.payload, request.block_crcs).map_err(
        |error| match error {
            ContentError::Malformed { what, .. } => MalformedChunk::Invalid(what),
            _ => MalformedChunk::Corrupt("a block does not match its CRC"),
        },
    )
}

/// What `request` asks for: chunk, offset, length.
pub fn range_asked(request: &GetChunkRequest) -> Result<(ChunkId, u32, u32), MalformedChunk> {
    let id = request
        .chunk
        .ok_or(MalformedChunk::Invalid("no chunk id"))?
        .into();
    let end = request.offset.checked_add(request.length);
    if request.length == 0 || end.is_none_or(|end| end > CHUNK_BYTES_MAX) {
        return Err(MalformedChunk::Invalid("its range is out of bounds"));
    }
    Ok((id, request.offset, request.length))
}

/// What the one who asked is told of an error.
pub fn status_of(error: &ContentError) -> ChunkStatus {
    match error {
        ContentError::NotFound { .. } => ChunkStatus::NotFound,
        ContentError::Corrupt { .. } => ChunkStatus::Corrupt,
        ContentError::NoSpace => ChunkStatus::NoSpace,
        ContentError::OutOfRange { .. } | ContentError::Malformed { .. } => ChunkStatus::Invalid,
        ContentError::Io { .. }
        | ContentError::UnknownVersion { .. }
        | ContentError::Unlisted { .. }
        | ContentError::InUse { .. }
        | ContentError::Fatal { .. } => ChunkStatus::Unavailable,
    }
}

/// The answer to a put.
pub fn put_response(call_id: u64, result: &Result<(), ContentError>) -> PutChunkResponse {
    let (status, detail) = match result {
        Ok(()) => (ChunkStatus::Ok, String::new()),
        Err(error) => (status_of(error), error.to_string()),
    };
    PutChunkResponse {
        call_id,
        status: status.into(),
        detail,
        leader: String::new(),
    }
}

/// The answer to a read.
pub fn get_response(call_id: u64, result: Result<ChunkRange, ContentError>) -> GetChunkResponse {
    match result {
        Ok(range) => GetChunkResponse {
            call_id,
            status: ChunkStatus::Ok.into(),
            detail: String::new(),
            offset: range.offset,
            payload: range.payload,
            block_crcs: range.block_crcs,
        },
        Err(error) => GetChunkResponse {
            call_id,
            status: status_of(&error).into(),
            detail: error.to_string(),
            ..GetChunkResponse::default()
        },
    }
}

/// The range that an answer of status OK carries, verified block by block.
pub fn chunk_range(response: GetChunkResponse) -> Result<ChunkRange, MalformedChunk> {
    if !response.offset.is_multiple_of(BLOCK_BYTES) {
        return Err(MalformedChunk::Invalid("it begins inside a block"));
    }
    if response.payload.len() > CHUNK_BYTES_MAX as usize {
        return Err(MalformedChunk::Invalid("it is longer than a chunk"));
    }
    if !blocks_match(&response.payload, &response.block_crcs) {
        return Err(MalformedChunk::Corrupt("a block does not match its CRC"));
    }
    Ok(ChunkRange {
        offset: response.offset,
        payload: response.payload,
        block_crcs: response.block_crcs,
    })
}
