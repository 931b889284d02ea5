//! The body of an upload, cut into chunks as it arrives. Holds less than two chunks' bytes.

use std::sync::Arc;

use axum::body::{Body, BodyDataStream};
use axum::http::StatusCode;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use quorumfs_proto::limits::{CHUNK_BYTES_MAX, FILE_BYTES_MAX};

use super::error::ApiError;
use crate::api::http::connections::Pace;

/// What has come and what is still to come.
pub(super) struct Incoming {
    stream: BodyDataStream,
    /// As the client announced it.
    announced_bytes: Option<u64>,
    received_bytes: u64,
    /// Received and not yet handed on.
    waiting: Bytes,
    ended: bool,
    pace: Arc<Pace>,
}

impl Incoming {
    pub(super) fn new(body: Body, announced_bytes: Option<u64>, pace: Arc<Pace>) -> Incoming {
        Incoming {
            stream: body.into_data_stream(),
            announced_bytes,
            received_bytes: 0,
            waiting: Bytes::new(),
            ended: false,
            pace,
        }
    }

    /// Whether all of it has at most `bytes_max` bytes; waits until that is known.
    pub(super) async fn fits_in(&mut self, bytes_max: usize) -> Result<bool, ApiError> {
        let mut begun = BytesMut::new();
        while begun.len() <= bytes_max && self.has_more().await? {
            begun.extend_from_slice(&std::mem::take(&mut self.waiting));
        }
        self.waiting = begun.freeze();
        Ok(self.waiting.len() <= bytes_max)
    }

    /// The next bytes: a whole chunk, or what is left; empty at the end. Fails where the body breaks off, or is
    /// longer or shorter than announced.
    pub(super) async fn next_chunk(&mut self) -> Result<Bytes, ApiError> {
        const WANTED: usize = CHUNK_BYTES_MAX as usize;
        let mut chunk = BytesMut::new();
        while chunk.len() < WANTED && self.has_more().await? {
            if chunk.is_empty() {
                let left = self.announced_bytes.map(|bytes| bytes - self.received_bytes);
                let expected = left.map_or(WANTED, |left| usize::try_from(left).unwrap_or(WANTED));
                chunk.reserve(expected.saturating_add(self.waiting.len()).min(WANTED));
            }
            let part = self
                .waiting
                .split_to(self.waiting.len().min(WANTED - chunk.len()));
            chunk.extend_from_slice(&part);
        }
        Ok(chunk.freeze())
    }

    /// Whether there is another byte; waits for it.
    pub(super) async fn has_more(&mut self) -> Result<bool, ApiError> {
        while self.waiting.is_empty() && !self.ended {
            match self.pace.client_does(self.stream.next()).await {
                Some(Some(Ok(bytes))) => self.received(bytes)?,
                Some(Some(Err(error))) => {
                    return Err(ApiError::bad_request(
                        "incomplete_body",
                        format!("the body broke off: {error}"),
                    )
                    .hint("nothing was stored"));
                }
                Some(None) => self.finished()?,
                None => {
                    return Err(ApiError::new(
                        StatusCode::REQUEST_TIMEOUT,
                        "body_timeout",
                        "no byte of the body came for too long",
                    )
                    .hint("nothing was stored"));
                }
            }
        }
        Ok(!self.waiting.is_empty())
    }

    fn received(&mut self, bytes: Bytes) -> Result<(), ApiError> {
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
        self.waiting = bytes;
        Ok(())
    }

    fn finished(&mut self) -> Result<(), ApiError> {
        self.ended = true;
        match self.announced_bytes {
            Some(announced) if announced != self.received_bytes => Err(self.mismatch()),
            _ => Ok(()),
        }
    }

    fn mismatch(&self) -> ApiError {
        let message = format!(
            "Content-Length is {}, but {} bytes came",
            self.announced_bytes.unwrap_or_default(),
            self.received_bytes
        );
        ApiError::bad_request("length_mismatch", message).hint("nothing was stored")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::http::connections::Patience;
    use futures::stream;
    use std::time::Duration;

    fn pace() -> Arc<Pace> {
        Arc::new(Pace::new(Patience::default(), None, None))
    }

    fn body(frames: Vec<Vec<u8>>) -> Body {
        Body::from_stream(stream::iter(frames.into_iter().map(Ok::<_, std::io::Error>)))
    }

    #[tokio::test]
    async fn frames_of_any_size_become_whole_chunks() {
        let bytes: Vec<u8> = (0..2_500_000u32).map(|i| (i / 7) as u8).collect();
        for frame_bytes in [1000, 65_536, 1_500_000, 2_500_000] {
            let frames = bytes.chunks(frame_bytes).map(<[u8]>::to_vec).collect();
            let mut incoming = Incoming::new(body(frames), Some(bytes.len() as u64), pace());
            let mut got = Vec::new();
            let mut sizes = Vec::new();
            while incoming.has_more().await.unwrap() {
                let chunk = incoming.next_chunk().await.unwrap();
                sizes.push(chunk.len());
                got.extend_from_slice(&chunk);
            }
            assert_eq!(sizes, [1 << 20, 1 << 20, 2_500_000 - (2 << 20)]);
            assert!(got == bytes, "frames of {frame_bytes}");
        }
    }

    #[tokio::test]
    async fn an_empty_body_is_no_chunk() {
        let mut incoming = Incoming::new(body(vec![vec![], vec![]]), Some(0), pace());
        assert!(!incoming.has_more().await.unwrap());
        assert!(incoming.next_chunk().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_body_of_another_length_than_announced_is_refused() {
        for (announced, sent) in [(10, 9), (10, 11), (0, 1), (1, 0)] {
            let mut incoming = Incoming::new(body(vec![vec![1; sent]]), Some(announced), pace());
            let error = incoming.next_chunk().await.unwrap_err();
            assert_eq!((error.status.as_u16(), error.code), (400, "length_mismatch"));
        }
    }

    #[tokio::test]
    async fn a_silent_client_is_given_up_on() {
        let impatient = Arc::new(Pace::new(
            Patience {
                let_go_after: Duration::from_millis(20),
                ..Patience::default()
            },
            None,
            None,
        ));
        let silent = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
        let mut incoming = Incoming::new(silent, None, impatient);
        let error = incoming.next_chunk().await.unwrap_err();
        assert_eq!(error.status, StatusCode::REQUEST_TIMEOUT);
    }
}
