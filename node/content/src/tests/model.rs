//! Random operations, compared with a map.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::ContentError;
use super::super::record::{Entry, Layout, Mark, PAGE_BYTES, SEGMENT_HEADER_BYTES, Table};
use super::super::segment::holes;
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Append(u64, usize),
    Sync,
    Discard(Vec<u64>),
    Rewrite,
    Reopen,
}

fn steps() -> impl Strategy<Value = Step> {
    let lengths = prop_oneof![4 => 1usize..6000, 1 => 60_000usize..400_000];
    prop_oneof![
        8 => (0u64..40, lengths).prop_map(|(counter, length)| Step::Append(counter, length)),
        2 => Just(Step::Sync),
        3 => prop::collection::vec(0u64..40, 1..12).prop_map(Step::Discard),
        1 => Just(Step::Rewrite),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_store_is_a_map_through_crashes(steps in prop::collection::vec(steps(), 1..80)) {
        let folder = tempfile::tempdir().unwrap();
        let options = ContentOptions { segment_bytes: 600 << 10, reserve_bytes: 0, ..options() };
        let mut store = ContentStore::open(folder.path(), options.clone()).unwrap().0;
        let mut model: BTreeMap<u64, Chunk> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Append(counter, length) => {
                    // Ids are never reused for other bytes: what is held stays what it was.
                    let chunk = model.entry(counter).or_insert_with(|| chunk(counter, length)).clone();
                    store.append(&chunk).unwrap();
                }
                Step::Sync => {
                    store.sync().unwrap();
                    prop_assert!(model.keys().all(|counter| store.holds(id(*counter))));
                }
                Step::Discard(counters) => {
                    store.discard(&counters.iter().map(|counter| id(*counter)).collect::<Vec<_>>()).unwrap();
                    model.retain(|counter, _| !counters.contains(counter));
                }
                Step::Rewrite => drop(store.rewrite_sparse(u64::MAX).unwrap()),
                Step::Reopen => {
                    // Dropped without a sync, as after a kill: the kernel still has the pages.
                    drop(store);
                    let (opened, report) = ContentStore::open(folder.path(), options.clone()).unwrap();
                    store = opened;
                    prop_assert_eq!(report.torn_records, 0);
                    prop_assert!(model.keys().all(|counter| store.holds(id(*counter))));
                }
            }
            prop_assert_eq!(store.counts().0 as usize, model.len());
        }
        for counter in 0..40 {
            match (model.get(&counter), store.read_whole(id(counter))) {
                (Some(chunk), Ok(read)) => prop_assert_eq!(&read, chunk),
                (None, Err(ContentError::NotFound { .. })) => {}
                (_, read) => prop_assert!(false, "chunk {}: {:?}", counter, read),
            }
        }
        let ids: Vec<ChunkId> = model.keys().map(|counter| id(*counter)).collect();
        prop_assert_eq!(store.ids_after(None, 100), ids);
    }

    #[test]
    fn holes_are_the_pages_that_only_dead_records_touch(
        records in prop::collection::vec((1u32..9000, 0u8..3), 1..60),
    ) {
        // 0: live, 1: dead before, 2: newly dead.
        let mut table = Table::default();
        let mut newly_dead = Vec::new();
        let mut end = SEGMENT_HEADER_BYTES;
        for (counter, (length, state)) in records.iter().enumerate() {
            let layout = Layout { position: end, length: *length };
            let entry = Entry::new(id(counter as u64), layout);
            table.push(entry, if *state == 0 { Mark::Live } else { Mark::Dead });
            if *state == 2 {
                newly_dead.push(entry.position_units);
            }
            end = layout.end();
        }
        let mut expected = Vec::new();
        for page in 0..end / PAGE_BYTES {
            let (from, to) = (page * PAGE_BYTES, (page + 1) * PAGE_BYTES);
            let touching: Vec<usize> = (0..records.len())
                .filter(|at| {
                    let layout = table.entries[*at].layout();
                    layout.position < to && layout.end() > from
                })
                .collect();
            let free = from >= SEGMENT_HEADER_BYTES && touching.iter().all(|at| table.dead[*at]);
            if free && touching.iter().any(|at| records[*at].1 == 2) {
                expected.push(from);
            }
        }
        let punched: Vec<u64> = holes(&table, &newly_dead)
            .into_iter()
            .flat_map(|(from, to)| (from..to).step_by(PAGE_BYTES as usize))
            .collect();
        prop_assert_eq!(punched, expected);
    }
}
