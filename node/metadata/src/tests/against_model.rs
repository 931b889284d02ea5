//! Random histories: each command's verdict, results and attributes, and after each batch the whole tree, equal those
//! of the model. Freezing, flushing, reopening and installing a snapshot change nothing.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::super::*;
use super::events::{Event, SESSIONS, event};
use super::history::{History, reapply};
use super::model::Model;
use super::support::*;

fn run(events: Vec<Event>, level: u32) {
    let mut node = Node::new();
    let mut history = History {
        model: Model::new(),
        log: Vec::new(),
        clock: 0,
        session_ids: std::array::from_fn(|at| at as u64 + 1),
        counters: BTreeMap::new(),
        sequences: BTreeMap::new(),
        last_mutation: None,
        named: Vec::new(),
        dead: Vec::new(),
        contents: BTreeMap::new(),
        rewritten: BTreeMap::new(),
        marks: BTreeMap::new(),
    };
    history.model.asks = level >= 3;
    if level >= 2 {
        let mut batch = node.store.begin();
        history.apply(&mut batch, LogBody::RaiseFeatureLevel { level });
        batch.publish(at(history.log.len() as u64));
        history.model.raise(level);
    }
    let mut events = (0..SESSIONS as u8)
        .map(Event::Open)
        .chain(events)
        .chain([Event::Publish])
        .peekable();
    while events.peek().is_some() {
        let mut batch = node.store.begin();
        let boundary = loop {
            let Some(event) = events.next() else { break None };
            match event {
                Event::Publish | Event::Reopen | Event::Install => break Some(event),
                Event::Freeze => {
                    node.store.freeze();
                }
                Event::Flush => {
                    node.store.flush().unwrap();
                }
                other => step(&mut history, &mut batch, &node.store, other),
            }
        };
        batch.publish(at(history.log.len() as u64));
        let view = node.store.view().unwrap();
        history.compare(&view);
        match boundary {
            Some(Event::Reopen) => {
                let before = dump(&view);
                drop(view);
                let path = node.folder.path().join("metadata.redb");
                let durable = node.store.durable_position();
                drop(node.store);
                node.store = MetadataStore::open(&path, SMALL).unwrap();
                assert_eq!(node.store.position(), durable);
                reapply(&node.store, &history.log);
                assert_eq!(dump(&node.store.view().unwrap()), before);
            }
            Some(Event::Install) => install(&mut node, &history, &view),
            _ => {}
        }
    }
    drain(&mut history, &mut node);
}

/// Installs a snapshot of the durable state on a new node, which then replaces the old one.
fn install(node: &mut Node, history: &History, view: &View) {
    let before = dump(view);
    let snapshot = node.store.snapshot().unwrap();
    let rows: Vec<Row> = snapshot.rows().collect::<Result<_, _>>().unwrap();
    let other = Node::with_sessions(1);
    let old_view = other.view();
    let old_rows = dump(&old_view);
    let mut installation = other.store.begin_install().unwrap();
    rows.chunks(7).for_each(|some| installation.add(some).unwrap());
    let received = installation.finish().unwrap();
    assert_eq!(&other.store.install(received).unwrap(), snapshot.position());
    assert_eq!(&other.store.durable_position(), snapshot.position());
    assert_eq!(dump(&old_view), old_rows, "a view from before changed");
    reapply(&other.store, &history.log);
    assert_eq!(dump(&other.store.view().unwrap()), before);
    *node = other;
}

/// At the end everything that no session holds is freed.
fn drain(history: &mut History, node: &mut Node) {
    for step in 0.. {
        assert!(step < 100_000, "reclaiming does not end");
        let body = match history.model.asks {
            true if node.view().has_reclaimable().unwrap() => LogBody::Reclaim { work_max: 2 },
            true => break,
            false => {
                let inodes = node.view().reclaimable(2).unwrap();
                let Some(&inode) = inodes.first() else { break };
                LogBody::ReclaimUnlinked {
                    inode,
                    extents_max: 2,
                }
            }
        };
        let mut batch = node.store.begin();
        history.apply(&mut batch, body);
        batch.publish(at(history.log.len() as u64));
    }
    history.model.forget_doomed();
    let view = node.view();
    history.compare(&view);
    assert_eq!(view.inode_count(), history.model.inodes.len() as u64);
    for (number, inode) in &history.model.inodes {
        let written = inode.bytes.iter().flatten().count() as u64;
        let allocated = view.attributes(*number).unwrap().allocated_bytes;
        match history.rewritten.is_empty() {
            true => assert_eq!(allocated, written),
            // A rewrite fills small holes.
            false => assert!((written..=inode.bytes.len() as u64).contains(&allocated)),
        }
    }
    // Each chunk that was ever named is still named or was reported dead, once.
    let mut known: Vec<ChunkId> = history.dead.clone();
    known.extend(
        view.chunks_after(None, usize::MAX)
            .unwrap()
            .iter()
            .map(|row| row.0),
    );
    known.sort();
    for pair in known.windows(2) {
        assert_ne!(pair[0], pair[1], "dead twice, or dead and named");
    }
    assert!(history.named.iter().all(|id| known.binary_search(id).is_ok()));
}

