//! The body of an upload, split into chunks as it arrives. Holds less than the bytes of two chunks.

use std::sync::Arc;

use axum::body::{Body, BodyDataStream};
use axum::http::StatusCode;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use quorumfs_proto::limits::{CHUNK_BYTES_MAX, FILE_BYTES_MAX};

use super::error::ApiError;
use crate::api::http::connections::ClientProgress;

/// The received and the remaining bytes of an upload.
pub(super) struct UploadBody {
    stream: BodyDataStream,
    /// The value of `Content-Length`.
    announced_bytes: Option<u64>,
    received_bytes: u64,
    /// Received bytes that were not returned yet.
    buffered: Bytes,
    is_ended: bool,
    progress: Arc<ClientProgress>,
}

impl UploadBody {
    pub(super) fn new(body: Body, announced_bytes: Option<u64>, progress: Arc<ClientProgress>) -> UploadBody {
        UploadBody {
            stream: body.into_data_stream(),
            announced_bytes,
            received_bytes: 0,
            buffered: Bytes::new(),
            is_ended: false,
            progress,
        }
    }

    /// Returns whether the body has at most `bytes_max` bytes; waits until this is known.
    pub(super) async fn fits_in(&mut self, bytes_max: usize) -> Result<bool, ApiError> {
        let mut first = BytesMut::new();
        while first.len() <= bytes_max && self.has_more().await? {
            first.extend_from_slice(&std::mem::take(&mut self.buffered));
        }
        self.buffered = first.freeze();
        Ok(self.buffered.len() <= bytes_max)
    }

    /// Returns the next bytes: a whole chunk, or the rest; empty at the end.
    ///
    /// # Errors
    /// 400 if the body ends early or has another length than announced, 408 if nothing arrives in time, 413 if it is
    /// larger than a file can be.
    pub(super) async fn next_chunk(&mut self) -> Result<Bytes, ApiError> {
        const CHUNK_BYTES: usize = CHUNK_BYTES_MAX as usize;
        let mut chunk = BytesMut::new();
        while chunk.len() < CHUNK_BYTES && self.has_more().await? {
            if chunk.is_empty() {
                let left = self.announced_bytes.map(|bytes| bytes - self.received_bytes);
                let expected = left.map_or(CHUNK_BYTES, |left| usize::try_from(left).unwrap_or(CHUNK_BYTES));
                chunk.reserve(expected.saturating_add(self.buffered.len()).min(CHUNK_BYTES));
            }
            let part = self
                .buffered
                .split_to(self.buffered.len().min(CHUNK_BYTES - chunk.len()));
            chunk.extend_from_slice(&part);
        }
        Ok(chunk.freeze())
    }

    /// Returns whether there is another byte; waits for it.
    pub(super) async fn has_more(&mut self) -> Result<bool, ApiError> {
        while self.buffered.is_empty() && !self.is_ended {
            match self.progress.wait_for_client(self.stream.next()).await {
                Some(Some(Ok(bytes))) => self.receive(bytes)?,
                Some(Some(Err(error))) => {
                    return Err(ApiError::bad_request(
                        "incomplete_body",
                        format!("the body ended early: {error}"),
                    )
                    .hint("nothing was stored"));
                }
                Some(None) => self.finish()?,
                None => {
                    return Err(ApiError::new(
                        StatusCode::REQUEST_TIMEOUT,
                        "body_timeout",
                        "no byte of the body arrived in time",
                    )
                    .hint("nothing was stored"));
                }
            }
        }
        Ok(!self.buffered.is_empty())
    }

    fn receive(&mut self, bytes: Bytes) -> Result<(), ApiError> {
        self.received_bytes += bytes.len() as u64;
        if self.received_bytes > FILE_BYTES_MAX {
            return Err(quorumfs_proto::FsError::FileTooLarge.into());
        }
        if self
            .announced_bytes
            .is_some_and(|announced| self.received_bytes > announced)
        {
            return Err(self.mismatch());
        }
        self.buffered = bytes;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ApiError> {
        self.is_ended = true;
        match self.announced_bytes {
            Some(announced) if announced != self.received_bytes => Err(self.mismatch()),
            _ => Ok(()),
        }
    }

    fn mismatch(&self) -> ApiError {
        let message = format!(
            "Content-Length is {}, but the body has {} bytes",
            self.announced_bytes.unwrap_or_default(),
            self.received_bytes
        );
        ApiError::bad_request("length_mismatch", message).hint("nothing was stored")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::http::connections::ClientTimeouts;
    use futures::stream;
    use std::time::Duration;

    fn progress() -> Arc<ClientProgress> {
        Arc::new(ClientProgress::new(ClientTimeouts::default(), None, None))
    }

    fn body(frames: Vec<Vec<u8>>) -> Body {
        Body::from_stream(stream::iter(frames.into_iter().map(Ok::<_, std::io::Error>)))
    }

    #[tokio::test]
    async fn frames_of_any_size_become_whole_chunks() {
        let bytes: Vec<u8> = (0..2_500_000u32).map(|i| (i / 7) as u8).collect();
        for frame_bytes in [1000, 65_536, 1_500_000, 2_500_000] {
            let frames = bytes.chunks(frame_bytes).map(<[u8]>::to_vec).collect();
            let mut body = UploadBody::new(body(frames), Some(bytes.len() as u64), progress());
            let mut got = Vec::new();
            let mut sizes = Vec::new();
            while body.has_more().await.unwrap() {
                let chunk = body.next_chunk().await.unwrap();
                sizes.push(chunk.len());
                got.extend_from_slice(&chunk);
            }
            assert_eq!(sizes, [1 << 20, 1 << 20, 2_500_000 - (2 << 20)]);
            assert!(got == bytes, "frames of {frame_bytes}");
        }
    }

    #[tokio::test]
    async fn an_empty_body_is_no_chunk() {
        let mut body = UploadBody::new(body(vec![vec![], vec![]]), Some(0), progress());
        assert!(!body.has_more().await.unwrap());
        assert!(body.next_chunk().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_body_of_another_length_than_announced_is_refused() {
        for (announced, sent) in [(10, 9), (10, 11), (0, 1), (1, 0)] {
            let mut body = UploadBody::new(body(vec![vec![1; sent]]), Some(announced), progress());
            let error = body.next_chunk().await.unwrap_err();
            assert_eq!((error.status.as_u16(), error.code), (400, "length_mismatch"));
        }
    }

    #[tokio::test]
    async fn a_silent_client_times_out() {
        let short = Arc::new(ClientProgress::new(
            ClientTimeouts {
                close_after: Duration::from_millis(20),
                ..ClientTimeouts::default()
            },
            None,
            None,
        ));
        let silent = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
        let mut body = UploadBody::new(silent, None, short);
        let error = body.next_chunk().await.unwrap_err();
        assert_eq!(error.status, StatusCode::REQUEST_TIMEOUT);
    }
}
