//! The work of one command is bounded, whatever content it meets. (In tests a command frees three extents.)

use bytes::Bytes;
use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::super::*;
use super::support::*;

const ROOT: InodeNumber = InodeNumber::ROOT;

/// Makes a file of consecutive extents of one byte.
fn fragmented(node: &mut Node, extents: u64) -> InodeNumber {
    let file = node.entry(create(ROOT, "fragmented", NewKind::File));
    for offset in 0..extents {
        let command = write_chunks(Target::Inode(file), 1, 1 + offset, &[offset], 1);
        node.call(1, command).0.unwrap();
    }
    file
}

fn extents(node: &Node, file: InodeNumber) -> usize {
    node.view()
        .extents(file, 0, u64::MAX, 8192)
        .unwrap()
        .extents
        .len()
}

fn reclaim_steps(node: &mut Node, file: InodeNumber) -> usize {
    for step in 0.. {
        if !node.view().reclaimable(10).unwrap().contains(&file) {
            return step;
        }
        let before = node.view().layers.active.row_count();
        node.apply(LogBody::ReclaimUnlinked {
            inode: file,
            extents_max: COMMAND_FREED_EXTENTS_MAX,
        });
        let written = node.view().layers.active.row_count() - before;
        assert!(
            written <= 4 * u64::from(COMMAND_FREED_EXTENTS_MAX),
            "{written} rows in one step"
        );
        check_invariants(&node.view());
    }
    unreachable!()
}

#[test]
fn a_write_over_many_extents_is_not_done_and_not_remembered_until_there_is_room() {
    let mut node = Node::at_newest_level(1);
    let file = fragmented(&mut node, 40);
    let before = dump(&node.view());
    let write = || write_chunks(Target::Inode(file), 1, 1000, &[5], 30);
    let crowded = node.result_of(write());
    let place = Crowded {
        inode: file,
        from: 5,
        to: 35,
    };
    assert_eq!(crowded, ApplyResult::Crowded(place));
    let unchanged =
        |rows: Vec<(u8, Vec<u8>, Vec<u8>)>| -> Vec<_> { rows.into_iter().filter(|row| row.0 != 0).collect() };
    assert_eq!(
        unchanged(before.clone()),
        unchanged(dump(&node.view())),
        "it left a trace"
    );
    // Space is made as the leader makes it, and the same mutation is decided.
    let mut rewrites = 0;
    while extents(&node, file) > 12 {
        let found = node.view().runs(file, 5, 35, RunTerms::Any).unwrap();
        for run in found.runs {
            rewrites += 1;
            assert_eq!(
                node.apply(rewrite(file, &run, 2000 + rewrites)).result,
                ApplyResult::Done
            );
            check_invariants(&node.view());
        }
    }
    assert!(matches!(node.result_of(write()), ApplyResult::Outcome(Ok(_))));
    check_invariants(&node.view());
    let extents = node.view().extents(file, 0, 40, 100).unwrap().extents;
    assert!(
        extents
            .iter()
            .any(|extent| (extent.file_offset, extent.length) == (5, 30)),
        "{extents:?}"
    );
    assert_eq!(node.attributes(file).size, 40);
}

#[test]
fn a_command_is_never_crowded_by_its_own_extents() {
    let mut node = Node::at_newest_level(1);
    let file = node.entry(create(ROOT, "file", NewKind::File));
    // Each extent overlaps the two before it.
    let offsets: Vec<u64> = (0..20).chain(0..10).collect();
    let command = write_chunks(Target::Inode(file), 1, 1, &offsets, 3);
    assert!(matches!(node.result_of(command), ApplyResult::Outcome(Ok(_))));
    check_invariants(&node.view());
}

#[test]
fn below_the_level_a_write_replaces_whatever_lies_under_it() {
    let mut node = Node::with_sessions(1);
    let file = fragmented(&mut node, 40);
    let write = write_chunks(Target::Inode(file), 1, 1000, &[5], 30);
    assert!(matches!(node.result_of(write), ApplyResult::Outcome(Ok(_))));
    assert_eq!(extents(&node, file), 11);
}

#[test]
fn a_file_that_is_cut_again_and_again_waits_for_its_steps() {
    let mut node = Node::at_newest_level(1);
    let file = fragmented(&mut node, 60);
    let mut crowded = None;
    for size in 1..20 {
        let longer = set(
            file,
            AttributeChanges {
                size: Some(50),
                ..AttributeChanges::default()
            },
        );
        node.operate(longer).unwrap();
        match node.result_of(Command::single(truncate(file, size))) {
            ApplyResult::Crowded(place) => {
                crowded = Some(place);
                break;
            }
            other => assert!(matches!(other, ApplyResult::Outcome(Ok(_)))),
        }
    }
    let place = crowded.expect("cuts without bound");
    assert_eq!((place.inode, place.from), (file, place.to));
    assert!(
        node.view()
            .runs(file, 0, u64::MAX, RunTerms::Any)
            .unwrap()
            .has_cuts
    );
    reclaim_steps(&mut node, file);
    node.operate(truncate(file, 1)).unwrap();
    assert_eq!(extents(&node, file), 1);
}

#[test]
fn each_step_of_freeing_an_unlinked_file_begins_where_the_last_one_ended() {
    let mut node = Node::at_newest_level(1);
    let file = fragmented(&mut node, 40);
    node.unlink_for_all("fragmented");
    node.apply(LogBody::Reclaim {
        work_max: COMMAND_FREED_EXTENTS_MAX,
    });
    assert_eq!(node.view().reclaimable(10).unwrap(), [file]);
    // A session that does not know that the file is being freed writes where it was freed already.
    node.call(1, write_chunks(Target::Inode(file), 1, 1000, &[0], 1))
        .0
        .unwrap();
    let steps = reclaim_steps(&mut node, file);
    assert!((13..=18).contains(&steps), "{steps} steps");
    let gone = node.view().attributes(file);
    assert!(matches!(gone, Err(Failure::Verdict(FsError::Stale))));
    assert_eq!(node.view().chunks_after(None, 10).unwrap(), []);
}

