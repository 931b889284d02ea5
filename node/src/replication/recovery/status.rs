//! The status of recovery, for the HTTP interface and metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::ledger::WalkReason;
use super::{CATCH_UP_MS_MAX, Recovery};
use crate::replication::names::CHUNKS_MAX;

/// Most file names in a status.
const FILES_NAMED_MAX: usize = 10;
/// Interval at which the processing of applied effects is checked.
const CATCH_UP_TICK_MS: u64 = 2;

/// The extent of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PassKind {
    /// All chunks that the metadata refers to.
    Complete,
    /// The known missing chunks.
    Changes,
}

/// A completed pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct PassReport {
    /// The extent of the pass.
    pub kind: PassKind,
    /// The reason of a complete pass; null otherwise.
    pub reason: Option<WalkReason>,
    /// The time of its start, in milliseconds since 1970.
    pub began_unix_ms: u64,
    /// Its duration, in milliseconds.
    pub duration_ms: u64,
    /// The number of chunks that it examined.
    pub chunks_looked_at: u64,
    /// The number of missing chunks at its end.
    pub chunks_missing: u64,
}

/// The response to a request for a pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct SyncReport {
    /// Whether this request starts a pass.
    pub started: bool,
    /// Whether a complete pass was running or about to start; this request then has no effect.
    pub already_running: bool,
    /// The extent of the pass.
    pub began: PassKind,
    /// The time of the request, in milliseconds since 1970.
    pub asked_unix_ms: u64,
}

/// The progress of recovery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct RecoveryStatus {
    /// Whether chunks are being fetched or compared.
    pub running: bool,
    /// Whether a complete comparison has taken place; before that the other numbers are preliminary.
    pub counted: bool,
    /// Number of files, directories and other inodes, without the root.
    pub total_files: u64,
    /// Number of inodes without missing content on this node; null if the files of the missing chunks are not known.
    pub local_files: Option<u64>,
    /// Chunks that files refer to.
    pub named_chunks: u64,
    /// Sum of their lengths, in bytes.
    pub named_bytes: u64,
    /// Chunks on this node's disk, including unreferenced ones.
    pub held_chunks: u64,
    /// Sum of their lengths, in bytes.
    pub held_bytes: u64,
    /// Number of copies of each chunk.
    pub copies: usize,
    /// Chunks held here but assigned to other nodes; they are deleted when those nodes hold them (at most 262144 are
    /// counted).
    pub surplus_chunks: u64,
    /// Referenced chunks that should be held here and are missing.
    pub missing_chunks: u64,
    /// Sum of their lengths, in bytes.
    pub missing_bytes: u64,
    /// Missing chunks that no node has, although all answered (at most 4096 are counted).
    pub lost_chunks: u64,
    /// Some of the files with missing content on this node, as far as a bounded search finds them.
    pub missing_files: Vec<String>,
    /// Chunks fetched since the node started.
    pub fetched_chunks: u64,
    /// Sum of their lengths, in bytes.
    pub fetched_bytes: u64,
    /// Bytes fetched per second, averaged over the last five seconds.
    pub bytes_per_s: u64,
    /// Remaining seconds at this rate; null if nothing is being fetched.
    pub seconds_to_go: Option<u64>,
    /// The last completed pass.
    pub last_pass: Option<PassReport>,
    /// The last complete pass.
    pub last_complete_pass: Option<PassReport>,
    /// Number of complete passes since the node started.
    pub complete_passes: u64,
    /// Why the state of this node, and thus these numbers, cannot be trusted; null if they can.
    pub trouble: Option<String>,
}

impl Recovery {
    /// Returns the status. The cost does not depend on the amount of data.
    pub fn status(&self) -> RecoveryStatus {
        let (held_chunks, held_bytes) = self.content.counts();
        let view = self.metadata.view().ok();
        let now = view.as_ref().map(|view| view.named_change());
        let total_files = view.map_or(0, |view| view.inode_count().saturating_sub(1));
        let (named, missing, lost, walk_requested) = {
            let ledger = self.ledger.lock();
            let named = now.and_then(|now| ledger.named(now));
            let lost = ledger.lost().len() as u64;
            (named, ledger.missing(), lost, ledger.walk_requested().is_some())
        };
        let walking = self.walking.load(Ordering::Acquire);
        let bytes_per_s = self.rate.lock().bytes_per_s(Instant::now());
        RecoveryStatus {
            // Recovery is also running between two fetches that the rate limit delays.
            running: walking
                || self.fetches_in_flight.load(Ordering::Acquire) > 0
                || (missing.chunks > 0 && bytes_per_s > 0),
            counted: named.is_some() && !walking && !walk_requested,
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

    /// Like [`Recovery::status`], after everything applied before the call was processed (or a few seconds have
    /// passed), and with the names of files.
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

    /// Waits until everything applied before the call was processed and no walk is due, at most [`CATCH_UP_MS_MAX`].
    async fn caught_up(&self) {
        let sent = self.consensus.effects_sent_and_dropped().0;
        let pending = || {
            self.effects_handled.load(Ordering::Acquire) < sent
                || self.walking.load(Ordering::Acquire)
                || self.ledger.lock().walk_requested().is_some()
        };
        let until = Instant::now() + Duration::from_millis(CATCH_UP_MS_MAX);
        while pending() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(CATCH_UP_TICK_MS)).await;
        }
    }
}
