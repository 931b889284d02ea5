//! How consensus is set up on a node, with the reason for each default.

use std::path::PathBuf;
use std::sync::Arc;

use openraft::{Config, SnapshotPolicy};
use quorumfs_proto::{ClusterId, NodeId};

use super::wal::WalOptions;
use crate::tasks::Tasks;
use quorumfs_metadata::Position;

/// Entries in one message to a follower; its bytes are bounded by the log reader.
const REPLICATION_ENTRIES_MAX: u64 = 1024;

/// How fast the absence of a leader is noticed.
///
/// openraft has followers wait out the leader's lease (`election_ms_max`) and then a random time between the two, and
/// twice `election_ms_max` more if an attempt meets a longer log. So calls pause for three to five times
/// `election_ms_max` at worst; with 1,000 ms that was measured as 4.7 s, and P6 allows 3. A follower that is merely
/// starved disturbs nobody: its pre-vote is refused by those who hear the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timings {
    /// How often a leader says that it lives.
    pub heartbeat_ms: u64,
    /// A follower that hears nothing stands for election after a random time from here …
    pub election_ms_min: u64,
    /// … to here.
    pub election_ms_max: u64,
}

impl Default for Timings {
    fn default() -> Timings {
        Timings {
            heartbeat_ms: 100,
            election_ms_min: 300,
            election_ms_max: 600,
        }
    }
}

/// See the fields.
#[derive(Clone, Debug)]
pub struct ConsensusOptions {
    /// This node.
    pub id: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Where the log lies.
    pub directory: PathBuf,
    /// Whether this incarnation has had a log: then an empty one is a lost one.
    pub had_log: bool,
    /// Set where this node's state is lost or must not be used: the node keeps the log and votes, and applies nothing. The
    /// metadata that it is given are new and stand in for the lost ones, which went up to here as far as that is known.
    pub log_only: Option<Position>,
    /// How the log is kept.
    pub wal: WalOptions,
    /// Elections.
    pub timings: Timings,
    /// Most bytes of commands under way at once.
    pub admission_bytes_max: usize,
    /// What has been applied is on disk after so long at the latest, which bounds what a restart replays.
    pub flush_age_ms: u64,
    /// A snapshot is built after so many entries …
    pub snapshot_entries: u64,
    /// … or after so many bytes of log.
    pub snapshot_log_bytes: u64,
    /// So much log is kept behind a snapshot, so that a follower that was away for a moment needs no
    /// snapshot.
    pub keep_log_bytes: u64,
    /// Other nodes hold the log up until it has grown to this, each of its entries counted with what it takes in
    /// memory: while a snapshot is being sent no new one is built, and so nothing is purged; what a follower still
    /// gets from the log is not purged either.
    pub hold_log_bytes_max: u64,
    /// A leader whose log flush takes longer hands leadership on.
    pub slow_flush_ms: u64,
    /// Where its loops run.
    pub tasks: Arc<Tasks>,
}

impl ConsensusOptions {
    /// The defaults, for a log in `directory`.
    pub fn new(id: NodeId, cluster: ClusterId, directory: PathBuf) -> ConsensusOptions {
        let wal = WalOptions::default();
        let file_bytes = wal.file_bytes;
        let mut options = ConsensusOptions {
            id,
            cluster,
            directory,
            had_log: false,
            log_only: None,
            wal,
            timings: Timings::default(),
            admission_bytes_max: 64 << 20,
            flush_age_ms: 2_000,
            snapshot_entries: 50_000,
            snapshot_log_bytes: 0,
            keep_log_bytes: 0,
            hold_log_bytes_max: 0,
            slow_flush_ms: 1_000,
            tasks: Arc::default(),
        };
        options.log_in_files_of(file_bytes);
        options
    }

    /// A log in files of `file_bytes`, all its bounds in proportion: a small disk, which has small files, is left to content.
    pub fn log_in_files_of(&mut self, file_bytes: u64) {
        self.wal.file_bytes = file_bytes;
        self.keep_log_bytes = file_bytes;
        self.snapshot_log_bytes = 4 * file_bytes;
        self.hold_log_bytes_max = 16 * file_bytes;
    }

    pub(super) fn raft_config(&self) -> Config {
        Config {
            cluster_name: self.cluster.to_string(),
            heartbeat_interval: self.timings.heartbeat_ms,
            election_timeout_min: self.timings.election_ms_min,
            election_timeout_max: self.timings.election_ms_max,
            enable_pre_vote: Some(true),
            // Who has no state cannot lead.
            enable_elect: self.log_only.is_none(),
            // A restarted leader has not committed what it has in its log; it stands for election as
            // everyone.
            enable_leader_restore: Some(false),
            // A leader that reaches no quorum stops its heartbeats for so long that those who hear it can
            // elect another.
            quorum_loss_probe_interval: Some(2 * self.timings.election_ms_max),
            // A follower whose disk lost what it had promised to keep must not take the leader down with it.
            allow_log_reversion: Some(true),
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_entries),
            // Purging goes by bytes and whole files: see `maintenance`.
            max_in_snapshot_log_to_keep: u64::MAX,
            max_payload_entries: REPLICATION_ENTRIES_MAX,
            replication_lag_threshold: 4 * self.snapshot_entries,
            ..Config::default()
        }
    }
}
