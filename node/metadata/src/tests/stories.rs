//! Single rules, each as a short story.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::command::*;
use quorumfs_proto::limits;
use quorumfs_proto::*;

use super::super::tables::{Inodes, Rows as _, Table};
use super::super::*;
use super::support::*;

const ROOT: InodeNumber = InodeNumber::ROOT;

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
    assert!(matches!(answer, ApplyResult::Outcome(Ok(_))));
    assert_eq!(node.apply(LogBody::Call(first.clone())).result, answer);
    // A verdict is stored too, even if its reason no longer exists.
    let refused = ApplyResult::Outcome(Err(FsError::Exists));
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
        ApplyResult::Outcome(Ok(_))
    ));
    assert_eq!(node.apply(LogBody::Call(again.clone())).result, refused);
    // A mutation with an old sequence or after a gap is not decided.
    assert_eq!(
        node.apply(LogBody::Call(first)).result,
        ApplyResult::StaleSequence
    );
    let mut gap = again.clone();
    gap.request.sequence += 2;
    assert_eq!(node.apply(LogBody::Call(gap)).result, ApplyResult::StaleSequence);
    let mut unknown = again.clone();
    unknown.request.session = SessionId(99);
    assert_eq!(
        node.apply(LogBody::Call(unknown)).result,
        ApplyResult::UnknownSession
    );
    let mut beyond = again;
    beyond.request.lane = Lane(limits::LANES_MAX);
    let invalid = ApplyResult::Outcome(Err(FsError::InvalidArgument));
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
        ApplyResult::Done
    );
    assert!(node.view().session(session).unwrap().unwrap().ended.is_some());
    assert_eq!(node.apply(open()).result, ApplyResult::UnknownSession);
    // Earlier results are still returned; nothing new is decided.
    assert_eq!(node.apply(LogBody::Call(decided.clone())).result, answer);
    let new = node.mutation(session, Command::single(create(ROOT, "b", NewKind::File)));
    assert_eq!(node.apply(LogBody::Call(new)).result, ApplyResult::NeverDecided);
    node.apply(LogBody::ForgetSession { session });
    assert_eq!(
        node.apply(LogBody::Call(decided)).result,
        ApplyResult::UnknownSession
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
        ApplyResult::Outcome(Ok(_))
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
    // A refused command advances the mark as well, and no command moves it back.
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
    // Without the last operation the command takes effect, and the unused number is used now.
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
        let Operation::Write { extents, .. } = command.operations.remove(0) else {
            panic!("it is a write");
        };
        command.operations.push(Operation::Append {
            inode: Target::Inode(file),
            extents,
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
    // Without group execution the set-group-id bit has no effect.
    set_privileges(&mut node, 0o6745);
    let owner = AttributeChanges {
        uid: Some(5),
        ..AttributeChanges::default()
    };
    node.operate(set(file, owner.clone())).unwrap();
    let attributes = node.attributes(file);
    assert_eq!((attributes.mode, attributes.has_capability), (0o2745, false));
    // A directory keeps its bits; a mode given along with the owner is applied.
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
    // A snapshot that ends before its position is not installed either.
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
        page.extents
            .iter()
            .map(|extent| extent.file_offset)
            .collect::<Vec<_>>(),
        [10, 20]
    );
    assert_eq!(page.known_to, 30);
}
