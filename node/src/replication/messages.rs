//! Conversions of chunks and store errors to and from messages, validated once on receipt.

use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::{ChunkId, ChunkRange};
use quorumfs_wire::{ChunkStatus, GetChunkRequest, GetChunkResponse, MalformedChunk, PutChunkResponse};

use quorumfs_content::ContentError;

/// Returns the chunk, offset and length that `request` asks for, in bytes.
///
/// # Errors
/// [`MalformedChunk::Invalid`] if the chunk id is missing or the range is empty or beyond the largest chunk.
pub fn requested_range(request: &GetChunkRequest) -> Result<(ChunkId, u32, u32), MalformedChunk> {
    let id = request
        .chunk
        .ok_or(MalformedChunk::Invalid("the chunk id is missing".to_string()))?
        .into();
    let end = request.offset.checked_add(request.length);
    if request.length == 0 || end.is_none_or(|end| end > CHUNK_BYTES_MAX) {
        return Err(MalformedChunk::Invalid("the range is out of bounds".to_string()));
    }
    Ok((id, request.offset, request.length))
}

/// Returns the status with which to answer a request that failed with `error`.
pub fn status_of(error: &ContentError) -> ChunkStatus {
    match error {
        ContentError::NotFound { .. } => ChunkStatus::NotFound,
        ContentError::Corrupt { .. } => ChunkStatus::Corrupt,
        ContentError::NoSpace => ChunkStatus::NoSpace,
        ContentError::OutOfRange { .. } | ContentError::Malformed(_) => ChunkStatus::Invalid,
        ContentError::Io { .. }
        | ContentError::UnknownVersion { .. }
        | ContentError::Unlisted { .. }
        | ContentError::InUse { .. }
        | ContentError::Fatal { .. } => ChunkStatus::Unavailable,
    }
}

/// Returns the answer to a put. The call id is 0.
pub fn put_response(result: &Result<(), ContentError>) -> PutChunkResponse {
    match result {
        Ok(()) => put_status(ChunkStatus::Ok, String::new()),
        Err(error) => put_status(status_of(error), error.to_string()),
    }
}

/// Returns the answer to a put with this status and, if it is not OK, the reason in `detail`. The call id is 0.
pub fn put_status(status: ChunkStatus, detail: String) -> PutChunkResponse {
    PutChunkResponse {
        status: status.into(),
        detail,
        ..PutChunkResponse::default()
    }
}

/// Returns the answer to a read. The call id is 0.
pub fn get_response(result: Result<ChunkRange, ContentError>) -> GetChunkResponse {
    match result {
        Ok(range) => {
            let (offset, payload, block_crcs) = range.into_parts();
            GetChunkResponse {
                status: ChunkStatus::Ok.into(),
                offset,
                payload,
                block_crcs,
                ..GetChunkResponse::default()
            }
        }
        Err(error) => get_error(status_of(&error), error.to_string()),
    }
}

/// Returns the answer to a failed read, with the reason in `detail`. The call id is 0.
pub fn get_error(status: ChunkStatus, detail: String) -> GetChunkResponse {
    GetChunkResponse {
        status: status.into(),
        detail,
        ..GetChunkResponse::default()
    }
}
