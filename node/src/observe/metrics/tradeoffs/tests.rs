//! The analysis of made-up measurements with known results.

use super::*;
use quorumfs_measure::Distribution;

fn micros(values: impl IntoIterator<Item = u64>) -> Snapshot {
    let distribution = Distribution::new();
    values
        .into_iter()
        .for_each(|value| distribution.record(value * NANOS_PER_MICRO));
    distribution.snapshot()
}

/// Three nodes; copies on this node always take 100 µs, those on others 200 to 1199 µs, evenly distributed.
fn inputs() -> Inputs {
    Inputs {
        nodes: 3,
        replicas: 3,
        inline_bytes_max: 32 << 10,
        commits: micros((0..1000).map(|n| 300 + n / 10)),
        log_flushes: micros((0..1000).map(|_| 200)),
        content_flushes: micros((0..1000).map(|_| 150)),
        to_quorum: micros((0..1000).map(|n| 500 + n / 10)),
        own_copies: micros((0..1000).map(|_| 100)),
        peer_copies: micros((0..1000).map(|n| 200 + n)),
        metadata_reads: micros((0..1000).map(|_| 60)),
        content_reads: micros((0..1000).map(|_| 90)),
        brought_bytes: 1000,
        copied_bytes: 2900,
        available_bytes: 1 << 30,
    }
}

fn find<'a>(tradeoffs: &'a Tradeoffs, name: &str) -> &'a Setting {
    let found = tradeoffs.alternatives.iter().find(|setting| setting.name == name);
    found.unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn at_least_is_the_binomial_tail() {
    assert!((at_least(2, 0, 0.3) - 1.0).abs() < 1e-12);
    assert!((at_least(2, 1, 0.5) - 0.75).abs() < 1e-12);
    assert!((at_least(4, 3, 0.5) - 5.0 / 16.0).abs() < 1e-12);
    assert_eq!(at_least(2, 3, 0.9), 0.0);
}

#[test]
fn time_to_a_quorum_is_an_order_statistic_of_the_copies() {
    let inputs = inputs();
    let time = |copies, quorum, quantile| quorum_time(&inputs, copies, quorum, quantile).unwrap() / 1000;
    let near = |found: u64, expected: f64| {
        assert!(
            (found as f64 - expected).abs() < expected / 15.0,
            "{found}, not {expected}"
        );
    };
    // The quicker of two others, evenly 200..1200: half of them by 200 + 1000 (1 - sqrt(1/2)).
    near(time(3, 2, 0.5), 200.0 + 1000.0 * (1.0 - 0.5f64.sqrt()));
    // The slower of two: by 200 + 1000 sqrt(1/2).
    near(time(3, 3, 0.5), 200.0 + 1000.0 * 0.5f64.sqrt());
    assert!(time(1, 1, 0.5) <= 104, "only this node's own disk");
    assert!(time(3, 1, 0.99) <= 104, "the own disk is the quickest of all");
    assert!(time(3, 2, 0.5) < time(3, 2, 0.99));
    // For even distributions the second of four is later than the first of two: 2/5 against 1/3.
    assert!(time(5, 3, 0.5) > time(3, 2, 0.5));
}

#[test]
fn the_present_is_measured_and_the_others_are_estimated() {
    let tradeoffs = analyse(&inputs());
    let present = &tradeoffs.present;
    assert_eq!(present.small_write.source, Source::Measured);
    let p50 = present.small_write.p50_us.unwrap();
    assert!((345..=365).contains(&p50), "{p50}");
    assert_eq!(present.space_factor.value, Some(2.9));
    assert_eq!(present.space_factor.source, Source::Measured);
    assert_eq!(present.tolerates.down_for_writes, 1);
    assert_eq!(present.tolerates.lost_for_ever, 1);
    for setting in &tradeoffs.alternatives {
        let figures = [
            &setting.chunk_write,
            &setting.metadata_read,
            &setting.content_read,
        ];
        for figure in figures {
            assert_eq!(figure.source, Source::Estimated, "{}", setting.name);
            assert!(figure.p50_us <= figure.p99_us, "{}: {figure:?}", setting.name);
            assert!(!figure.basis.is_empty());
        }
    }
}

