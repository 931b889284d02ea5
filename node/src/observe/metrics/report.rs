//! `GET /metrics` as JSON: everything that is counted, with its quantiles and rates.

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
use crate::tasks::Tasks;
use quorumfs_content::ContentStore;

/// What a node counted since it started. Durations are in microseconds.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MetricsReport {
    /// The node's slot.
    pub slot: u16,
    /// For how long it has counted, in seconds.
    pub uptime_s: u64,
    /// Whether it leads: the leader counts what clients ask of the cluster, the others only what came to them.
    pub is_leader: bool,
    /// The leader's slot, where one is known.
    pub leader_slot: Option<u16>,
    /// What goes on now.
    pub throughput: Throughput,
    /// Operations on files by kind and origin; kinds that never happened are left out.
    pub operations: Vec<OperationRow>,
    /// Calls that were not decided here; the clients come again.
    pub refusals: Vec<RefusalRow>,
    /// HTTP requests; those that were never made are left out.
    pub http: Vec<HttpRow>,
    /// How chunks reach their nodes.
    pub replication: ReplicationReport,
    /// The log.
    pub raft: RaftReport,
    /// The content store.
    pub content: ContentReport,
    /// What is kept in memory.
    pub caches: CachesReport,
    /// Room on this node's disk and in the cluster.
    pub space: SpaceReport,
    /// What the mounts say of themselves; only the leader hears it.
    pub mounts: Vec<MountRow>,
}

/// What went on in the last seconds.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct Throughput {
    /// Over how many seconds it was taken: about 10.
    pub window_s: f64,
    /// Operations on files, per second.
    pub operations_per_s: f64,
    /// Those that failed.
    pub failures_per_s: f64,
    /// Bytes read by clients from this node.
    pub read_bytes_per_s: f64,
    /// Bytes put into files.
    pub written_bytes_per_s: f64,
    /// HTTP requests.
    pub http_requests_per_s: f64,
    /// How long the commands took that were decided through this node.
    pub commit_latency: Latency,
}

impl Throughput {
    /// What goes on on this node now.
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

/// One kind of operation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct OperationRow {
    /// Whether a mount or an HTTP client wanted it.
    pub origin: Origin,
    /// `create`, `read`, `write`, `delete`, …
    pub kind: &'static str,
    /// What that is.
    pub meaning: &'static str,
    /// How many.
    pub count: u64,
    /// How many of them were answered with an error, which may be what was expected (a name that is not there).
    pub failures: u64,
    /// The part of them that did what was asked, 0 to 1.
    pub success_rate: f64,
    /// Bytes of content that they moved.
    pub bytes: u64,
    /// How long this node took over them.
    pub latency: Latency,
    /// How many per second, lately.
    pub per_s: f64,
    /// Bytes per second, lately.
    pub bytes_per_s: f64,
}

/// Calls refused for one reason.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct RefusalRow {
    /// Why.
    pub reason: &'static str,
    /// How many.
    pub count: u64,
}

/// HTTP requests of one kind.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HttpRow {
    /// `upload`, `download`, `delete`, `list`, …
    pub endpoint: &'static str,
    /// How many.
    pub count: u64,
    /// Those answered with 400 or more.
    pub failures: u64,
    /// How many were answered with each hundred.
    pub statuses: Vec<StatusRow>,
    /// Bytes of bodies: what came of uploads, what went of all others.
    pub bytes: u64,
    /// From the request's head to the end of the answer's body.
    pub latency: Latency,
    /// How many per second, lately.
    pub per_s: f64,
    /// Bytes per second, lately.
    pub bytes_per_s: f64,
}

/// Answers of one hundred.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusRow {
    /// `2xx`, `3xx`, `4xx` or `5xx`.
    pub class: &'static str,
    /// How many.
    pub count: u64,
}

