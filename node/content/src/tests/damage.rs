//! Torn tails and damaged bytes: damage is detected, the rest is served.

use std::os::unix::fs::FileExt;

use super::super::record::{Layout, SEGMENT_HEADER_BYTES};
use super::super::{ContentError, Quarantined};
use super::*;

/// How the rest of a record was lost.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Zeros,
    Garbage,
    CutFile,
}

#[test]
fn a_tail_torn_at_any_byte_costs_only_the_torn_record() {
    let original = tempfile::tempdir().unwrap();
    let chunks = [chunk(1, 700), chunk(2, 40), chunk(3, 333)];
    {
        let (store, _) = open(original.path());
        chunks.iter().for_each(|chunk| store.append(chunk).unwrap());
    }
    let mut end = SEGMENT_HEADER_BYTES;
    let mut last = Layout {
        position: 0,
        length: 0,
    };
    for chunk in &chunks {
        last = Layout {
            position: end,
            length: chunk.payload().len() as u32,
        };
        end = last.end();
    }
    let payload_end = last.payload_at() + u64::from(last.length);
    let segment = &segment_files(original.path())[0];
    let bytes = std::fs::read(segment).unwrap();
    for loss in [Loss::Zeros, Loss::Garbage, Loss::CutFile] {
        // Every byte once; the other two kinds of loss differ in how the scan continues, not in where.
        let step = if matches!(loss, Loss::Zeros) { 1 } else { 7 };
        for cut in (last.position..=last.end()).step_by(step) {
            let mut torn = bytes[..end as usize].to_vec();
            match loss {
                Loss::Zeros => torn[cut as usize..].fill(0),
                Loss::Garbage => torn[cut as usize..].fill(0xA5),
                Loss::CutFile => torn.truncate(cut as usize),
            }
            if !matches!(loss, Loss::CutFile) {
                torn.resize(bytes.len().min(32 << 10), 0);
            }
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(segment.file_name().unwrap()), &torn).unwrap();
            let (store, report) = open(folder.path());
            let whole = cut >= payload_end;
            let context = format!("{loss:?} from {cut}: {report:?}");
            assert_eq!(report.chunks, if whole { 3 } else { 2 }, "{context}");
            assert!(store.holds(id(1)) && store.holds(id(2)), "{context}");
            assert_eq!(store.holds(id(3)), whole, "{context}");
            chunks[..report.chunks as usize]
                .iter()
                .for_each(|chunk| assert_served(&store, chunk));
            // The chunk can be put again and is found after that.
            store.append(&chunks[2]).unwrap();
            drop(store);
            let (store, report) = open(folder.path());
            assert_eq!(report.chunks, 3, "{context}");
            assert_served(&store, &chunks[2]);
        }
    }
}

#[test]
fn a_torn_record_does_not_cost_those_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..5).map(|counter| chunk(counter, 90_000)).collect();
    {
        let (store, _) = open(folder.path());
        chunks.iter().for_each(|chunk| store.append(chunk).unwrap());
    }
    let segment = &segment_files(folder.path())[0];
    let payload_at = find(segment, &chunks[1].payload()[..64]);
    let head_at = find(segment, &chunks[3].sha256().0);
    let file = writable(segment);
    file.write_all_at(&[0; 100], payload_at + 50_000).unwrap();
    file.write_all_at(&[0; 4], head_at).unwrap();
    drop(file);
    for torn in [1, 0] {
        let (store, report) = open(folder.path());
        assert_eq!((report.chunks, report.torn_records), (3, torn));
        for at in [0, 2, 4] {
            assert_served(&store, &chunks[at]);
        }
    }
}

#[tokio::test]
async fn below_the_watermark_payloads_are_not_read_at_opening() {
    let folder = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..4).map(|counter| chunk(counter, 10_000)).collect();
    {
        let (store, _) = open(folder.path());
        for chunk in &chunks {
            store.put(chunk.clone()).await.unwrap();
        }
    }
    let segment = &segment_files(folder.path())[0];
    let at = find(segment, &chunks[0].payload()[..64]);
    writable(segment).write_all_at(&[0; 8], at).unwrap();
    let (store, report) = open(folder.path());
    // Only the last put is above the watermark that a record carries.
    assert_eq!((report.chunks, report.rewritten_records), (4, 1));
    // A record that was flushed and damaged later is not torn. A reader detects the damage.
    assert!(matches!(
        store.read(id(0), 0, 1),
        Err(ContentError::Corrupt { .. })
    ));
}

