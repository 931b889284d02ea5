//! Inodes without a name from feature level 3 on: the cost of an unlink, the sessions that keep an inode, and its
//! freeing.

use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::super::overlay::visited;
use super::super::*;
use super::support::*;

const ROOT: InodeNumber = InodeNumber::ROOT;

/// Makes a file of session 1 with a chunk and removes its name.
fn unlinked_file(node: &mut Node, text: &str, counter: u64) -> InodeNumber {
    let file = node.entry(create(ROOT, text, NewKind::File));
    let write = write_chunks(Target::Inode(file), 1, counter, &[0], 10);
    node.call(1, write).0.unwrap();
    node.operate(unlink(ROOT, text, Held::Open)).unwrap();
    file
}

fn is_there(node: &Node, inode: InodeNumber) -> bool {
    Failure::split(node.view().attributes(inode)).unwrap().is_ok()
}

/// Returns the rows and bytes that one unlink adds.
fn cost_of_unlink(sessions: u64) -> (usize, u64) {
    let mut node = Node::at_newest_level(sessions);
    node.operate(create(ROOT, "f", NewKind::File)).unwrap();
    let (rows, bytes) = (dump(&node.view()).len(), node.store.overlay_bytes());
    node.operate(unlink(ROOT, "f", Held::Open)).unwrap();
    (
        dump(&node.view()).len() - rows,
        node.store.overlay_bytes() - bytes,
    )
}

#[test]
fn an_unlink_costs_the_same_however_many_sessions_there_are() {
    let (few, many) = (cost_of_unlink(1), cost_of_unlink(1000));
    assert_eq!(few.0, many.0);
    // Larger numbers are a few bytes longer.
    assert!(many.1 < few.1 + 32, "{few:?} {many:?}");
    eprintln!(
        "measured: an unlink adds {} bytes of overlay at 1,000 sessions",
        many.1
    );
}

#[test]
fn an_unlinked_file_lives_until_every_session_has_answered_and_let_go() {
    let mut node = Node::at_newest_level(3);
    let file = unlinked_file(&mut node, "f", 1);
    for session in [1, 2] {
        assert_eq!(node.answer_all(session, &[]), 1);
        assert_eq!(node.answer_all(session, &[]), 0, "it is asked once");
        assert!(node.reclaim(10).is_empty());
    }
    assert_eq!(node.answer_all(3, &[file, InodeNumber(999)]), 1);
    assert!(node.reclaim(10).is_empty());
    assert!(is_there(&node, file));
    check_invariants(&node.view());
    let held = node
        .view()
        .unlinked_held_by(SessionId(3), InodeNumber(0), 10)
        .unwrap();
    assert_eq!(held, [file]);
    let late = write_chunks(Target::Inode(file), 3, 1, &[20], 10);
    assert!(node.call(3, late).0.is_ok(), "who has it open still writes");
    let release = Command::single(Operation::ReleaseUnlinked { inodes: vec![file] });
    assert_eq!(node.call(3, release).1.dead.len(), 2);
    assert!(!is_there(&node, file));
    check_invariants(&node.view());
}

#[test]
fn a_session_that_holds_much_keeps_nothing_else() {
    let mut node = Node::at_newest_level(2);
    let held: Vec<InodeNumber> = (0..100)
        .map(|n| unlinked_file(&mut node, &format!("held-{n}"), n + 1))
        .collect();
    node.answer_all(1, &[]);
    assert_eq!(node.answer_all(2, &held), 100);
    assert!(node.reclaim(7).is_empty());
    for n in 0..50 {
        unlinked_file(&mut node, &format!("free-{n}"), n + 200);
    }
    assert_eq!(node.answer_all(1, &[]), 50);
    assert_eq!(
        node.answer_all(2, &[]),
        50,
        "what it holds it is not asked about again"
    );
    assert_eq!(node.reclaim(7).len(), 50);
    assert!(held.iter().all(|inode| is_there(&node, *inode)));
    check_invariants(&node.view());
}

