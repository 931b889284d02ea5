//! The rate of decisions of three nodes in one process. Run by hand: `cargo test -p quorumfs-node --lib rates --
//! --ignored --nocapture`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::node::Cluster;
use crate::consensus::tests::open_session;

async fn measure(cluster: &Cluster, in_flight: u64) -> f64 {
    let leader = cluster.leader().await;
    let consensus = cluster.node(leader).consensus();
    let next = Arc::new(AtomicU64::new(in_flight * 1_000_000));
    let began = Instant::now();
    let proposers = (0..in_flight).map(|_| {
        let (consensus, next) = (consensus.clone(), next.clone());
        tokio::spawn(async move {
            let mut decided = 0u64;
            while began.elapsed() < Duration::from_secs(3) {
                let session = next.fetch_add(1, Ordering::Relaxed);
                consensus.propose(open_session(session, "rate")).await.unwrap();
                decided += 1;
            }
            decided
        })
    });
    let decided: u64 = futures::future::join_all(proposers)
        .await
        .into_iter()
        .map(Result::unwrap)
        .sum();
    decided as f64 / began.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn rates() {
    let cluster = Cluster::start(3, |options| options.wal.file_bytes = 64 << 20).await;
    let leader = cluster.leader().await;
    for in_flight in [1, 1, 8, 64, 256] {
        let before = cluster.node(leader).consensus().status().log;
        let rate = measure(&cluster, in_flight).await;
        let after = cluster.node(leader).consensus().status().log;
        let entries = after.entries_flushed - before.entries_flushed;
        let flushes = after.flushes - before.flushes;
        println!("{in_flight} in flight: {rate:.0} proposals/s, {entries} entries in {flushes} flushes");
    }
    let consensus = cluster.node(leader).consensus();
    let began = Instant::now();
    for _ in 0..1000 {
        consensus.barrier().await.unwrap();
    }
    println!("a barrier takes {:?}", began.elapsed() / 1000);
    drop(consensus);
    cluster.shutdown().await;
}
