//! Nodes whose state is unreliable: they keep the log and vote, and never lead. Also which nodes a leader can do
//! without.

use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;

use super::super::open_session;
use super::node::{Cluster, eventually};
use crate::consensus::types::VoterId;

/// Duration of a flush on a slow disk, in milliseconds.
const SLOW_FLUSH_MS: u64 = 300;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_stood_down_is_not_made_leader() {
    let mut cluster = Cluster::start(3, |_| {}).await;
    let leader = cluster.leader().await;
    cluster.open_sessions(1..5).await;
    let (damaged, healthy) = (cluster.others(leader)[0], cluster.others(leader)[1]);
    cluster.node(damaged).consensus().step_aside(|_| true).await;

    let consensus = cluster.node(leader).consensus();
    let refused = consensus.transfer_leadership(damaged).await;
    assert!(refused.is_err(), "{refused:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(consensus.is_leader(), "the leader is what it was");
    cluster.open_sessions(5..6).await;

    // It has every entry, and so has the other: the node that steps aside chooses the one that can lead.
    consensus.step_aside(|_| true).await;
    eventually("the healthy node leads", || {
        cluster.node(healthy).consensus().is_leader()
    })
    .await;
    assert!(!consensus.is_leader());
    cluster.open_sessions(6..9).await;
    assert!(!cluster.node(damaged).consensus().is_leader());
    drop(consensus);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_stood_down_refuses_leadership_that_comes_to_it_all_the_same() {
    let mut cluster = Cluster::start(3, |_| {}).await;
    let leader = cluster.leader().await;
    cluster.open_sessions(1..5).await;
    let damaged = cluster.others(leader)[0];
    cluster.node(damaged).consensus().step_aside(|_| true).await;
    // As if it had stood down after it was asked.
    let consensus = cluster.node(leader).consensus();
    let term = consensus.term();
    consensus
        .0
        .raft
        .trigger()
        .transfer_leader(VoterId(damaged))
        .await
        .unwrap();
    eventually("another leads", || {
        cluster
            .running()
            .any(|node| node.consensus().is_leader() && node.consensus().term() > term)
    })
    .await;
    let has_led = |metrics: &openraft::RaftMetrics<_>| metrics.current_leader == Some(VoterId(damaged));
    assert!(!has_led(&consensus.0.raft.metrics().borrow_watched().clone()));
    cluster.open_sessions(5..9).await;
    drop(consensus);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p1_a_node_is_not_let_go_while_the_others_lack_what_was_acknowledged() {
    const COMMANDS: u64 = 1_000;
    const COMMAND_BYTES: usize = 16 << 10;
    let mut cluster = Cluster::start(3, |_| {}).await;
    let leader = cluster.leader().await;
    cluster.open_sessions(1..5).await;
    let (behind, leaving) = (cluster.others(leader)[0], cluster.others(leader)[1]);
    let consensus = cluster.node(leader).consensus();
    eventually("a majority lives without any one of them", || {
        consensus.lag_of(behind) == Some(0) && consensus.lag_of(leaving) == Some(0)
    })
    .await;
    consensus.quorum_without(leaving).await.unwrap();
    consensus.quorum_without(behind).await.unwrap();

    cluster.kill(behind);
    for first in (10..10 + COMMANDS).step_by(50) {
        let some = (first..first + 50)
            .map(|number| cluster.propose(open_session(number, "w".repeat(COMMAND_BYTES))));
        futures::future::join_all(some).await;
    }
    let delay = cluster.node(behind).flush_delay_ms();
    delay.store(SLOW_FLUSH_MS, Ordering::Relaxed);
    cluster.restart(behind).await;
    // It answers heartbeats long before it has all entries.
    let mut refused = 0;
    while consensus.quorum_without(leaving).await.is_err() {
        refused += 1;
        assert!(refused < 100, "{:?}", consensus.lag_of(behind));
    }
    assert_eq!(consensus.lag_of(behind), Some(0), "after {refused} refusals");
    drop(consensus);
    cluster.shutdown().await;
}
