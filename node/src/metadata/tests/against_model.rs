//! Random histories: each command's verdict, results and attributes, and after each batch the whole tree, are those of
//! the model; freezing, flushing, reopening and installing a snapshot change nothing.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use quorumfs_proto::call::Mutation;
use quorumfs_proto::chunk::{ChunkBody, NewChunk};
use quorumfs_proto::command::*;
use quorumfs_proto::query::EntryDetail;
use quorumfs_proto::*;

use super::super::*;
use super::events::{Event, Op, SESSIONS, event};
use super::model::{Byte, Model};
use super::support::*;

/// The history so far, beside the model's.
struct History {
    model: Model,
    log: Vec<(LogCommand, CallResult)>,
    clock: i64,
    /// Session `n` ends and a new one takes its place in the history.
    session_ids: [u64; SESSIONS as usize],
    counters: BTreeMap<SessionId, u64>,
    sequences: BTreeMap<SessionId, u64>,
    last_mutation: Option<(Mutation, CallResult)>,
    named: Vec<ChunkId>,
    dead: Vec<ChunkId>,
    contents: BTreeMap<InodeNumber, (u64, Vec<Byte>)>,
    /// What each byte of a chunk that a rewrite made was before.
    rewritten: BTreeMap<ChunkId, Vec<Byte>>,
    /// Up to where each session has answered.
    marks: BTreeMap<SessionId, u64>,
}

impl History {
    fn session(&self, at: u8) -> SessionId {
        SessionId(self.session_ids[usize::from(at)])
    }

    fn stamp(&self) -> Timestamp {
        Timestamp {
            seconds: 1000 + self.clock / 1_000_000_000,
            nanoseconds: (self.clock % 1_000_000_000) as u32,
        }
    }

    /// A number that is mostly in use, never one of an inode that may be gone at any moment.
    fn inode(&self, at: u8) -> InodeNumber {
        let inode = InodeNumber(1 + u64::from(at) % self.model.next_inode);
        match self.model.inodes.get(&inode) {
            Some(found) if found.is_doomed() => InodeNumber::ROOT,
            _ => inode,
        }
    }

    fn target(&self, at: u8) -> Target {
        match at {
            0..4 => Target::Created(u16::from(at % 2)),
            _ => Target::Inode(self.inode(at)),
        }
    }

    /// A directory more often than not.
    fn parent(&self, at: u8) -> Target {
        let directories: Vec<InodeNumber> = self
            .model
            .inodes
            .values()
            .filter(|inode| inode.attributes.kind == FileKind::Directory && !inode.is_doomed())
            .map(|inode| inode.attributes.inode)
            .collect();
        match at {
            0..30 => Target::Inode(directories[usize::from(at) % directories.len()]),
            _ => self.target(at - 30),
        }
    }

    fn command(&mut self, session: SessionId, ops: &[Op]) -> Command {
        let mut command = Command {
            chunks: Vec::new(),
            operations: Vec::new(),
        };
        for op in ops {
            let operation = self.operation(session, op, &mut command.chunks);
            command.operations.push(operation);
        }
        command
    }

    fn chunk(&mut self, session: SessionId, length: u32, chunks: &mut Vec<NewChunk>) -> ChunkId {
        let counter = self.counters.entry(session).or_insert(0);
        *counter += 1;
        let mut chunk = chunk(session.0, *counter, length);
        if counter.is_multiple_of(2) {
            chunk.body = ChunkBody::Inline(Bytes::from(vec![0; length as usize]));
        }
        let id = chunk.id;
        chunks.push(chunk);
        id
    }

