//! Puts and gets of chunks with a cluster that fails in parts (P2, P3, P6).

use std::time::{Duration, Instant};

use crate::fake::{Fake, GetAct, PutAct};
use bytes::Bytes;
use quorumfs_client::{Client, ClientOptions, FreshChunk};
use quorumfs_proto::FsError;
use quorumfs_wire::ChunkStatus;

const MS: Duration = Duration::from_millis(1);
const MIB: usize = 1 << 20;

async fn connect(fake: &Fake, call_timeout: Option<Duration>) -> Client {
    let options = ClientOptions {
        addresses: fake.addresses(),
        call_timeout,
        bytes_in_flight_max: 4 * MIB,
        ..ClientOptions::default()
    };
    Client::connect(options).await.unwrap()
}

fn bytes(length: usize) -> Bytes {
    (0..length).map(|at| (at % 251) as u8).collect()
}

async fn put(client: &Client, length: usize) -> FreshChunk {
    let chunk = client.new_chunk(bytes(length));
    client.put_chunk(&chunk).await.unwrap();
    chunk
}

/// Handles the first `times` puts with `act`.
fn first_puts(
    times: usize,
    act: fn() -> PutAct,
) -> impl FnMut(usize, quorumfs_proto::ChunkId) -> PutAct + Send + 'static {
    let mut seen = 0;
    move |_, _| {
        seen += 1;
        match seen <= times {
            true => act(),
            false => PutAct::Normal,
        }
    }
}

#[tokio::test]
async fn a_put_is_tried_until_a_quorum_holds_it() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    fake.on_put(first_puts(3, || PutAct::Status(ChunkStatus::Unavailable)));
    let chunk = put(&client, 5000).await;
    assert_eq!(fake.world.lock().puts.len(), 4);
    assert_eq!(fake.world.lock().chunks[&chunk.id()], bytes(5000));

    fake.on_put(first_puts(1, || PutAct::Break));
    put(&client, 100).await;
    fake.on_put(first_puts(1, || PutAct::Status(ChunkStatus::Corrupt)));
    put(&client, 100).await;

    fake.world.lock().elect(Some(2));
    put(&client, 100).await;
    assert_eq!(fake.world.lock().puts.last().map(|put| put.0), Some(2));
    // No other node received a put after the change.
    assert_eq!(client.leader(), Some(fake.addresses()[2].clone()));
}

#[tokio::test]
async fn a_full_disk_is_heard_of_at_once() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    fake.on_put(first_puts(1, || PutAct::Status(ChunkStatus::NoSpace)));
    let chunk = client.new_chunk(bytes(10));
    assert_eq!(client.put_chunk(&chunk).await, Err(FsError::NoSpace));
    assert_eq!(
        client.put_chunk(&chunk).await,
        Ok(()),
        "and there may be room later"
    );
}

#[tokio::test]
async fn a_put_without_a_quorum_ends_at_the_time_out() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, Some(300 * MS)).await;
    fake.on_put(first_puts(usize::MAX, || {
        PutAct::Status(ChunkStatus::Unavailable)
    }));
    let chunk = client.new_chunk(bytes(10));
    assert_eq!(client.put_chunk(&chunk).await, Err(FsError::TimedOut));
    assert!(fake.world.lock().puts.len() < 20, "it pauses between attempts");
}

#[tokio::test]
async fn puts_survive_a_stopped_leader() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    put(&client, 100).await;
    fake.freeze(0);
    let began = Instant::now();
    let puts: Vec<_> = (0..8)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { put(&client, MIB).await })
        })
        .collect();
    tokio::time::sleep(1_000 * MS).await;
    fake.world.lock().elect(Some(1));
    for put in puts {
        put.await.unwrap();
    }
    assert!(began.elapsed() < 3_000 * MS, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_under_way_are_bounded() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    fake.on_put(|_, _| PutAct::After(30 * MS));
    let puts: Vec<_> = (0..32)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { put(&client, MIB).await })
        })
        .collect();
    for put in puts {
        put.await.unwrap();
    }
    let world = fake.world.lock();
    assert_eq!(world.puts.len(), 32);
    let most = world.put_bytes_under_way_max;
    assert!(most <= 4 * MIB, "{most} bytes at once");
    assert!(most > MIB, "but several at once");
}

#[tokio::test]
async fn a_swallowed_put_answer_is_asked_for_again() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    fake.on_put(first_puts(1, || PutAct::Swallow));
    let began = Instant::now();
    put(&client, 100).await;
    assert!(began.elapsed() < 7_000 * MS);
    let world = fake.world.lock();
    assert_eq!(world.puts.len(), 2);
    assert_eq!(world.puts[0], world.puts[1]);
}