#[test]
fn more_nodes_tolerate_more_and_cost_more() {
    let tradeoffs = analyse(&inputs());
    let (five, seven) = (find(&tradeoffs, "5 nodes"), find(&tradeoffs, "7 nodes"));
    assert_eq!((five.quorum, five.tolerates.down_for_writes), (3, 2));
    assert_eq!((seven.quorum, seven.tolerates.lost_for_ever), (4, 3));
    assert_eq!(
        five.space_factor.value,
        Some(3.0),
        "three copies are a majority of five"
    );
    assert_eq!(seven.space_factor.value, Some(4.0));
    assert!(five.available.value > tradeoffs.present.available.value);
    assert!(five.small_write.p50_us > tradeoffs.present.small_write.p50_us);
    let all = find(&tradeoffs, "acknowledged by all nodes");
    assert_eq!(
        (all.tolerates.down_for_writes, all.tolerates.lost_for_ever),
        (0, 2)
    );
    assert!(all.chunk_write.p50_us > tradeoffs.present.chunk_write.p50_us);
    let one = find(&tradeoffs, "acknowledged by one node");
    assert_eq!(
        (one.tolerates.down_for_writes, one.tolerates.lost_for_ever),
        (1, 0)
    );
    let alone = find(&tradeoffs, "1 node");
    assert_eq!(alone.tolerates.down_for_reads, 0);
}

#[test]
fn where_there_are_more_nodes_than_copies_the_copies_can_be_chosen() {
    let five = Inputs {
        nodes: 5,
        replicas: 5,
        ..inputs()
    };
    let tradeoffs = analyse(&five);
    assert_eq!((tradeoffs.present.nodes, tradeoffs.present.copies), (5, 5));
    let fewer = find(&tradeoffs, "each chunk on 3 nodes");
    assert_eq!((fewer.quorum, fewer.tolerates), (3, tradeoffs.present.tolerates));
    assert!(fewer.available.value > tradeoffs.present.available.value);
    assert!(fewer.how.contains("/membership/replicas"));
    let less_disk = tradeoffs
        .advice
        .iter()
        .find(|advice| advice.wish.starts_with("less disk"));
    assert_eq!(less_disk.map(|advice| &advice.change), Some(&fewer.how));
}

#[test]
fn without_flushes_power_is_not_survived_and_a_flush_is_saved() {
    let tradeoffs = analyse(&inputs());
    let unflushed = find(&tradeoffs, "without flushes");
    assert!(!unflushed.tolerates.power_loss_everywhere);
    let saved = tradeoffs.present.small_write.p50_us.unwrap() - unflushed.small_write.p50_us.unwrap();
    assert!((195..=210).contains(&saved), "{saved}");
    assert!(unflushed.how.contains("P1"));
}

#[test]
fn inline_content_saves_a_trip_and_is_written_twice() {
    let tradeoffs = analyse(&inputs());
    assert_eq!(tradeoffs.present.small_write_factor.value, Some(6.0));
    let apart = find(&tradeoffs, "content of up to 0 KiB inside commands");
    assert_eq!(apart.small_write_factor.value, Some(3.0));
    assert!(apart.small_write.p50_us > tradeoffs.present.small_write.p50_us);
}

#[test]
fn what_was_not_measured_is_unknown() {
    let empty = micros([]);
    let inputs = Inputs {
        commits: empty.clone(),
        log_flushes: empty.clone(),
        content_flushes: empty.clone(),
        to_quorum: empty.clone(),
        own_copies: empty.clone(),
        peer_copies: empty.clone(),
        metadata_reads: empty.clone(),
        content_reads: empty,
        brought_bytes: 0,
        copied_bytes: 0,
        ..inputs()
    };
    let tradeoffs = analyse(&inputs);
    for setting in std::iter::once(&tradeoffs.present).chain(&tradeoffs.alternatives) {
        assert_eq!(setting.small_write.source, Source::Unknown, "{}", setting.name);
        assert_eq!(setting.small_write.p50_us, None);
        assert_eq!(setting.space_factor.source, Source::Known);
    }
    assert!(
        tradeoffs
            .notes
            .iter()
            .any(|note| note.contains("Little was written"))
    );
    assert!(tradeoffs.advice.len() >= 4, "advice does not need measurements");
}

#[test]
fn advice_says_what_dominates() {
    let says = |inputs: &Inputs| {
        let advice = analyse(inputs).advice;
        let faster = advice
            .into_iter()
            .find(|advice| advice.wish == "faster small writes");
        faster.unwrap().change
    };
    assert!(says(&inputs()).contains("flush faster"));
    let quick = Inputs {
        log_flushes: micros((0..1000).map(|_| 20)),
        ..inputs()
    };
    assert!(says(&quick).contains("network"));
}
