//! Conversions of chunks to and from messages, with verification of the checksums.

use bytes::Bytes;
use quorumfs_proto::{BadChunk, Chunk, ChunkRange, Sha256};

use crate::messages::{ChunkStatus, GetChunkResponse, PutChunkRequest};

/// A message is not a valid chunk or range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedChunk {
    /// A field is missing or out of bounds.
    #[error("malformed chunk: {0}")]
    Invalid(String),
    /// The payload does not match the checksums in the message.
    #[error("the chunk was damaged in transit: {0}")]
    Corrupt(String),
}

impl MalformedChunk {
    /// Returns the status to answer with.
    pub fn status(&self) -> ChunkStatus {
        match self {
            MalformedChunk::Invalid(_) => ChunkStatus::Invalid,
            MalformedChunk::Corrupt(_) => ChunkStatus::Corrupt,
        }
    }
}

impl From<BadChunk> for MalformedChunk {
    fn from(bad: BadChunk) -> MalformedChunk {
        match bad {
            BadChunk::Length(_) | BadChunk::Offset | BadChunk::CrcCount => {
                MalformedChunk::Invalid(bad.to_string())
            }
            BadChunk::Crc => MalformedChunk::Corrupt(bad.to_string()),
        }
    }
}

/// Builds the message that carries a chunk. The payload is shared, not copied; the call id is 0.
impl From<&Chunk> for PutChunkRequest {
    fn from(chunk: &Chunk) -> PutChunkRequest {
        PutChunkRequest {
            call_id: 0,
            chunk: Some(chunk.id().into()),
            sha256: Bytes::copy_from_slice(&chunk.sha256().0),
            payload: chunk.payload().clone(),
            block_crcs: chunk.block_crcs().to_vec(),
        }
    }
}

/// Verifies the CRC-32C of each block.
impl TryFrom<PutChunkRequest> for Chunk {
    type Error = MalformedChunk;

    fn try_from(request: PutChunkRequest) -> Result<Chunk, MalformedChunk> {
        let invalid = |what: &str| MalformedChunk::Invalid(what.to_string());
        let id = request
            .chunk
            .ok_or_else(|| invalid("the chunk id is missing"))?
            .into();
        let sha256: [u8; 32] = request
            .sha256
            .as_ref()
            .try_into()
            .map_err(|_| invalid("the SHA-256 does not have 32 bytes"))?;
        Ok(Chunk::checked(
            id,
            Sha256(sha256),
            request.payload,
            request.block_crcs,
        )?)
    }
}

/// Takes the range of an answer with status OK and verifies the CRC-32C of each block.
impl TryFrom<GetChunkResponse> for ChunkRange {
    type Error = MalformedChunk;

    fn try_from(response: GetChunkResponse) -> Result<ChunkRange, MalformedChunk> {
        Ok(ChunkRange::checked(
            response.offset,
            response.payload,
            response.block_crcs,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use quorumfs_proto::limits::CHUNK_BYTES_MAX;
    use quorumfs_proto::{ChunkId, SessionId};

    use super::*;

    fn request(length: usize) -> PutChunkRequest {
        let id = ChunkId {
            session: SessionId(7),
            counter: 1,
        };
        (&Chunk::new(id, vec![3; length].into()).unwrap()).into()
    }

    #[test]
    fn a_chunk_is_unchanged_by_conversion() {
        let chunk = Chunk::try_from(request(5000)).unwrap();
        assert_eq!(PutChunkRequest::from(&chunk), request(5000));
    }

    #[test]
    fn p3_what_is_no_chunk_or_was_damaged_is_refused() {
        let refused = |change: fn(&mut PutChunkRequest)| {
            let mut request = request(5000);
            change(&mut request);
            Chunk::try_from(request).unwrap_err().status()
        };
        assert_eq!(
            refused(|request| request.block_crcs[1] ^= 1),
            ChunkStatus::Corrupt
        );
        assert_eq!(
            refused(|request| request.payload = vec![4; 5000].into()),
            ChunkStatus::Corrupt
        );
        for invalid in [
            (|request| request.chunk = None) as fn(&mut PutChunkRequest),
            |request| request.sha256 = Bytes::from_static(b"short"),
            |request| request.payload = Bytes::new(),
            |request| request.payload = vec![3; CHUNK_BYTES_MAX as usize + 1].into(),
            |request| {
                request.block_crcs.pop();
            },
        ] {
            assert_eq!(refused(invalid), ChunkStatus::Invalid);
        }
    }
}
