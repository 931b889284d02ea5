//! Copies that are brought rather than fetched.

use bytes::Bytes;
use quorumfs_proto::{Chunk, ChunkId, Sha256};

use super::Recovery;
use quorumfs_content::ContentError;

/// What became of a copy that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// It was missing, and is on disk now.
    Stored,
    /// It was here.
    Held,
}

/// Why a copy was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// No file names this chunk: who puts a new one does so through the leader.
    #[error("no file names this chunk")]
    NotNamed,
    /// It is not what its sender says.
    #[error("the bytes do not have the SHA-256 that came with them")]
    Digest,
    /// It is not what the metadata names.
    #[error("the metadata names other content for this chunk")]
    Other,
    /// The disk is full.
    #[error("no space left for content")]
    NoSpace,
    /// The disk or the metadata says no.
    #[error("{0}")]
    Failed(String),
}

impl Recovery {
    /// Takes a copy of a chunk that files name, if it is missing here; on disk when it returns.
    pub async fn offer(&self, id: ChunkId, sha256: Sha256, payload: Bytes) -> Result<Offered, OfferError> {
        let failed = |reason: String| OfferError::Failed(reason);
        let hashed = {
            let payload = payload.clone();
            tokio::task::spawn_blocking(move || Sha256::of(&payload)).await
        };
        if hashed.map_err(|panic| failed(panic.to_string()))? != sha256 {
            return Err(OfferError::Digest);
        }
        let view = self.metadata.view().map_err(|fault| failed(fault.to_string()))?;
        let record = view.chunk(id).map_err(|fault| failed(fault.to_string()))?;
        let record = record.ok_or(OfferError::NotNamed)?;
        if record.sha256 != sha256 || record.length as usize != payload.len() {
            return Err(OfferError::Other);
        }
        if self.content.holds(id) {
            return Ok(Offered::Held);
        }
        let chunk = Chunk::with_sha256(id, sha256, payload).map_err(|bad| failed(bad.to_string()))?;
        match self.content.put(chunk).await {
            Ok(()) => {
                self.ledger.lock().settled(id);
                Ok(Offered::Stored)
            }
            Err(ContentError::NoSpace) => Err(OfferError::NoSpace),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}
