//! Single rules, each told as a short story.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::chunk::ChunkBody;
use quorumfs_proto::command::*;
use quorumfs_proto::query::EntryDetail;
use quorumfs_proto::*;

use super::super::tables::{DirentKey, DirentRecord, Dirents, Inodes, Rows as _, Table};
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
fn the_store_and_its_views_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<MetadataStore>();
    shared::<View>();
    shared::<Snapshot>();
    sent::<Batch<'_>>();
    sent::<Installation>();
}

#[test]
fn a_retried_mutation_answers_what_it_answered_first() {
    let mut node = Node::with_sessions(1);
    let first = node.mutation(
        SessionId(1),
        Command::single(create(ROOT, "a", NewKind::Directory)),
    );
    let again = node.mutation(
        SessionId(1),
        Command::single(create(ROOT, "a", NewKind::Directory)),
    );
    let answer = node.apply(LogBody::Call(first.clone())).result;
    assert!(matches!(answer, CallResult::Outcome(Ok(_))));
    assert_eq!(node.apply(LogBody::Call(first.clone())).result, answer);
    // A verdict is remembered too, even when the reason for it is gone by then.
    let refused = CallResult::Outcome(Err(FsError::Exists));
    assert_eq!(node.apply(LogBody::Call(again.clone())).result, refused);
    let mut other_lane = node.mutation(
        SessionId(1),
        Command::single(Operation::RemoveDirectory {
            parent: Target::Inode(ROOT),
            name: name("a"),
        }),
    );
    other_lane.request.lane = Lane(1);
    other_lane.request.sequence = 1;
    assert!(matches!(
        node.apply(LogBody::Call(other_lane)).result,
        CallResult::Outcome(Ok(_))
    ));
    assert_eq!(node.apply(LogBody::Call(again.clone())).result, refused);
    // What lies before or leaves a gap is not decided.
    assert_eq!(node.apply(LogBody::Call(first)).result, CallResult::StaleSequence);
    let mut gap = again.clone();
    gap.request.sequence += 2;
    assert_eq!(node.apply(LogBody::Call(gap)).result, CallResult::StaleSequence);
    let mut unknown = again.clone();
    unknown.request.session = SessionId(99);
    assert_eq!(
        node.apply(LogBody::Call(unknown)).result,
        CallResult::UnknownSession
    );
    let mut beyond = again;
    beyond.request.lane = Lane(limits::LANES_MAX);
    let invalid = CallResult::Outcome(Err(FsError::InvalidArgument));
    assert_eq!(node.apply(LogBody::Call(beyond)).result, invalid);
}

#[test]
fn a_session_that_ended_is_not_opened_again_and_is_forgotten_on_request() {
    let mut node = Node::with_sessions(1);
    let session = SessionId(1);
    let open = || LogBody::OpenSession {
        session,
        description: String::new(),
    };
    let decided = node.mutation(session, Command::single(create(ROOT, "a", NewKind::File)));
    let answer = node.apply(LogBody::Call(decided.clone())).result;
    node.apply(LogBody::ForgetSession { session });
    assert!(node.view().session(session).unwrap().is_some(), "it is alive");
    assert_eq!(
        node.apply(LogBody::EndSession { session }).result,
        CallResult::Done
    );
    assert!(node.view().session(session).unwrap().unwrap().ended.is_some());
    assert_eq!(node.apply(open()).result, CallResult::UnknownSession);
    // What was decided is still told, nothing more is decided.
    assert_eq!(node.apply(LogBody::Call(decided.clone())).result, answer);
    let new = node.mutation(session, Command::single(create(ROOT, "b", NewKind::File)));
    assert_eq!(node.apply(LogBody::Call(new)).result, CallResult::NeverDecided);
    node.apply(LogBody::ForgetSession { session });
    assert_eq!(
        node.apply(LogBody::Call(decided)).result,
        CallResult::UnknownSession
    );
    assert!(node.view().session(session).unwrap().is_none());
    let lanes = dump(&node.view())
        .into_iter()
        .filter(|row| row.0 == Table::Lanes.number());
    assert_eq!(lanes.count(), 0);
}

