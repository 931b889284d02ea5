//! `GET /metrics` for Prometheus: exposition format 0.0.4, encoded by the crate `prometheus`.
//!
//! Base units (seconds, bytes), counters end in `_total`. Histograms have fixed bounds; a value within 1/32 of a bound
//! may be counted in the next bucket.
//!
//! The crate's own counters and registry are not used: the same numbers are shown as JSON with quantiles, which its
//! histograms do not keep, so what was counted is converted when it is asked for.

use std::sync::atomic::Ordering;

use prometheus::TextEncoder;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use quorumfs_measure::{CallCounter, Snapshot};

use super::Metrics;
use super::kinds::{Endpoint, OperationKind, Origin, RefusalKind};
use super::report::{MetricsReport, Sources};

const NANOS_PER_SECOND: f64 = 1e9;

/// Upper bounds of durations, in nanoseconds: from an answer out of memory to a time-out.
const BOUNDS_NS: [u64; 19] = [
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    10_000_000_000,
    60_000_000_000,
];
/// Upper bounds of the number of entries in a flush.
const BOUNDS_ENTRIES: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024];

/// The content type of the result of [`text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Families of one kind, each with its name, its help and its value.
macro_rules! table {
    ($families:ident.$add:ident: $($name:literal $help:literal $value:expr,)*) => {
        $($families.$add($name, $help, $value);)*
    };
}

/// Returns all metrics in Prometheus' text format.
///
/// # Errors
/// Only if a metric has no value, which is a defect of this program.
pub fn text(metrics: &Metrics, sources: Sources<'_>) -> Result<String, prometheus::Error> {
    let report = MetricsReport::gather(metrics, sources);
    let measured = sources.consensus.measured();
    let mut families = Families::default();
    operations(&mut families, metrics);
    http(&mut families, metrics);
    replication(&mut families, metrics, &report);
    node(&mut families, &report);
    let tasks = sources.tasks.report();
    let failures = tasks
        .iter()
        .map(|task| counter(&[("task", task.name)], task.failures));
    let content_flushes = sources.content.flush_times();
    let entries = histogram(&[], &measured.flush_entries, &BOUNDS_ENTRIES, 1.0);
    table! { families.add_counter:
        "quorumfs_task_failures_total" "Failures of a background task, each followed by a restart." failures.collect(),
    }
    table! { families.add_durations:
        "quorumfs_raft_flush_duration_seconds" "Durations of the flushes of the log." &measured.flush_times,
        "quorumfs_raft_apply_duration_seconds" "Time to apply a batch of entries." &measured.applies,
        "quorumfs_content_flush_duration_seconds" "Durations of the flushes of the content store." &content_flushes,
    }
    table! { families.add_histogram:
        "quorumfs_raft_flush_entries" "Entries made durable by one flush of the log." vec![entries],
    }
    let mut text = String::new();
    // A family without a metric (no such event yet) cannot be encoded, and is left out.
    families.0.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new().encode_utf8(&families.0, &mut text)?;
    Ok(text)
}

#[derive(Default)]
struct Families(Vec<MetricFamily>);

impl Families {
    fn add(&mut self, kind: MetricType, name: &str, help: &str, metrics: Vec<Metric>) {
        let mut family = MetricFamily::default();
        family.set_name(name.to_string());
        family.set_help(help.to_string());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.0.push(family);
    }

    fn add_counter(&mut self, name: &str, help: &str, metrics: Vec<Metric>) {
        self.add(MetricType::COUNTER, name, help, metrics);
    }

    /// A counter without labels.
    fn add_count(&mut self, name: &str, help: &str, value: u64) {
        self.add_counter(name, help, vec![counter(&[], value)]);
    }

    fn add_gauge(&mut self, name: &str, help: &str, value: f64) {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        self.add(MetricType::GAUGE, name, help, vec![Metric::from_gauge(gauge)]);
    }

    fn add_histogram(&mut self, name: &str, help: &str, metrics: Vec<Metric>) {
        self.add(MetricType::HISTOGRAM, name, help, metrics);
    }

    /// A histogram of durations without labels.
    fn add_durations(&mut self, name: &str, help: &str, snapshot: &Snapshot) {
        self.add_histogram(name, help, vec![duration(&[], snapshot)]);
    }
}

type Labels<'a> = &'a [(&'a str, &'a str)];

fn labelled(labels: Labels<'_>) -> Metric {
    let pairs = labels.iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_string());
        pair.set_value((*value).to_string());
        pair
    });
    Metric::from_label(pairs.collect())
}

fn counter(labels: Labels<'_>, value: u64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value as f64);
    let mut metric = labelled(labels);
    metric.set_counter(counter);
    metric
}

fn duration(labels: Labels<'_>, snapshot: &Snapshot) -> Metric {
    histogram(labels, snapshot, &BOUNDS_NS, NANOS_PER_SECOND)
}

