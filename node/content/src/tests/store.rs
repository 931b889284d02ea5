//! Putting, reading, reopening, discarding.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use quorumfs_proto::limits::CHUNK_BYTES_MAX;

use super::super::ContentError;
use super::*;

const SIZES: [usize; 9] = [
    1,
    100,
    4095,
    4096,
    4097,
    30_000,
    65_536,
    300_001,
    CHUNK_BYTES_MAX as usize,
];

#[tokio::test]
async fn what_was_put_is_read_and_still_there_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..60)
        .map(|counter| chunk(counter, SIZES[counter as usize % SIZES.len()]))
        .collect();
    let payload_bytes: u64 = chunks.iter().map(|chunk| chunk.payload().len() as u64).sum();
    {
        let (store, report) = open(folder.path());
        assert_eq!(report.chunks, 0);
        for chunk in &chunks {
            assert!(!store.holds(chunk.id()));
            store.put(chunk.clone()).await.unwrap();
            assert!(store.holds(chunk.id()));
            assert_served(&store, chunk);
        }
        assert_eq!(store.counts(), (60, payload_bytes));
        // A second put does nothing.
        store.put(chunks[3].clone()).await.unwrap();
        assert_eq!(store.counts(), (60, payload_bytes));
    }
    assert!(segment_files(folder.path()).len() > 1);
    for scanned in [1, 0] {
        let (store, report) = open(folder.path());
        assert_eq!(report.scanned_segments, scanned);
        assert_eq!((report.chunks, report.payload_bytes), (60, payload_bytes));
        assert_eq!(report.torn_records, 0);
        for chunk in &chunks {
            assert!(store.holds(chunk.id()));
            assert_served(&store, chunk);
            store.verify(chunk.id()).unwrap();
        }
        let mut listed = Vec::new();
        while let page = store.ids_after(listed.last().copied(), 7)
            && !page.is_empty()
        {
            listed.extend(page);
        }
        assert_eq!(listed, chunks.iter().map(|chunk| chunk.id()).collect::<Vec<_>>());
    }
}

#[test]
fn ranges_are_widened_to_blocks_and_end_with_the_chunk() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    for (counter, length) in [(1, 10_000), (2, 200_000)] {
        let chunk = chunk(counter, length);
        store.append(&chunk).unwrap();
        for (offset, wanted) in [
            (0, 1),
            (4095, 2),
            (4096, 4096),
            (5000, 100_000),
            (9_999, 1),
            (0, u32::MAX),
        ] {
            let range = store.read(chunk.id(), offset, wanted).unwrap();
            assert!(range.offset() <= offset && range.offset() % 4096 == 0);
            let begin = range.offset() as usize;
            let (_, payload, block_crcs) = range.clone().into_parts();
            assert_eq!(payload, chunk.payload().slice(begin..begin + payload.len()));
            assert!(quorumfs_proto::chunk::blocks_match(&payload, &block_crcs));
            let available = wanted.min(length as u32 - offset);
            let from = offset as usize;
            assert_eq!(
                range.exactly(offset, available).unwrap(),
                chunk.payload().slice(from..from + available as usize)
            );
        }
        assert!(matches!(
            store.read(chunk.id(), length as u32, 1),
            Err(ContentError::OutOfRange { .. })
        ));
    }
    assert!(matches!(
        store.read(id(9), 0, 1),
        Err(ContentError::NotFound { .. })
    ));
}

#[test]
fn what_is_appended_is_held_once_it_is_synced() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    let chunks: Vec<Chunk> = (0..12).map(|counter| chunk(counter, 900_000)).collect();
    for chunk in &chunks {
        store.append(chunk).unwrap();
        assert_served(&store, chunk);
    }
    // The last chunk is in a segment that no flush has reached.
    assert!(!store.holds(id(11)));
    store.sync().unwrap();
    assert!(chunks.iter().all(|chunk| store.holds(chunk.id())));
    let flushes = store.flush_counts().flushes;
    store.sync().unwrap();
    assert_eq!(store.flush_counts().flushes, flushes, "nothing was left to flush");
}

#[tokio::test]
async fn many_puts_share_a_flush() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    let puts = (0..500).map(|counter| store.put(chunk(counter, 1000)));
    for result in futures::future::join_all(puts).await {
        result.unwrap();
    }
    let counts = store.flush_counts();
    assert_eq!(counts.puts, 500);
    assert!(counts.flushes < 100, "{counts:?}");
    // Small records are packed closely.
    let (store, report) = {
        drop(store);
        open(folder.path())
    };
    assert_eq!(report.chunks, 500);
    drop(store);
    let bytes: u64 = segment_files(folder.path())
        .iter()
        .map(|path| std::fs::metadata(path).unwrap().len())
        .sum();
    assert!(bytes < 500 * 1130, "{bytes} bytes for 500 chunks of 1000");
}