/// How chunks that clients brought to this node (as the leader) reached the others.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct ReplicationReport {
    /// Nodes that are to hold each chunk.
    pub copies: usize,
    /// Nodes that must have it before the client is told so.
    pub quorum: usize,
    /// Chunks brought.
    pub chunks: u64,
    /// Chunks that did not reach a quorum in time.
    pub failures: u64,
    /// Bytes of those that did.
    pub bytes: u64,
    /// Time until a quorum had it on disk: what the client waits for.
    pub time_to_quorum: Latency,
    /// Time until all had it on disk.
    pub time_to_all: Latency,
    /// Time until this node had it on disk.
    pub own_copy: Latency,
    /// Time until another node had it on disk.
    pub peer_copy: Latency,
    /// Copies that could not be made; recovery makes them later.
    pub failed_copies: u64,
    /// Bytes of all copies made, this node's too.
    pub copied_bytes: u64,
    /// Bytes copied for each byte brought; null where nothing was brought.
    pub overhead_factor: Option<f64>,
    /// Bytes of content that rode inside commands instead; each node writes them to its log and to its content.
    pub inline_bytes: u64,
}

/// The log.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RaftReport {
    /// What this node is in it.
    #[schema(value_type = String, example = "leader")]
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// Voters in the present configuration.
    pub voters: usize,
    /// Index of the last entry in this node's log.
    pub last_index: Option<u64>,
    /// Index up to which entries are known to be committed.
    pub committed_index: Option<u64>,
    /// Index up to which they have taken effect here.
    pub applied_index: Option<u64>,
    /// Commands that were decided through this node.
    pub commits: u64,
    /// Commands that came to no decision here.
    pub commit_failures: u64,
    /// From the proposal to the result: a quorum has flushed it and this node has applied it.
    pub commit_latency: Latency,
    /// Entries applied since the node started.
    pub entries_applied: u64,
    /// How long a batch of entries took to apply.
    pub apply_latency: Latency,
    /// Flushes of the log.
    pub flushes: u64,
    /// How long they took.
    pub flush_latency: Latency,
    /// Entries made durable.
    pub entries_flushed: u64,
    /// Entries for each flush that had any, on average.
    pub entries_per_flush: f64,
    /// The most in one.
    pub entries_per_flush_max: u64,
    /// Bytes of the log's files.
    pub log_bytes: u64,
    /// Rounds of the read barrier; many reads share one.
    pub barrier_rounds: u64,
}

/// The content store.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct ContentReport {
    /// Chunks held.
    pub chunks: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Puts acknowledged as durable.
    pub puts: u64,
    /// Flushes.
    pub flushes: u64,
    /// How long they took.
    pub flush_latency: Latency,
    /// Puts for each flush, on average.
    pub puts_per_flush: f64,
}

/// What is kept in memory.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct CachesReport {
    /// Bytes of metadata that were applied and are not in the database yet.
    pub overlay_bytes: u64,
    /// Looks into the mounts' caches of chunks that found what they wanted, of all mounts that were heard of lately.
    pub mount_hits: u64,
    /// Those that did not.
    pub mount_misses: u64,
    /// Bytes in them.
    pub mount_bytes: u64,
}

/// Room.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct SpaceReport {
    /// Bytes of this node's filesystem.
    pub capacity_bytes: u64,
    /// Bytes that content may still take on it.
    pub available_bytes: u64,
    /// Whether it takes more.
    pub has_room: bool,
    /// Bytes that every node known to this one has room for.
    pub cluster_available_bytes: u64,
}

/// The parts of a node that count for themselves.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The log.
    pub consensus: &'a Consensus,
    /// The content store.
    pub content: &'a ContentStore,
    /// Who has room.
    pub space: &'a SpaceMonitor,
    /// Who holds what.
    pub placement: &'a Placement,
    /// What runs in the background.
    pub tasks: &'a Tasks,
}

impl MetricsReport {
    /// Everything, as it is now.
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
    let tally = metrics.operation(origin, kind);
    if tally.count() == 0 {
        return None;
    }
    let snapshot = tally.snapshot();
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
    let (tally, classes) = metrics.http_requests(endpoint);
    if tally.count() == 0 {
        return None;
    }
    let snapshot = tally.snapshot();
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
    // Keep-alives and the transport of chunks are no operations on files.
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

/// Voters of the newest configuration.
pub fn voters(consensus: &Consensus) -> usize {
    consensus.voters().len().max(1)
}

fn ratio(of: u64, to: u64) -> Option<f64> {
    (to > 0).then(|| of as f64 / to as f64)
}