fn histogram(labels: Labels<'_>, snapshot: &Snapshot, bounds: &[u64], unit: f64) -> Metric {
    let buckets = bounds.iter().map(|bound| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound as f64 / unit);
        bucket.set_cumulative_count(snapshot.count_up_to(*bound));
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(snapshot.count());
    histogram.set_sample_sum(snapshot.sum() as f64 / unit);
    let mut metric = labelled(labels);
    metric.set_histogram(histogram);
    metric
}

fn operations(families: &mut Families, metrics: &Metrics) {
    let (mut counts, mut failures, mut bytes, mut durations) = (vec![], vec![], vec![], vec![]);
    for origin in Origin::ALL {
        for kind in OperationKind::ALL {
            let calls: &CallCounter = metrics.operation(origin, kind);
            if calls.count() == 0 {
                continue;
            }
            let labels = [("kind", kind.name()), ("origin", origin.name())];
            let snapshot = calls.snapshot();
            counts.push(counter(&labels, snapshot.durations.count()));
            failures.push(counter(&labels, snapshot.failures));
            bytes.push(counter(&labels, snapshot.bytes));
            durations.push(duration(&labels, &snapshot.durations));
        }
    }
    let refusals = RefusalKind::ALL.into_iter().map(|kind| {
        let labels = [("reason", kind.name())];
        counter(&labels, metrics.refusals(kind))
    });
    table! { families.add_counter:
        "quorumfs_operations_total" "Operations on files, by kind and origin." counts,
        "quorumfs_operation_failures_total" "Operations that were answered with an error." failures,
        "quorumfs_operation_bytes_total" "Bytes of content that operations moved." bytes,
        "quorumfs_refusals_total" "Calls that were not decided on this node." refusals.collect(),
    }
    table! { families.add_histogram:
        "quorumfs_operation_duration_seconds" "Durations of operations on this node." durations,
    }
}

fn http(families: &mut Families, metrics: &Metrics) {
    let (mut counts, mut bytes, mut durations) = (vec![], vec![], vec![]);
    for endpoint in Endpoint::ALL {
        let (calls, classes) = metrics.http_requests(endpoint);
        if calls.count() == 0 {
            continue;
        }
        for (class, count) in super::STATUS_CLASSES.into_iter().zip(classes) {
            let labels = [("endpoint", endpoint.name()), ("status", class)];
            counts.push(counter(&labels, count));
        }
        let labels = [("endpoint", endpoint.name())];
        let snapshot = calls.snapshot();
        bytes.push(counter(&labels, snapshot.bytes));
        durations.push(duration(&labels, &snapshot.durations));
    }
    table! { families.add_counter:
        "quorumfs_http_requests_total" "HTTP requests, by endpoint and class of the status." counts,
        "quorumfs_http_bytes_total" "Bytes of the request bodies of uploads, and of the response bodies of all other requests." bytes,
    }
    table! { families.add_histogram:
        "quorumfs_http_request_duration_seconds" "Time from the head of a request to the end of its response." durations,
    }
}

fn replication(families: &mut Families, metrics: &Metrics, report: &MetricsReport) {
    let counted = &metrics.replication;
    let (own, peer) = (counted.own_copies.snapshot(), counted.peer_copies.snapshot());
    let brought = counted.to_quorum.snapshot();
    let places = [("own", &own), ("peer", &peer)];
    let bytes = places.map(|(place, copies)| counter(&[("place", place)], copies.bytes));
    let failures = places.map(|(place, copies)| counter(&[("place", place)], copies.failures));
    let durations = places.map(|(place, copies)| duration(&[("place", place)], &copies.durations));
    let inline_bytes = counted.inline_bytes.load(Ordering::Relaxed);
    table! { families.add_count:
        "quorumfs_replication_chunks_total" "Chunks that clients sent to this node." brought.durations.count(),
        "quorumfs_replication_chunk_failures_total" "Chunks that did not reach a quorum." brought.failures,
        "quorumfs_replication_bytes_total" "Bytes of chunks that reached a quorum, each counted once." brought.bytes,
        "quorumfs_replication_inline_bytes_total" "Bytes of content that came inside commands." inline_bytes,
        "quorumfs_raft_commit_failures_total" "Commands that were not decided on this node." metrics.commits.failures(),
    }
    table! { families.add_counter:
        "quorumfs_replication_copied_bytes_total" "Bytes of copies made, by place." bytes.into(),
        "quorumfs_replication_copy_failures_total" "Copies that could not be made, by place." failures.into(),
    }
    table! { families.add_histogram:
        "quorumfs_replication_copy_duration_seconds" "Time until one node had a chunk on disk, by place." durations.into(),
    }
    let (to_all, commits) = (counted.to_all.snapshot(), metrics.commits.snapshot().durations);
    table! { families.add_durations:
        "quorumfs_replication_quorum_duration_seconds" "Time until a quorum had a chunk on disk." &brought.durations,
        "quorumfs_replication_all_duration_seconds" "Time until all nodes had a chunk on disk." &to_all,
        "quorumfs_raft_commit_duration_seconds" "Time from a command's proposal to its result." &commits,
    }
    if let Some(factor) = report.replication.overhead_factor {
        table! { families.add_gauge:
            "quorumfs_replication_overhead_ratio" "Bytes copied for each byte of chunks received." factor,
        }
    }
}