#[test]
fn a_move_below_a_very_deep_directory_is_refused() {
    let mut node = Node::at_newest_level(1);
    let moved = node.entry(create(ROOT, "moved", NewKind::Directory));
    let mut deepest = ROOT;
    for _ in 0..60 {
        deepest = node.entry(create(deepest, "d", NewKind::Directory));
    }
    let rename = |from_parent: InodeNumber, to_parent: InodeNumber, to_name: &str| Operation::Rename {
        from_parent: Target::Inode(from_parent),
        from_name: name("moved"),
        to_parent: Target::Inode(to_parent),
        to_name: name(to_name),
        mode: RenameMode::Replace,
        held: Held::NotOpen,
    };
    let refused = node.operate(rename(ROOT, deepest, "moved"));
    assert_eq!(refused.unwrap_err(), FsError::NameTooLong);
    // Within one directory no cycle can arise, however deep it is.
    let below = node.entry(create(deepest, "moved", NewKind::Directory));
    node.operate(rename(deepest, deepest, "renamed")).unwrap();
    assert_eq!(node.attributes(below).parent, deepest);
    assert_eq!(node.attributes(moved).parent, ROOT);
}

#[test]
fn the_count_of_extended_attributes_never_goes_below_none() {
    let mut node = Node::at_newest_level(1);
    let file = node.entry(create(ROOT, "file", NewKind::File));
    let set_xattr = |text: &str| Operation::SetXattr {
        inode: Target::Inode(file),
        name: XattrName::new(text.as_bytes().to_vec()).unwrap(),
        value: Bytes::from_static(b"1"),
        mode: XattrMode::Set,
    };
    for text in ["security.capability", "user.a", "user.b", "user.c", "user.d"] {
        node.operate(set_xattr(text)).unwrap();
    }
    node.unlink_for_all("file");
    // One step removes four of the five, the capability among them.
    node.apply(LogBody::Reclaim { work_max: 4 });
    assert_eq!(node.attributes(file).xattr_count, 1);
    let changes = AttributeChanges {
        uid: Some(7),
        ..AttributeChanges::default()
    };
    node.operate(set(file, changes)).unwrap();
    assert_eq!(
        node.attributes(file).xattr_count,
        1,
        "the capability was counted off twice"
    );
    check_invariants(&node.view());
}

#[test]
fn whoever_writes_file_capabilities_go_and_set_user_id_may_stay() {
    let capability = || XattrName::new(&b"security.capability"[..]).unwrap();
    let chunk_at = |counter| chunk(1, counter, 4);
    let extent_of = |chunk: &NewChunk| Extent {
        file_offset: 0,
        length: 4,
        chunk: chunk.id,
        chunk_offset: 0,
    };
    let writes: [fn(InodeNumber, Vec<Extent>) -> Operation; 3] = [
        |file, extents| Operation::Append {
            inode: Target::Inode(file),
            extents,
            privileges: Privileges::Keep,
        },
        |file, extents| Operation::Write {
            inode: Target::Inode(file),
            extents,
            mtime: None,
            privileges: Privileges::Keep,
        },
        |file, _| truncate(file, 1),
    ];
    for (number, write) in (1..).zip(writes) {
        let mut node = Node::at_newest_level(1);
        let file = node.entry(create(ROOT, "program", NewKind::File));
        node.call(1, write_chunks(Target::Inode(file), 1, 50, &[0], 4))
            .0
            .unwrap();
        let changes = AttributeChanges {
            mode: Some(0o4755),
            ..AttributeChanges::default()
        };
        node.operate(set(file, changes)).unwrap();
        node.operate(Operation::SetXattr {
            inode: Target::Inode(file),
            name: capability(),
            value: Bytes::from_static(b"cap_net_raw+ep"),
            mode: XattrMode::Set,
        })
        .unwrap();
        assert!(node.attributes(file).has_capability);
        let chunk = chunk_at(number);
        let operation = write(file, vec![extent_of(&chunk)]);
        let chunks = match operation.extents() {
            [] => Vec::new(),
            _ => vec![chunk],
        };
        node.call(
            1,
            Command {
                chunks,
                operations: vec![operation],
            },
        )
        .0
        .unwrap();
        let attributes = node.attributes(file);
        assert!(!attributes.has_capability, "write {number} left the capability");
        assert_eq!((attributes.xattr_count, attributes.mode), (0, 0o4755));
        check_invariants(&node.view());
    }
}

#[test]
fn names_of_extended_attributes_have_a_namespace() {
    let mut node = Node::at_newest_level(1);
    let set_xattr = |text: &str| Operation::SetXattr {
        inode: Target::Inode(ROOT),
        name: XattrName::new(text.as_bytes().to_vec()).unwrap(),
        value: Bytes::new(),
        mode: XattrMode::Set,
    };
    for text in ["plain", "system.posix_acl_access", "users.a"] {
        assert_eq!(
            node.operate(set_xattr(text)).unwrap_err(),
            FsError::NotSupported,
            "{text}"
        );
    }
    for text in ["user.", "trusted.", "security."] {
        assert_eq!(
            node.operate(set_xattr(text)).unwrap_err(),
            FsError::InvalidArgument,
            "{text}"
        );
    }
    for text in ["user.a", "trusted.a", "security.a"] {
        node.operate(set_xattr(text)).unwrap();
    }
}
