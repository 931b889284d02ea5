//! Helpers that the tests share: a store in its own folder, short commands, and the rows of the state.

use std::collections::BTreeMap;

use bytes::Bytes;
use quorumfs_proto::call::Mutation;
use quorumfs_proto::chunk::{ChunkBody, NewChunk};
use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::super::overlay::{Direction, KeyRange};
use super::super::tables::*;
use super::super::*;

pub const SMALL: MetadataOptions = MetadataOptions {
    overlay_bytes_max: 64 << 20,
    cache_bytes: 4 << 20,
};

/// A store, the log that led to it, and the next index.
pub struct Node {
    pub folder: tempfile::TempDir,
    pub store: MetadataStore,
    pub index: u64,
    /// Next sequence by session and lane.
    sequences: BTreeMap<(SessionId, Lane), u64>,
}

impl Node {
    pub fn new() -> Node {
        let folder = tempfile::tempdir().unwrap();
        let store = MetadataStore::open(&folder.path().join("metadata.redb"), SMALL).unwrap();
        Node {
            folder,
            store,
            index: 0,
            sequences: BTreeMap::new(),
        }
    }

    /// Makes a node with open sessions 1 to `sessions`.
    pub fn with_sessions(sessions: u64) -> Node {
        let mut node = Node::new();
        for session in 1..=sessions {
            node.apply(LogBody::OpenSession {
                session: SessionId(session),
                description: String::new(),
            });
        }
        node
    }

    /// Returns the result of a new mutation of session 1, whatever it is.
    pub fn result_of(&mut self, command: Command) -> ApplyResult {
        let mutation = self.mutation(SessionId(1), command);
        let sequence = mutation.request.sequence;
        let result = self.apply(LogBody::Call(mutation)).result;
        if !matches!(result, ApplyResult::Outcome(_)) {
            // Nothing was decided: the lane expects the same sequence again.
            self.sequences.insert((SessionId(1), Lane(0)), sequence - 1);
        }
        result
    }

    /// Makes a node at the newest feature level, with open sessions 1 to `sessions`, which answer about unlinked inodes
    /// in order.
    pub fn at_newest_level(sessions: u64) -> Node {
        let mut node = Node::new();
        node.apply(LogBody::RaiseFeatureLevel { level: FEATURE_LEVEL });
        for session in 1..=sessions {
            node.open_with_key(session);
        }
        node
    }

    pub fn open_with_key(&mut self, session: u64) {
        let opened = self.apply(LogBody::OpenSessionWithKey {
            session: SessionId(session),
            description: String::new(),
            key: key(SessionId(session)),
        });
        assert_eq!(opened.result, ApplyResult::Done);
    }

    /// The session answers everything it is asked about, and holds `held`. Returns how many inodes it was asked about.
    pub fn answer_all(&mut self, session: u64, held: &[InodeNumber]) -> usize {
        let page = self.view().unlinked_page(SessionId(session), usize::MAX).unwrap();
        let Some(page) = page else { return 0 };
        let answer = UnlinkedAnswer {
            session: SessionId(session),
            from: page.from,
            through: page.through,
            held: held.to_vec(),
        };
        self.apply(LogBody::AnswerUnlinked {
            answers: vec![answer],
        });
        page.inodes.len()
    }

    /// Removes the last name of `text` in the root directory; no session holds the inode.
    pub fn unlink_for_all(&mut self, text: &str) {
        self.operate(unlink(InodeNumber::ROOT, text, Held::NotOpen))
            .unwrap();
        for session in self.view().living_sessions() {
            self.answer_all(session.0, &[]);
        }
    }

    /// Frees what can be freed, in steps of `work_max`; returns the chunks that died.
    pub fn reclaim(&mut self, work_max: u32) -> Vec<ChunkId> {
        let mut dead = Vec::new();
        for step in 0.. {
            assert!(step < 100_000, "reclaiming does not end");
            if !self.view().has_reclaimable().unwrap() {
                break;
            }
            dead.extend(self.apply(LogBody::Reclaim { work_max }).effects.dead);
        }
        dead
    }

