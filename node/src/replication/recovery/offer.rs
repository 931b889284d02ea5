//! Copies that are uploaded instead of fetched.

use bytes::Bytes;
use quorumfs_proto::{Chunk, ChunkId, Sha256};

use super::Recovery;
use quorumfs_content::ContentError;

/// The result of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfferOutcome {
    /// The chunk was missing and is now on disk.
    Stored,
    /// The chunk was already held.
    AlreadyHeld,
}

/// Why a copy was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// No file refers to the chunk; new content is put through the leader.
    #[error("no file refers to this chunk")]
    NotNamed,
    /// The content does not have the SHA-256 in the request.
    #[error("the content does not have the SHA-256 in the request")]
    WrongDigest,
    /// The content differs from the metadata.
    #[error("the content differs from that of the chunk in the metadata")]
    OtherContent,
    /// The disk is full.
    #[error("no space left for content")]
    NoSpace,
    /// The disk or the metadata failed; with the reason.
    #[error("{0}")]
    Failed(String),
}

impl Recovery {
    /// Stores a copy of a chunk that files refer to, if it is missing here; it is on disk when this returns.
    ///
    /// # Errors
    /// An [`OfferError`].
    pub async fn offer(
        &self,
        id: ChunkId,
        sha256: Sha256,
        payload: Bytes,
    ) -> Result<OfferOutcome, OfferError> {
        let failed = |reason: String| OfferError::Failed(reason);
        let hashed = {
            let payload = payload.clone();
            tokio::task::spawn_blocking(move || Sha256::of(&payload)).await
        };
        if hashed.map_err(|panic| failed(panic.to_string()))? != sha256 {
            return Err(OfferError::WrongDigest);
        }
        let view = self.metadata.view().map_err(|fault| failed(fault.to_string()))?;
        let record = view.chunk(id).map_err(|fault| failed(fault.to_string()))?;
        let record = record.ok_or(OfferError::NotNamed)?;
        if record.sha256 != sha256 || record.length as usize != payload.len() {
            return Err(OfferError::OtherContent);
        }
        if self.content.holds(id) {
            return Ok(OfferOutcome::AlreadyHeld);
        }
        let chunk = Chunk::with_sha256(id, sha256, payload).map_err(|bad| failed(bad.to_string()))?;
        match self.content.put(chunk).await {
            Ok(()) => {
                self.ledger.lock().remove(id);
                Ok(OfferOutcome::Stored)
            }
            Err(ContentError::NoSpace) => Err(OfferError::NoSpace),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}
