//! `GET /metrics/tradeoffs`: the benefits and costs of the present setting and of others, and what to change for more
//! of one or the other.
//!
//! A pure function of the measurements: [`analyse`]. Every figure states whether it was measured, estimated or is known
//! by construction, and its basis. The estimates:
//!
//! - **Time to a quorum of other clusters.** Nodes are assumed to be independent and as fast as those measured: the
//!   time by which `quorum` of `copies` have a chunk on disk follows from the distributions of the copies made on this
//!   node and on others ([`quorum_time`]). More nodes on the same network and machines are slower than that; slower
//!   nodes are not considered.
//! - **Commits of other clusters** change in proportion to the time to a quorum.
//! - **Without flushes** a write is faster by the duration of a flush.
//!
//! This module does not know how values are measured or shown.

mod advice;

use quorumfs_measure::Snapshot;
use serde::Serialize;
use utoipa::ToSchema;

use self::advice::{advice, notes};

/// With fewer values than this no conclusion is drawn.
const SAMPLES_MIN: u64 = 20;
/// Size of the small file whose write is estimated, in bytes.
const SMALL_FILE_BYTES: u32 = 16 << 10;
const NANOS_PER_MICRO: u64 = 1_000;
/// Steps of the search for a quantile: to a millionth of the largest time.
const SEARCH_STEPS: u32 = 20;

/// The measurements; times in nanoseconds.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Number of voters.
    pub nodes: usize,
    /// Number of nodes that should hold each chunk, if there are as many.
    pub replicas: u8,
    /// Largest content inside a command, in bytes.
    pub inline_bytes_max: u32,
    /// Time from a command's proposal to its result.
    pub commits: Snapshot,
    /// Durations of flushes of the log.
    pub log_flushes: Snapshot,
    /// Durations of flushes of the content store.
    pub content_flushes: Snapshot,
    /// Time until a chunk was on a quorum.
    pub to_quorum: Snapshot,
    /// Time until a chunk was on this node's disk.
    pub own_copies: Snapshot,
    /// Time until a chunk was on another node's disk.
    pub peer_copies: Snapshot,
    /// Durations of look-ups and other metadata queries.
    pub metadata_reads: Snapshot,
    /// Durations of reads of ranges of chunks.
    pub content_reads: Snapshot,
    /// Bytes of chunks that clients sent.
    pub brought_bytes: u64,
    /// Bytes of the copies made of them.
    pub copied_bytes: u64,
    /// Bytes of content for which every node has space.
    pub available_bytes: u64,
}

/// The analysis of the present and other settings.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Tradeoffs {
    /// The present setting.
    pub present: Setting,
    /// Other settings, each different from the present one in one respect.
    pub alternatives: Vec<Setting>,
    /// What to change for more of one thing, and its cost.
    pub advice: Vec<Advice>,
    /// How the estimates are made and what they ignore.
    pub notes: Vec<String>,
}

/// One configuration of the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Setting {
    /// Short name of the setting.
    pub name: String,
    /// Number of voters.
    pub nodes: usize,
    /// Number of nodes that hold each chunk.
    pub copies: usize,
    /// Number of nodes that must have a write on disk before it is acknowledged.
    pub quorum: usize,
    /// Whether a write is flushed to stable storage before it is acknowledged.
    pub flush: bool,
    /// Largest content inside a command, in bytes.
    pub inline_bytes_max: u32,
    /// How to get this setting, or why it is not offered.
    pub how: String,
    /// Failures that it tolerates.
    pub tolerates: Tolerance,
    /// Time from `close` of a new file of 16 KiB to its acknowledgement, at the leader.
    pub small_write: LatencyFigure,
    /// Time for one chunk of a large file and the command that names it, at the leader.
    pub chunk_write: LatencyFigure,
    /// Time of a query for names or attributes, at the leader.
    pub metadata_read: LatencyFigure,
    /// Time to read a range of a chunk, at the node that is asked.
    pub content_read: LatencyFigure,
    /// Bytes on all disks for each byte of content.
    pub space_factor: Figure,
    /// Bytes written to all disks for each byte of a file of 16 KiB (the log, then the content store).
    pub small_write_factor: Figure,
    /// Bytes of content that still fit.
    pub available: Figure,
}

/// Failures that do no harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Tolerance {
    /// Nodes that may be down while writes continue.
    pub down_for_writes: usize,
    /// Nodes that may be down while reads continue.
    pub down_for_reads: usize,
    /// Nodes that may be lost for ever without the loss of an acknowledged write.
    pub lost_for_ever: usize,
    /// Whether acknowledged writes survive a loss of power on all nodes at once.
    pub power_loss_everywhere: bool,
}