    fn operation(&mut self, session: SessionId, op: &Op, chunks: &mut Vec<NewChunk>) -> Operation {
        let text = |n: u8| name(["a", "b", "c", "d"][usize::from(n)]);
        let held = |open: bool| if open { Held::Open } else { Held::NotOpen };
        let existing = |open: bool| if open { IfExists::Open } else { IfExists::Refuse };
        let privileges = |drop: bool| if drop { Privileges::Drop } else { Privileges::Keep };
        let xattr = |n: u8| {
            XattrName::new(
                ["user.a", "user.b", "security.capability", "trusted.c"][usize::from(n)].as_bytes(),
            )
            .unwrap()
        };
        let change = |inode, changes| Operation::SetAttributes { inode, changes };
        match op {
            Op::Create(parent, n, kind, open) => Operation::Create {
                parent: self.parent(*parent),
                name: text(*n),
                inode: new_inode(match kind {
                    0..3 => NewKind::File,
                    3..6 => NewKind::Directory,
                    6 => NewKind::Symlink(SymlinkTarget::new(&b"target"[..]).unwrap()),
                    _ => NewKind::CharacterDevice(259),
                }),
                existing: existing(*open),
            },
            Op::CreateUnlinked => Operation::CreateUnlinked {
                inode: new_inode(NewKind::File),
            },
            Op::Link(target, parent, n, open) => Operation::Link {
                inode: self.target(*target),
                parent: self.parent(*parent),
                name: text(*n),
                existing: existing(*open),
            },
            Op::Unlink(parent, n, open) => Operation::Unlink {
                parent: self.parent(*parent),
                name: text(*n),
                held: held(*open),
            },
            Op::RemoveDirectory(parent, n) => Operation::RemoveDirectory {
                parent: self.parent(*parent),
                name: text(*n),
            },
            Op::Rename(from, to, mode, open) => Operation::Rename {
                from_parent: self.parent(from.0),
                from_name: text(from.1),
                to_parent: self.parent(to.0),
                to_name: text(to.1),
                mode: [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange][usize::from(*mode)],
                held: held(*open),
            },
            Op::Truncate(target, size) => change(
                self.target(*target),
                AttributeChanges {
                    size: Some(*size),
                    ..AttributeChanges::default()
                },
            ),
            Op::Write(target, places, time, drop) => {
                let inode = self.target(*target);
                // All pieces lie in one chunk, as the dirty ranges of a file do.
                let chunk = self.chunk(session, places.iter().map(|place| place.1).sum(), chunks);
                let mut chunk_offset = 0;
                let mut pieces = Vec::new();
                for (file_offset, length) in places {
                    pieces.push(Piece {
                        file_offset: *file_offset,
                        length: *length,
                        chunk,
                        chunk_offset,
                    });
                    chunk_offset += length;
                }
                Operation::Write {
                    inode,
                    pieces,
                    mtime: time.then(|| self.stamp()),
                    privileges: privileges(*drop),
                }
            }
            Op::Append(target, length) => {
                let inode = self.target(*target);
                let chunk = self.chunk(session, *length, chunks);
                let piece = |file_offset, length, chunk_offset| Piece {
                    file_offset,
                    length,
                    chunk,
                    chunk_offset,
                };
                Operation::Append {
                    inode,
                    pieces: vec![piece(0, *length, 0)],
                    privileges: Privileges::Drop,
                }
            }
            Op::Chmod(target, mode) => change(
                self.target(*target),
                AttributeChanges {
                    mode: Some(*mode),
                    ..AttributeChanges::default()
                },
            ),
            Op::Chown(target, owner) => change(
                self.target(*target),
                AttributeChanges {
                    uid: Some(*owner),
                    gid: Some(7),
                    ..AttributeChanges::default()
                },
            ),
            Op::Times(target, now) => {
                let time = match now {
                    true => SetTime::Now,
                    false => SetTime::At(self.stamp()),
                };
                change(
                    self.target(*target),
                    AttributeChanges {
                        mtime: Some(time),
                        atime: Some(SetTime::Now),
                        ..AttributeChanges::default()
                    },
                )
            }
            Op::Kill(target) => change(
                self.target(*target),
                AttributeChanges {
                    privileges: Some(Privileges::Drop),
                    ..AttributeChanges::default()
                },
            ),
            Op::SetXattr(target, n, mode) => Operation::SetXattr {
                inode: self.target(*target),
                name: xattr(*n),
                value: Bytes::from(vec![*mode; 3]),
                mode: [XattrMode::Set, XattrMode::Create, XattrMode::Replace][usize::from(*mode)],
            },
            Op::RemoveXattr(target, n) => Operation::RemoveXattr {
                inode: self.target(*target),
                name: xattr(*n),
            },
        }
    }