#[tokio::test]
async fn a_damaged_block_is_never_served_and_the_others_are() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    let chunks: Vec<Chunk> = (0..3).map(|counter| chunk(counter, 1 << 20)).collect();
    for chunk in &chunks {
        store.put(chunk.clone()).await.unwrap();
    }
    let segment = &segment_files(folder.path())[0];
    let at = find(segment, &chunks[1].payload()[5 * 4096..5 * 4096 + 64]);
    assert_eq!(at % 4096, 0, "blocks of large chunks lie on pages");
    writable(segment).write_all_at(b"!", at + 17).unwrap();

    for block in 0..256 {
        let read = store.read(id(1), block * 4096, 4096);
        match block {
            5 => assert!(matches!(read, Err(ContentError::Corrupt { .. })), "{read:?}"),
            _ => assert_eq!(
                *read.unwrap().payload(),
                chunks[1]
                    .payload()
                    .slice(block as usize * 4096..(block as usize + 1) * 4096)
            ),
        }
    }
    assert!(matches!(
        store.read_whole(id(1)),
        Err(ContentError::Corrupt { .. })
    ));
    assert!(matches!(store.verify(id(1)), Err(ContentError::Corrupt { .. })));
    assert_served(&store, &chunks[0]);
    assert_served(&store, &chunks[2]);

    assert_eq!(store.quarantine(id(0), None).unwrap(), Quarantined::Healthy);
    assert_eq!(store.quarantine(id(1), None).unwrap(), Quarantined::SetAside);
    assert_eq!(store.quarantine(id(1), None).unwrap(), Quarantined::NotHeld);
    assert!(!store.holds(id(1)));
    assert!(matches!(
        store.read(id(1), 0, 1),
        Err(ContentError::NotFound { .. })
    ));
    store.put(chunks[1].clone()).await.unwrap();
    assert_served(&store, &chunks[1]);
    drop(store);
    let (store, _) = open(folder.path());
    chunks.iter().for_each(|chunk| assert_served(&store, chunk));
}

#[tokio::test]
async fn any_damaged_byte_of_a_record_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    let chunk = chunk(1, 5000);
    store.put(chunk.clone()).await.unwrap();
    let segment = &segment_files(folder.path())[0];
    let file = writable(segment);
    let layout = Layout {
        position: SEGMENT_HEADER_BYTES,
        length: 5000,
    };
    for at in layout.position..layout.payload_at() + 5000 {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        assert!(
            matches!(store.read_whole(chunk.id()), Err(ContentError::Corrupt { .. })),
            "byte {at}"
        );
        file.write_all_at(&byte, at).unwrap();
    }
    assert_served(&store, &chunk);
}

#[test]
fn wrong_bytes_with_right_crcs_are_found_by_their_digest() {
    let folder = tempfile::tempdir().unwrap();
    let (store, _) = open(folder.path());
    let right = chunk(1, 5000);
    let mut sha256 = right.sha256();
    sha256.0[0] ^= 1;
    let chunk = Chunk::with_sha256(right.id(), sha256, right.payload().clone()).unwrap();
    store.append(&chunk).unwrap();
    assert_served(&store, &chunk);
    assert!(matches!(
        store.verify(chunk.id()),
        Err(ContentError::Corrupt {
            what: "it does not match its SHA-256",
            ..
        })
    ));
}