/// The source of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Measured on this node since it started.
    Measured,
    /// Derived from measurements, as the basis says.
    Estimated,
    /// Known by construction.
    Known,
    /// Unknown, because too little was measured.
    Unknown,
}

/// A number and its source.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Figure {
    /// The value; null if unknown.
    pub value: Option<f64>,
    /// `bytes` or `factor`.
    pub unit: &'static str,
    /// The source of the value.
    pub source: Source,
    /// The basis of the value.
    pub basis: String,
}

/// A latency and its source; null if unknown.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct LatencyFigure {
    /// The median, in microseconds.
    pub p50_us: Option<u64>,
    /// The 99th percentile, in microseconds.
    pub p99_us: Option<u64>,
    /// The source of the values.
    pub source: Source,
    /// The basis of the values.
    pub basis: String,
}

/// A possible gain and its cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Advice {
    /// What to improve.
    pub wish: String,
    /// What to change.
    pub change: String,
    /// What improves, and by how much.
    pub gain: String,
    /// What it costs.
    pub cost: String,
}

/// A setting before its figures are estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    nodes: usize,
    copies: usize,
    quorum: usize,
    flush: bool,
    inline_bytes_max: u32,
}

impl Choice {
    /// Returns for how many nodes' disks of content the cluster has space.
    fn spread(self) -> f64 {
        self.nodes as f64 / self.copies as f64
    }
}

fn majority(nodes: usize) -> usize {
    nodes / 2 + 1
}

/// Returns the number of copies, as [`crate::replication::placement::Layout`] does.
fn copies_among(nodes: usize, replicas: u8) -> usize {
    usize::from(replicas).max(majority(nodes)).min(nodes)
}

/// Analyses the present setting and others, given `inputs`.
pub fn analyse(inputs: &Inputs) -> Tradeoffs {
    let now = Choice {
        nodes: inputs.nodes,
        copies: copies_among(inputs.nodes, inputs.replicas),
        quorum: majority(inputs.nodes),
        flush: true,
        inline_bytes_max: inputs.inline_bytes_max,
    };
    let present = reckon(inputs, now, now, "as it is", "this is how the cluster runs");
    let mut alternatives = Vec::new();
    for nodes in [1, 3, 5, 7].into_iter().filter(|nodes| *nodes != now.nodes) {
        let choice = Choice {
            nodes,
            copies: copies_among(nodes, inputs.replicas),
            quorum: majority(nodes),
            ..now
        };
        let how = "change the members of the cluster; the list in --members founds it";
        let name = match nodes {
            1 => "1 node".to_string(),
            _ => format!("{nodes} nodes"),
        };
        alternatives.push(reckon(inputs, now, choice, &name, how));
    }
    for replicas in 1..=u8::try_from(now.nodes).unwrap_or(u8::MAX) {
        let copies = copies_among(now.nodes, replicas);
        if copies == now.copies || copies != usize::from(replicas) {
            continue;
        }
        let how = format!("POST /membership/replicas with {{\"replicas\": {replicas}}}");
        let name = format!("each chunk on {copies} nodes");
        alternatives.push(reckon(inputs, now, Choice { copies, ..now }, &name, &how));
    }
    if now.nodes > 1 {
        let all = Choice {
            quorum: now.nodes,
            copies: now.nodes,
            ..now
        };
        let how = "not offered: one node that is down would stop all writes";
        alternatives.push(reckon(inputs, now, all, "acknowledged by all nodes", how));
        let one = Choice { quorum: 1, ..now };
        let how = "not offered: the loss of one node would lose acknowledged writes (P1)";
        alternatives.push(reckon(inputs, now, one, "acknowledged by one node", how));
    }
    let unflushed = Choice { flush: false, ..now };
    let how = "not offered for the cluster (P1); the mount option durability=fsync spares programs the wait until fsync";
    alternatives.push(reckon(inputs, now, unflushed, "without flushes", how));
    for inline_bytes_max in [0, 4 << 10, 128 << 10] {
        let choice = Choice {
            inline_bytes_max,
            ..now
        };
        let name = format!("content of up to {} KiB inside commands", inline_bytes_max >> 10);
        let how = "a constant of the program (INLINE_BYTES_MAX), to be changed on all nodes and mounts";
        alternatives.push(reckon(inputs, now, choice, &name, how));
    }
    Tradeoffs {
        advice: advice(inputs, &present, &alternatives),
        present,
        alternatives,
        notes: notes(inputs),
    }
}

