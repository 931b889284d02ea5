//! `GET /metrics/tradeoffs`: what the present setting gives and costs, what others would, and what to change for more
//! of one or the other.
//!
//! A pure function of what was measured: [`analyse`]. Every figure says whether it was measured, estimated or is known by
//! construction, and from what. The estimates:
//!
//! - **Time to a quorum of other clusters.** Nodes are taken as independent, each as fast as those measured: the time
//!   by which `quorum` of `copies` have a chunk on disk follows from the distributions of the copies made here and on
//!   others ([`quorum_time`]). More nodes on the same network and machines cost more than that; slower ones are not seen.
//! - **Commits of other clusters** change as the time to a quorum does.
//! - **Without flushes** a write is quicker by what a flush took.
//!
//! It knows nothing of how things are measured or shown.

mod advice;

use quorumfs_measure::Snapshot;
use serde::Serialize;
use utoipa::ToSchema;

use self::advice::{advice, notes};

/// With fewer values than this nothing is concluded.
const SAMPLES_MIN: u64 = 20;
/// The small file whose write is reckoned, in bytes.
const SMALL_FILE_BYTES: u32 = 16 << 10;
const NANOS_PER_MICRO: u64 = 1_000;
/// Steps of the search for a quantile: to a millionth of the largest time.
const SEARCH_STEPS: u32 = 20;

/// What was measured; times in nanoseconds.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Voters.
    pub nodes: usize,
    /// On how many of them each chunk is to lie, where there are so many.
    pub replicas: u8,
    /// Largest content that rides inside a command, in bytes.
    pub inline_bytes_max: u32,
    /// From a command's proposal to its result.
    pub commits: Snapshot,
    /// Flushes of the log.
    pub log_flushes: Snapshot,
    /// Flushes of the content store.
    pub content_flushes: Snapshot,
    /// Until a chunk was on a quorum.
    pub to_quorum: Snapshot,
    /// Until a chunk was on this node's disk.
    pub own_copies: Snapshot,
    /// Until a chunk was on another node's disk.
    pub peer_copies: Snapshot,
    /// Lookups and other questions.
    pub metadata_reads: Snapshot,
    /// Ranges of chunks.
    pub content_reads: Snapshot,
    /// Bytes of chunks that clients brought.
    pub brought_bytes: u64,
    /// Bytes of copies made of them.
    pub copied_bytes: u64,
    /// Bytes of content that every node has room for.
    pub available_bytes: u64,
}

/// The analysis.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Tradeoffs {
    /// As it is.
    pub present: Setting,
    /// As it could be, each different from the present in one thing.
    pub alternatives: Vec<Setting>,
    /// What to change for more of one thing, and what it costs.
    pub advice: Vec<Advice>,
    /// How the estimates are made and what they leave out.
    pub notes: Vec<String>,
}

/// One way to run the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Setting {
    /// In a few words.
    pub name: String,
    /// Nodes that vote.
    pub nodes: usize,
    /// Nodes that hold each chunk.
    pub copies: usize,
    /// Nodes that must have a write on disk before it is acknowledged.
    pub quorum: usize,
    /// Whether a write is flushed to stable storage before it is acknowledged.
    pub flush: bool,
    /// Largest content that rides inside a command, in bytes.
    pub inline_bytes_max: u32,
    /// How it is had, or why it is not offered.
    pub how: String,
    /// What may fail.
    pub tolerates: Tolerance,
    /// From `close` of a new file of 16 KiB to its acknowledgement, at the leader.
    pub small_write: LatencyFigure,
    /// The same for one chunk of a large file and the command that names it.
    pub chunk_write: LatencyFigure,
    /// A question about names or attributes, at the leader.
    pub metadata_read: LatencyFigure,
    /// A range of a chunk, at the node that is asked.
    pub content_read: LatencyFigure,
    /// Bytes on all disks for each byte of content.
    pub space_factor: Figure,
    /// Bytes written to all disks for each byte of a file of 16 KiB (the log, then the content).
    pub small_write_factor: Figure,
    /// Bytes of content that still fit.
    pub available: Figure,
}

/// What may fail without harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Tolerance {
    /// Nodes that may be down while writes go on.
    pub down_for_writes: usize,
    /// Nodes that may be down while reads go on.
    pub down_for_reads: usize,
    /// Nodes that may be lost for ever without losing an acknowledged write.
    pub lost_for_ever: usize,
    /// Whether acknowledged writes survive a loss of power everywhere at once.
    pub power_loss_everywhere: bool,
}

/// Where a figure comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// It was measured on this node since it started.
    Measured,
    /// It follows from what was measured, by what the basis says.
    Estimated,
    /// It is so by construction.
    Known,
    /// Too little was measured.
    Unknown,
}

/// A number and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Figure {
    /// Null where it is unknown.
    pub value: Option<f64>,
    /// `bytes`, or `factor`.
    pub unit: &'static str,
    /// Where it comes from.
    pub source: Source,
    /// From what, in words.
    pub basis: String,
}

/// A latency and where it comes from; null where it is unknown.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct LatencyFigure {
    /// Half of them take no longer, in microseconds.
    pub p50_us: Option<u64>,
    /// 99 in a hundred take no longer, in microseconds.
    pub p99_us: Option<u64>,
    /// Where it comes from.
    pub source: Source,
    /// From what, in words.
    pub basis: String,
}

/// Something to be had, and for what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Advice {
    /// What one may want.
    pub wish: String,
    /// What to do.
    pub change: String,
    /// What it brings.
    pub gain: String,
    /// What it costs.
    pub cost: String,
}

/// A setting before it is reckoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    nodes: usize,
    copies: usize,
    quorum: usize,
    flush: bool,
    inline_bytes_max: u32,
}

impl Choice {
    /// How many nodes' worth of content the cluster holds.
    fn spread(self) -> f64 {
        self.nodes as f64 / self.copies as f64
    }
}

fn majority(nodes: usize) -> usize {
    nodes / 2 + 1
}

/// As [`crate::replication::placement::Layout`] has it.
fn copies_among(nodes: usize, replicas: u8) -> usize {
    usize::from(replicas).max(majority(nodes)).min(nodes)
}

/// What `inputs` mean for the present setting and for others.
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
                "the node with the least room decides, since each holds {copies} parts of {nodes}; nodes of the same size"
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
                "{} bytes copied for {} bytes brought; a copy that failed is made later by recovery",
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

    /// One after the other. The sum of two 99th percentiles is more than the 99th percentile of the sum.
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

/// `figure` as if `change(quantile, ns)` had been done to it.
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
        // Each quantile is changed by its own; they stay in order.
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
    let figure = measured(&inputs.to_quorum, "chunks brought to a quorum");
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
    let basis = format!("less what a flush of {whose} takes");
    changed(figure, &basis, |quantile, ns| {
        Some(ns.saturating_sub(flushes.quantile(quantile)))
    })
}

/// The time, in nanoseconds, by which with probability `quantile` at least `quorum` of `copies` nodes have a chunk on
/// disk, where one is this node and the others are as those measured. `None`: too few were measured.
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

/// The probability that at least `wanted` of `all` independent events happen, each with probability `each`.
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