#[test]
fn a_sealed_segment_with_a_damaged_footer_is_scanned_and_the_dead_stay_dead() {
    let folder = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..40).map(|counter| chunk(counter, 30_000)).collect();
    {
        let (store, _) = open(folder.path());
        chunks.iter().for_each(|chunk| store.append(chunk).unwrap());
    }
    {
        let (store, _) = open(folder.path());
        let dead: Vec<ChunkId> = (10..20).map(id).collect();
        store.discard(&dead).unwrap();
    }
    let segment = &segment_files(folder.path())[0];
    // In the trailer, twice, and among the entries.
    for before_end in [41, 64, 500] {
        let damaged = std::fs::metadata(segment).unwrap().len() - before_end;
        writable(segment).write_all_at(&[0x77; 3], damaged).unwrap();
        let (store, report) = open(folder.path());
        assert_eq!((report.scanned_segments, report.chunks), (1, 30), "{damaged}");
        for chunk in &chunks {
            let dead = (10..20).contains(&chunk.id().counter);
            assert_eq!(store.holds(chunk.id()), !dead);
            if !dead {
                assert_served(&store, chunk);
            }
        }
        drop(store);
        let (_store, report) = open(folder.path());
        assert_eq!((report.scanned_segments, report.chunks), (0, 30), "sealed again");
    }
    writable(segment).write_all_at(&[0; 64], 0).unwrap();
    let (store, report) = open(folder.path());
    assert_eq!((report.damaged_headers, report.chunks), (1, 30));
    assert_served(&store, &chunks[0]);
}

#[test]
fn a_copy_of_a_segment_inside_a_chunk_is_not_mistaken_for_records() {
    let folder = tempfile::tempdir().unwrap();
    let inner = chunk(1, 3000);
    {
        let (store, _) = open(folder.path());
        store.append(&inner).unwrap();
        let segment = std::fs::read(&segment_files(folder.path())[0]).unwrap();
        let copy = Bytes::copy_from_slice(&segment[..4096]);
        store.append(&Chunk::new(id(2), copy).unwrap()).unwrap();
        store.append(&chunk(3, 3000)).unwrap();
        store.discard(&[id(1)]).unwrap();
    }
    // The chunk that contains the copy loses its header, so that the scan walks through its payload.
    let segment = &segment_files(folder.path())[0];
    let position = Layout {
        position: SEGMENT_HEADER_BYTES,
        length: 3000,
    }
    .end();
    writable(segment).write_all_at(&[0; 16], position).unwrap();
    let (store, report) = open(folder.path());
    assert_eq!(report.chunks, 1);
    assert!(store.holds(id(3)) && !store.holds(id(1)));
}

#[test]
fn a_segment_of_a_later_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    {
        let (store, _) = open(folder.path());
        store.append(&chunk(1, 100)).unwrap();
    }
    let segment = &segment_files(folder.path())[0];
    let mut header = std::fs::read(segment).unwrap()[..64].to_vec();
    header[8] = 9;
    let crc = crc32c::crc32c(&header[..24]);
    header[24..28].copy_from_slice(&crc.to_le_bytes());
    writable(segment).write_all_at(&header, 0).unwrap();
    let refused = ContentStore::open(folder.path(), options());
    assert!(
        matches!(refused, Err(ContentError::UnknownVersion { found: 9, .. })),
        "{refused:?}"
    );
}

#[test]
fn a_segment_that_was_made_and_never_used_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let name = super::super::segment::file_name(5, 77);
    writable_new(&folder.path().join(name), 1 << 20);
    let (store, report) = open(folder.path());
    assert_eq!((report.removed_segments, report.chunks), (1, 0));
    store.append(&chunk(1, 100)).unwrap();
    // The segment's number is not reused.
    let files = segment_files(folder.path());
    assert!(
        files[0].to_str().unwrap().contains("segment-00000006-"),
        "{files:?}"
    );
}

fn writable_new(path: &Path, length: u64) {
    File::create(path).unwrap().set_len(length).unwrap();
}

#[test]
fn what_no_flush_has_reached_is_not_taken_for_sealed() {
    let folder = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..9).map(|counter| chunk(counter, 900_000)).collect();
    {
        let (store, _) = open(folder.path());
        store
            .writer
            .fault
            .fail_flushes
            .store(true, std::sync::atomic::Ordering::Relaxed);
        // The I/O thread seals full segments and fails; the pages stay where a killed process leaves them.
        for chunk in &chunks {
            let _ = store.append(chunk);
        }
        assert!(matches!(store.sync(), Err(ContentError::Fatal { .. })));
    }
    let (store, report) = open(folder.path());
    assert_eq!(report.scanned_segments, report.segments);
    assert_eq!(report.rewritten_records, report.chunks);
    assert!(report.chunks >= 4, "{report:?}");
    for chunk in &chunks[..report.chunks as usize] {
        assert_served(&store, chunk);
    }
}
