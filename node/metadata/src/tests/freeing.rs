//! Unreachable content, inodes and chunks are freed in bounded steps.

use bytes::Bytes;
use quorumfs_proto::chunk::ChunkBody;
use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::super::*;
use super::support::*;

const ROOT: InodeNumber = InodeNumber::ROOT;

fn free_all(node: &mut Node) -> Vec<ChunkId> {
    let mut dead = Vec::new();
    while let Some(inode) = node.view().reclaimable(1).unwrap().first().copied() {
        let body = LogBody::ReclaimUnlinked {
            inode,
            extents_max: 2,
        };
        dead.extend(node.apply(body).effects.dead);
    }
    dead
}

fn verdict<T>(result: Result<T, Failure>) -> Option<FsError> {
    Failure::split(result).unwrap().err()
}

#[test]
fn truncating_a_long_file_takes_one_short_command_and_steps() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "long", NewKind::File));
    let target = Target::Inode(file);
    let offsets: Vec<u64> = (0..20).map(|n| n * 10).collect();
    node.call(1, write_chunks(target, 1, 1, &offsets, 10)).0.unwrap();
    let (outcome, effects) = node.call(1, Command::single(truncate(file, 25)));
    assert_eq!(outcome.unwrap().attributes_of(file).unwrap().size, 25);
    assert_eq!(effects.dead.len(), COMMAND_FREED_EXTENTS_MAX as usize);
    // When the file grows again, the part that was cut off is a hole, although its extents still exist.
    node.operate(truncate(file, 200)).unwrap();
    let extents = |node: &Node| node.view().extents(file, 0, 200, 100).unwrap().extents;
    let lengths = |extents: Vec<Extent>| -> Vec<(u64, u32)> {
        extents
            .iter()
            .map(|extent| (extent.file_offset, extent.length))
            .collect()
    };
    assert_eq!(lengths(extents(&node)), [(0, 10), (10, 10), (20, 5)]);
    assert_eq!(node.view().reclaimable(10).unwrap(), [file]);
    // A new write among the dead extents is visible; a second cut hides what the first did not.
    node.call(1, write_chunks(target, 1, 50, &[95, 135], 20))
        .0
        .unwrap();
    assert_eq!(lengths(extents(&node))[3..], [(95, 20), (135, 20)]);
    check_invariants(&node.view());
    let cut = node.call(1, Command::single(truncate(file, 140))).1;
    node.operate(truncate(file, 200)).unwrap();
    assert_eq!(lengths(extents(&node))[3..], [(95, 20), (135, 5)]);
    let dead = free_all(&mut node);
    check_invariants(&node.view());
    let attributes = node.attributes(file);
    assert_eq!((attributes.size, attributes.allocated_bytes), (200, 25 + 20 + 5));
    assert_eq!(
        lengths(extents(&node)),
        [(0, 10), (10, 10), (20, 5), (95, 20), (135, 5)]
    );
    // The write in between freed the two extents that it overwrote.
    assert_eq!(effects.dead.len() + cut.dead.len() + dead.len() + 2, 17);
}

#[test]
fn an_unlinked_file_lives_until_every_session_has_let_go() {
    let mut node = Node::with_sessions(3);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    node.call(1, write_chunks(Target::Inode(file), 1, 1, &[0, 10], 10))
        .0
        .unwrap();
    let removed = node.operate(unlink(ROOT, "f", Held::NotOpen)).unwrap();
    assert_eq!(
        removed.results,
        [OperationResult::Removed {
            inode: file,
            last: true
        }]
    );
    assert_eq!(removed.attributes_of(file).unwrap().links, 0);
    // The sender stated that it does not hold the file; the others are asked.
    let waiting = |node: &Node, session| node.view().unlinked_waiting_for(SessionId(session), 10).unwrap();
    assert_eq!(
        [waiting(&node, 1), waiting(&node, 2), waiting(&node, 3)],
        [vec![], vec![file], vec![file]]
    );
    let link = Operation::Link {
        inode: Target::Inode(file),
        parent: Target::Inode(ROOT),
        name: name("again"),
        existing: IfExists::Refuse,
    };
    assert_eq!(node.operate(link), Err(FsError::NotFound));
    let late = write_chunks(Target::Inode(file), 2, 1, &[20], 10);
    assert!(node.call(2, late).0.is_ok(), "who has it open still writes");
    let release = Command::single(Operation::ReleaseUnlinked {
        inodes: vec![file, InodeNumber(999)],
    });
    assert!(node.call(2, release).1.dead.is_empty());
    assert!(node.view().reclaimable(10).unwrap().is_empty());
    let ended = node.apply(LogBody::EndSession {
        session: SessionId(3),
    });
    assert_eq!(ended.result, ApplyResult::Done);
    assert_eq!(node.view().reclaimable(10).unwrap(), [file]);
    assert_eq!(free_all(&mut node).len(), 3);
    assert_eq!(verdict(node.view().attributes(file)), Some(FsError::Stale));
    check_invariants(&node.view());
}