#[tokio::test]
async fn exactly_the_range_is_read() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    let chunk = put(&client, 100_000).await;
    for (offset, length) in [
        (0, 100_000),
        (1, 1),
        (4095, 2),
        (99_999, 1),
        (8192, 4096),
        (50_000, 0),
    ] {
        let read = client.get_chunk(chunk.id(), offset, length).await.unwrap();
        assert_eq!(read, chunk.payload()[offset as usize..(offset + length) as usize]);
    }
    let beyond = client.get_chunk(chunk.id(), u32::MAX, 1).await;
    assert_eq!(beyond, Err(FsError::InvalidArgument));
}

#[tokio::test]
async fn a_damaged_or_missing_copy_is_passed_over() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    let chunk = put(&client, 10_000).await;
    fake.on_get(|node, _| match node {
        0 => GetAct::Damage,
        1 => GetAct::Status(ChunkStatus::NotFound),
        _ => GetAct::Normal,
    });
    let read = client.get_chunk(chunk.id(), 100, 5000).await.unwrap();
    assert_eq!(read, chunk.payload()[100..5100]);
    let asked: Vec<usize> = fake.world.lock().gets.iter().map(|get| get.0).collect();
    assert_eq!(asked, [0, 1, 2], "in the order of the list");
}

#[tokio::test]
async fn a_node_that_swallows_a_read_is_passed_over() {
    let fake = Fake::start(2).await;
    let client = connect(&fake, None).await;
    let chunk = put(&client, 10).await;
    fake.on_get(|node, _| match node {
        0 => GetAct::Swallow,
        _ => GetAct::Normal,
    });
    let began = Instant::now();
    assert_eq!(client.get_chunk(chunk.id(), 0, 10).await, Ok(bytes(10)));
    assert!(began.elapsed() < 3_000 * MS, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_chunk_that_nobody_has_is_stale() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    let chunk = client.new_chunk(bytes(10));
    let began = Instant::now();
    assert_eq!(client.get_chunk(chunk.id(), 0, 10).await, Err(FsError::Stale));
    assert!(began.elapsed() < 500 * MS);
    // The answers of a majority are sufficient.
    fake.cut(2);
    assert_eq!(client.get_chunk(chunk.id(), 0, 10).await, Err(FsError::Stale));
    assert!(began.elapsed() < 2_000 * MS);
}

#[tokio::test]
async fn a_chunk_of_which_every_copy_is_damaged_is_an_error_after_a_while() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    let chunk = put(&client, 10).await;
    fake.on_get(|_, _| GetAct::Damage);
    let began = Instant::now();
    assert_eq!(client.get_chunk(chunk.id(), 0, 10).await, Err(FsError::Io));
    assert!(began.elapsed() >= 5_000 * MS, "a repair was waited for");
    assert!(fake.world.lock().gets.len() < 150, "with pauses");
}

#[tokio::test]
async fn reads_go_on_while_nodes_die_and_stop() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    let chunk = put(&client, 10_000).await;
    let read = || async {
        let began = Instant::now();
        let read = client.get_chunk(chunk.id(), 0, 10_000).await.unwrap();
        assert_eq!(read, chunk.payload());
        began.elapsed()
    };
    read().await;
    fake.cut(0);
    for _ in 0..10 {
        let pause = read().await;
        assert!(pause < 1_000 * MS, "{pause:?}");
    }
    fake.mend(0);
    fake.freeze(1);
    let mut pauses = Vec::new();
    for _ in 0..30 {
        pauses.push(read().await);
        tokio::time::sleep(20 * MS).await;
    }
    assert!(pauses.iter().all(|pause| *pause < 3_000 * MS), "{pauses:?}");
    let slow = pauses.iter().filter(|pause| **pause > 200 * MS);
    assert!(slow.count() <= 1, "only the first to notice waits: {pauses:?}");
    // The node returns and is used again.
    fake.mend(1);
    fake.cut(0);
    fake.cut(2);
    let pause = read().await;
    assert!(pause < 3_000 * MS, "{pause:?}");
    // No node can be reached: the read waits until one can.
    fake.cut(1);
    let hasty = tokio::time::timeout(700 * MS, client.get_chunk(chunk.id(), 0, 10_000)).await;
    assert!(hasty.is_err());
    fake.mend(2);
    read().await;
}
