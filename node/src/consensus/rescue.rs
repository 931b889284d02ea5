//! Saves content that only this node's log has, before a snapshot replaces the log.
//!
//! Content inside commands is in the log until it is stored. A snapshot refers to it but does not contain it, and the
//! log is dropped when the snapshot is installed: a copy that this node has acknowledged would be lost. So the content
//! that the new state refers to is stored durably before openraft learns of the snapshot (it may cut a diverging log at
//! once), and again before the new state is installed (more may have been appended meanwhile).
//!
//! Entries need not be committed for that: the state has the SHA-256 of each chunk, and nothing else is stored.

use std::time::{Duration, Instant};

use openraft::EntryPayload;
use quorumfs_proto::{Chunk, ChunkBody, NewChunk};

use super::log::LogStore;
use super::types::Entry;
use quorumfs_content::{ContentError, ContentStore};
use quorumfs_metadata::{Failure, LogBody, LogCommand, View};

/// Least time between two attempts to receive a snapshot for which, or for whose displaced content, there is no space:
/// sending one is much work.
const NEXT_ATTEMPT: Duration = Duration::from_secs(15);
/// For this long a snapshot is refused if it would drop content for which there is no space. Meanwhile the nodes with
/// the other copies make new ones, and the content need not be kept here. A full disk must not for ever keep a node
/// from the deletes that would free its space.
const PATIENCE: Duration = Duration::from_secs(300);

/// The result of saving content from the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rescued {
    /// All content that the state refers to is on disk.
    All,
    /// There is no space for this many chunks.
    AllBut(u64),
}

/// Why the content could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum RescueError {
    /// The new state cannot be read.
    #[error("cannot look up content in the snapshot: {0}")]
    State(#[from] Failure),
    /// The content store failed.
    #[error("cannot store content of the log: {0}")]
    Content(#[from] ContentError),
}

/// Stores the content in the entries of `log` from `first` on that `state` refers to, and makes everything stored
/// durable. Blocking.
pub fn rescue_content(
    content: &ContentStore,
    log: &LogStore,
    state: &View,
    first: u64,
) -> Result<Rescued, RescueError> {
    let mut without_room = 0;
    let held = log.range();
    for index in first.max(held.start)..held.end {
        let entry = match log.read_entry(index) {
            Ok(Some(entry)) => entry,
            // The entry was purged or cut off meanwhile.
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(index, %error, "cannot read an entry of the log; if it has content, recovery fetches that from other nodes");
                continue;
            }
        };
        for chunk in chunks_of(&entry) {
            let ChunkBody::Inline(payload) = &chunk.body else {
                continue;
            };
            if content.contains(chunk.id) {
                continue;
            }
            let named = state.chunk(chunk.id)?;
            if !named.is_some_and(|named| named.sha256 == chunk.sha256 && named.length == chunk.length) {
                continue;
            }
            let chunk = Chunk::with_sha256(chunk.id, chunk.sha256, payload.clone());
            match chunk
                .map_err(ContentError::from)
                .and_then(|chunk| content.append(&chunk))
            {
                Ok(()) => {}
                Err(ContentError::NoSpace) => without_room += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }
    content.sync()?;
    Ok(match without_room {
        0 => Rescued::All,
        some => Rescued::AllBut(some),
    })
}

fn chunks_of(entry: &Entry) -> &[NewChunk] {
    match &entry.payload {
        EntryPayload::Normal(LogCommand {
            body: LogBody::Call(mutation),
            ..
        }) => &mutation.command.chunks,
        _ => &[],
    }
}

/// The times at which snapshots were refused for lack of space.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoomRefusals {
    first_and_last: Option<(Instant, Instant)>,
}

impl RoomRefusals {
    /// Whether the last refusal was a moment ago.
    pub fn is_too_soon(&self) -> bool {
        self.first_and_last
            .is_some_and(|(_, last)| last.elapsed() < NEXT_ATTEMPT)
    }

    /// Records a refusal. Returns whether snapshots have been refused long enough.
    pub fn note(&mut self) -> bool {
        let now = Instant::now();
        // Old refusals say nothing about what other nodes hold now.
        let first = match self.first_and_last {
            Some((first, last)) if last.elapsed() < PATIENCE => first,
            _ => now,
        };
        self.first_and_last = Some((first, now));
        first.elapsed() >= PATIENCE
    }

    /// Records that a snapshot was taken.
    pub fn clear(&mut self) {
        self.first_and_last = None;
    }
}
