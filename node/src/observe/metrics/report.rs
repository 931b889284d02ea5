//! `GET /metrics` as JSON: all counters, with quantiles and rates.

use std::sync::atomic::Ordering;

use quorumfs_measure::{Latency, Snapshot};
use serde::Serialize;
use utoipa::ToSchema;

use super::kinds::{Endpoint, OperationKind, Origin, RefusalKind};
use super::mounts::MountRow;
use super::window::Rate;
use super::{Metrics, STATUS_CLASSES};
use crate::consensus::{Consensus, Role};
use crate::replication::placement::Placement;
use crate::replication::space::SpaceMonitor;
use quorumfs_content::ContentStore;
use quorumfs_tasks::Tasks;

/// The counters of a node since it started. Durations are in microseconds.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MetricsReport {
    /// The node's slot.
    pub slot: u16,
    /// Time since the node started, in seconds.
    pub uptime_s: u64,
    /// Whether the node leads: the leader counts the calls of clients to the cluster, the others only what reached
    /// them.
    pub is_leader: bool,
    /// The leader's slot, if known.
    pub leader_slot: Option<u16>,
    /// The present throughput.
    pub throughput: Throughput,
    /// Operations on files by kind and origin; kinds that never occurred are left out.
    pub operations: Vec<OperationRow>,
    /// Calls that were not decided on this node; the clients repeat them.
    pub refusals: Vec<RefusalRow>,
    /// HTTP requests by endpoint; endpoints without requests are left out.
    pub http: Vec<HttpRow>,
    /// The replication of chunks.
    pub replication: ReplicationReport,
    /// The consensus and its log.
    pub raft: RaftReport,
    /// The content store.
    pub content: ContentReport,
    /// The caches in memory.
    pub caches: CachesReport,
    /// Space on this node's disk and in the cluster.
    pub space: SpaceReport,
    /// The reports of the mounts; only the leader receives them.
    pub mounts: Vec<MountRow>,
}

/// The throughput of the last seconds.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct Throughput {
    /// Length of the window, in seconds: about 10.
    pub window_s: f64,
    /// Operations on files, per second.
    pub operations_per_s: f64,
    /// Failed operations per second.
    pub failures_per_s: f64,
    /// Bytes read by clients from this node, per second.
    pub read_bytes_per_s: f64,
    /// Bytes written to files, per second.
    pub written_bytes_per_s: f64,
    /// HTTP requests per second.
    pub http_requests_per_s: f64,
    /// Durations of the commands decided through this node.
    pub commit_latency: Latency,
}

impl Throughput {
    /// Returns the present throughput of this node.
    pub fn gather(metrics: &Metrics) -> Throughput {
        let (window, rates) = metrics.rates();
        let (operation_rates, http_rates) = rates.split_at(Origin::ALL.len() * OperationKind::ALL.len());
        Throughput {
            window_s: window.as_secs_f64(),
            http_requests_per_s: http_rates.iter().map(|rate| rate.count_per_s).sum(),
            commit_latency: metrics.commits_lately().latency(),
            ..throughput(operation_rates)
        }
    }
}

/// Counters of one kind of operation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct OperationRow {
    /// The origin: a mount or an HTTP client.
    pub origin: Origin,
    /// `create`, `read`, `write`, `delete`, …
    pub kind: &'static str,
    /// The meaning of the kind.
    pub meaning: &'static str,
    /// Number of operations.
    pub count: u64,
    /// Operations answered with an error, which may be the expected answer (a name that does not exist).
    pub failures: u64,
    /// Fraction of operations that succeeded, 0 to 1.
    pub success_rate: f64,
    /// Bytes of content that they moved.
    pub bytes: u64,
    /// Durations on this node.
    pub latency: Latency,
    /// Present rate per second.
    pub per_s: f64,
    /// Present bytes per second.
    pub bytes_per_s: f64,
}

/// Counters of one reason of refusals.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct RefusalRow {
    /// Reason of the refusals.
    pub reason: &'static str,
    /// Number of refusals.
    pub count: u64,
}

