//! The advice of the analysis: what to change for more of one thing, its cost, and what the estimates ignore.

use super::{Advice, Inputs, LatencyFigure, NANOS_PER_MICRO, SAMPLES_MIN, Setting};

pub(super) fn advice(inputs: &Inputs, present: &Setting, alternatives: &[Setting]) -> Vec<Advice> {
    let of_nodes = |nodes: Option<usize>| alternatives.iter().find(|s| Some(s.nodes) == nodes);
    let mut advice = Vec::new();
    let from_to = |what: &str, from: &LatencyFigure, to: &LatencyFigure| {
        format!("{what}: {} instead of {}", shown(to), shown(from))
    };
    let more = [3, 5, 7].into_iter().find(|nodes| *nodes > present.nodes);
    if let Some(more) = of_nodes(more) {
        advice.push(Advice {
            wish: "more failures tolerated".to_string(),
            change: format!("{} nodes instead of {}", more.nodes, present.nodes),
            gain: format!(
                "{} instead of {} nodes may be down or lost for ever",
                more.tolerates.down_for_writes, present.tolerates.down_for_writes
            ),
            cost: format!(
                "machines, {} copies of each chunk instead of {}; {}",
                more.copies,
                present.copies,
                from_to("small writes", &present.small_write, &more.small_write)
            ),
        });
    }
    // First fewer copies, which cost no failure tolerance, then fewer nodes.
    let fewer_copies = alternatives
        .iter()
        .filter(|s| s.nodes == present.nodes && s.copies < present.copies)
        .min_by_key(|s| s.copies);
    let fewer = [5, 3, 1].into_iter().find(|nodes| *nodes < present.nodes);
    if let Some(fewer) = fewer_copies.or(of_nodes(fewer)) {
        advice.push(Advice {
            wish: "less disk for each byte".to_string(),
            change: match fewer.nodes == present.nodes {
                true => fewer.how.clone(),
                false => format!("{} nodes instead of {}", fewer.nodes, present.nodes),
            },
            gain: format!("{} times the disk instead of {}", fewer.copies, present.copies),
            cost: match fewer.nodes == present.nodes {
                true => "a chunk is read from fewer nodes at once".to_string(),
                false => format!(
                    "only {} instead of {} nodes may be down or lost for ever",
                    fewer.tolerates.down_for_writes, present.tolerates.down_for_writes
                ),
            },
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

pub(super) fn notes(inputs: &Inputs) -> Vec<String> {
    let mut notes = vec![
        "Latencies are of the node that answers, without the client's network.".to_string(),
        "Estimates for other numbers of nodes assume that nodes are independent and as fast as those measured; a leader that \
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

fn shown(figure: &LatencyFigure) -> String {
    match (figure.p50_us, figure.p99_us) {
        (Some(p50), Some(p99)) => format!("p50 {p50} µs, p99 {p99} µs"),
        _ => "not known yet".to_string(),
    }
}
