//! The content that the own log alone has, before a snapshot takes the log's place.
//!
//! What comes inside commands lies in the log until it is stored. A snapshot names it and does not hold it,
//! and the log goes when it is installed: with it would go a copy that this node has acknowledged. So what the new state
//! names is stored, durably, before openraft hears of the snapshot (it may cut the log at once, where that differs), and
//! again before the new state is put in place (more may have been appended meanwhile).
//!
//! Entries need not be committed for that: the state names a chunk with its SHA-256, and nothing else is stored.

use std::time::{Duration, Instant};

use openraft::EntryPayload;
use quorumfs_proto::{Chunk, ChunkBody, NewChunk};

use super::log::LogStore;
use super::types::Entry;
use quorumfs_content::{ContentError, ContentStore};
use quorumfs_metadata::{Failure, LogBody, LogCommand, View};

/// Who found no room for a snapshot, or for what it would take away, does not look at another for so long: to send one
/// is a lot of work.
const NEXT_ATTEMPT: Duration = Duration::from_secs(15);
/// For so long no snapshot is installed that would take content away for which there is no room. Those who hold the rest
/// of the copies make new ones meanwhile, and then it need not be kept here; a full disk must not keep a node away for
/// ever from the deletes that would make room on it.
const PATIENCE: Duration = Duration::from_secs(300);

/// How far content was saved from the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rescued {
    /// All that the state names is on disk.
    All,
    /// For so many chunks there is no room.
    AllBut(u64),
}

/// Why it cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum RescueError {
    /// The new state cannot be read.
    #[error("look up content in the snapshot: {0}")]
    State(#[from] Failure),
    /// The content store does not store.
    #[error("store content that the log has: {0}")]
    Content(#[from] ContentError),
}

/// Stores the content in the entries of `log` from `first` on that `state` names, and makes durable all that is stored.
/// Blocking.
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
            // Purged or cut off since.
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(index, %error, "an entry cannot be read; if it has content, that is left to recovery");
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

/// When snapshots were refused for want of room.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoomRefusals {
    first_and_last: Option<(Instant, Instant)>,
}

impl RoomRefusals {
    /// Whether the last was a moment ago.
    pub fn is_too_soon(&self) -> bool {
        self.first_and_last
            .is_some_and(|(_, last)| last.elapsed() < NEXT_ATTEMPT)
    }

    /// There is no room now. Says whether it has been so for long enough.
    pub fn note(&mut self) -> bool {
        let now = Instant::now();
        // Those of long ago say nothing about what others hold now.
        let first = match self.first_and_last {
            Some((first, last)) if last.elapsed() < PATIENCE => first,
            _ => now,
        };
        self.first_and_last = Some((first, now));
        first.elapsed() >= PATIENCE
    }

    /// A snapshot was taken.
    pub fn clear(&mut self) {
        self.first_and_last = None;
    }
}