/// Counters of one HTTP endpoint.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HttpRow {
    /// `upload`, `download`, `delete`, `list`, …
    pub endpoint: &'static str,
    /// Number of requests.
    pub count: u64,
    /// Requests answered with 400 or more.
    pub failures: u64,
    /// Number of responses in each class of statuses.
    pub statuses: Vec<StatusRow>,
    /// Bytes of bodies: of the requests for uploads, of the responses for all others.
    pub bytes: u64,
    /// Time from the head of the request to the end of the response's body.
    pub latency: Latency,
    /// Present rate per second.
    pub per_s: f64,
    /// Present bytes per second.
    pub bytes_per_s: f64,
}

/// Number of responses in one class of statuses.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusRow {
    /// `2xx`, `3xx`, `4xx` or `5xx`.
    pub class: &'static str,
    /// Number of responses.
    pub count: u64,
}

/// Replication of the chunks that clients sent to this node (as the leader).
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct ReplicationReport {
    /// Number of nodes that should hold each chunk.
    pub copies: usize,
    /// Number of nodes that must have it before the client is answered.
    pub quorum: usize,
    /// Number of chunks received.
    pub chunks: u64,
    /// Chunks that did not reach a quorum in time.
    pub failures: u64,
    /// Bytes of the chunks that did.
    pub bytes: u64,
    /// Time until a quorum had the chunk on disk: the client waits for it.
    pub time_to_quorum: Latency,
    /// Time until all had it on disk.
    pub time_to_all: Latency,
    /// Time until this node had it on disk.
    pub own_copy: Latency,
    /// Time until another node had it on disk.
    pub peer_copy: Latency,
    /// Copies that could not be made; recovery makes them later.
    pub failed_copies: u64,
    /// Bytes of all copies made, including those of this node.
    pub copied_bytes: u64,
    /// Bytes copied for each byte received; null if nothing was received.
    pub overhead_factor: Option<f64>,
    /// Bytes of content inside commands; each node writes them to its log and to its content store.
    pub inline_bytes: u64,
}

/// The consensus and its log.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RaftReport {
    /// This node's role.
    #[schema(value_type = String, example = "leader")]
    pub role: Role,
    /// The present term.
    pub term: u64,
    /// Voters in the present configuration.
    pub voters: usize,
    /// Index of the last entry in this node's log.
    pub last_index: Option<u64>,
    /// Index up to which entries are known to be committed.
    pub committed_index: Option<u64>,
    /// Index up to which entries are applied on this node.
    pub applied_index: Option<u64>,
    /// Commands that were decided through this node.
    pub commits: u64,
    /// Commands that were not decided on this node.
    pub commit_failures: u64,
    /// Time from the proposal to the result: a quorum has flushed the entry and this node has applied it.
    pub commit_latency: Latency,
    /// Entries applied since the node started.
    pub entries_applied: u64,
    /// Time to apply a batch of entries.
    pub apply_latency: Latency,
    /// Flushes of the log.
    pub flushes: u64,
    /// Durations of the flushes.
    pub flush_latency: Latency,
    /// Entries made durable.
    pub entries_flushed: u64,
    /// Mean number of entries in a flush that had any.
    pub entries_per_flush: f64,
    /// Largest number of entries in a flush.
    pub entries_per_flush_max: u64,
    /// Bytes of the log's files.
    pub log_bytes: u64,
    /// Rounds of the read barrier; many reads share one.
    pub barrier_rounds: u64,
}

/// The content store.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct ContentReport {
    /// Number of chunks held.
    pub chunks: u64,
    /// Bytes of these chunks.
    pub bytes: u64,
    /// Puts acknowledged as durable.
    pub puts: u64,
    /// Number of flushes.
    pub flushes: u64,
    /// Durations of the flushes.
    pub flush_latency: Latency,
    /// Mean number of puts for each flush.
    pub puts_per_flush: f64,
}

/// The caches in memory.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct CachesReport {
    /// Bytes of metadata that were applied and are not in the database yet.
    pub overlay_bytes: u64,
    /// Hits in the chunk caches of all mounts heard recently.
    pub mount_hits: u64,
    /// Misses in these caches.
    pub mount_misses: u64,
    /// Bytes in these caches.
    pub mount_bytes: u64,
}