#[tokio::test]
async fn what_is_put_after_the_files_were_taken_away_is_not_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    store.put(chunk(1, 1000)).await.unwrap();
    store.check_files().unwrap();
    std::fs::remove_dir_all(folder.path()).unwrap();
    assert!(matches!(
        store.put(chunk(2, 1000)).await,
        Err(ContentError::Fatal { .. })
    ));
    assert!(store.fatal().await.files_gone);
    assert!(!store.holds(id(2)));
    drop(store);
    // After a restart the store is empty.
    let (store, report) = open(folder.path());
    assert_eq!(report.chunks, 0);
    store.put(chunk(1, 1000)).await.unwrap();
    std::fs::remove_dir_all(folder.path()).unwrap();
    assert!(matches!(store.check_files(), Err(ContentError::Fatal { .. })));
    assert!(store.fatal().await.files_gone);
}

#[test]
fn only_what_the_medium_says_of_a_copy_makes_it_a_bad_one() {
    let failed = |errno| {
        ContentError::io(
            "read",
            "segment".as_ref(),
            std::io::Error::from_raw_os_error(errno),
        )
    };
    for errno in [libc::EIO, libc::EUCLEAN, libc::ENODATA] {
        assert!(failed(errno).is_bad_copy(), "{errno}");
    }
    for errno in [
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::EACCES,
        libc::ENOENT,
    ] {
        assert!(!failed(errno).is_bad_copy(), "{errno}");
    }
}

#[tokio::test]
async fn after_a_failed_flush_nothing_is_acknowledged_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    store.put(chunk(1, 1000)).await.unwrap();
    let mut told = tokio::spawn(store.fatal());
    assert!(
        tokio::time::timeout(Duration::from_millis(20), &mut told)
            .await
            .is_err()
    );

    store.writer.fault.fail_flushes.store(true, Ordering::Relaxed);
    assert!(matches!(
        store.put(chunk(2, 1000)).await,
        Err(ContentError::Fatal { .. })
    ));
    // The disk works again: too late.
    store.writer.fault.fail_flushes.store(false, Ordering::Relaxed);
    assert!(matches!(
        store.put(chunk(2, 1000)).await,
        Err(ContentError::Fatal { .. })
    ));
    assert!(matches!(
        store.put(chunk(3, 1000)).await,
        Err(ContentError::Fatal { .. })
    ));
    assert!(matches!(
        store.append(&chunk(3, 1000)),
        Err(ContentError::Fatal { .. })
    ));
    assert!(matches!(store.sync(), Err(ContentError::Fatal { .. })));
    assert!(matches!(store.discard(&[id(1)]), Err(ContentError::Fatal { .. })));
    assert!(matches!(store.read_whole(id(1)), Err(ContentError::Fatal { .. })));
    assert!(!store.holds(id(2)) && !store.holds(id(3)));
    let reason = told.await.unwrap();
    assert!(reason.reason.contains("cannot flush"), "{reason}");
    drop(store);

    // The next process finds the data that had reached the disk.
    let (store, _) = open(folder.path());
    assert_served(&store, &chunk(1, 1000));
}

#[test]
fn a_folder_is_opened_by_one_store_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path());
    assert!(matches!(
        ContentStore::open(folder.path(), options()),
        Err(ContentError::InUse { .. })
    ));
    drop(first);
    open(folder.path());
}

#[tokio::test]
async fn discarded_chunks_are_gone_for_good_and_their_room_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..24)
        .map(|counter| chunk(counter, if counter % 3 == 0 { 3000 } else { 700_000 }))
        .collect();
    let (dead, live): (Vec<_>, Vec<_>) = chunks.iter().partition(|chunk| chunk.id().counter % 4 < 2);
    {
        let (store, _) = open(folder.path());
        for chunk in &chunks {
            store.put(chunk.clone()).await.unwrap();
        }
        let before = disk_bytes(folder.path());
        let ids: Vec<ChunkId> = dead.iter().map(|chunk| chunk.id()).chain([id(999)]).collect();
        let freed = store.discard(&ids).unwrap();
        let large = dead.iter().filter(|chunk| chunk.payload().len() > 4096).count() as u64;
        assert!(freed >= large * (700_000 / 4096 * 4096), "{freed}");
        assert!(disk_bytes(folder.path()) <= before - freed + 4096);
        assert_eq!(store.discard(&ids).unwrap(), 0);
        for chunk in &dead {
            assert!(!store.holds(chunk.id()));
            assert!(matches!(
                store.read(chunk.id(), 0, 1),
                Err(ContentError::NotFound { .. })
            ));
        }
    }
    for _ in 0..2 {
        let (store, report) = open(folder.path());
        assert_eq!(report.chunks, live.len() as u64);
        assert_eq!(report.torn_records, 0);
        live.iter().for_each(|chunk| assert_served(&store, chunk));
        assert!(dead.iter().all(|chunk| !store.holds(chunk.id())));
    }
    // A discarded id that is put again (a peer sent a chunk that was dead here) is stored again.
    let (store, _) = open(folder.path());
    store.put(chunks[0].clone()).await.unwrap();
    assert_served(&store, &chunks[0]);
    // Segments without a live record are removed.
    let all: Vec<ChunkId> = chunks.iter().map(|chunk| chunk.id()).collect();
    store.discard(&all).unwrap();
    assert_eq!(store.counts(), (0, 0));
    assert!(
        segment_files(folder.path()).len() <= 1,
        "only the active one is left"
    );
    drop(store);
    let (_store, report) = open(folder.path());
    assert_eq!(report.chunks, 0);
    assert!(segment_files(folder.path()).is_empty());
}

