//! Speed. Run by hand: `cargo test -p quorumfs-content tests::pace -- --ignored --nocapture`.

use std::time::Instant;

use futures::StreamExt;

use super::*;

#[tokio::test]
#[ignore = "measures"]
async fn pace() {
    let folder = tempfile::tempdir_in(std::env::var("PACE_DIR").unwrap_or("/var/tmp".to_string())).unwrap();
    let (store, _) = ContentStore::open(folder.path(), ContentOptions::default()).unwrap();
    let numbered = |counter| chunk(counter, 1 << 20);
    for (round, flight) in [1, 4, 16, 1, 16].into_iter().enumerate() {
        let round = round as u64;
        let before = store.flush_counts();
        let began = Instant::now();
        let first = flight * 1_000_000 + 2048 * round;
        futures::stream::iter(first..first + 1024)
            .map(|counter| store.put(numbered(counter)))
            .buffer_unordered(flight as usize)
            .for_each(|result| async { result.unwrap() })
            .await;
        let flushes = store.flush_counts().flushes - before.flushes;
        let rate = 1024.0 / began.elapsed().as_secs_f64();
        println!("put 1 MiB, {flight} in flight: {rate:.0} MiB/s, {flushes} flushes");
    }
    for flight in [1, 64] {
        let before = store.flush_counts();
        let began = Instant::now();
        let first = flight * 100_000_000;
        futures::stream::iter(first..first + 20_000)
            .map(|counter| store.put(chunk(counter, 4096)))
            .buffer_unordered(flight as usize)
            .for_each(|result| async { result.unwrap() })
            .await;
        let flushes = store.flush_counts().flushes - before.flushes;
        let rate = 20_000.0 / began.elapsed().as_secs_f64();
        println!("put 4 KiB, {flight} in flight: {rate:.0}/s, {flushes} flushes");
    }
    for (what, first) in [
        ("of a 1 MiB chunk", 16_004_096),
        ("whole small chunk", 6_400_000_000u64),
    ] {
        let began = Instant::now();
        for turn in 0..200_000u64 {
            let offset = if first == 16_004_096 {
                (turn % 256) as u32 * 4096
            } else {
                0
            };
            store.read(id(first + turn % 100), offset, 4096).unwrap();
        }
        let rate = 200_000.0 / began.elapsed().as_secs_f64();
        println!("read 4 KiB {what}: {rate:.0}/s");
    }
    let began = Instant::now();
    let dead: Vec<ChunkId> = (16_004_096..16_004_496).map(id).collect();
    let freed = store.discard(&dead).unwrap();
    println!("discard of 400 MiB: {freed} bytes in {:?}", began.elapsed());
    drop(store);
    for _ in 0..2 {
        let (_store, report) = ContentStore::open(folder.path(), ContentOptions::default()).unwrap();
        println!("{report:?}");
    }
}

#[test]
#[ignore = "measures"]
fn index_memory() {
    let resident = || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let index = super::super::index::Index::default();
    let segment = super::super::segment::Segment::new(
        PathBuf::new(),
        1,
        1,
        super::super::segment::SegmentState::Open(super::super::record::Table::default()),
        0,
    );
    let before = resident();
    let count = 4_000_000u64;
    for counter in 0..count {
        let layout = super::super::record::Layout {
            position: counter * 4096,
            length: 4096,
        };
        index.insert(&segment, &super::super::record::Entry::new(id(counter), layout));
    }
    println!("{} bytes for each chunk", (resident() - before) / count);
}
