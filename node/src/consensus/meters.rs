//! The measurements of the consensus for the metrics: recorded on its paths, read by [`Consensus::measured`].

use std::sync::atomic::{AtomicU64, Ordering};

use quorumfs_measure::{Distribution, Snapshot};

use super::Consensus;

/// Counts of [`AppliedEffects`](super::AppliedEffects).
#[derive(Debug, Default)]
pub struct EffectCounts {
    /// Number of effects sent.
    pub told: AtomicU64,
    /// Number dropped because the receiver was slow.
    pub dropped: AtomicU64,
    /// The entry up to which all effects were sent or dropped.
    pub through_index: AtomicU64,
}

/// Shared by the state machine and its readers.
#[derive(Debug, Default)]
pub struct Meters {
    /// Time to apply each batch of entries, in nanoseconds.
    pub applies: Distribution,
    /// Number of entries in these batches.
    pub entries_applied: AtomicU64,
    /// Counts of the effects that were sent to recovery and sweep.
    pub effects: EffectCounts,
}

/// Measurements of the consensus since the start of the node.
#[derive(Clone, Debug)]
pub struct ConsensusMeasured {
    /// Durations of the log's flushes, in nanoseconds.
    pub flush_times: Snapshot,
    /// Number of entries in each of these flushes.
    pub flush_entries: Snapshot,
    /// Time to apply each batch of entries, in nanoseconds.
    pub applies: Snapshot,
    /// Number of entries in these batches.
    pub entries_applied: u64,
}

impl Consensus {
    /// Returns the measurements so far.
    pub fn measured(&self) -> ConsensusMeasured {
        let (flush_times, flush_entries) = self.0.log.flush_distributions();
        ConsensusMeasured {
            flush_times,
            flush_entries,
            applies: self.0.meters.applies.snapshot(),
            entries_applied: self.0.meters.entries_applied.load(Ordering::Relaxed),
        }
    }
}
