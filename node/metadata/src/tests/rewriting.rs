//! Small extents are combined without a visible change. (In tests two neighbours are enough, and three are the most.)

use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::super::*;
use super::support::*;

const ROOT: InodeNumber = InodeNumber::ROOT;

/// Appends `count` extents of `length` bytes, each with its own command.
fn append(node: &mut Node, file: InodeNumber, counter: u64, count: u64, length: u32) {
    for counter in counter..counter + count {
        let chunk = chunk(1, counter, length);
        let extent = Extent {
            file_offset: 0,
            length,
            chunk: chunk.id,
            chunk_offset: 0,
        };
        let command = Command {
            chunks: vec![chunk],
            operations: vec![Operation::Append {
                inode: Target::Inode(file),
                extents: vec![extent],
                privileges: Privileges::Keep,
            }],
        };
        node.call(1, command).0.unwrap();
    }
}

fn runs(node: &Node, file: InodeNumber) -> Vec<Run> {
    let found = node.view().runs(file, 0, u64::MAX, RunTerms::Worthwhile).unwrap();
    assert_eq!(found.goes_on_at, None);
    found.runs
}

#[test]
fn a_file_of_small_appends_is_noted_rewritten_and_left_alone() {
    let mut node = Node::at_newest_level(1);
    let file = node.entry(create(ROOT, "log", NewKind::File));
    assert_eq!(node.view().fragmented(None, 10).unwrap(), []);
    append(&mut node, file, 1, 30, 10);
    assert_eq!(node.view().fragmented(None, 10).unwrap(), [file]);
    let before = node.attributes(file);
    let mut dead = Vec::new();
    for (number, run) in (1000..).zip(runs(&node, file)) {
        let applied = node.apply(rewrite(file, &run, number));
        assert_eq!(applied.result, ApplyResult::Done);
        assert_eq!(applied.effects.named.len(), 1, "recovery hears of the new chunk");
        dead.extend(applied.effects.dead);
        check_invariants(&node.view());
    }
    assert_eq!(dead.len(), 30);
    assert_eq!(
        node.attributes(file),
        before,
        "not a time, not the content version"
    );
    let extents = node.view().extents(file, 0, u64::MAX, 100).unwrap().extents;
    assert_eq!(extents.len(), 10);
    assert_eq!(
        extents.iter().map(|extent| u64::from(extent.length)).sum::<u64>(),
        300
    );
    // The results are combined in turn, until nothing is left to do.
    for number in 2000.. {
        let Some(run) = runs(&node, file).into_iter().next() else {
            break;
        };
        node.apply(rewrite(file, &run, number));
    }
    assert!(node.view().extents(file, 0, u64::MAX, 100).unwrap().extents.len() < 6);
    let settle = |through_version| LogBody::Settle {
        inode: file,
        through_version,
    };
    node.apply(settle(3));
    assert_eq!(
        node.view().fragmented(None, 10).unwrap(),
        [file],
        "it was noted again since"
    );
    node.apply(settle(before.content_version));
    assert_eq!(node.view().fragmented(None, 10).unwrap(), []);
}

#[test]
fn extents_that_changed_are_not_replaced_and_the_chunk_is_dead() {
    let changes: [fn(&mut Node, InodeNumber); 4] = [
        |node, file| {
            let over = write_chunks(Target::Inode(file), 1, 500, &[12], 3);
            node.call(1, over).0.unwrap();
        },
        |node, file| {
            node.operate(truncate(file, 15)).unwrap();
        },
        |node, file| {
            node.operate(truncate(file, 0)).unwrap();
            append(node, file, 600, 9, 10);
        },
        |node, _| {
            node.unlink_for_all("log");
            node.reclaim(9);
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut node = Node::at_newest_level(1);
        let file = node.entry(create(ROOT, "log", NewKind::File));
        append(&mut node, file, 1, 9, 10);
        let run = runs(&node, file).swap_remove(0);
        change(&mut node, file);
        let before = dump(&node.view());
        let applied = node.apply(rewrite(file, &run, 1000));
        assert_eq!(
            applied.result,
            ApplyResult::Outcome(Err(FsError::Stale)),
            "change {number}"
        );
        assert_eq!(
            applied.effects.dead.len(),
            1,
            "change {number}: its chunk is of no use"
        );
        let rows = |dump: Vec<(u8, Vec<u8>, Vec<u8>)>| -> Vec<_> {
            dump.into_iter().filter(|row| row.0 != 0).collect()
        };
        assert_eq!(rows(dump(&node.view())), rows(before), "change {number}");
    }
}

#[test]
fn a_file_that_grows_meanwhile_is_rewritten_all_the_same() {
    let mut node = Node::at_newest_level(1);
    let file = node.entry(create(ROOT, "log", NewKind::File));
    append(&mut node, file, 1, 9, 10);
    let run = runs(&node, file).swap_remove(0);
    append(&mut node, file, 100, 5, 10);
    assert_eq!(node.apply(rewrite(file, &run, 1000)).result, ApplyResult::Done);
    check_invariants(&node.view());
    assert_eq!(node.attributes(file).size, 140);
    assert_eq!(
        node.view().extents(file, 0, u64::MAX, 100).unwrap().extents.len(),
        12
    );
}

#[test]
fn holes_of_less_than_a_block_are_filled_and_larger_ones_stay() {
    let mut node = Node::at_newest_level(1);
    let file = node.entry(create(ROOT, "sparse", NewKind::File));
    let offsets = [0, 100, 200, 1 << 20, (1 << 20) + 10, (1 << 20) + 20];
    node.call(1, write_chunks(Target::Inode(file), 1, 1, &offsets, 10))
        .0
        .unwrap();
    let found = runs(&node, file);
    let ends: Vec<(u64, u64)> = found.iter().map(|run| (run.from(), run.to())).collect();
    assert_eq!(ends, [(0, 210), (1 << 20, (1 << 20) + 30)]);
    for (number, run) in (1000..).zip(&found) {
        assert_eq!(node.apply(rewrite(file, run, number)).result, ApplyResult::Done);
    }
    check_invariants(&node.view());
    assert_eq!(node.attributes(file).allocated_bytes, 240);
}

#[test]
fn what_is_much_larger_than_its_neighbours_is_not_written_again() {
    let mut node = Node::at_newest_level(1);
    let file = node.entry(create(ROOT, "log", NewKind::File));
    append(&mut node, file, 1, 1, 1000);
    append(&mut node, file, 100, 2, 10);
    let found = runs(&node, file);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].from(), found[0].to()), (1000, 1020));
}

#[test]
fn a_rewrite_is_refused_below_its_level_and_for_a_session_that_ended() {
    let mut node = Node::with_sessions(2);
    let file = node.entry(create(ROOT, "log", NewKind::File));
    append(&mut node, file, 1, 9, 10);
    let run = runs(&node, file).swap_remove(0);
    let refused = node.apply(rewrite(file, &run, 1000));
    assert_eq!(refused.result, ApplyResult::Outcome(Err(FsError::NotSupported)));
    assert_eq!(node.view().fragmented(None, 10).unwrap(), []);
    node.apply(LogBody::RaiseFeatureLevel { level: FEATURE_LEVEL });
    node.apply(LogBody::EndSession {
        session: SessionId(1),
    });
    assert_eq!(
        node.apply(rewrite(file, &run, 1000)).result,
        ApplyResult::UnknownSession
    );
}