#[test]
fn a_small_file_is_freed_by_the_last_release_itself() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    node.call(1, write_chunks(Target::Inode(file), 1, 1, &[0], 10))
        .0
        .unwrap();
    node.operate(unlink(ROOT, "f", Held::Open)).unwrap();
    let release = Command::single(Operation::ReleaseUnlinked { inodes: vec![file] });
    let (outcome, effects) = node.call(1, release);
    assert!(outcome.unwrap().touched.is_empty());
    assert_eq!(effects.dead.len(), 1);
    assert_eq!(node.view().inode_count(), 1);
    assert!(node.view().reclaimable(1).unwrap().is_empty());
}

#[test]
fn a_file_without_a_name_is_named_by_its_maker_or_goes_with_it() {
    let mut node = Node::with_sessions(2);
    let make = || Operation::CreateUnlinked {
        inode: new_inode(NewKind::File),
    };
    let link = |inode, existing| {
        Command::single(Operation::Link {
            inode: Target::Inode(inode),
            parent: Target::Inode(ROOT),
            name: name("upload"),
            existing,
        })
    };
    let (first, second, third) = (node.entry(make()), node.entry(make()), node.entry(make()));
    assert_eq!(node.attributes(first).links, 0);
    assert_eq!(
        node.call(2, link(first, IfExists::Refuse)).0,
        Err(FsError::NotFound)
    );
    assert!(node.call(1, link(first, IfExists::Refuse)).0.is_ok());
    assert_eq!(node.attributes(first).links, 1);
    // The second takes the first one's name, as by rename.
    assert_eq!(
        node.call(1, link(second, IfExists::Refuse)).0,
        Err(FsError::Exists)
    );
    let outcome = node.call(1, link(second, IfExists::Open)).0.unwrap();
    assert_eq!(outcome.attributes_of(first).unwrap().links, 0);
    assert_eq!(node.view().lookup(ROOT, &name("upload")).unwrap().inode, second);
    check_invariants(&node.view());
    for session in [1, 2] {
        node.apply(LogBody::EndSession {
            session: SessionId(session),
        });
    }
    free_all(&mut node);
    assert_eq!(verdict(node.view().attributes(third)), Some(FsError::Stale));
    assert_eq!(node.view().inode_count(), 2);
    check_invariants(&node.view());
}

#[test]
fn an_ended_session_lets_go_of_more_than_one_step_drops() {
    let mut node = Node::with_sessions(2);
    let count = 3 * u64::from(COMMAND_FREED_EXTENTS_MAX) + 1;
    for n in 0..count {
        let text = format!("f{n}");
        node.operate(create(ROOT, &text, NewKind::File)).unwrap();
        node.operate(unlink(ROOT, &text, Held::NotOpen)).unwrap();
    }
    let session = SessionId(2);
    node.apply(LogBody::EndSession { session });
    assert!(!node.view().unlinked_waiting_for(session, 100).unwrap().is_empty());
    assert_eq!(node.view().reclaimable(100).unwrap().len() as u64, count);
    node.apply(LogBody::ForgetSession { session });
    assert!(
        node.view().session(session).unwrap().is_some(),
        "it still has pins"
    );
    check_invariants(&node.view());
    free_all(&mut node);
    assert_eq!(node.view().inode_count(), 1);
    node.apply(LogBody::ForgetSession { session });
    assert!(node.view().session(session).unwrap().is_none());
    check_invariants(&node.view());
}

#[test]
fn a_chunk_that_is_overwritten_by_its_own_command_is_dead_at_once() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    let mut command = write_chunks(Target::Inode(file), 1, 1, &[0, 0], 10);
    for chunk in &mut command.chunks {
        chunk.body = ChunkBody::Inline(Bytes::from(vec![7; 10]));
    }
    let chunks: Vec<ChunkId> = command.chunks.iter().map(|chunk| chunk.id).collect();
    let (outcome, effects) = node.call(1, command);
    assert_eq!(outcome.unwrap().attributes_of(file).unwrap().allocated_bytes, 10);
    assert_eq!(effects.dead, [chunks[0]]);
    assert_eq!(effects.inline.len(), 1);
    assert_eq!(
        (effects.inline[0].id, effects.inline[0].payload.len()),
        (chunks[1], 10)
    );
    assert!(effects.named.is_empty());
    // A chunk is named for the first time only once.
    let twice = node.call(1, write_chunks(Target::Inode(file), 1, 2, &[0], 10)).0;
    assert_eq!(twice, Err(FsError::InvalidArgument));
}