    pub fn apply(&mut self, body: LogBody) -> Applied {
        self.apply_at(Timestamp::default(), body)
    }

    pub fn apply_at(&mut self, stamp: Timestamp, body: LogBody) -> Applied {
        self.index += 1;
        let mut batch = self.store.begin();
        let applied = batch.apply(self.index, &LogCommand { stamp, body }).unwrap();
        batch.publish(at(self.index));
        applied
    }

    /// Makes a new mutation of a session, in its lane 0.
    pub fn mutation(&mut self, session: SessionId, command: Command) -> Mutation {
        let sequence = self.sequences.entry((session, Lane(0))).or_insert(0);
        *sequence += 1;
        Mutation {
            request: RequestId {
                session,
                lane: Lane(0),
                sequence: *sequence,
            },
            chunk_low_water: 0,
            command,
        }
    }

    pub fn call(&mut self, session: u64, command: Command) -> (Result<Outcome, FsError>, Effects) {
        let mutation = self.mutation(SessionId(session), command);
        let applied = self.apply(LogBody::Call(mutation));
        match applied.result {
            ApplyResult::Outcome(outcome) => (outcome, applied.effects),
            other => panic!("not decided: {other:?}"),
        }
    }

    /// Runs one operation of session 1.
    pub fn operate(&mut self, operation: Operation) -> Result<Outcome, FsError> {
        self.call(1, Command::single(operation)).0
    }

    /// Returns the inode that an operation of session 1 answers.
    pub fn entry(&mut self, operation: Operation) -> InodeNumber {
        match self.operate(operation).unwrap().results[..] {
            [OperationResult::Entry { inode, .. }] => inode,
            ref other => panic!("no entry: {other:?}"),
        }
    }

    pub fn view(&self) -> View {
        self.store.view().unwrap()
    }

    pub fn attributes(&self, inode: InodeNumber) -> Attributes {
        self.view().attributes(inode).unwrap()
    }
}

pub fn at(index: u64) -> Position {
    Position {
        index,
        log_id: Some(Bytes::from(index.to_be_bytes().to_vec())),
        membership: None,
    }
}

/// Returns the key of a test session.
pub fn key(session: SessionId) -> SessionKey {
    SessionKey {
        secret: Sha256::of(&session.0.to_be_bytes()),
        certificate: None,
    }
}

/// Whether this is the result for a session that does not, or no longer, live.
pub fn is_of_no_living_session(result: &ApplyResult) -> bool {
    matches!(result, ApplyResult::UnknownSession | ApplyResult::NeverDecided)
}

pub fn name(text: &str) -> Name {
    Name::new(text.as_bytes().to_vec()).unwrap()
}

pub fn new_inode(kind: NewKind) -> NewInode {
    NewInode {
        kind,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
    }
}

pub fn create(parent: InodeNumber, text: &str, kind: NewKind) -> Operation {
    Operation::Create {
        parent: Target::Inode(parent),
        name: name(text),
        inode: new_inode(kind),
        existing: IfExists::Refuse,
    }
}

pub fn unlink(parent: InodeNumber, text: &str, held: Held) -> Operation {
    Operation::Unlink {
        parent: Target::Inode(parent),
        name: name(text),
        held,
    }
}

pub fn set(inode: InodeNumber, changes: AttributeChanges) -> Operation {
    Operation::SetAttributes {
        inode: Target::Inode(inode),
        changes,
    }
}

pub fn truncate(inode: InodeNumber, size: u64) -> Operation {
    set(
        inode,
        AttributeChanges {
            size: Some(size),
            ..AttributeChanges::default()
        },
    )
}

pub fn chunk(session: u64, counter: u64, length: u32) -> NewChunk {
    NewChunk {
        id: ChunkId {
            session: SessionId(session),
            counter,
        },
        length,
        sha256: Sha256::of(&counter.to_be_bytes()),
        body: ChunkBody::Stored,
    }
}