    fn mutation(&mut self, session: SessionId, command: Command) -> Mutation {
        let sequence = self.sequences.entry(session).or_insert(0);
        *sequence += 1;
        Mutation {
            request: RequestId {
                session,
                lane: Lane(3),
                sequence: *sequence,
            },
            chunk_low_water: 0,
            command,
        }
    }

    fn apply(&mut self, batch: &mut Batch<'_>, body: LogBody) -> Applied {
        let entry = LogCommand {
            stamp: self.stamp(),
            body,
        };
        self.model.tick(entry.stamp);
        let applied = batch.apply(self.log.len() as u64 + 1, &entry).unwrap();
        self.log.push((entry, applied.result.clone()));
        let brought = applied.effects.inline.iter().map(|chunk| chunk.id);
        self.named
            .extend(brought.chain(applied.effects.named.iter().copied()));
        self.dead.extend(&applied.effects.dead);
        applied
    }

    /// Runs a command in both and compares verdict, results and touched attributes.
    fn mutate(&mut self, batch: &mut Batch<'_>, session: SessionId, command: Command) {
        let mutation = self.mutation(session, command);
        let alive = self.model.living.contains(&session);
        let applied = self.apply(batch, LogBody::Call(mutation.clone()));
        if !alive {
            assert!(is_of_no_living_session(&applied.result));
            *self.sequences.get_mut(&session).unwrap() -= 1;
            return;
        }
        if let CallResult::Crowded(place) = applied.result {
            assert!(self.model.writes_drop_capabilities, "only from its level on");
            assert!(self.model.inodes.contains_key(&place.inode));
            // Nothing was done, and the lane waits for the same.
            *self.sequences.get_mut(&session).unwrap() -= 1;
            return;
        }
        self.last_mutation = Some((mutation.clone(), applied.result.clone()));
        let expected = self.model.run(session, &mutation.command);
        let CallResult::Outcome(outcome) = applied.result else {
            panic!("not decided: {mutation:?}");
        };
        let results = outcome.as_ref().map(|outcome| outcome.results.clone());
        assert_eq!(results, expected.as_ref().cloned(), "{mutation:?}");
        for touched in outcome.iter().flat_map(|outcome| &outcome.touched) {
            let modelled = &self.model.inodes[&touched.inode];
            if modelled.is_doomed() {
                // It may be half freed by this very command.
                continue;
            }
            assert_eq!(comparable(touched), modelled.attributes, "after {mutation:?}");
        }
        if let Ok(outcome) = &outcome {
            for result in &outcome.results {
                if let OperationResult::Entry { inode, .. } = result {
                    assert!(outcome.attributes_of(*inode).is_some());
                }
            }
        }
    }

    /// Puts runs of the file together as the leader does, from a view that may be out of date.
    fn rewrite(&mut self, batch: &mut Batch<'_>, store: &MetadataStore, file: InodeNumber, any: bool) {
        let terms = if any { RunTerms::Any } else { RunTerms::Worthwhile };
        let view = store.view().unwrap();
        let Ok(found) = view.runs(file, 0, u64::MAX, terms) else {
            return;
        };
        let session = self.session(0);
        for run in found.runs {
            let mut chunks = Vec::new();
            let length = (run.to() - run.from()) as u32;
            let id = self.chunk(session, length, &mut chunks);
            let mut bytes: Vec<Byte> = vec![None; length as usize];
            for piece in &run.pieces {
                for at in 0..piece.length {
                    let place = (piece.file_offset - run.from()) as usize + at as usize;
                    bytes[place] = self.origin((piece.chunk, piece.chunk_offset + at));
                }
            }
            self.rewritten.insert(id, bytes);
            let body = LogBody::Rewrite {
                inode: file,
                from: run.from(),
                extents: run.pieces.len() as u32,
                digest: run.digest,
                chunk: chunks.swap_remove(0),
            };
            let result = self.apply(batch, body).result;
            let refused = matches!(
                result,
                CallResult::Outcome(Err(FsError::Stale | FsError::NotSupported)) | CallResult::UnknownSession
            );
            assert!(result == CallResult::Done || refused, "{result:?}");
        }
    }