#[test]
fn a_session_that_opens_later_is_not_asked_and_one_that_has_ended_is_not_waited_for() {
    let mut node = Node::at_newest_level(2);
    let file = unlinked_file(&mut node, "f", 1);
    node.open_with_key(3);
    assert_eq!(node.answer_all(3, &[]), 0);
    node.answer_all(1, &[]);
    assert!(node.view().sessions_to_ask().unwrap() == [SessionId(2)]);
    node.apply(LogBody::EndSession {
        session: SessionId(2),
    });
    assert!(node.view().sessions_to_ask().unwrap().is_empty());
    assert_eq!(node.reclaim(10).len(), 1);
    assert!(!is_there(&node, file));
}

#[test]
fn a_session_that_ends_lets_go_of_more_than_one_step_drops() {
    let mut node = Node::at_newest_level(2);
    let held: Vec<InodeNumber> = (0..5 * u64::from(COMMAND_FREED_EXTENTS_MAX))
        .map(|n| unlinked_file(&mut node, &format!("{n}"), n + 1))
        .collect();
    node.answer_all(1, &[]);
    node.answer_all(2, &held);
    node.reclaim(10);
    let session = SessionId(2);
    node.apply(LogBody::EndSession { session });
    check_invariants(&node.view());
    node.apply(LogBody::ForgetSession { session });
    assert!(
        node.view().session(session).unwrap().is_some(),
        "it still holds some"
    );
    assert_eq!(node.reclaim(4).len(), held.len());
    assert_eq!(node.view().inode_count(), 1);
    node.apply(LogBody::ForgetSession { session });
    assert!(node.view().session(session).unwrap().is_none());
    check_invariants(&node.view());
}

#[test]
fn an_answer_counts_once_and_only_for_what_was_asked() {
    let mut node = Node::at_newest_level(1);
    let first = unlinked_file(&mut node, "first", 1);
    let page = node.view().unlinked_page(SessionId(1), 10).unwrap().unwrap();
    let answer = |held: &[InodeNumber]| LogBody::AnswerUnlinked {
        answers: vec![UnlinkedAnswer {
            session: SessionId(1),
            from: page.from,
            through: page.through,
            held: held.to_vec(),
        }],
    };
    let second = unlinked_file(&mut node, "second", 2);
    // The session was not asked about the second one.
    node.apply(answer(&[first, second]));
    let release = Command::single(Operation::ReleaseUnlinked { inodes: vec![first] });
    node.call(1, release).0.unwrap();
    node.apply(answer(&[first]));
    node.reclaim(10);
    assert!(!is_there(&node, first), "an answer that came late holds nothing");
    assert!(is_there(&node, second));
    let held = node
        .view()
        .unlinked_held_by(SessionId(1), InodeNumber(0), 10)
        .unwrap();
    assert!(held.is_empty());
    check_invariants(&node.view());
}

#[test]
fn what_was_unlinked_before_the_level_drains_and_older_clients_are_asked_about_each() {
    let mut node = Node::with_sessions(2);
    node.operate(create(ROOT, "old", NewKind::File)).unwrap();
    node.operate(unlink(ROOT, "old", Held::Open)).unwrap();
    node.apply(LogBody::RaiseFeatureLevel { level: 3 });
    let new = unlinked_file(&mut node, "new", 1);
    check_invariants(&node.view());
    let held = |node: &Node, session| {
        let view = node.view();
        view.unlinked_held_by(SessionId(session), InodeNumber(0), 10)
            .unwrap()
    };
    assert_eq!(held(&node, 1).len(), 2);
    // From now on session 1 answers in order; it still releases separately what it was asked about before.
    assert_eq!(node.answer_all(1, &[]), 0);
    node.open_with_key(1);
    let later = unlinked_file(&mut node, "later", 2);
    assert!(!held(&node, 1).contains(&later));
    assert!(held(&node, 2).contains(&later));
    assert_eq!(node.answer_all(1, &[]), 1);
    for session in [1, 2] {
        let inodes = held(&node, session);
        let release = Command::single(Operation::ReleaseUnlinked { inodes });
        node.call(session, release).0.unwrap();
    }
    node.reclaim(10);
    assert!(!is_there(&node, new) && !is_there(&node, later));
    assert_eq!(node.view().inode_count(), 1);
    assert!(!node.view().has_orphans().unwrap());
    check_invariants(&node.view());
}

