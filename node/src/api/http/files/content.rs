//! The bytes of a file as a stream: extents page by page, chunks fetched ahead, holes as zeros.
//!
//! What is streamed is one version of the file, the one that its `ETag` names. Its chunks are immutable and the inode
//! is held open meanwhile, so replacing or removing the file does not disturb a download. A file that is written in
//! place while it is read may lose a chunk that we still need; then the stream fails (and with it the response, whose
//! length was announced): never a mix of two versions.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use async_stream::try_stream;
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::{Extent, FsError, InodeNumber};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

use super::calls::Calls;
use super::error::CallError;
use super::open_inodes::HeldInode;
use super::turns::Turn;
use quorumfs_proto::query::ExtentsPage;

/// Chunks of one download that are fetched ahead: 8 MiB at most.
const READ_AHEAD_MAX: usize = 8;

/// How often the extents are looked up again for bytes that were not where they had said.
const LOOKUPS_MAX: usize = 4;

/// Zeros are sent from here, as often as it takes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What is streamed.
pub(super) struct Content {
    pub(super) calls: Calls,
    pub(super) held: HeldInode,
    /// Equal versions mean equal bytes.
    pub(super) version: u64,
    /// First byte.
    pub(super) start: u64,
    /// After the last.
    pub(super) end: u64,
    /// Extents of this version from `start` on.
    pub(super) first_page: ExtentsPage,
    /// Chunks fetched ahead by all downloads of this node.
    pub(super) read_ahead: Arc<Semaphore>,
    /// Makes one of the node's downloads, until the stream ends.
    pub(super) turn: Turn,
}

/// Why a stream broke off.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the file was changed while it was read")]
    Changed,
    #[error("reading the file: {0:?}")]
    Call(CallError),
}

impl From<Broken> for io::Error {
    fn from(broken: Broken) -> io::Error {
        io::Error::other(broken)
    }
}

/// A part of the file, at most a chunk long where it has bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Hole { bytes: u64 },
    Bytes(Extent),
}

/// A part under way.
enum Fetch {
    Hole {
        bytes: u64,
    },
    Bytes(
        AbortOnDropHandle<Result<Bytes, Broken>>,
        Option<OwnedSemaphorePermit>,
    ),
}

impl Content {
    /// All of it at once, and its turn is over; `None` if the version is gone meanwhile.
    pub(super) async fn whole(self) -> Result<Option<Bytes>, CallError> {
        let mut bytes = BytesMut::with_capacity((self.end - self.start) as usize);
        let stream = self.stream();
        tokio::pin!(stream);
        while let Some(next) = stream.next().await {
            match next {
                Ok(part) => bytes.extend_from_slice(&part),
                Err(error) => {
                    let broken = error
                        .into_inner()
                        .and_then(|inner| inner.downcast::<Broken>().ok());
                    return match broken.map(|broken| *broken) {
                        Some(Broken::Call(error)) => Err(error),
                        Some(Broken::Changed) => Ok(None),
                        None => Err(CallError::Verdict(FsError::Io)),
                    };
                }
            }
        }
        Ok(Some(bytes.freeze()))
    }

    /// Streams exactly `end - start` bytes, or an error. Dropped: what is under way is given up.
    pub(super) fn stream(self) -> impl Stream<Item = Result<Bytes, io::Error>> + Send + 'static {
        try_stream! {
            let Content { calls, held, version, start, end, first_page, read_ahead, turn } = self;
            let source = Source { calls, inode: held.inode(), version };
            let mut parts = Parts::new(source.clone(), start, end, first_page);
            let mut ahead: VecDeque<Fetch> = VecDeque::new();
            loop {
                while ahead.len() < READ_AHEAD_MAX {
                    // The next chunk is always fetched; those after it as the node's memory allows.
                    let permit = Arc::clone(&read_ahead).try_acquire_owned().ok();
                    if !ahead.is_empty() && permit.is_none() {
                        break;
                    }
                    match parts.next().await? {
                        None => break,
                        Some(Part::Hole { bytes }) => ahead.push_back(Fetch::Hole { bytes }),
                        Some(Part::Bytes(piece)) => {
                            let task = tokio::spawn(source.clone().fetch(piece));
                            ahead.push_back(Fetch::Bytes(AbortOnDropHandle::new(task), permit));
                        }
                    }
                }
                match ahead.pop_front() {
                    None => break,
                    Some(Fetch::Hole { mut bytes }) => while bytes > 0 {
                        let length = bytes.min(ZEROS.len() as u64);
                        bytes -= length;
                        yield Bytes::from_static(&ZEROS[..length as usize]);
                    },
                    Some(Fetch::Bytes(task, permit)) => {
                        let fetched = task.await.map_err(io::Error::other)?;
                        if let Err(broken) = &fetched {
                            tracing::warn!(inode = %held.inode(), %broken, "a download breaks off");
                        }
                        yield fetched?;
                        drop(permit);
                    }
                }
            }
            drop((held, turn));
        }
    }
}

