//! Options of the consensus on a node, with the reason for each default.

use std::path::PathBuf;
use std::sync::Arc;

use openraft::{Config, SnapshotPolicy};
use quorumfs_proto::{ClusterId, NodeId};

use super::wal::WalOptions;
use quorumfs_metadata::Position;
use quorumfs_tasks::Tasks;

/// Entries in one message to a follower; its bytes are bounded by the log reader.
const REPLICATION_ENTRIES_MAX: u64 = 1024;

/// Timings of the elections.
///
/// openraft makes followers wait for the leader's lease (`election_ms_max`) and then for a random time between the two
/// bounds, and for twice `election_ms_max` more if an attempt meets a longer log. So calls pause for three to five
/// times `election_ms_max` at worst; with 1,000 ms a pause of 4.7 s was measured, and P6 allows 3 s. A follower that is
/// merely starved of CPU has no effect: voters that hear the leader refuse its pre-vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timings {
    /// Interval of a leader's heartbeats.
    pub heartbeat_ms: u64,
    /// Lower bound of the random time without a heartbeat after which a follower stands for election.
    pub election_ms_min: u64,
    /// Upper bound of that time.
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

/// Options of the consensus.
#[derive(Clone, Debug)]
pub struct ConsensusOptions {
    /// This node's id.
    pub id: NodeId,
    /// The id of its cluster.
    pub cluster: ClusterId,
    /// Folder of the log.
    pub directory: PathBuf,
    /// Whether this incarnation has had a log: then an empty log is a lost one.
    pub had_log: bool,
    /// Set if this node's state is lost or must not be used: the node keeps the log and votes, and applies nothing. Its
    /// metadata are new and stand in for the lost ones, which ended at this position as far as is known.
    pub log_only: Option<Position>,
    /// Options of the log.
    pub wal: WalOptions,
    /// Timings of the elections.
    pub timings: Timings,
    /// Most bytes of commands in progress at once.
    pub admission_bytes_max: usize,
    /// Longest time until an applied change is on disk; it bounds what a restart replays.
    pub flush_age_ms: u64,
    /// A snapshot is built after this many entries …
    pub snapshot_entries: u64,
    /// … or after this many bytes of log.
    pub snapshot_log_bytes: u64,
    /// Bytes of log kept behind a snapshot, so that a follower that was away briefly needs no snapshot.
    pub keep_log_bytes: u64,
    /// Other nodes may hold the log up until it has this weight, in which each entry counts with its memory: while a
    /// snapshot is being sent no new one is built, so nothing is purged; entries that a follower still gets from the
    /// log are not purged either.
    pub hold_log_bytes_max: u64,
    /// A leader hands on leadership if its log flush takes longer than this.
    pub slow_flush_ms: u64,
    /// Supervisor of its background tasks.
    pub tasks: Arc<Tasks>,
}

impl ConsensusOptions {
    /// Returns the defaults, for a log in `directory`.
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

    /// Sets the size of log files, and all bounds of the log in proportion: a small disk gets small files, so that it
    /// has space for content.
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
            // A node without a state cannot lead.
            enable_elect: self.log_only.is_none(),
            // A restarted leader has not committed the entries in its log; it stands for election like every voter.
            enable_leader_restore: Some(false),
            // A leader that reaches no quorum stops its heartbeats long enough for the followers that hear it to elect
            // another.
            quorum_loss_probe_interval: Some(2 * self.timings.election_ms_max),
            // A follower whose disk lost acknowledged entries must not stop the leader.
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