#[test]
fn a_file_without_a_name_is_its_makers_alone() {
    let mut node = Node::at_newest_level(2);
    let make = || Operation::CreateUnlinked {
        inode: new_inode(NewKind::File),
    };
    let (named, lost) = (node.entry(make()), node.entry(make()));
    let link = Operation::Link {
        inode: Target::Inode(named),
        parent: Target::Inode(ROOT),
        name: name("upload"),
        existing: IfExists::Refuse,
    };
    assert_eq!(
        node.call(2, Command::single(link.clone())).0,
        Err(FsError::NotFound)
    );
    node.operate(link).unwrap();
    assert_eq!(node.answer_all(2, &[]), 0, "nobody else can have it open");
    check_invariants(&node.view());
    node.apply(LogBody::EndSession {
        session: SessionId(1),
    });
    node.reclaim(10);
    assert!(is_there(&node, named) && !is_there(&node, lost));
    check_invariants(&node.view());
}

#[test]
fn a_session_is_opened_again_with_its_own_key_only() {
    let mut node = Node::at_newest_level(1);
    let open = |secret: &[u8]| LogBody::OpenSessionWithKey {
        session: SessionId(1),
        description: String::new(),
        key: SessionKey {
            secret: Sha256::of(secret),
            certificate: None,
        },
    };
    assert_eq!(node.apply(open(b"a thief's")).result, ApplyResult::WrongKey);
    let own = 1u64.to_be_bytes();
    assert_eq!(node.apply(open(&own)).result, ApplyResult::Done);
    node.apply(LogBody::EndSession {
        session: SessionId(1),
    });
    assert_eq!(node.apply(open(&own)).result, ApplyResult::UnknownSession);
}

#[test]
fn a_silence_is_known_until_the_session_speaks_or_ends() {
    let mut node = Node::at_newest_level(2);
    let note = |silences: &[(u64, u64)]| LogBody::NoteSilences {
        silences: silences.iter().map(|(id, ms)| (SessionId(*id), *ms)).collect(),
    };
    let known = |node: &Node| [1, 2].map(|session| node.view().silence_ms(SessionId(session)));
    node.apply(note(&[(1, 10_000), (2, 20_000), (99, 5)]));
    assert_eq!(known(&node), [10_000, 20_000]);
    node.store.freeze();
    node.store.flush().unwrap();
    node.operate(create(ROOT, "f", NewKind::File)).unwrap();
    assert_eq!(known(&node), [0, 20_000], "session 1 has spoken");
    node.apply(note(&[(2, 0)]));
    assert_eq!(known(&node), [0, 0]);
    node.apply(note(&[(2, 30_000)]));
    node.apply(LogBody::EndSession {
        session: SessionId(2),
    });
    assert!(node.view().silences().is_empty());
}

#[test]
fn freeing_does_not_come_by_what_was_freed_before() {
    const FILES: u64 = 2_000;
    const ROWS_PER_FILE_MAX: u64 = 40;
    let mut node = Node::at_newest_level(1);
    for n in 0..FILES {
        unlinked_file(&mut node, &format!("{n}"), n + 1);
    }
    assert_eq!(node.answer_all(1, &[]), FILES as usize);
    let before = visited::rows();
    assert_eq!(node.reclaim(7).len(), FILES as usize);
    let visited = visited::rows() - before;
    eprintln!("measured: {visited} rows visited to free {FILES} files");
    assert!(visited < ROWS_PER_FILE_MAX * FILES, "{visited}");
    check_invariants(&node.view());

    // An inode with a low number is found, although those above it were freed first.
    let low = node.entry(create(ROOT, "low", NewKind::File));
    unlinked_file(&mut node, "high", FILES + 10);
    node.answer_all(1, &[]);
    assert_eq!(node.reclaim(7).len(), 1);
    node.operate(unlink(ROOT, "low", Held::Open)).unwrap();
    assert_eq!(node.answer_all(1, &[low]), 1);
    node.reclaim(7);
    assert!(is_there(&node, low));
    unlinked_file(&mut node, "higher", FILES + 20);
    node.answer_all(1, &[]);
    node.reclaim(7);
    node.apply(LogBody::EndSession {
        session: SessionId(1),
    });
    node.reclaim(7);
    assert!(!is_there(&node, low));
    check_invariants(&node.view());
}