#[test]
fn a_command_with_a_chunk_below_the_low_water_mark_is_refused() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    let target = Target::Inode(file);
    // The mark that comes with a command does not refuse the command's own chunks, only later ones.
    let mut mutation = node.mutation(SessionId(1), write_chunks(target, 1, 5, &[0], 10));
    mutation.chunk_low_water = 9;
    assert!(matches!(
        node.apply(LogBody::Call(mutation)).result,
        CallResult::Outcome(Ok(_))
    ));
    assert_eq!(
        node.view()
            .session(SessionId(1))
            .unwrap()
            .unwrap()
            .chunk_low_water,
        9
    );
    let late = node.call(1, write_chunks(target, 1, 8, &[0], 10)).0;
    assert_eq!(late, Err(FsError::ChunkDead));
    assert!(node.call(1, write_chunks(target, 1, 9, &[0], 10)).0.is_ok());
    // A refused command moves the mark as well, and no command moves it back.
    let mut refused = node.mutation(SessionId(1), Command::single(create(ROOT, "f", NewKind::File)));
    refused.chunk_low_water = 20;
    node.apply(LogBody::Call(refused));
    let late = node.call(1, write_chunks(target, 1, 19, &[0], 10)).0;
    assert_eq!(late, Err(FsError::ChunkDead));
}

#[test]
fn time_goes_on_when_the_leaders_clock_goes_back() {
    let mut node = Node::with_sessions(1);
    let mut last = node.view().last_stamp();
    for seconds in [100, 50, 0, 100, 101] {
        let stamp = Timestamp {
            seconds,
            nanoseconds: 0,
        };
        let text = format!("at-{}", node.index);
        let mutation = node.mutation(SessionId(1), Command::single(create(ROOT, &text, NewKind::File)));
        node.apply_at(stamp, LogBody::Call(mutation));
        let root = node.attributes(ROOT);
        assert!(root.mtime > last && root.mtime >= stamp);
        assert_eq!((root.mtime, root.ctime), (node.view().last_stamp(), root.mtime));
        last = root.mtime;
    }
}

#[test]
fn a_command_that_is_refused_in_the_middle_leaves_no_trace() {
    let mut node = Node::with_sessions(2);
    let before = node.entry(create(ROOT, "before", NewKind::File));
    node.call(1, write_chunks(Target::Inode(before), 1, 1, &[0, 100], 50))
        .0
        .unwrap();
    let rows = |node: &Node| {
        let mut rows = dump(&node.view());
        rows.retain(|row| row.0 != Table::Lanes.number() && row.0 != Table::Meta.number());
        rows
    };
    let (rows_before, count_before) = (rows(&node), node.view().inode_count());
    let mut command = write_chunks(Target::Created(0), 1, 10, &[0], 10);
    command.operations.insert(0, create(ROOT, "new", NewKind::File));
    command.operations.push(truncate(before, 20));
    command.operations.push(unlink(ROOT, "before", Held::Open));
    command.operations.push(unlink(ROOT, "missing", Held::Open));
    let (outcome, effects) = node.call(1, command.clone());
    assert_eq!(outcome, Err(FsError::NotFound));
    assert!(effects.is_empty());
    assert_eq!(rows(&node), rows_before);
    assert_eq!(node.view().inode_count(), count_before);
    check_invariants(&node.view());
    // Without the last one it takes effect, and the number that was not used is used now.
    command.operations.pop();
    let (outcome, effects) = node.call(1, command);
    assert_eq!(
        outcome.unwrap().results[0],
        OperationResult::Entry {
            inode: InodeNumber(before.0 + 1),
            created: true
        }
    );
    assert_eq!(effects.named.len(), 1);
    check_invariants(&node.view());
}