/// Writes a new chunk at each of the offsets; the counters start at `counter`.
pub fn write_chunks(inode: Target, session: u64, counter: u64, offsets: &[u64], length: u32) -> Command {
    let chunks: Vec<NewChunk> = (counter..)
        .zip(offsets)
        .map(|(counter, _)| chunk(session, counter, length))
        .collect();
    let extents = chunks
        .iter()
        .zip(offsets)
        .map(|(chunk, offset)| Extent {
            file_offset: *offset,
            length,
            chunk: chunk.id,
            chunk_offset: 0,
        })
        .collect();
    Command {
        chunks,
        operations: vec![Operation::Write {
            inode,
            extents,
            mtime: None,
            privileges: Privileges::Keep,
        }],
    }
}

/// Returns all rows of a view as bytes.
pub fn dump(view: &View) -> Vec<(u8, Vec<u8>, Vec<u8>)> {
    let mut rows = Vec::new();
    dump_table::<Meta>(view, b"state", &mut rows);
    dump_table::<Format>(view, b"format", &mut rows);
    dump_table::<Inodes>(view, b"", &mut rows);
    dump_table::<Dirents>(view, b"", &mut rows);
    dump_table::<Extents>(view, b"", &mut rows);
    dump_table::<Xattrs>(view, b"", &mut rows);
    dump_table::<Symlinks>(view, b"", &mut rows);
    dump_table::<Sessions>(view, b"", &mut rows);
    dump_table::<Lanes>(view, b"", &mut rows);
    dump_table::<Orphans>(view, b"", &mut rows);
    dump_table::<Pins>(view, b"", &mut rows);
    dump_table::<Reclaimable>(view, b"", &mut rows);
    dump_table::<Chunks>(view, b"", &mut rows);
    dump_table::<Fragmented>(view, b"", &mut rows);
    dump_table::<Unlinked>(view, b"", &mut rows);
    dump_table::<UnlinkedQueue>(view, b"", &mut rows);
    dump_table::<Holds>(view, b"", &mut rows);
    dump_table::<Marks>(view, b"", &mut rows);
    dump_table::<Departed>(view, b"", &mut rows);
    dump_table::<SessionKeys>(view, b"", &mut rows);
    dump_table::<Silences>(view, b"", &mut rows);
    rows
}

fn dump_table<R: Rows>(view: &View, prefix: &[u8], into: &mut Vec<(u8, Vec<u8>, Vec<u8>)>) {
    let range = KeyRange::prefix(prefix);
    for row in view.layers.scan::<R>(range, Direction::Up).unwrap() {
        let (key, value) = row.unwrap();
        into.push((
            R::TABLE.number(),
            R::key(&key).to_vec(),
            codec::encode_checked(&value).to_vec(),
        ));
    }
}

