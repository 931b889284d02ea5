//! The content of a file as a stream.
//!
//! The stream has the bytes of one version of the file, that of its `ETag`. The file is open during the download, so
//! replacing or removing it has no effect. If it is written in place, the stream fails, and so does the response,
//! whose length was announced; versions are never mixed.

use std::io;
use std::ops::Range;

use async_stream::try_stream;
use bytes::Bytes;
use futures::Stream;
use quorumfs_fs::readahead::{READAHEAD_CHUNKS_MAX, ReadaheadLimits};
use quorumfs_proto::FsError;
use quorumfs_proto::limits::CHUNK_BYTES_MAX;

use super::access::{Access, OpenFile};
use super::error::CallError;
use super::limiter::RequestPermit;
use super::{CACHE_BYTES, DOWNLOADS_MAX};

const CHUNK: u64 = CHUNK_BYTES_MAX as u64;

/// The content to stream.
pub(super) struct Content {
    pub(super) access: Access,
    pub(super) file: OpenFile,
    /// The content version; equal versions have equal bytes.
    pub(super) version: u64,
    pub(super) range: Range<u64>,
    /// The permit of the download, held until the stream ends.
    pub(super) permit: RequestPermit,
}

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("the file changed during the download")]
    Changed,
    #[error("cannot read the file: {0}")]
    Call(CallError),
}

impl Content {
    /// Returns the range, at most as long as a chunk, and releases the permit; `None` if the version no longer exists.
    pub(super) async fn whole(self) -> Result<Option<Bytes>, CallError> {
        match self.read(self.range.start, self.range.end).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(ReadError::Changed) => Ok(None),
            Err(ReadError::Call(error)) => Err(error),
        }
    }

    /// Streams exactly the range, or ends with an error.
    pub(super) fn stream(self) -> impl Stream<Item = Result<Bytes, io::Error>> + Send + 'static {
        try_stream! {
            let mut at = self.range.start;
            while at < self.range.end {
                let end = (at / CHUNK + 1) * CHUNK;
                let read = self.read(at, end.min(self.range.end)).await;
                if let Err(error) = &read {
                    tracing::warn!(handle = self.file.handle, %error, "a download was aborted");
                }
                let bytes = read.map_err(io::Error::other)?;
                at += bytes.len() as u64;
                yield bytes;
            }
        }
    }

    /// Reads the bytes `from..to`, at most the length of a chunk.
    async fn read(&self, from: u64, to: u64) -> Result<Bytes, ReadError> {
        let (handle, version) = (self.file.handle, self.version);
        let length = (to - from) as u32;
        // The readahead of all downloads together fits into the cache.
        let share = CACHE_BYTES / CHUNK / self.permit.in_use().clamp(1, DOWNLOADS_MAX) as u64;
        let ahead = ReadaheadLimits {
            // The window reaches up to one chunk further.
            chunks: (share / 2).saturating_sub(1).clamp(1, READAHEAD_CHUNKS_MAX),
            end: Some(self.range.end),
        };
        let read = self.access.call(|filesystem| async move {
            filesystem
                .read_version(handle, version, from, length, ahead)
                .await
        });
        match read.await {
            Ok(bytes) if bytes.len() == length as usize => Ok(bytes),
            Ok(_) | Err(CallError::Verdict(FsError::Stale | FsError::NotFound)) => Err(ReadError::Changed),
            Err(error) => Err(ReadError::Call(error)),
        }
    }
}