/// Space on disk.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct SpaceReport {
    /// Bytes of this node's filesystem.
    pub capacity_bytes: u64,
    /// Bytes on it that are free for content.
    pub available_bytes: u64,
    /// Whether the node takes more content.
    pub has_room: bool,
    /// Bytes for which every node known to this one has space.
    pub cluster_available_bytes: u64,
}

/// The parts of a node that have counters of their own.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The consensus of the node.
    pub consensus: &'a Consensus,
    /// The content store.
    pub content: &'a ContentStore,
    /// Knows the free space of the nodes.
    pub space: &'a SpaceMonitor,
    /// Knows the placement of chunks.
    pub placement: &'a Placement,
    /// The background tasks.
    pub tasks: &'a Tasks,
}

impl MetricsReport {
    /// Returns all counters at this moment.
    pub fn gather(metrics: &Metrics, sources: Sources<'_>) -> MetricsReport {
        let (_, rates) = metrics.rates();
        let kinds = OperationKind::ALL.len();
        let (operation_rates, http_rates) = rates.split_at(Origin::ALL.len() * kinds);
        let mut operations = Vec::new();
        for origin in Origin::ALL {
            for kind in OperationKind::ALL {
                let rate = operation_rates[origin as usize * kinds + kind as usize];
                operations.extend(operation_row(metrics, origin, kind, rate));
            }
        }
        let mounts = metrics.mounts.rows();
        let own = sources.space.own();
        MetricsReport {
            slot: sources.consensus.id().slot,
            uptime_s: metrics.uptime().as_secs(),
            is_leader: sources.consensus.is_leader(),
            leader_slot: sources.consensus.leader().map(|leader| leader.id.slot),
            throughput: Throughput::gather(metrics),
            operations,
            refusals: RefusalKind::ALL
                .into_iter()
                .map(|kind| RefusalRow {
                    reason: kind.name(),
                    count: metrics.refusals(kind),
                })
                .collect(),
            http: Endpoint::ALL
                .into_iter()
                .filter_map(|endpoint| http_row(metrics, endpoint, http_rates[endpoint as usize]))
                .collect(),
            replication: replication(metrics, sources.consensus, sources.placement.copies()),
            raft: raft(metrics, sources.consensus),
            content: content(sources.content),
            caches: CachesReport {
                overlay_bytes: sources.consensus.status().overlay_bytes,
                mount_hits: mounts.iter().map(|mount| mount.statistics.cache.hits).sum(),
                mount_misses: mounts.iter().map(|mount| mount.statistics.cache.misses).sum(),
                mount_bytes: mounts.iter().map(|mount| mount.statistics.cache.bytes).sum(),
            },
            space: SpaceReport {
                capacity_bytes: own.capacity_bytes,
                available_bytes: own.available_bytes,
                has_room: own.has_room,
                cluster_available_bytes: sources.space.cluster_bytes().1,
            },
            mounts,
        }
    }
}

fn operation_row(metrics: &Metrics, origin: Origin, kind: OperationKind, rate: Rate) -> Option<OperationRow> {
    let counter = metrics.operation(origin, kind);
    if counter.count() == 0 {
        return None;
    }
    let snapshot = counter.snapshot();
    let count = snapshot.durations.count();
    Some(OperationRow {
        origin,
        kind: kind.name(),
        meaning: kind.meaning(),
        count,
        failures: snapshot.failures,
        success_rate: 1.0 - snapshot.failures as f64 / count.max(1) as f64,
        bytes: snapshot.bytes,
        latency: snapshot.durations.latency(),
        per_s: rate.count_per_s,
        bytes_per_s: rate.bytes_per_s,
    })
}

fn http_row(metrics: &Metrics, endpoint: Endpoint, rate: Rate) -> Option<HttpRow> {
    let (counter, classes) = metrics.http_requests(endpoint);
    if counter.count() == 0 {
        return None;
    }
    let snapshot = counter.snapshot();
    let statuses = STATUS_CLASSES
        .into_iter()
        .zip(classes)
        .map(|(class, count)| StatusRow { class, count });
    Some(HttpRow {
        endpoint: endpoint.name(),
        count: snapshot.durations.count(),
        failures: snapshot.failures,
        statuses: statuses.collect(),
        bytes: snapshot.bytes,
        latency: snapshot.durations.latency(),
        per_s: rate.count_per_s,
        bytes_per_s: rate.bytes_per_s,
    })
}

