//! Nodes whose state cannot be relied on: they keep the log and vote, and never lead; and who may do without whom.

use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;

use super::node::{Cluster, eventually};
use crate::consensus::types::VoterId;

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

    // It has every entry, and so has the other: who steps aside chooses the one that can lead.
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
