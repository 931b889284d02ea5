//! Chunks as they travel: conversions from and to the generated messages, checked once on receipt.

use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::{ChunkId, ChunkRange};
use quorumfs_wire::{ChunkStatus, GetChunkRequest, GetChunkResponse, MalformedChunk, PutChunkResponse};

use quorumfs_content::ContentError;

/// What `request` asks for: chunk, offset, length.
pub fn range_asked(request: &GetChunkRequest) -> Result<(ChunkId, u32, u32), MalformedChunk> {
    let id = request
        .chunk
        .ok_or(MalformedChunk::Invalid("no chunk id".to_string()))?
        .into();
    let end = request.offset.checked_add(request.length);
    if request.length == 0 || end.is_none_or(|end| end > CHUNK_BYTES_MAX) {
        return Err(MalformedChunk::Invalid("its range is out of bounds".to_string()));
    }
    Ok((id, request.offset, request.length))
}

/// What the one who asked is told of an error.
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

/// The answer to a put. The number of the call is left 0.
pub fn put_response(result: &Result<(), ContentError>) -> PutChunkResponse {
    match result {
        Ok(()) => put_status(ChunkStatus::Ok, String::new()),
        Err(error) => put_status(status_of(error), error.to_string()),
    }
}

/// The answer to a put with this status; `detail` says why where it is not OK. The number of the call is left 0.
pub fn put_status(status: ChunkStatus, detail: String) -> PutChunkResponse {
    PutChunkResponse {
        status: status.into(),
        detail,
        ..PutChunkResponse::default()
    }
}

/// The answer to a read. The number of the call is left 0.
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
        Err(error) => get_refused(status_of(&error), error.to_string()),
    }
}

/// The answer to a read that has no bytes; `detail` says why. The number of the call is left 0.
pub fn get_refused(status: ChunkStatus, detail: String) -> GetChunkResponse {
    GetChunkResponse {
        status: status.into(),
        detail,
        ..GetChunkResponse::default()
    }
}