#[tokio::test]
async fn holes_are_punched_at_the_next_opening_if_a_crash_came_before() {
    let folder = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..3).map(|counter| chunk(counter, 1 << 20)).collect();
    {
        let (store, _) = open(folder.path());
        for chunk in &chunks {
            store.put(chunk.clone()).await.unwrap();
        }
    }
    // Seal the segment; then mark a record as a discard does, and stop there.
    drop(open(folder.path()));
    {
        let (store, _) = open(folder.path());
        let (place, segment) = store.index.get(id(1)).unwrap();
        let file = store.file(&segment).unwrap();
        segment.mark_dead(&file, &[place.position_units]).unwrap();
    }
    let before = disk_bytes(folder.path());
    let (store, report) = open(folder.path());
    assert_eq!(report.chunks, 2);
    assert!(disk_bytes(folder.path()) <= before - (1 << 20) + 4096);
    assert_served(&store, &chunks[0]);
    assert_served(&store, &chunks[2]);
}

#[tokio::test]
async fn sparse_segments_of_small_records_are_rewritten() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    // Every eighth chunk lives: no page is free of live records.
    let chunks: Vec<Chunk> = (0..4000).map(|counter| chunk(counter, 2000)).collect();
    for chunk in &chunks {
        store.append(chunk).unwrap();
    }
    store.sync().unwrap();
    let (live, dead): (Vec<_>, Vec<_>) = chunks.iter().partition(|chunk| chunk.id().counter % 8 == 0);
    let dead: Vec<ChunkId> = dead.iter().map(|chunk| chunk.id()).collect();
    store.discard(&dead).unwrap();
    let before = disk_bytes(folder.path());
    let rewritten = store.rewrite_sparse(64 << 20).unwrap();
    assert!(rewritten.segments >= 1, "{rewritten:?}");
    assert!(rewritten.freed_bytes > 2 * rewritten.moved_bytes, "{rewritten:?}");
    assert!(disk_bytes(folder.path()) < before);
    live.iter().for_each(|chunk| {
        assert!(store.holds(chunk.id()));
        assert_served(&store, chunk);
    });
    let counts = store.counts();
    assert_eq!(counts, (500, 500 * 2000));
    drop(store);
    let (store, report) = open(folder.path());
    assert_eq!((report.chunks, report.payload_bytes), counts);
    live.iter().for_each(|chunk| assert_served(&store, chunk));
}

#[tokio::test]
async fn readers_are_not_disturbed_by_discards_and_rewriting() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(folder.path()).0);
    let chunks: Arc<Vec<Chunk>> = Arc::new((0..600).map(|counter| chunk(counter, 20_000)).collect());
    for chunk in chunks.iter() {
        store.append(chunk).unwrap();
    }
    store.sync().unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|seed| {
            let (store, chunks, stop) = (Arc::clone(&store), Arc::clone(&chunks), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut at = seed;
                let mut reads = 0;
                while !stop.load(Ordering::Relaxed) || reads < 100 {
                    at = (at * 7 + 13) % chunks.len();
                    match store.read_whole(chunks[at].id()) {
                        Ok(read) => assert_eq!(read, chunks[at]),
                        Err(ContentError::NotFound { .. }) => assert!(at % 10 != 0, "chunk {at} is live"),
                        Err(error) => panic!("{error}"),
                    }
                    reads += 1;
                }
            })
        })
        .collect();
    for part in chunks.chunks(100) {
        let dead: Vec<ChunkId> = part
            .iter()
            .map(|chunk| chunk.id())
            .filter(|id| id.counter % 10 != 0)
            .collect();
        store.discard(&dead).unwrap();
        store.rewrite_sparse(64 << 20).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
    assert_eq!(store.counts().0, 60);
}