fn step(history: &mut History, batch: &mut Batch<'_>, store: &MetadataStore, event: Event) {
    match event {
        Event::Command(session, ops) => {
            let session = history.session(session);
            let command = history.command(session, &ops);
            history.mutate(batch, session, command);
        }
        Event::Release(session, inodes) => {
            let inodes = inodes.iter().map(|at| history.inode(*at)).collect();
            let command = Command::single(Operation::ReleaseUnlinked { inodes });
            history.mutate(batch, history.session(session), command);
        }
        Event::Retry => {
            if let Some((mutation, result)) = history.last_mutation.clone() {
                let alive = history.model.living.contains(&mutation.request.session);
                let applied = history.apply(batch, LogBody::Call(mutation));
                let forgotten = !alive && applied.result == ApplyResult::UnknownSession;
                assert!(applied.result == result || forgotten);
                assert!(applied.effects.is_empty());
            }
        }
        Event::Clock(by) => history.clock = (history.clock + i64::from(by)).max(0),
        Event::Open(session) => {
            let session = history.session(session);
            let is_new = history.model.living.insert(session);
            let description = "test".into();
            let body = match history.model.asks {
                false => LogBody::OpenSession { session, description },
                true => LogBody::OpenSessionWithKey {
                    session,
                    description,
                    key: key(session),
                },
            };
            history.apply(batch, body);
            if is_new {
                history.marks.insert(session, history.log.len() as u64);
            }
        }
        Event::End(at) => {
            let session = history.session(at);
            history.apply(batch, LogBody::EndSession { session });
            history.model.end_session(session);
            history.session_ids[usize::from(at)] += SESSIONS;
        }
        Event::Forget(at) => {
            // Either the previous session, which has ended, or the living one, which must stay.
            let session = history.session(at);
            let before = SessionId(session.0.saturating_sub(SESSIONS));
            for session in [before, session] {
                history.apply(batch, LogBody::ForgetSession { session });
            }
        }
        Event::Reclaim(work_max) if history.model.asks => {
            history.apply(batch, LogBody::Reclaim { work_max });
        }
        Event::Answer(session, max, mask) => answer(history, batch, store, session, (max, mask)),
        Event::Reclaim(extents_max) => {
            // The leader sees published state; by now it may be outdated.
            for inode in store.view().unwrap().reclaimable(2).unwrap() {
                history.apply(batch, LogBody::ReclaimUnlinked { inode, extents_max });
            }
        }
        Event::Rewrite(file, any) => {
            let file = history.inode(file);
            history.rewrite(batch, store, file, any);
        }
        Event::Publish | Event::Freeze | Event::Flush | Event::Reopen | Event::Install => {}
    }
}

/// The question comes from published state; by now the session may have answered, or ended.
fn answer(
    history: &mut History,
    batch: &mut Batch<'_>,
    store: &MetadataStore,
    at: u8,
    (max, mask): (usize, u32),
) {
    let session = history.session(at);
    let view = store.view().unwrap();
    if !history.model.asks || !view.living_sessions().any(|living| living == session) {
        return;
    }
    let Some(page) = view.unlinked_page(session, max).unwrap() else {
        return;
    };
    let holds = |at: usize| mask & (1 << (at % 32)) != 0;
    let numbered = page.inodes.iter().copied().enumerate();
    let answer = UnlinkedAnswer {
        session,
        from: page.from,
        through: page.through,
        held: numbered
            .clone()
            .filter(|(at, _)| holds(*at))
            .map(|(_, inode)| inode)
            .collect(),
    };
    let is_due = history.marks.get(&session) == Some(&page.from);
    // It may arrive twice.
    let answers = vec![answer.clone(), answer];
    history.apply(batch, LogBody::AnswerUnlinked { answers });
    if is_due {
        history.marks.insert(session, page.through);
        for (at, inode) in numbered {
            history.model.answer(session, inode, holds(at));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_history_is_that_of_the_model(events in vec(event(), 1..150)) {
        run(events, 1);
    }

    #[test]
    fn any_history_of_sessions_that_answer_in_order_is_that_of_the_model(events in vec(event(), 1..150)) {
        run(events, 3);
    }
}