#[test]
fn an_outcome_tells_the_attributes_of_all_it_touched() {
    let mut node = Node::with_sessions(1);
    let mut command = write_chunks(Target::Created(0), 1, 1, &[0], 10);
    command.operations.insert(0, create(ROOT, "new", NewKind::File));
    let outcome = node.call(1, command).0.unwrap();
    let view = node.view();
    let touched: BTreeSet<InodeNumber> = outcome.touched.iter().map(|a| a.inode).collect();
    assert_eq!(touched, BTreeSet::from([ROOT, InodeNumber(2)]));
    for attributes in &outcome.touched {
        assert_eq!(attributes, &view.attributes(attributes.inode).unwrap());
    }
    assert_eq!(outcome.index, view.index());
    assert_eq!(outcome.attributes_of(InodeNumber(2)).unwrap().size, 10);
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
    // Grown again, what was cut is a hole, although its extents are still there.
    node.operate(truncate(file, 200)).unwrap();
    let pieces = |node: &Node| node.view().extents(file, 0, 200, 100).unwrap().pieces;
    let lengths = |pieces: Vec<Piece>| -> Vec<(u64, u32)> {
        pieces
            .iter()
            .map(|piece| (piece.file_offset, piece.length))
            .collect()
    };
    assert_eq!(lengths(pieces(&node)), [(0, 10), (10, 10), (20, 5)]);
    assert_eq!(node.view().reclaimable(10).unwrap(), [file]);
    // A new write among the dead extents counts; a second cut hides what the first did not.
    node.call(1, write_chunks(target, 1, 50, &[95, 135], 20))
        .0
        .unwrap();
    assert_eq!(lengths(pieces(&node))[3..], [(95, 20), (135, 20)]);
    check_invariants(&node.view());
    let cut = node.call(1, Command::single(truncate(file, 140))).1;
    node.operate(truncate(file, 200)).unwrap();
    assert_eq!(lengths(pieces(&node))[3..], [(95, 20), (135, 5)]);
    let dead = free_all(&mut node);
    check_invariants(&node.view());
    let attributes = node.attributes(file);
    assert_eq!((attributes.size, attributes.allocated_bytes), (200, 25 + 20 + 5));
    assert_eq!(
        lengths(pieces(&node)),
        [(0, 10), (10, 10), (20, 5), (95, 20), (135, 5)]
    );
    // The two extents that the write between lay over were freed by it.
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
    // The sender said that it does not hold it; the others are asked.
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
    assert_eq!(ended.result, CallResult::Done);
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

#[test]
fn privileges_fall_with_chown_and_with_a_write_that_says_so() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    let set_privileges = |node: &mut Node, mode| {
        let capability = Operation::SetXattr {
            inode: Target::Inode(file),
            name: XattrName::new(&b"security.capability"[..]).unwrap(),
            value: Bytes::from_static(b"cap"),
            mode: XattrMode::Set,
        };
        let mode = AttributeChanges {
            mode: Some(mode),
            ..AttributeChanges::default()
        };
        node.operate(capability).unwrap();
        node.operate(set(file, mode)).unwrap();
        assert!(node.attributes(file).has_capability);
    };
    let append = |counter, privileges| {
        let mut command = write_chunks(Target::Inode(file), 1, counter, &[0], 10);
        let Operation::Write { pieces, .. } = command.operations.remove(0) else {
            panic!("it is a write");
        };
        command.operations.push(Operation::Append {
            inode: Target::Inode(file),
            pieces,
            privileges,
        });
        command
    };
    set_privileges(&mut node, 0o6755);
    node.call(1, append(1, Privileges::Keep)).0.unwrap();
    assert_eq!(node.attributes(file).mode, 0o6755);
    let outcome = node.call(1, append(2, Privileges::Drop)).0.unwrap();
    assert_eq!(outcome.results, [OperationResult::Appended { offset: 10 }]);
    let attributes = outcome.attributes_of(file).unwrap();
    assert_eq!(
        (attributes.mode, attributes.has_capability, attributes.xattr_count),
        (0o755, false, 0)
    );
    // Without group execution the set-group-id bit is none.
    set_privileges(&mut node, 0o6745);
    let owner = AttributeChanges {
        uid: Some(5),
        ..AttributeChanges::default()
    };
    node.operate(set(file, owner.clone())).unwrap();
    let attributes = node.attributes(file);
    assert_eq!((attributes.mode, attributes.has_capability), (0o2745, false));
    // A directory keeps its bits; a mode given along with the owner is what stays.
    let directory = node.entry(create(ROOT, "d", NewKind::Directory));
    let both = AttributeChanges {
        mode: Some(0o7777),
        ..owner.clone()
    };
    for inode in [directory, file] {
        node.operate(set(inode, both.clone())).unwrap();
        assert_eq!(node.attributes(inode).mode, 0o7777);
    }
    node.operate(set(directory, owner)).unwrap();
    assert_eq!(node.attributes(directory).mode, 0o7777);
}

#[test]
fn a_file_has_at_most_so_many_names_a_directory_any_number_of_subdirectories() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    let link = |n: u32| Operation::Link {
        inode: Target::Inode(file),
        parent: Target::Inode(ROOT),
        name: name(&format!("l{n}")),
        existing: IfExists::Refuse,
    };
    let names: Vec<u32> = (1..limits::LINKS_MAX).collect();
    for some in names.chunks(limits::COMMAND_OPERATIONS_MAX) {
        let command = Command {
            chunks: Vec::new(),
            operations: some.iter().copied().map(link).collect(),
        };
        node.call(1, command).0.unwrap();
    }
    assert_eq!(node.attributes(file).links, limits::LINKS_MAX);
    assert_eq!(node.operate(link(0)), Err(FsError::TooManyLinks));
}