/// Cuts what the extents say into parts, and asks for more extents when they run out.
struct Parts {
    source: Source,
    at: u64,
    end: u64,
    pieces: VecDeque<Extent>,
    known_to: u64,
}

impl Parts {
    fn new(source: Source, start: u64, end: u64, page: ExtentsPage) -> Parts {
        Parts {
            source,
            at: start,
            end,
            pieces: page.extents.into(),
            known_to: page.known_to,
        }
    }

    async fn next(&mut self) -> Result<Option<Part>, Broken> {
        while self.at < self.end {
            if let Some(part) = self.next_known() {
                return Ok(Some(part));
            }
            let page = self.source.page(self.at, self.end).await?;
            self.known_to = page.known_to;
            self.pieces = page.extents.into();
        }
        Ok(None)
    }

    /// The next part, if the extents at hand say what it is.
    fn next_known(&mut self) -> Option<Part> {
        while let Some(piece) = self.pieces.front().copied() {
            if piece.file_end() <= self.at {
                self.pieces.pop_front();
            } else if piece.file_offset >= self.end {
                self.pieces.clear();
            } else if piece.file_offset > self.at {
                return Some(self.hole_to(piece.file_offset));
            } else {
                self.pieces.pop_front();
                let part = clipped(&piece, self.at, self.end);
                self.at = part.file_end();
                return Some(Part::Bytes(part));
            }
        }
        let known_to = self.known_to.min(self.end);
        (known_to > self.at).then(|| self.hole_to(known_to))
    }

    fn hole_to(&mut self, to: u64) -> Part {
        let bytes = to - self.at;
        self.at = to;
        Part::Hole { bytes }
    }
}

/// The part of `piece` that lies in `from..to`; they overlap.
fn clipped(piece: &Extent, from: u64, to: u64) -> Extent {
    let skipped = from.saturating_sub(piece.file_offset);
    let start = piece.file_offset + skipped;
    Extent {
        file_offset: start,
        length: (piece.file_end().min(to) - start) as u32,
        chunk: piece.chunk,
        chunk_offset: piece.chunk_offset + skipped as u32,
    }
}

/// One version of one file.
#[derive(Clone)]
struct Source {
    calls: Calls,
    inode: InodeNumber,
    version: u64,
}

impl Source {
    /// Extents of this version.
    async fn page(&self, from: u64, to: u64) -> Result<ExtentsPage, Broken> {
        let page = match self.calls.extents(self.inode, from, to).await {
            Ok(page) => page,
            Err(CallError::Verdict(FsError::Stale | FsError::NotFound)) => return Err(Broken::Changed),
            Err(error) => return Err(Broken::Call(error)),
        };
        if page.attributes.content_version != self.version {
            return Err(Broken::Changed);
        }
        if page.known_to <= from {
            return Err(Broken::Call(CallError::Verdict(FsError::Io)));
        }
        Ok(page)
    }

    /// The bytes of `piece`; where its chunk is gone, of what is there now, if the version is the same (a file that was
    /// rewritten into fewer pieces has the same bytes in other chunks).
    async fn fetch(self, piece: Extent) -> Result<Bytes, Broken> {
        let mut result = self.read(&piece).await;
        for _ in 0..LOOKUPS_MAX {
            match result {
                Err(Broken::Call(CallError::Verdict(FsError::Stale))) => {
                    result = self.look_up_and_read(piece.file_offset, piece.file_end()).await;
                }
                other => return other,
            }
        }
        result
    }

    async fn look_up_and_read(&self, from: u64, to: u64) -> Result<Bytes, Broken> {
        let page = self.page(from, to).await?;
        let mut parts = Parts::new(self.clone(), from, to, page);
        let mut bytes = BytesMut::with_capacity(CHUNK_BYTES_MAX as usize);
        while let Some(part) = parts.next().await? {
            match part {
                Part::Hole { bytes: hole } => bytes.resize(bytes.len() + hole as usize, 0),
                Part::Bytes(piece) => bytes.extend_from_slice(&self.read(&piece).await?),
            }
        }
        Ok(bytes.freeze())
    }

    async fn read(&self, piece: &Extent) -> Result<Bytes, Broken> {
        let call = self
            .calls
            .client
            .get_chunk(piece.chunk, piece.chunk_offset, piece.length);
        self.calls.in_time(call).await.map_err(Broken::Call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_proto::{ChunkId, SessionId};

    fn piece(file_offset: u64, length: u32, chunk_offset: u32) -> Extent {
        let chunk = ChunkId {
            session: SessionId(1),
            counter: file_offset,
        };
        Extent {
            file_offset,
            length,
            chunk,
            chunk_offset,
        }
    }

    #[test]
    fn a_piece_is_clipped_at_both_ends() {
        let part = clipped(&piece(100, 50, 7), 110, 120);
        assert_eq!((part.file_offset, part.length, part.chunk_offset), (110, 10, 17));
        let part = clipped(&piece(100, 50, 7), 90, 200);
        assert_eq!((part.file_offset, part.length, part.chunk_offset), (100, 50, 7));
    }
}
