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

use quorumfs_measure::Snapshot;
use serde::Serialize;
use utoipa::ToSchema;

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
    /// Voters, each of which holds everything.
    pub copies: usize,
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
    /// Nodes that hold everything.
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
    copies: usize,
    quorum: usize,
    flush: bool,
    inline_bytes_max: u32,
}

fn majority(copies: usize) -> usize {
    copies / 2 + 1
}

/// What `inputs` mean for the present setting and for others.
pub fn analyse(inputs: &Inputs) -> Tradeoffs {
    let now = Choice {
        copies: inputs.copies,
        quorum: majority(inputs.copies),
        flush: true,
        inline_bytes_max: inputs.inline_bytes_max,
    };
    let present = reckon(inputs, now, now, "as it is", "this is how the cluster runs");
    let mut alternatives = Vec::new();
    for copies in [1, 3, 5, 7].into_iter().filter(|copies| *copies != now.copies) {
        let choice = Choice {
            copies,
            quorum: majority(copies),
            ..now
        };
        let how = "change the members of the cluster; the list in --members founds it";
        let name = match copies {
            1 => "1 node".to_string(),
            _ => format!("{copies} nodes"),
        };
        alternatives.push(reckon(inputs, now, choice, &name, how));
    }
    if now.copies > 1 {
        let all = Choice {
            quorum: now.copies,
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
    let Choice { copies, quorum, .. } = choice;
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
    let writes_per_copy = if is_inline { 2.0 } else { 1.0 };
    Setting {
        name: name.to_string(),
        copies,
        quorum,
        flush: choice.flush,
        inline_bytes_max: choice.inline_bytes_max,
        how: how.to_string(),
        tolerates: Tolerance {
            down_for_writes: copies - quorum.max(majority(copies)),
            down_for_reads: copies - majority(copies),
            lost_for_ever: quorum - 1,
            power_loss_everywhere: choice.flush,
        },
        small_write: if is_inline { commit } else { with_chunk.clone() },
        chunk_write: with_chunk,
        metadata_read: is_measured(&inputs.metadata_reads, "questions about names and attributes"),
        content_read: is_measured(&inputs.content_reads, "ranges of chunks"),
        space_factor: space_factor(inputs, now, choice),
        small_write_factor: Figure {
            value: Some(copies as f64 * writes_per_copy),
            unit: "factor",
            source: Source::Known,
            basis: match is_inline {
                true => format!("{copies} nodes write it to their log and then to their content"),
                false => format!("{copies} nodes write it to their content"),
            },
        },
        available: Figure {
            value: Some(inputs.available_bytes as f64),
            unit: "bytes",
            source: if choice == now {
                Source::Measured
            } else {
                Source::Estimated
            },
            basis:
                "the node with the least room decides, since each holds everything; nodes of the same size"
                    .to_string(),
        },
    }
}

fn space_factor(inputs: &Inputs, now: Choice, choice: Choice) -> Figure {
    if choice.copies == now.copies && inputs.brought_bytes > 0 {
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
        basis: format!("{} nodes hold everything", choice.copies),
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
    let figure = if (choice.copies, choice.quorum) == (now.copies, now.quorum) {
        figure
    } else {
        let basis = format!(
            "changed as the time to {} of {} is to that of {} of {}",
            choice.quorum, choice.copies, now.quorum, now.copies
        );
        changed(figure, &basis, |quantile, ns| {
            let before = quorum_time(inputs, now.copies, now.quorum, quantile)?;
            let after = quorum_time(inputs, choice.copies, choice.quorum, quantile)?;
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

fn shown(figure: &LatencyFigure) -> String {
    match (figure.p50_us, figure.p99_us) {
        (Some(p50), Some(p99)) => format!("p50 {p50} µs, p99 {p99} µs"),
        _ => "not known yet".to_string(),
    }
}

fn advice(inputs: &Inputs, present: &Setting, alternatives: &[Setting]) -> Vec<Advice> {
    let with_copies = |copies: Option<usize>| alternatives.iter().find(|s| Some(s.copies) == copies);
    let mut advice = Vec::new();
    let from_to = |what: &str, from: &LatencyFigure, to: &LatencyFigure| {
        format!("{what}: {} instead of {}", shown(to), shown(from))
    };
    let more = [3, 5, 7].into_iter().find(|copies| *copies > present.copies);
    if let Some(more) = with_copies(more) {
        advice.push(Advice {
            wish: "more failures tolerated".to_string(),
            change: format!("{} nodes instead of {}", more.copies, present.copies),
            gain: format!(
                "{} instead of {} nodes may be down or lost for ever",
                more.tolerates.down_for_writes, present.tolerates.down_for_writes
            ),
            cost: format!(
                "{} times the disk instead of {}; {}",
                more.copies,
                present.copies,
                from_to("small writes", &present.small_write, &more.small_write)
            ),
        });
    }
    let fewer = [5, 3, 1].into_iter().find(|copies| *copies < present.copies);
    if let Some(fewer) = with_copies(fewer) {
        advice.push(Advice {
            wish: "less disk for each byte".to_string(),
            change: format!("{} nodes instead of {}", fewer.copies, present.copies),
            gain: format!("{} times the disk instead of {}", fewer.copies, present.copies),
            cost: format!(
                "only {} instead of {} nodes may be down or lost for ever",
                fewer.tolerates.down_for_writes, present.tolerates.down_for_writes
            ),
        });
    }
    if inputs.log_flushes.count() >= SAMPLES_MIN && inputs.commits.count() >= SAMPLES_MIN {
        let flush = inputs.log_flushes.quantile(0.5);
        let percent = (100 * flush / inputs.commits.quantile(0.5).max(1)).min(100);
        let flush_us = flush / NANOS_PER_MICRO;
        advice.push(match percent {
            40.. => Advice {
                wish: "faster small writes".to_string(),
                change: "disks that flush faster (with protection against loss of power), for the data folders"
                    .to_string(),
                gain: format!("up to {percent} % of a commit: a flush of the log takes {flush_us} µs (measured)"),
                cost: "hardware; nothing is given up".to_string(),
            },
            _ => Advice {
                wish: "faster small writes".to_string(),
                change: "a faster network between the nodes, or faster processors".to_string(),
                gain: format!("the flush of the log is only {percent} % of a commit ({flush_us} µs, measured): the rest is network and work"),
                cost: "hardware; nothing is given up".to_string(),
            },
        });
    }
    advice.push(Advice {
        wish: "programs that wait less for writes".to_string(),
        change: "mount with -o durability=fsync".to_string(),
        gain: "close and namespace calls return once they are ordered; fsync still waits until a quorum has flushed"
            .to_string(),
        cost: "a loss of power can take the last second of what was not fsynced, as with a local filesystem".to_string(),
    });
    advice.push(Advice {
        wish: "more reads at once".to_string(),
        change: "more nodes, or more memory for the mounts' caches".to_string(),
        gain: "every node serves content; what a mount has cached it reads without any".to_string(),
        cost: "disk for each node; names and attributes still come from the leader".to_string(),
    });
    advice
}

fn notes(inputs: &Inputs) -> Vec<String> {
    let mut notes = vec![
        "Latencies are of the node that answers, without the client's network.".to_string(),
        "Estimates for other numbers of nodes take nodes as independent and as fast as those measured; a leader that \
         sends to more nodes also works more, which they leave out."
            .to_string(),
        "Sums of 99th percentiles are upper bounds.".to_string(),
    ];
    if inputs.commits.count() < SAMPLES_MIN || inputs.to_quorum.count() < SAMPLES_MIN {
        notes.push(
            "Little was written through this node since it started; ask the leader, or after some work."
                .to_string(),
        );
    }
    notes
}

#[cfg(test)]
mod tests;