fn throughput(rates: &[Rate]) -> Throughput {
    let of = |wanted: &[OperationKind], what: fn(&Rate) -> f64| -> f64 {
        let kinds = OperationKind::ALL.iter().cycle();
        rates
            .iter()
            .zip(kinds)
            .filter(|(_, kind)| wanted.contains(kind))
            .map(|(rate, _)| what(rate))
            .sum()
    };
    // Keep-alives and the transfer of chunks are not operations on files.
    let apart = [OperationKind::Session, OperationKind::PutChunk];
    let files: Vec<OperationKind> = OperationKind::ALL
        .into_iter()
        .filter(|kind| !apart.contains(kind))
        .collect();
    let written = [OperationKind::Write, OperationKind::Append];
    Throughput {
        operations_per_s: of(&files, |rate| rate.count_per_s),
        failures_per_s: of(&files, |rate| rate.failures_per_s),
        read_bytes_per_s: of(&[OperationKind::Read], |rate| rate.bytes_per_s),
        written_bytes_per_s: of(&written, |rate| rate.bytes_per_s),
        ..Throughput::default()
    }
}

fn replication(metrics: &Metrics, consensus: &Consensus, copies: usize) -> ReplicationReport {
    let counted = &metrics.replication;
    let brought = counted.to_quorum.snapshot();
    let (own, peer) = (counted.own_copies.snapshot(), counted.peer_copies.snapshot());
    let copied_bytes = own.bytes + peer.bytes;
    let voters = voters(consensus);
    ReplicationReport {
        copies,
        quorum: voters / 2 + 1,
        chunks: brought.durations.count(),
        failures: brought.failures,
        bytes: brought.bytes,
        time_to_quorum: brought.durations.latency(),
        time_to_all: counted.to_all.snapshot().latency(),
        own_copy: own.durations.latency(),
        peer_copy: peer.durations.latency(),
        failed_copies: own.failures + peer.failures,
        copied_bytes,
        overhead_factor: ratio(copied_bytes, brought.bytes),
        inline_bytes: counted.inline_bytes.load(Ordering::Relaxed),
    }
}

fn raft(metrics: &Metrics, consensus: &Consensus) -> RaftReport {
    let status = consensus.status();
    let measured = consensus.measured();
    let commits = metrics.commits.snapshot();
    RaftReport {
        role: status.role,
        term: status.term,
        voters: voters(consensus),
        last_index: status.last_log,
        committed_index: status.committed,
        applied_index: status.applied,
        commits: commits.durations.count() - commits.failures.min(commits.durations.count()),
        commit_failures: commits.failures,
        commit_latency: commits.durations.latency(),
        entries_applied: measured.entries_applied,
        apply_latency: measured.applies.latency(),
        flushes: status.log.flushes,
        flush_latency: measured.flush_times.latency(),
        entries_flushed: status.log.entries_flushed,
        entries_per_flush: measured.flush_entries.mean(),
        entries_per_flush_max: measured.flush_entries.max(),
        log_bytes: status.log.bytes,
        barrier_rounds: status.barrier_rounds,
    }
}

fn content(content: &ContentStore) -> ContentReport {
    let (chunks, bytes) = content.counts();
    let counts = content.flush_counts();
    let times: Snapshot = content.flush_times();
    ContentReport {
        chunks,
        bytes,
        puts: counts.puts,
        flushes: counts.flushes,
        flush_latency: times.latency(),
        puts_per_flush: ratio(counts.puts, counts.flushes).unwrap_or_default(),
    }
}

/// Returns the number of voters of the newest configuration.
pub fn voters(consensus: &Consensus) -> usize {
    consensus.voters().len().max(1)
}

fn ratio(of: u64, to: u64) -> Option<f64> {
    (to > 0).then(|| of as f64 / to as f64)
}
