//! The bytes of a file as a stream.
//!
//! What is streamed is one version of the file, the one that its `ETag` names. The file is open meanwhile, so replacing or
//! removing it does not disturb a download. When it is written in place while it is read, the stream fails (and with it the
//! response, whose length was announced): never a mix of two versions.

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
use super::turns::Turn;
use super::{CACHE_BYTES, DOWNLOADS_MAX};

const CHUNK: u64 = CHUNK_BYTES_MAX as u64;

/// What is streamed.
pub(super) struct Content {
    pub(super) access: Access,
    pub(super) file: OpenFile,
    /// Equal versions mean equal bytes.
    pub(super) version: u64,
    pub(super) range: Range<u64>,
    /// Makes one of the node's downloads, until the stream ends.
    pub(super) turn: Turn,
}

/// Why a stream broke off.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the file was changed while it was read")]
    Changed,
    #[error("reading the file: {0}")]
    Call(CallError),
}

impl Content {
    /// All of it at once, at most a chunk's length, and its turn is over; `None` if the version is gone meanwhile.
    pub(super) async fn whole(self) -> Result<Option<Bytes>, CallError> {
        match self.read(self.range.start, self.range.end).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Broken::Changed) => Ok(None),
            Err(Broken::Call(error)) => Err(error),
        }
    }

    /// Streams exactly the range, or an error.
    pub(super) fn stream(self) -> impl Stream<Item = Result<Bytes, io::Error>> + Send + 'static {
        try_stream! {
            let mut at = self.range.start;
            while at < self.range.end {
                let end = (at / CHUNK + 1) * CHUNK;
                let read = self.read(at, end.min(self.range.end)).await;
                if let Err(broken) = &read {
                    tracing::warn!(handle = self.file.handle, %broken, "a download breaks off");
                }
                let bytes = read.map_err(io::Error::other)?;
                at += bytes.len() as u64;
                yield bytes;
            }
        }
    }

    /// The bytes of `from..to`, which lie in one chunk's length.
    async fn read(&self, from: u64, to: u64) -> Result<Bytes, Broken> {
        let (handle, version) = (self.file.handle, self.version);
        let length = (to - from) as u32;
        // All downloads together fetch ahead no more than is kept until it is read.
        let share = CACHE_BYTES / CHUNK / self.turn.taken().clamp(1, DOWNLOADS_MAX) as u64;
        let ahead = ReadaheadLimits {
            chunks: (share / 2).clamp(1, READAHEAD_CHUNKS_MAX),
            end: Some(self.range.end),
        };
        let read = self.access.call(|filesystem| async move {
            filesystem
                .read_version(handle, version, from, length, ahead)
                .await
        });
        match read.await {
            Ok(bytes) if bytes.len() == length as usize => Ok(bytes),
            Ok(_) | Err(CallError::Verdict(FsError::Stale | FsError::NotFound)) => Err(Broken::Changed),
            Err(error) => Err(Broken::Call(error)),
        }
    }
}
