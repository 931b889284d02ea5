//! What the consensus counts of itself, for the metrics: recorded on its paths, read by [`Consensus::measured`].

use std::sync::atomic::{AtomicU64, Ordering};

use quorumfs_measure::{Distribution, Snapshot};

use super::Consensus;

/// How many [`AppliedEffects`](super::AppliedEffects) there were.
#[derive(Debug, Default)]
pub struct EffectCounts {
    /// Sent.
    pub told: AtomicU64,
    /// Passed over because the receiver was slow.
    pub dropped: AtomicU64,
    /// Up to which entry everything was sent or passed over.
    pub through_index: AtomicU64,
}

/// Shared by the state machine and those who ask.
#[derive(Debug, Default)]
pub struct Meters {
    /// How long each batch of entries took to apply, in nanoseconds.
    pub applies: Distribution,
    /// Entries in them.
    pub entries_applied: AtomicU64,
    /// What those who look after content were told.
    pub effects: EffectCounts,
}

/// How the consensus does, since the start of the node.
#[derive(Clone, Debug)]
pub struct ConsensusMeasured {
    /// How long the log's flushes took, in nanoseconds.
    pub flush_times: Snapshot,
    /// Entries that each of them made durable.
    pub flush_entries: Snapshot,
    /// How long each batch of entries took to apply, in nanoseconds.
    pub applies: Snapshot,
    /// Entries in them.
    pub entries_applied: u64,
}

impl Consensus {
    /// What was counted so far.
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
