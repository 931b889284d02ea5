//! The status of repair.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use quorumfs_proto::ChunkId;
use serde::Serialize;

use super::{MetadataCheck, Repair};

/// Most names of files in a status.
const FILES_NAMED_MAX: usize = 100;

/// The last problem of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct LastError {
    /// Time, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Description of the problem.
    pub message: String,
}

/// What was verified and found, and the progress of the scrub.
#[derive(Clone, Debug, PartialEq, Serialize, utoipa::ToSchema)]
pub struct RepairStatus {
    /// Whether the scrub is reading now; between passes it rests.
    pub running: bool,
    /// Copies on this node that had the right SHA-256, since it started, in all checks; the same copy may count often.
    pub verified_chunks: u64,
    /// Bytes of these copies.
    pub verified_bytes: u64,
    /// Copies on this node that were found to be bad since it started; each counts once.
    pub found_corrupt: u64,
    /// Bad copies for which a good copy has been written.
    pub repaired: u64,
    /// Bad copies of chunks that no file refers to any more: dropped.
    pub obsolete: u64,
    /// Bad copies without a good replacement.
    pub under_repair: u64,
    /// Chunks for which all nodes answered and none has a good copy, damaged or missing here.
    pub unrepairable_chunks: u64,
    /// The files that these chunks belong to, as far as they could be found within a bound (at most 100).
    pub unrepairable_files: Vec<String>,
    /// Whether these are all such files.
    pub unrepairable_files_complete: bool,
    /// Percentage of all held bytes that this coverage has verified.
    pub progress_percent: f64,
    /// Number of chunks that this coverage has verified.
    pub progress_chunks: u64,
    /// Bytes of these chunks.
    pub progress_bytes: u64,
    /// Start of this coverage, in milliseconds since 1970; null between two coverages.
    pub coverage_began_unix_ms: Option<u64>,
    /// Seconds until this coverage ends at the highest rate that is set; null between two coverages.
    pub coverage_seconds_to_go: Option<u64>,
    /// Seconds that a whole coverage takes at that rate. Everything is verified within that time plus the interval of a
    /// pass.
    pub coverage_seconds: u64,
    /// Coverages completed since the data folder was created.
    pub coverages_completed: u64,
    /// End of the last completed coverage, in milliseconds since 1970.
    pub last_coverage_unix_ms: Option<u64>,
    /// Its duration in milliseconds, restarts included.
    pub last_coverage_duration_ms: Option<u64>,
    /// Its number of chunks.
    pub last_coverage_chunks: Option<u64>,
    /// Most bytes verified per second.
    pub bytes_per_s_max: u64,
    /// Files of this node's content store that its disk could not read whole; they were set aside and can be removed.
    pub files_set_aside: Vec<String>,
    /// The last bad copy or failure.
    pub last_error: Option<LastError>,
    /// The last check of the metadata on this node's disk that found it intact; null before the first.
    pub metadata_check: Option<MetadataCheck>,
    /// Why this node's state, and so all of these numbers, are unreliable; null if nothing is known.
    pub trouble: Option<String>,
}

impl Repair {
    /// Returns the status. Blocking: if a chunk is unrepairable, the names of files are looked up.
    pub fn status(self: &Arc<Self>) -> RepairStatus {
        let lost: BTreeSet<ChunkId> = self.parts.recovery.lost();
        let lost_chunks = lost.len() as u64;
        let files = self.names.files_of(|| lost);
        let (_, held_bytes) = self.parts.content.counts();
        let rate = self.options.bytes_per_s.max(1);
        let set_aside = self.parts.content.files_set_aside();
        let state = self.state.lock();
        let coverage = state.coverage;
        let begun = coverage.began_unix_ms > 0;
        let completed = coverage.completed > 0;
        RepairStatus {
            running: self.scrubbing.load(Ordering::Acquire),
            verified_chunks: self.verified_chunks.load(Ordering::Relaxed),
            verified_bytes: self.verified_bytes.load(Ordering::Relaxed),
            found_corrupt: state.found_corrupt,
            repaired: state.repaired,
            obsolete: state.obsolete,
            under_repair: state.under_repair.len() as u64,
            unrepairable_chunks: lost_chunks,
            unrepairable_files: files.paths.into_iter().take(FILES_NAMED_MAX).collect(),
            unrepairable_files_complete: files.complete,
            progress_percent: if begun { coverage.percent(held_bytes) } else { 0.0 },
            progress_chunks: coverage.chunks,
            progress_bytes: coverage.bytes,
            coverage_began_unix_ms: begun.then_some(coverage.began_unix_ms),
            coverage_seconds_to_go: begun.then(|| held_bytes.saturating_sub(coverage.bytes).div_ceil(rate)),
            coverage_seconds: held_bytes.div_ceil(rate),
            coverages_completed: coverage.completed,
            last_coverage_unix_ms: completed.then_some(coverage.completed_unix_ms),
            last_coverage_duration_ms: completed.then_some(coverage.completed_duration_ms),
            last_coverage_chunks: completed.then_some(coverage.completed_chunks),
            bytes_per_s_max: self.options.bytes_per_s,
            files_set_aside: set_aside.iter().map(|path| path.display().to_string()).collect(),
            last_error: state.last_error.clone(),
            metadata_check: self.metadata_check.lock().clone(),
            trouble: self.parts.consensus.trouble(),
        }
    }
}