#[test]
fn the_names_of_extended_attributes_fit_one_list() {
    let mut node = Node::with_sessions(1);
    let set_xattr = |n: usize| Operation::SetXattr {
        inode: Target::Inode(ROOT),
        name: XattrName::new(format!("user.{n:0>250}").into_bytes()).unwrap(),
        value: Bytes::new(),
        mode: XattrMode::Set,
    };
    let fitting = limits::XATTR_LIST_BYTES_MAX / 256;
    for n in 0..fitting {
        node.operate(set_xattr(n)).unwrap();
    }
    assert_eq!(node.operate(set_xattr(fitting)), Err(FsError::NoSpace));
    node.operate(set_xattr(0)).unwrap();
    assert_eq!(node.view().xattr_names(ROOT).unwrap().len(), fitting);
}

#[test]
fn entries_of_one_cookie_come_in_one_answer() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    let mut view = node.view();
    let real = DirentKey::new(ROOT, &name("f"));
    let (before, cookie, after) = (real.cookie - 1, real.cookie, real.cookie + 1);
    let placed = [("a", before), ("x", cookie), ("y", cookie), ("b", after)];
    for (text, cookie) in placed {
        let key = DirentKey {
            directory: ROOT,
            cookie,
            name: name(text),
        };
        let entry = DirentRecord {
            inode: file,
            kind: FileKind::File,
        };
        let value = Arc::from(&codec::encode_checked(&entry)[..]);
        Arc::make_mut(&mut view.layers.active).set(Table::Dirents, Dirents::key(&key), Some(value));
    }
    let page = |after| {
        let page = view.read_directory(ROOT, after, 0, EntryDetail::Name).unwrap();
        let names: Vec<String> = page.entries.iter().map(|entry| entry.name.to_string()).collect();
        (names.concat(), page.end)
    };
    assert_eq!(page(0), ("a".into(), false));
    assert_eq!(page(before), ("fxy".into(), false));
    assert_eq!(page(cookie), ("b".into(), true));
    assert_eq!(page(after), (String::new(), true));
    assert_eq!(page(u64::MAX), (String::new(), true));
}

#[test]
fn a_large_directory_lists_completely_while_it_changes() {
    let mut node = Node::with_sessions(1);
    let names = |prefix: &str, node: &mut Node| {
        let made: Vec<String> = (0..1000).map(|n| format!("{prefix}{n}")).collect();
        for some in made.chunks(250) {
            let operations = some
                .iter()
                .map(|text| create(ROOT, text, NewKind::File))
                .collect();
            let command = Command {
                chunks: Vec::new(),
                operations,
            };
            node.call(1, command).0.unwrap();
        }
        made
    };
    let stay = names("stay", &mut node);
    let go = names("go", &mut node);
    node.store.freeze();
    node.store.flush().unwrap();
    let mut seen = Vec::new();
    let mut after = 0;
    let mut round = 0;
    loop {
        let page = node
            .view()
            .read_directory(ROOT, after, 4000, EntryDetail::Name)
            .unwrap();
        seen.extend(page.entries.iter().map(|entry| entry.name.to_string()));
        if page.end {
            break;
        }
        after = page.entries.last().unwrap().cookie;
        node.operate(unlink(ROOT, &go[round], Held::NotOpen)).unwrap();
        node.operate(create(ROOT, &format!("new{round}"), NewKind::File))
            .unwrap();
        round += 1;
    }
    assert!(round > 10, "several pages");
    let unique: BTreeSet<&String> = seen.iter().collect();
    assert_eq!(unique.len(), seen.len(), "none twice");
    assert!(stay.iter().all(|text| unique.contains(text)), "none missed");
}