fn reckon(inputs: &Inputs, now: Choice, choice: Choice, name: &str, how: &str) -> Setting {
    let Choice {
        nodes,
        copies,
        quorum,
        ..
    } = choice;
    let commit = commit_latency(inputs, now, choice);
    let to_quorum = quorum_latency(inputs, now, choice);
    let is_inline = SMALL_FILE_BYTES <= choice.inline_bytes_max;
    let with_chunk = commit.plus(&to_quorum);
    let is_measured = |snapshot: &Snapshot, what: &str| {
        let measured = measured(snapshot, what);
        match choice == now || measured.source == Source::Unknown {
            true => measured,
            false => LatencyFigure {
                source: Source::Estimated,
                basis: format!("as measured now ({}): one node answers", measured.basis),
                ..measured
            },
        }
    };
    let small_writes = if is_inline { nodes + copies } else { copies };
    Setting {
        name: name.to_string(),
        nodes,
        copies,
        quorum,
        flush: choice.flush,
        inline_bytes_max: choice.inline_bytes_max,
        how: how.to_string(),
        tolerates: Tolerance {
            down_for_writes: nodes - quorum.max(majority(nodes)),
            down_for_reads: nodes - majority(nodes),
            lost_for_ever: quorum - 1,
            power_loss_everywhere: choice.flush,
        },
        small_write: if is_inline { commit } else { with_chunk.clone() },
        chunk_write: with_chunk,
        metadata_read: is_measured(&inputs.metadata_reads, "questions about names and attributes"),
        content_read: is_measured(&inputs.content_reads, "ranges of chunks"),
        space_factor: space_factor(inputs, now, choice),
        small_write_factor: Figure {
            value: Some(small_writes as f64),
            unit: "factor",
            source: Source::Known,
            basis: match is_inline {
                true => format!("{nodes} nodes write it to their log, and {copies} keep it in their content"),
                false => format!("{copies} nodes write it to their content"),
            },
        },
        available: Figure {
            value: Some(inputs.available_bytes as f64 * choice.spread() / now.spread()),
            unit: "bytes",
            source: if choice == now {
                Source::Measured
            } else {
                Source::Estimated
            },
            basis: format!(
                "the node with the least space decides, since each holds {copies} parts of {nodes}; nodes of the same size"
            ),
        },
    }
}

fn space_factor(inputs: &Inputs, now: Choice, choice: Choice) -> Figure {
    if (choice.nodes, choice.copies) == (now.nodes, now.copies) && inputs.brought_bytes > 0 {
        let factor = inputs.copied_bytes as f64 / inputs.brought_bytes as f64;
        return Figure {
            value: Some(factor),
            unit: "factor",
            source: Source::Measured,
            basis: format!(
                "{} bytes copied for {} bytes received; a copy that failed is made later by recovery",
                inputs.copied_bytes, inputs.brought_bytes
            ),
        };
    }
    Figure {
        value: Some(choice.copies as f64),
        unit: "factor",
        source: Source::Known,
        basis: format!("{} of {} nodes hold each chunk", choice.copies, choice.nodes),
    }
}

impl LatencyFigure {
    fn unknown(why: String) -> LatencyFigure {
        LatencyFigure {
            p50_us: None,
            p99_us: None,
            source: Source::Unknown,
            basis: why,
        }
    }

    /// Adds a step that comes before. The sum of two 99th percentiles is at least the 99th percentile of the sum.
    fn plus(&self, next: &LatencyFigure) -> LatencyFigure {
        let sum = |a: Option<u64>, b: Option<u64>| Some(a? + b?);
        let source = match (self.source, next.source) {
            (Source::Unknown, _) | (_, Source::Unknown) => Source::Unknown,
            _ => Source::Estimated,
        };
        LatencyFigure {
            p50_us: sum(self.p50_us, next.p50_us),
            p99_us: sum(self.p99_us, next.p99_us),
            source,
            basis: format!("{}, and before it {}", self.basis, next.basis),
        }
    }
}

fn measured(snapshot: &Snapshot, what: &str) -> LatencyFigure {
    if snapshot.count() < SAMPLES_MIN {
        return LatencyFigure::unknown(format!(
            "{} {what} so far, {SAMPLES_MIN} are needed",
            snapshot.count()
        ));
    }
    LatencyFigure {
        p50_us: Some(snapshot.quantile(0.50) / NANOS_PER_MICRO),
        p99_us: Some(snapshot.quantile(0.99) / NANOS_PER_MICRO),
        source: Source::Measured,
        basis: format!("{} {what}", snapshot.count()),
    }
}

