//! The write buffer against a model with one entry per byte.

use super::*;
use proptest::prelude::*;

/// The content of a file by byte; `None` if never written.
#[derive(Default)]
struct Model(Vec<Option<u8>>);

impl Model {
    fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        if self.0.len() < end {
            self.0.resize(end, None);
        }
        for (at, byte) in data.iter().enumerate() {
            self.0[offset as usize + at] = Some(*byte);
        }
    }
}

fn read(buffer: &WriteBuffer, range: Range<u64>) -> Vec<Option<u8>> {
    let mut model = vec![None; (range.end - range.start) as usize];
    for part in buffer.overlay(range.clone()) {
        assert!(part.offset >= range.start && part.offset + part.bytes.len() as u64 <= range.end);
        for (at, byte) in part.bytes.iter().enumerate() {
            model[(part.offset - range.start) as usize + at] = Some(*byte);
        }
    }
    model
}

#[derive(Clone, Debug)]
enum Step {
    Write { offset: u64, length: usize, byte: u8 },
    Seal,
    Commit,
}

/// Offsets cluster at cell borders, where the edge cases are.
fn step() -> impl Strategy<Value = Step> {
    let offset = (0u64..3, 0u64..4000, prop::bool::ANY).prop_map(|(cell, by, before)| {
        let border = cell * CELL_BYTES;
        if before {
            border.saturating_sub(by)
        } else {
            border + by
        }
    });
    let length = prop_oneof![4 => 1usize..3000, 1 => Just(CELL_BYTES as usize), 1 => 1usize..2_500_000];
    prop_oneof![
        8 => (offset, length, any::<u8>()).prop_map(|(offset, length, byte)| Step::Write { offset, length, byte }),
        1 => Just(Step::Seal),
        1 => Just(Step::Commit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn reads_return_the_newest_bytes_before_and_after_sealing(
        steps in prop::collection::vec(step(), 1..40),
        window in (0u64..2 * CELL_BYTES, 1u64..200_000),
    ) {
        let mut buffer = WriteBuffer::default();
        let mut model = Model::default();
        let mut committed: Vec<Option<u8>> = Vec::new();
        for (number, step) in steps.iter().enumerate() {
            match step {
                Step::Write { offset, length, byte } => {
                    let data: Vec<u8> = (0..*length).map(|at| byte.wrapping_add((at * 31 + number) as u8)).collect();
                    for pack in buffer.write(*offset, Bytes::from(data.clone())) {
                        prop_assert_eq!(pack.payload.len() as u64, CELL_BYTES);
                        prop_assert_eq!(pack.ranges.len(), 1);
                    }
                    model.write(*offset, &data);
                }
                Step::Seal => {
                    let bytes = buffer.active_bytes;
                    let packs = buffer.seal_all();
                    prop_assert_eq!(packs.len() as u64, bytes.div_ceil(CELL_BYTES), "as few as possible");
                }
                Step::Commit => {
                    buffer.seal_all();
                    let last = buffer.last_sequence();
                    loop {
                        let batch = buffer.next_batch(last);
                        let Some(youngest) = batch.last() else { break };
                        for pack in &batch {
                            let mut covered = 0;
                            for range in &pack.ranges {
                                prop_assert_eq!(range.pack_offset, covered);
                                covered += range.length;
                                let end = range.file_end() as usize;
                                if committed.len() < end { committed.resize(end, None); }
                                for at in 0..range.length as usize {
                                    committed[range.file_offset as usize + at] =
                                        Some(pack.payload[range.pack_offset as usize + at]);
                                }
                            }
                            prop_assert_eq!(covered as usize, pack.payload.len());
                        }
                        buffer.remove_through(youngest.sequence);
                    }
                    prop_assert!(buffer.is_clean());
                    prop_assert_eq!(buffer.footprint_bytes(), 0);
                    prop_assert!(committed == model.0, "the committed bytes are the written ones");
                }
            }
            let active: u64 = buffer.active.values().map(|bytes| bytes.len() as u64).sum();
            prop_assert_eq!(active, buffer.active_bytes);
            prop_assert_eq!(buffer.cells.values().sum::<u64>(), active);
        }
        // Dirty bytes over committed ones equal the model, in the window and at the end.
        let (from, length) = window;
        let mut seen = vec![None; length as usize];
        for (at, byte) in seen.iter_mut().enumerate() {
            *byte = committed.get(from as usize + at).copied().flatten();
        }
        for (at, byte) in read(&buffer, from..from + length).into_iter().enumerate() {
            seen[at] = byte.or(seen[at]);
        }
        let expected: Vec<Option<u8>> =
            (0..length as usize).map(|at| model.0.get(from as usize + at).copied().flatten()).collect();
        prop_assert!(seen == expected);
        prop_assert_eq!(buffer.end().max(committed.len() as u64), model.0.len() as u64);
    }
}

#[test]
fn small_sequential_writes_become_one_range_and_a_full_cell_is_sealed() {
    let mut buffer = WriteBuffer::default();
    for at in 0..255u64 {
        assert!(
            buffer
                .write(at * 4096, Bytes::from(vec![at as u8; 4096]))
                .is_empty()
        );
        assert_eq!(buffer.active.len(), 1);
    }
    let full = buffer.write(255 * 4096, Bytes::from(vec![255u8; 8192]));
    assert_eq!(full.len(), 1);
    assert_eq!(full[0].ranges, vec![whole_range(0, CELL_BYTES)]);
    assert_eq!(buffer.active_bytes, 4096, "the rest begins the next cell");
}

#[test]
fn random_small_writes_share_a_chunk() {
    let mut buffer = WriteBuffer::default();
    for at in [900u64, 7, 350, 20, 512] {
        buffer.write(at * 10_000, Bytes::from(vec![at as u8; 4096]));
    }
    let packs = buffer.seal_all();
    assert_eq!(packs.len(), 1);
    assert_eq!(packs[0].ranges.len(), 5);
    assert!(packs[0].is_inline());
}

#[test]
fn a_batch_stays_within_the_limits_of_a_command() {
    let mut buffer = WriteBuffer::default();
    for round in 0..10u64 {
        for at in 0..1000u64 {
            buffer.write(round + at * 100, Bytes::from_static(b"x"));
        }
        buffer.seal_all();
    }
    let mut batches = 0;
    while let Some(last) = buffer
        .next_batch(buffer.last_sequence())
        .last()
        .map(|pack| pack.sequence)
    {
        let batch = buffer.next_batch(buffer.last_sequence());
        assert!(batch.iter().map(|pack| pack.ranges.len()).sum::<usize>() <= COMMAND_EXTENTS_MAX);
        buffer.remove_through(last);
        batches += 1;
    }
    assert_eq!(batches, 3);
    assert!(buffer.is_clean());
}

#[test]
fn covers_detects_gaps_at_each_end_and_between() {
    let part = |offset, length: usize| DirtyPart {
        offset,
        bytes: Bytes::from(vec![0; length]),
    };
    assert!(covers(&[part(5, 5), part(0, 6)], 0..10));
    assert!(!covers(&[part(5, 5), part(0, 4)], 0..10));
    assert!(!covers(&[part(1, 9)], 0..10));
    assert!(!covers(&[part(0, 9)], 0..10));
}