/// Checks the invariants of a state.
pub fn check_invariants(view: &View) {
    let all = || KeyRange::prefix(&[]);
    let mut references: BTreeMap<ChunkId, u32> = BTreeMap::new();
    let mut allocated: BTreeMap<InodeNumber, u64> = BTreeMap::new();
    let mut last: Option<(InodeNumber, u64)> = None;
    for row in view.layers.scan::<Extents>(all(), Direction::Up).unwrap() {
        let ((inode, offset), extent) = row.unwrap();
        if let Some((last_inode, end)) = last {
            assert!(
                last_inode != inode || end <= offset,
                "extents of {inode} overlap at {offset}"
            );
        }
        last = Some((inode, offset + u64::from(extent.length)));
        *references.entry(extent.chunk).or_default() += 1;
        *allocated.entry(inode).or_default() += u64::from(extent.length);
    }
    let chunks = view.chunks_after(None, usize::MAX).unwrap();
    let counted: BTreeMap<ChunkId, u32> = chunks.iter().map(|(id, c)| (*id, c.references)).collect();
    assert_eq!(counted, references, "references of chunks");

    let mut names: BTreeMap<InodeNumber, u32> = BTreeMap::new();
    let mut subdirectories: BTreeMap<InodeNumber, u32> = BTreeMap::new();
    let mut entries: BTreeMap<InodeNumber, u64> = BTreeMap::new();
    for row in view.layers.scan::<Dirents>(all(), Direction::Up).unwrap() {
        let (key, entry) = row.unwrap();
        *names.entry(entry.inode).or_default() += 1;
        *entries.entry(key.directory).or_default() += 1;
        if entry.kind == FileKind::Directory {
            *subdirectories.entry(key.directory).or_default() += 1;
        }
    }
    let mut held: BTreeMap<InodeNumber, u32> = BTreeMap::new();
    for row in view.layers.scan::<Holds>(all(), Direction::Up).unwrap() {
        let ((_, inode), ()) = row.unwrap();
        *held.entry(inode).or_default() += 1;
    }
    let mut inodes = 0;
    for row in view.layers.scan::<Inodes>(all(), Direction::Up).unwrap() {
        let (inode, record) = row.unwrap();
        let attributes = record.attributes;
        inodes += 1;
        let named = names.remove(&inode).unwrap_or(0);
        let links = match attributes.kind {
            FileKind::Directory if named == 0 && inode != InodeNumber::ROOT => 0,
            FileKind::Directory => 2 + subdirectories.get(&inode).unwrap_or(&0),
            _ => named,
        };
        assert_eq!(attributes.links, links, "links of {inode}");
        if attributes.kind == FileKind::Directory {
            assert_eq!(attributes.size, entries.get(&inode).copied().unwrap_or(0));
        }
        assert_eq!(
            attributes.allocated_bytes,
            allocated.remove(&inode).unwrap_or(0),
            "allocated bytes of {inode}"
        );
        let xattrs = view.xattr_names(inode).unwrap().len();
        assert_eq!(attributes.xattr_count as usize, xattrs);
        let orphan = view.layers.get::<Orphans>(&inode).unwrap();
        let unlinked = view.layers.get::<Unlinked>(&inode).unwrap();
        let has_no_name = orphan.is_some() != unlinked.is_some();
        assert_eq!(has_no_name, links == 0, "orphanhood of {inode}");
        let queued = unlinked.as_ref().is_some_and(|record| {
            let place = (record.since, inode);
            view.layers.contains::<UnlinkedQueue>(&place).unwrap()
        });
        let holds = unlinked.map_or(0, |record| record.holds);
        assert_eq!(holds, held.remove(&inode).unwrap_or(0), "holds of {inode}");
        let is_kept = queued || holds > 0;
        let waiting = orphan.map(|orphan| orphan.waiting_for).unwrap_or_default();
        for session in &waiting {
            assert!(view.layers.contains::<Pins>(&(*session, inode)).unwrap());
        }
        if (links == 0 && waiting.is_empty() && !is_kept) || !record.cuts.is_empty() {
            assert!(view.layers.contains::<Reclaimable>(&inode).unwrap());
        }
    }
    assert!(held.is_empty(), "holds of inodes without a row: {held:?}");
    assert!(names.is_empty(), "entries name missing inodes: {names:?}");
    assert!(allocated.is_empty(), "extents of missing inodes: {allocated:?}");
    assert_eq!(view.inode_count(), inodes);
    for row in view.layers.scan::<Pins>(all(), Direction::Up).unwrap() {
        let ((session, inode), ()) = row.unwrap();
        let orphan = view.layers.get::<Orphans>(&inode).unwrap().unwrap();
        assert!(orphan.waiting_for.contains(&session));
    }
}

/// Returns the command with which the leader, as session 1, replaces `run` by a chunk.
pub fn rewrite(inode: InodeNumber, run: &Run, counter: u64) -> LogBody {
    LogBody::Rewrite {
        inode,
        from: run.from(),
        extents: run.extents.len() as u32,
        digest: run.digest,
        chunk: chunk(1, counter, (run.to() - run.from()) as u32),
    }
}
