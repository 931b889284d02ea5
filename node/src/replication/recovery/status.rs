//! What recovery says of itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::ledger::WalkReason;
use super::{CATCH_UP_MS_MAX, Recovery};
use crate::replication::names::CHUNKS_MAX;

/// Names of files in a status.
const FILES_NAMED_MAX: usize = 10;
/// How often it is seen whether everything applied was accounted for.
const CATCH_UP_TICK_MS: u64 = 2;

/// What a pass looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PassKind {
    /// All that the metadata names.
    Complete,
    /// What is known to be missing.
    Changes,
}

/// A pass that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct PassReport {
    /// What it looked at.
    pub kind: PassKind,
    /// Why all that is named was looked at; null if it was not.
    pub reason: Option<WalkReason>,
    /// When it began, in milliseconds since 1970.
    pub began_unix_ms: u64,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// How many chunks it looked at.
    pub chunks_looked_at: u64,
    /// How many were missing when it ended.
    pub chunks_missing: u64,
}

/// What asking for a pass has begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct SyncReport {
    /// Whether a pass begins because of this request.
    pub started: bool,
    /// Whether one was under way or about to begin; then this request changes nothing.
    pub already_running: bool,
    /// What the pass looks at.
    pub began: PassKind,
    /// When this was asked, in milliseconds since 1970.
    pub asked_unix_ms: u64,
}

/// How far the healing is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct RecoveryStatus {
    /// Whether chunks are being fetched or compared now.
    pub running: bool,
    /// Whether everything named has been compared with everything held; until then the other numbers are what is known
    /// so far.
    pub counted: bool,
    /// Files, directories and all others; not the root.
    pub total_files: u64,
    /// Those of which no content that should be here is missing; null where it is not known which files the missing chunks belong to.
    pub local_files: Option<u64>,
    /// Chunks that the metadata names.
    pub named_chunks: u64,
    /// Bytes of them.
    pub named_bytes: u64,
    /// Chunks on this node's disk; those that no file names yet, or any more, too.
    pub held_chunks: u64,
    /// Bytes of them.
    pub held_bytes: u64,
    /// On how many nodes each chunk is kept.
    pub copies: usize,
    /// Chunks held that are for other nodes to hold; they are let go once those do (at most 262144 are counted).
    pub surplus_chunks: u64,
    /// Chunks named that should be held here and are not.
    pub missing_chunks: u64,
    /// Bytes of them.
    pub missing_bytes: u64,
    /// Of the missing ones, those that no node could give although all answered (at most 4096 are counted).
    pub lost_chunks: u64,
    /// Some of the files that lack content here, if they could be found within a bound.
    pub missing_files: Vec<String>,
    /// Chunks fetched since the node started.
    pub fetched_chunks: u64,
    /// Bytes of them.
    pub fetched_bytes: u64,
    /// Bytes fetched per second, over the last five seconds.
    pub bytes_per_s: u64,
    /// Seconds to go at that rate; null where nothing is being fetched.
    pub seconds_to_go: Option<u64>,
    /// The last pass that ended.
    pub last_pass: Option<PassReport>,
    /// The last pass over all that is named.
    pub last_complete_pass: Option<PassReport>,
    /// How many of these there were since the node started.
    pub complete_passes: u64,
    /// Why this node's state cannot be relied on, and so none of these numbers; null where nothing is known against it.
    pub trouble: Option<String>,
}

impl Recovery {
    /// How far it is. Costs the same whatever is stored.
    pub fn status(&self) -> RecoveryStatus {
        let (held_chunks, held_bytes) = self.content.counts();
        let view = self.metadata.view().ok();
        let now = view.as_ref().map(|view| view.named_change());
        let total_files = view.map_or(0, |view| view.inode_count().saturating_sub(1));
        let (named, missing, lost, walk_wanted) = {
            let ledger = self.ledger.lock();
            let named = now.and_then(|now| ledger.named(now));
            let lost = ledger.lost().len() as u64;
            (named, ledger.missing(), lost, ledger.walk_wanted().is_some())
        };
        let walking = self.walking.load(Ordering::Acquire);
        let bytes_per_s = self.rate.lock().bytes_per_s(Instant::now());
        RecoveryStatus {
            // Between two fetches, as the bound on their pace has it, none is under way.
            running: walking
                || self.fetching.load(Ordering::Acquire) > 0
                || (missing.chunks > 0 && bytes_per_s > 0),
            counted: named.is_some() && !walking && !walk_wanted,
            total_files,
            local_files: (missing.chunks == 0).then_some(total_files),
            named_chunks: named.unwrap_or_default().chunks,
            named_bytes: named.unwrap_or_default().bytes,
            held_chunks,
            held_bytes,
            copies: self.placement.copies(),
            surplus_chunks: self.surplus.count(),
            missing_chunks: missing.chunks,
            missing_bytes: missing.bytes,
            lost_chunks: lost,
            missing_files: Vec::new(),
            fetched_chunks: self.fetched_chunks.load(Ordering::Relaxed),
            fetched_bytes: self.fetched_bytes.load(Ordering::Relaxed),
            bytes_per_s,
            seconds_to_go: (bytes_per_s > 0 && missing.bytes > 0)
                .then(|| missing.bytes.div_ceil(bytes_per_s)),
            last_pass: self.last_pass.lock().clone(),
            last_complete_pass: self.last_complete_pass.lock().clone(),
            complete_passes: self.complete_passes.load(Ordering::Acquire),
            trouble: self.consensus.trouble(),
        }
    }

    /// As [`Recovery::status`], with everything accounted for that was applied before the call (or as much as a few
    /// seconds allow), and with names of files.
    pub async fn status_now(self: &Arc<Self>) -> RecoveryStatus {
        self.caught_up().await;
        let recovery = Arc::clone(self);
        let named = tokio::task::spawn_blocking(move || {
            let mut status = recovery.status();
            if status.missing_chunks > 0 {
                let missing = || recovery.ledger.lock().missing_ids(CHUNKS_MAX);
                let names = recovery.names.files_of(missing);
                if names.complete {
                    status.local_files = Some(status.total_files.saturating_sub(names.paths.len() as u64));
                }
                status.missing_files = names.paths.into_iter().take(FILES_NAMED_MAX).collect();
            }
            status
        });
        named.await.unwrap_or_else(|_| self.status())
    }

    /// Everything that was applied before the call has been accounted for, and no walk is due; or time is up.
    async fn caught_up(&self) {
        let told = self.consensus.effects_sent_and_dropped().0;
        let pending = || {
            self.effects_handled.load(Ordering::Acquire) < told
                || self.walking.load(Ordering::Acquire)
                || self.ledger.lock().walk_wanted().is_some()
        };
        let until = Instant::now() + Duration::from_millis(CATCH_UP_MS_MAX);
        while pending() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(CATCH_UP_TICK_MS)).await;
        }
    }
}