fn node(families: &mut Families, report: &MetricsReport) {
    let (raft, content, space) = (&report.raft, &report.content, &report.space);
    let indexes = [raft.last_index, raft.committed_index, raft.applied_index];
    let [last, committed, applied] = indexes.map(|index| index.unwrap_or_default() as f64);
    table! { families.add_gauge:
        "quorumfs_uptime_seconds" "Time since this node started." report.uptime_s as f64,
        "quorumfs_raft_is_leader" "1 if this node leads, else 0." f64::from(u8::from(report.is_leader)),
        "quorumfs_raft_term" "The node's term." raft.term as f64,
        "quorumfs_raft_voters" "Voters in the present configuration." raft.voters as f64,
        "quorumfs_raft_last_index" "Index of the last entry in the log." last,
        "quorumfs_raft_committed_index" "Index up to which entries are known to be committed." committed,
        "quorumfs_raft_applied_index" "Index up to which entries are applied on this node." applied,
        "quorumfs_raft_log_bytes" "Bytes of the log's files." raft.log_bytes as f64,
        "quorumfs_content_chunks" "Chunks held." content.chunks as f64,
        "quorumfs_content_bytes" "Bytes of the chunks held." content.bytes as f64,
        "quorumfs_metadata_overlay_bytes" "Bytes of metadata that are not in the database yet."
            report.caches.overlay_bytes as f64,
        "quorumfs_space_capacity_bytes" "Bytes of this node's filesystem." space.capacity_bytes as f64,
        "quorumfs_space_available_bytes" "Bytes that are free for content." space.available_bytes as f64,
        "quorumfs_mounts" "Mounts that this node heard from recently." report.mounts.len() as f64,
        "quorumfs_mount_cache_bytes" "Bytes in the caches of these mounts." report.caches.mount_bytes as f64,
    }
    table! { families.add_count:
        "quorumfs_raft_flushes_total" "Flushes of the log." raft.flushes,
        "quorumfs_raft_entries_flushed_total" "Entries made durable." raft.entries_flushed,
        "quorumfs_raft_entries_applied_total" "Entries applied since the node started." raft.entries_applied,
        "quorumfs_content_puts_total" "Chunks acknowledged as durable on this node." content.puts,
        "quorumfs_content_flushes_total" "Flushes of the content store." content.flushes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_measure::{Distribution, Ending};
    use std::time::Duration;

    #[test]
    fn counts_become_samples_with_labels_and_rising_buckets() {
        let metrics = Metrics::new();
        let counter = metrics.operation(Origin::Rest, OperationKind::Create);
        for micros in [100, 200, 3_000, 900_000] {
            counter.record(Ending::Done, 10, Duration::from_micros(micros));
        }
        let mut families = Families::default();
        operations(&mut families, &metrics);
        families.0.retain(|family| !family.get_metric().is_empty());
        let mut text = String::new();
        TextEncoder::new().encode_utf8(&families.0, &mut text).unwrap();
        let has = |line: &str| assert!(text.lines().any(|found| found == line), "no {line} in:\n{text}");
        has("# TYPE quorumfs_operations_total counter");
        has("quorumfs_operations_total{kind=\"create\",origin=\"rest\"} 4");
        has("quorumfs_operation_bytes_total{kind=\"create\",origin=\"rest\"} 40");
        has("quorumfs_operation_duration_seconds_bucket{kind=\"create\",origin=\"rest\",le=\"0.0005\"} 2");
        has("quorumfs_operation_duration_seconds_bucket{kind=\"create\",origin=\"rest\",le=\"+Inf\"} 4");
        has("quorumfs_operation_duration_seconds_count{kind=\"create\",origin=\"rest\"} 4");
        has("quorumfs_refusals_total{reason=\"not_leader\"} 0");
    }

    #[test]
    fn a_histogram_counts_in_its_unit() {
        let distribution = Distribution::new();
        [1, 1, 3, 20, 5000]
            .into_iter()
            .for_each(|value| distribution.record(value));
        let metric = histogram(&[], &distribution.snapshot(), &BOUNDS_ENTRIES, 1.0);
        let counts: Vec<u64> = metric
            .get_histogram()
            .get_bucket()
            .iter()
            .map(|bucket| bucket.cumulative_count())
            .collect();
        assert_eq!(counts, [2, 2, 3, 3, 3, 4, 4, 4, 4, 4]);
        assert_eq!(metric.get_histogram().get_sample_count(), 5);
    }
}