#[test]
fn a_tree_lists_sorted_by_path_in_pages_of_any_size() {
    let mut node = Node::with_sessions(1);
    // '!' and '.' sort before '/', '0' after it.
    let directories = ["a", "a!", "a0", "b", "b/c", "b/empty", "z", "z/y", "z/y/x"];
    let files = [
        "a/0", "a/z", "a.txt", "a!/1", "a0/f", "a00", "b/c/1", "b/c/2", "b/c!", "b/c0", "b0", "z/y/x/f", "~",
    ];
    let split = |path: &str| match path.rsplit_once('/') {
        Some((parent, last)) => (parent.split('/').map(name).collect(), last.to_string()),
        None => (Vec::new(), path.to_string()),
    };
    for (path, kind) in directories
        .iter()
        .map(|path| (path, NewKind::Directory))
        .chain(files.iter().map(|path| (path, NewKind::File)))
    {
        let (parent, last): (Vec<Name>, String) = split(path);
        let parent = node.view().resolve(ROOT, &parent).unwrap().inode;
        node.operate(create(parent, &last, kind)).unwrap();
    }
    let link = NewKind::Symlink(SymlinkTarget::new(&b"b"[..]).unwrap());
    node.operate(create(ROOT, "link", link)).unwrap();
    let mut sorted = files.map(str::to_string);
    sorted.sort();
    let view = node.view();
    let page = |after: &str, max| -> Vec<String> {
        let page = view.list_tree(ROOT, after.as_bytes(), max).unwrap();
        page.into_iter()
            .map(|file| String::from_utf8(file.0).unwrap())
            .collect()
    };
    for max in 1..=files.len() + 1 {
        let mut listed: Vec<String> = Vec::new();
        loop {
            let after = listed.last().cloned().unwrap_or_default();
            let more = page(&after, max);
            let last = more.len() < max;
            listed.extend(more);
            if last {
                break;
            }
        }
        assert_eq!(listed, sorted, "pages of {max}");
    }
    // A page may begin after anything, not only after a file that is there.
    for after in ["a/", "a0", "b/c", "b/c/", "b/c/1x", "b/d", "zz", "a!"] {
        let expected: Vec<&String> = sorted.iter().filter(|path| path.as_str() > after).collect();
        assert_eq!(
            page(after, 100).iter().collect::<Vec<_>>(),
            expected,
            "after {after}"
        );
    }
}

#[test]
fn a_snapshot_that_is_damaged_changes_nothing() {
    let mut node = Node::with_sessions(1);
    node.operate(create(ROOT, "f", NewKind::File)).unwrap();
    node.store.freeze();
    node.store.flush().unwrap();
    let rows: Vec<Row> = node
        .store
        .snapshot()
        .unwrap()
        .rows()
        .collect::<Result<_, _>>()
        .unwrap();
    let before = dump(&node.view());
    let refused = |rows: &[Row]| {
        let mut installation = node.store.begin_install().unwrap();
        installation.add(rows)
    };
    let mut damaged = rows.clone();
    damaged[3].value = Bytes::from([&[damaged[3].value[0] ^ 1], &damaged[3].value[1..]].concat());
    let mut unknown = rows.clone();
    unknown.last_mut().unwrap().table = 200;
    let twice: Vec<Row> = rows.iter().take(1).chain(&rows).cloned().collect();
    for bad in [&damaged, &unknown, &twice] {
        assert!(matches!(refused(bad), Err(StorageFault::BadSnapshot { .. })));
    }
    // One that stops before its position is there is not installed either.
    let mut cut_short = node.store.begin_install().unwrap();
    cut_short.add(&rows[..1]).unwrap();
    assert!(cut_short.finish().is_err());
    assert_eq!(dump(&node.view()), before);
    let left: Vec<_> = std::fs::read_dir(node.folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "no unfinished files stay");
}