/// Applies `change(quantile, ns)` to `figure`.
fn changed(figure: LatencyFigure, basis: &str, change: impl Fn(f64, u64) -> Option<u64>) -> LatencyFigure {
    if figure.source == Source::Unknown {
        return figure;
    }
    let apply =
        |quantile, micros: Option<u64>| Some(change(quantile, micros? * NANOS_PER_MICRO)? / NANOS_PER_MICRO);
    let (p50_us, p99_us) = (apply(0.50, figure.p50_us), apply(0.99, figure.p99_us));
    if p50_us.is_none() || p99_us.is_none() {
        return LatencyFigure::unknown(format!(
            "{basis}: fewer than {SAMPLES_MIN} copies of chunks were measured on other nodes"
        ));
    }
    LatencyFigure {
        p50_us,
        // Each quantile is changed separately; their order is kept.
        p99_us: p99_us.max(p50_us),
        source: Source::Estimated,
        basis: format!("{}; {basis}", figure.basis),
    }
}

fn commit_latency(inputs: &Inputs, now: Choice, choice: Choice) -> LatencyFigure {
    let figure = measured(&inputs.commits, "commits");
    let figure = if (choice.nodes, choice.quorum) == (now.nodes, now.quorum) {
        figure
    } else {
        let basis = format!(
            "changed as the time to {} of {} is to that of {} of {}",
            choice.quorum, choice.nodes, now.quorum, now.nodes
        );
        changed(figure, &basis, |quantile, ns| {
            let before = quorum_time(inputs, now.nodes, now.quorum, quantile)?;
            let after = quorum_time(inputs, choice.nodes, choice.quorum, quantile)?;
            Some((ns as f64 * after as f64 / before.max(1) as f64) as u64)
        })
    };
    without_flush(figure, choice, &inputs.log_flushes, "the log")
}

fn quorum_latency(inputs: &Inputs, now: Choice, choice: Choice) -> LatencyFigure {
    let figure = measured(&inputs.to_quorum, "chunks replicated to a quorum");
    let figure = if (choice.copies, choice.quorum) == (now.copies, now.quorum) {
        figure
    } else {
        let basis = format!(
            "from the copies measured, when {} of {} are done",
            choice.quorum, choice.copies
        );
        changed(figure, &basis, |quantile, _| {
            quorum_time(inputs, choice.copies, choice.quorum, quantile)
        })
    };
    without_flush(figure, choice, &inputs.content_flushes, "the content store")
}

fn without_flush(figure: LatencyFigure, choice: Choice, flushes: &Snapshot, whose: &str) -> LatencyFigure {
    if choice.flush || flushes.count() < SAMPLES_MIN {
        return figure;
    }
    let basis = format!("less the duration of a flush of {whose}");
    changed(figure, &basis, |quantile, ns| {
        Some(ns.saturating_sub(flushes.quantile(quantile)))
    })
}

/// Returns the time in nanoseconds by which, with probability `quantile`, at least `quorum` of `copies` nodes have a
/// chunk on disk, if one is this node and the others are like those measured; `None` if too few copies were measured.
pub fn quorum_time(inputs: &Inputs, copies: usize, quorum: usize, quantile: f64) -> Option<u64> {
    let (own, peer) = (&inputs.own_copies, &inputs.peer_copies);
    if own.count() < SAMPLES_MIN || (copies > 1 && peer.count() < SAMPLES_MIN) {
        return None;
    }
    let part_done = |snapshot: &Snapshot, ns: u64| match snapshot.count() {
        0 => 0.0,
        _ if ns >= snapshot.max() => 1.0,
        count => snapshot.count_up_to(ns) as f64 / count as f64,
    };
    let reached = |ns: u64| {
        let (own, peer) = (part_done(own, ns), part_done(peer, ns));
        own * at_least(copies - 1, quorum.saturating_sub(1), peer)
            + (1.0 - own) * at_least(copies - 1, quorum, peer)
    };
    let (mut low, mut high) = (0, own.max().max(peer.max()));
    for _ in 0..SEARCH_STEPS {
        let middle = low + (high - low) / 2;
        match reached(middle) >= quantile {
            true => high = middle,
            false => low = middle,
        }
    }
    Some(high)
}

/// Returns the probability that at least `wanted` of `all` independent events happen, each with probability `each`.
fn at_least(all: usize, wanted: usize, each: f64) -> f64 {
    let mut exactly = vec![0.0; all + 1];
    exactly[0] = 1.0;
    for event in 0..all {
        for happened in (0..=event).rev() {
            exactly[happened + 1] += exactly[happened] * each;
            exactly[happened] *= 1.0 - each;
        }
    }
    exactly.iter().skip(wanted).sum()
}

#[cfg(test)]
mod tests;
