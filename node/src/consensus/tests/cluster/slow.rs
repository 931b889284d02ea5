//! Slow and full disks. The other nodes do not wait for a follower with a slow disk: their logs stay short, and it
//! catches up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::super::log_files::SmallDisk;
use super::super::open_session;
use super::node::{Cluster, eventually};
use crate::consensus::AppliedEffects;
use quorumfs_metadata::StorageFault;

/// Bytes of each command.
const COMMAND_BYTES: usize = 4 << 10;
/// Pause between two batches of commands.
const PAUSE: Duration = Duration::from_millis(30);
/// Commands that are proposed together.
const TOGETHER: u64 = 16;

/// Proposes [`TOGETHER`] commands from `next` on.
async fn write(cluster: &Cluster, next: &mut u64) {
    let each = (*next..*next + TOGETHER)
        .map(|number| cluster.propose(open_session(number, "s".repeat(COMMAND_BYTES))));
    futures::future::join_all(each).await;
    *next += TOGETHER;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p8_a_slow_follower_does_not_keep_the_log_and_catches_up_under_load() {
    const WRITTEN_BYTES: u64 = 10 << 20;
    const LOG_BYTES_MAX: u64 = 4 << 20;
    let mut cluster = Cluster::start(3, |options| {
        options.wal.file_bytes = 64 << 10;
        options.snapshot_entries = 32;
        options.keep_log_bytes = 64 << 10;
        options.hold_log_bytes_max = 1 << 20;
        options.flush_age_ms = 100;
    })
    .await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    let slow = others[0];
    let (mut next, mut longest) = (1, 0);
    write(&cluster, &mut next).await;
    cluster.node_mut(slow).take_effects();
    cluster
        .node(slow)
        .flush_delay_ms()
        .store(1_000, Ordering::Relaxed);
    while next * (COMMAND_BYTES as u64) < WRITTEN_BYTES {
        write(&cluster, &mut next).await;
        tokio::time::sleep(PAUSE).await;
        for id in [leader, others[1], slow] {
            longest = longest.max(cluster.node(id).consensus().status().log.bytes);
        }
    }
    println!("the longest log: {longest} bytes of {WRITTEN_BYTES}");
    assert!(longest < LOG_BYTES_MAX, "the longest log: {longest} bytes");
    assert_eq!(cluster.leader().await, leader, "the leader stayed");

    // Its disk recovers while the others continue: it does not take one snapshot after another.
    cluster.node(slow).flush_delay_ms().store(20, Ordering::Relaxed);
    let over = AtomicBool::new(false);
    let load = async {
        while !over.load(Ordering::Relaxed) {
            write(&cluster, &mut next).await;
            tokio::time::sleep(PAUSE).await;
        }
    };
    let caught_up = async {
        eventually("the slow follower is close behind under load", || {
            let lag = cluster.node(leader).consensus().lag_of(slow);
            lag.is_some_and(|entries| entries <= 4 * TOGETHER)
        })
        .await;
        over.store(true, Ordering::Relaxed);
    };
    futures::future::join(load, caught_up).await;
    eventually("the slow follower has everything", || {
        let known = cluster.node(slow).metadata().view().unwrap().sessions().unwrap();
        known.len() as u64 == next - 1
    })
    .await;
    let told = cluster.node_mut(slow).take_effects();
    let snapshots = told
        .iter()
        .filter(|effects| matches!(effects, AppliedEffects::Installed { .. }))
        .count();
    println!("{snapshots} snapshots");
    assert!(snapshots > 0, "it was by a snapshot");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_was_without_its_reserve_has_it_as_soon_as_there_is_room_and_while_it_is_written() {
    const FILE_BYTES: u64 = 256 << 10;
    const COMMANDS_MAX: u64 = 600;
    let Some(disk) = SmallDisk::of_kibibytes(2048) else {
        println!("skipped: not allowed to mount");
        return;
    };
    // Space for one file and not for the reserve.
    let filler = disk.0.path().join("filler");
    std::fs::write(&filler, vec![1; (2048 << 10) - (FILE_BYTES as usize) * 3 / 2]).unwrap();
    let cluster = Cluster::start(1, |options| {
        options.directory = disk.0.path().join("log");
        options.wal.file_bytes = FILE_BYTES;
    })
    .await;
    let consensus = cluster.node(cluster.ids()[0]).consensus();
    eventually("it leads and sees that there is no room", || {
        consensus.is_leader() && !consensus.has_room()
    })
    .await;
    std::fs::remove_file(&filler).unwrap();
    let files = || std::fs::read_dir(disk.0.path().join("log")).unwrap().count();
    let before = files();
    // The log is never idle, and the file in use has space for everything.
    let mut next = 1;
    while !consensus.has_room() {
        assert!(next < COMMANDS_MAX, "no room after {next} commands");
        let opened = consensus.propose(open_session(next, "while there is room")).await;
        opened.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        next += 1;
    }
    println!("room after {next} commands");
    assert!(consensus.status().log.reserve_held);
    assert_eq!(files(), before + 1, "the reserve is all that is new");
    drop(consensus);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p8_a_node_whose_state_is_damaged_looks_for_room_for_its_log() {
    let Some(disk) = SmallDisk::of_kibibytes(4096) else {
        println!("skipped: not allowed to mount");
        return;
    };
    let cluster = Cluster::start(1, |options| {
        options.directory = disk.0.path().join("log");
        options.wal.file_bytes = 256 << 10;
    })
    .await;
    let consensus = cluster.node(cluster.ids()[0]).consensus();
    eventually("it leads and has room", || {
        consensus.is_leader() && consensus.has_room()
    })
    .await;
    let what = "a block does not match its checksum".to_string();
    consensus
        .0
        .fatal
        .raise("read the metadata", StorageFault::Damaged { what });
    let filler = disk.0.path().join("filler");
    let mut bytes = 4096 << 10;
    while bytes > 64 << 10 && std::fs::write(&filler, vec![1; bytes]).is_err() {
        bytes -= 64 << 10;
    }
    eventually("it sees that there is no room", || !consensus.has_room()).await;
    std::fs::remove_file(&filler).unwrap();
    eventually("it sees that there is room again", || consensus.has_room()).await;
    drop(consensus);
}