#[test]
fn views_and_snapshots_stay_as_they_were() {
    let mut node = Node::with_sessions(1);
    node.operate(create(ROOT, "early", NewKind::File)).unwrap();
    let early = node.view();
    let early_rows = dump(&early);
    let frozen_at = node.store.freeze().unwrap();
    node.operate(create(ROOT, "between", NewKind::File)).unwrap();
    assert_eq!(
        node.store.freeze(),
        Some(frozen_at.clone()),
        "one flush at a time"
    );
    assert_eq!(node.store.durable_position().index, 0);
    assert_eq!(node.store.flush().unwrap(), frozen_at);
    assert_eq!(node.store.durable_position(), frozen_at);
    let snapshot = node.store.snapshot().unwrap();
    assert_eq!(snapshot.position(), &frozen_at);
    let snapshot_rows = || snapshot.rows().collect::<Result<Vec<_>, _>>().unwrap();
    let rows_before = snapshot_rows();
    for n in 0..3 {
        node.operate(unlink(ROOT, "early", Held::NotOpen)).unwrap();
        node.operate(create(ROOT, "early", NewKind::Directory)).unwrap();
        node.operate(Operation::RemoveDirectory {
            parent: Target::Inode(ROOT),
            name: name("early"),
        })
        .unwrap();
        node.operate(create(ROOT, "early", NewKind::File)).unwrap();
        assert!(node.store.freeze().is_some(), "flush {n}");
        node.store.flush().unwrap();
    }
    assert_eq!(node.store.freeze(), None, "nothing to flush");
    assert_eq!(node.store.overlay_bytes(), 0);
    assert_eq!(dump(&early), early_rows);
    assert_eq!(snapshot_rows(), rows_before);
    let table_and_key: Vec<_> = rows_before
        .iter()
        .map(|row| (row.table, row.key.clone()))
        .collect();
    assert!(table_and_key.is_sorted());
}

#[test]
fn a_damaged_row_is_a_fault_and_never_an_answer() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    let mut view = node.view();
    let key = Inodes::key(&file);
    let mut value = view
        .layers
        .active
        .get(Table::Inodes, &key)
        .unwrap()
        .clone()
        .unwrap()
        .to_vec();
    value[4] ^= 0x10;
    Arc::make_mut(&mut view.layers.active).set(Table::Inodes, key, Some(Arc::from(value)));
    assert!(matches!(
        view.lookup(ROOT, &name("f")),
        Err(Failure::Fault(StorageFault::Decode(_)))
    ));
}

#[test]
fn questions_are_answered_or_refused_as_their_callers_expect() {
    let mut node = Node::with_sessions(1);
    let directory = node.entry(create(ROOT, "d", NewKind::Directory));
    let file = node.entry(create(directory, "f", NewKind::File));
    let target = SymlinkTarget::new(&b"d/f"[..]).unwrap();
    let link = node.entry(create(ROOT, "l", NewKind::Symlink(target.clone())));
    let view = node.view();
    let path = |text: &str| text.split('/').map(name).collect::<Vec<_>>();
    assert_eq!(view.resolve(ROOT, &path("d/f")).unwrap().inode, file);
    assert_eq!(view.resolve(file, &[]).unwrap().inode, file);
    assert_eq!(verdict(view.resolve(ROOT, &path("d/x"))), Some(FsError::NotFound));
    assert_eq!(
        verdict(view.resolve(ROOT, &path("l/f"))),
        Some(FsError::NotDirectory)
    );
    assert_eq!(
        verdict(view.lookup(InodeNumber(99), &name("x"))),
        Some(FsError::Stale)
    );
    assert_eq!(view.read_link(link).unwrap(), target);
    assert_eq!(verdict(view.read_link(file)), Some(FsError::InvalidArgument));
    assert_eq!(
        verdict(view.extents(directory, 0, 1, 1)),
        Some(FsError::IsDirectory)
    );
    assert_eq!(
        verdict(view.extents(link, 0, 1, 1)),
        Some(FsError::InvalidArgument)
    );
    assert_eq!(verdict(view.answer(&Query::Space)), Some(FsError::NotSupported));
    let name = XattrName::new(&b"user.x"[..]).unwrap();
    assert_eq!(verdict(view.xattr(file, &name)), Some(FsError::NoAttribute));
    let ids: Vec<ChunkId> = (1..=5)
        .map(|counter| ChunkId {
            session: SessionId(1),
            counter,
        })
        .collect();
    let target = Target::Inode(file);
    node.call(1, write_chunks(target, 1, 1, &[0, 10, 20, 30, 40], 10))
        .0
        .unwrap();
    let view = node.view();
    let page = |after, max| -> Vec<ChunkId> {
        view.chunks_after(after, max)
            .unwrap()
            .iter()
            .map(|row| row.0)
            .collect()
    };
    assert_eq!(page(None, 2), ids[..2]);
    assert_eq!(page(Some(ids[1]), 9), ids[2..]);
    assert_eq!(view.chunk(ids[4]).unwrap().unwrap().length, 10);
    let page = view.extents(file, 15, 35, 2).unwrap();
    assert_eq!(
        page.pieces
            .iter()
            .map(|piece| piece.file_offset)
            .collect::<Vec<_>>(),
        [10, 20]
    );
    assert_eq!(page.known_to, 30);
}