    /// What the model knows a byte of a chunk as.
    fn origin(&self, (chunk, at): (ChunkId, u32)) -> Byte {
        match self.rewritten.get(&chunk) {
            Some(bytes) => bytes[at as usize],
            None => Some((chunk, at)),
        }
    }

    /// The whole tree is the model's.
    fn compare(&mut self, view: &View) {
        assert_eq!(view.last_stamp(), self.model.now);
        for (number, inode) in &self.model.inodes {
            if inode.is_doomed() {
                continue;
            }
            let attributes = view.attributes(*number).unwrap();
            assert_eq!(comparable(&attributes), inode.attributes);
            let names: Vec<XattrName> = inode.xattrs.keys().cloned().collect();
            assert_eq!(view.xattr_names(*number).unwrap(), names);
            for (name, value) in &inode.xattrs {
                assert_eq!(view.xattr(*number, name).unwrap(), value);
            }
            match attributes.kind {
                FileKind::Directory => {
                    let listed = list(view, *number);
                    let entries: BTreeMap<Name, InodeNumber> =
                        listed.iter().map(|entry| (entry.0.clone(), entry.1)).collect();
                    assert_eq!(listed.len(), entries.len(), "listed twice");
                    assert_eq!(entries, inode.entries);
                }
                FileKind::File => {
                    let bytes = read(view, *number, attributes.size);
                    let origin = |byte: Byte| byte.and_then(|byte| self.origin(byte));
                    let bytes: Vec<Byte> = bytes.into_iter().map(origin).collect();
                    assert_eq!(bytes, inode.bytes, "bytes of {number}");
                    let seen = (attributes.content_version, bytes);
                    if let Some(before) = self.contents.insert(*number, seen.clone()) {
                        assert!(before.1 == seen.1 || before.0 < seen.0, "version of {number}");
                    }
                }
                FileKind::Symlink => {
                    assert_eq!(view.read_link(*number).unwrap(), *inode.target.as_ref().unwrap());
                }
                _ => {}
            }
        }
        check_invariants(view);
    }
}

fn comparable(attributes: &Attributes) -> Attributes {
    Attributes {
        allocated_bytes: 0,
        content_version: 0,
        ..attributes.clone()
    }
}

/// A directory's entries, a few at a time.
fn list(view: &View, directory: InodeNumber) -> Vec<(Name, InodeNumber)> {
    let mut found = Vec::new();
    let mut after = 0;
    loop {
        let page = view
            .read_directory(directory, after, 1, EntryDetail::Attributes)
            .unwrap();
        for entry in page.entries {
            assert!(entry.cookie > after);
            after = entry.cookie;
            assert_eq!(entry.attributes.unwrap().inode, entry.inode);
            found.push((entry.name, entry.inode));
        }
        if page.end {
            return found;
        }
    }
}

/// A file's bytes, two pieces at a time.
fn read(view: &View, file: InodeNumber, size: u64) -> Vec<Byte> {
    let mut bytes = vec![None; size as usize];
    let mut from = 0;
    while from < size {
        let page = view.extents(file, from, size, 2).unwrap();
        for piece in page.pieces {
            for at in 0..u64::from(piece.length) {
                let place = (piece.file_offset + at) as usize;
                bytes[place] = Some((piece.chunk, piece.chunk_offset + at as u32));
            }
        }
        assert!(page.known_to > from);
        from = page.known_to;
    }
    bytes
}

fn reapply(store: &MetadataStore, log: &[(LogCommand, CallResult)]) {
    let durable = store.position().index as usize;
    let mut batch = store.begin();
    for (at, (entry, result)) in log.iter().enumerate().skip(durable) {
        assert_eq!(&batch.apply(at as u64 + 1, entry).unwrap().result, result);
    }
    batch.publish(at(log.len() as u64));
}

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

/// A snapshot of the durable state goes to a new node, which then takes the place of the old one.
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

/// In the end all that nobody holds is freed.
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
    // Each chunk that was ever named is named still or was said to be dead, once.
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
                let forgotten = !alive && applied.result == CallResult::UnknownSession;
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
            // The one before, which has ended, or the living one, which must stay.
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
            // What the leader sees was published; by now it may be out of date.
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

/// What is asked was published; by now the session may have answered, or be over.
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
