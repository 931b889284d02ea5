//! A cluster in the memory of one process, for tests: the state machine of the nodes (`quorumfs_metadata`), a map of
//! chunks in place of their content stores, and injected faults.
//!
//! Its answers are those of a real cluster, because the same code makes them. It has no log, no network, and no leases.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_client::{Cluster, FreshContent, UnlinkedHandler};
use quorumfs_metadata::{
    Applied, ApplyResult, FEATURE_LEVEL, Failure, LogBody, LogCommand, MetadataOptions, MetadataStore,
    Position, SessionKey, UnlinkedAnswer, View,
};
use quorumfs_proto::call::Mutation;
use quorumfs_proto::chunk::Extent;
use quorumfs_proto::query::{Answer, Space};
use quorumfs_proto::{
    ChunkBody, ChunkId, Command, FsError, InodeNumber, Lane, NewChunk, Operation, Outcome, Query, RequestId,
    SessionId, Sha256, Timestamp,
};

/// Most rows freed by one reclaim step.
const RECLAIM_WORK_MAX: u32 = 1_000;

/// The state machine and the index of its last command.
struct State {
    store: MetadataStore,
    index: u64,
    /// The sequence of the last mutation of each session.
    sequences: BTreeMap<SessionId, u64>,
    _folder: tempfile::TempDir,
}

/// The cluster that all mounts of a test share.
pub struct MemoryCluster {
    state: Mutex<State>,
    chunks: Mutex<HashMap<ChunkId, Bytes>>,
    handlers: Mutex<BTreeMap<SessionId, UnlinkedHandler>>,
    /// The commands that took effect, in order.
    pub commands: Mutex<Vec<Command>>,
    /// The number of puts.
    pub puts: AtomicU64,
    /// The number of chunk reads.
    pub gets: AtomicU64,
    /// The number of queries.
    pub queries: AtomicU64,
    /// The error that all puts return, if set.
    pub put_fault: Mutex<Option<FsError>>,
    /// Whether the next mutation with chunks fails with [`FsError::ChunkDead`].
    pub kill_chunks: AtomicBool,
    /// Held for writing, it blocks all puts.
    pub put_gate: tokio::sync::RwLock<()>,
}

/// The connection of one session.
#[derive(Clone)]
pub struct Connection {
    /// The cluster.
    pub cluster: Arc<MemoryCluster>,
    session: SessionId,
    counter: Arc<AtomicU64>,
    pauses: Arc<AtomicU64>,
}

/// A chunk that no command has named.
#[derive(Clone)]
pub struct MemoryChunk {
    id: ChunkId,
    payload: Bytes,
}

impl FreshContent for MemoryChunk {
    fn id(&self) -> ChunkId {
        self.id
    }

    fn stored(&self) -> NewChunk {
        self.named(ChunkBody::Stored)
    }

    fn inline(&self) -> NewChunk {
        self.named(ChunkBody::Inline(self.payload.clone()))
    }
}

impl MemoryChunk {
    fn named(&self, body: ChunkBody) -> NewChunk {
        NewChunk {
            id: self.id,
            length: u32::try_from(self.payload.len()).expect("a chunk"),
            sha256: Sha256::of(&self.payload),
            body,
        }
    }
}

impl State {
    fn apply(&mut self, body: LogBody) -> Applied {
        self.index += 1;
        let stamp = Timestamp::from(SystemTime::now());
        let mut batch = self.store.begin();
        let applied = batch.apply(self.index, &LogCommand { stamp, body });
        batch.publish(Position {
            index: self.index,
            ..Position::default()
        });
        applied.expect("the database is in order")
    }

    fn view(&self) -> View {
        self.store.view().expect("the database is in order")
    }
}

impl MemoryCluster {
    /// Makes an empty cluster.
    pub fn new() -> Arc<MemoryCluster> {
        let folder = tempfile::tempdir().expect("a folder for the state");
        let options = MetadataOptions {
            cache_bytes: 1 << 20,
            ..MetadataOptions::default()
        };
        let store = MetadataStore::open(&folder.path().join("metadata.redb"), options);
        let mut state = State {
            store: store.expect("a new database"),
            index: 0,
            sequences: BTreeMap::new(),
            _folder: folder,
        };
        state.apply(LogBody::RaiseFeatureLevel { level: FEATURE_LEVEL });
        Arc::new(MemoryCluster {
            state: Mutex::new(state),
            chunks: Mutex::default(),
            handlers: Mutex::default(),
            commands: Mutex::default(),
            puts: AtomicU64::new(0),
            gets: AtomicU64::new(0),
            queries: AtomicU64::new(0),
            put_fault: Mutex::new(None),
            kill_chunks: AtomicBool::new(false),
            put_gate: tokio::sync::RwLock::new(()),
        })
    }

    /// Opens the session, unless it is open, and returns a connection.
    pub fn connect(self: &Arc<Self>, session: u64) -> Connection {
        let session = SessionId(session);
        let opened = self.state.lock().apply(LogBody::OpenSessionWithKey {
            session,
            description: String::new(),
            key: SessionKey {
                secret: Sha256::of(&session.0.to_be_bytes()),
                certificate: None,
            },
        });
        assert_eq!(opened.result, ApplyResult::Done);
        Connection {
            cluster: Arc::clone(self),
            session,
            counter: Arc::default(),
            pauses: Arc::default(),
        }
    }

    /// Asks every session about unlinked inodes, as the leader does periodically, and frees those that no session has
    /// open.
    pub fn reclaim(&self) {
        let sessions: Vec<SessionId> = self.state.lock().view().living_sessions().collect();
        for session in sessions {
            self.query_unlinked(session);
        }
        let mut state = self.state.lock();
        while state.view().has_reclaimable().expect("readable") {
            let work_max = RECLAIM_WORK_MAX;
            let freed = state.apply(LogBody::Reclaim { work_max });
            self.remove_dead_chunks(&freed);
        }
    }

    fn query_unlinked(&self, session: SessionId) {
        let view = self.state.lock().view();
        if let Some(page) = view.unlinked_page(session, usize::MAX).expect("readable") {
            let released = self.not_open(session, &page.inodes);
            let mut held = page.inodes;
            held.retain(|inode| !released.contains(inode));
            let answers = vec![UnlinkedAnswer {
                session,
                from: page.from,
                through: page.through,
                held,
            }];
            self.state.lock().apply(LogBody::AnswerUnlinked { answers });
        }
        let held = view
            .unlinked_held_by(session, InodeNumber(0), usize::MAX)
            .expect("readable");
        let inodes = self.not_open(session, &held);
        if !inodes.is_empty() {
            let release = Command::single(Operation::ReleaseUnlinked { inodes });
            let released = self.apply_mutation(session, release);
            assert!(released.is_ok(), "{released:?}");
        }
    }

    /// Returns those of `inodes` that `session` does not have open.
    fn not_open(&self, session: SessionId, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        match self.handlers.lock().get(&session) {
            Some(handler) => handler(inodes),
            None => inodes.to_vec(),
        }
    }

    /// Returns the number of inodes, including the root.
    pub fn inode_count(&self) -> usize {
        self.state.lock().view().inode_count() as usize
    }

    /// Returns the extents of a file.
    pub fn extents_of(&self, inode: InodeNumber) -> Vec<Extent> {
        let query = Query::Extents {
            inode,
            from: 0,
            to: u64::MAX,
            extents_max: u32::MAX,
        };
        match self.answer(&query) {
            Ok(Answer::Extents(page)) => page.extents,
            other => panic!("no extents: {other:?}"),
        }
    }

    /// Removes chunks that the applied command left dead.
    fn remove_dead_chunks(&self, applied: &Applied) {
        let mut chunks = self.chunks.lock();
        for dead in &applied.effects.dead {
            chunks.remove(dead);
        }
    }

    fn apply(&self, session: SessionId, command: Command) -> Result<Outcome, FsError> {
        command.validate(session)?;
        if !command.chunks.is_empty() && self.kill_chunks.swap(false, Ordering::SeqCst) {
            return Err(FsError::ChunkDead);
        }
        for chunk in &command.chunks {
            match &chunk.body {
                ChunkBody::Inline(bytes) => {
                    self.chunks.lock().insert(chunk.id, bytes.clone());
                }
                ChunkBody::Stored => {
                    assert!(
                        self.chunks.lock().contains_key(&chunk.id),
                        "content before metadata"
                    );
                }
            }
        }
        let outcome = self.apply_mutation(session, command.clone())?;
        self.commands.lock().push(command);
        Ok(outcome)
    }

    fn apply_mutation(&self, session: SessionId, command: Command) -> Result<Outcome, FsError> {
        let mut state = self.state.lock();
        let sequence = state.sequences.entry(session).or_default();
        *sequence += 1;
        let request = RequestId {
            session,
            lane: Lane(0),
            sequence: *sequence,
        };
        let applied = state.apply(LogBody::Call(Mutation {
            request,
            chunk_low_water: 0,
            command,
        }));
        self.remove_dead_chunks(&applied);
        match applied.result {
            ApplyResult::Outcome(outcome) => outcome,
            other => panic!("not decided: {other:?}"),
        }
    }

    fn answer(&self, query: &Query) -> Result<Answer, FsError> {
        let view = self.state.lock().view();
        if let Query::Space = query {
            return Ok(Answer::Space(Space {
                capacity_bytes: 1 << 40,
                available_bytes: 1 << 39,
                inodes: view.inode_count(),
            }));
        }
        match view.answer(query) {
            Ok(answer) => Ok(answer),
            Err(Failure::Verdict(verdict)) => Err(verdict),
            Err(Failure::Fault(fault)) => panic!("the database is not in order: {fault}"),
        }
    }
}

impl Connection {
    /// Yields a varying number of times, so that other tasks interleave.
    async fn pause(&self) {
        for _ in 0..self.pauses.fetch_add(1, Ordering::Relaxed) * 7 % 5 {
            tokio::task::yield_now().await;
        }
    }
}

impl Cluster for Connection {
    type Chunk = MemoryChunk;

    async fn mutate(&self, command: Command, _stored: &[MemoryChunk]) -> Result<Outcome, FsError> {
        self.pause().await;
        let outcome = self.cluster.apply(self.session, command);
        self.pause().await;
        outcome
    }

    async fn query(&self, query: Query) -> Result<Answer, FsError> {
        self.cluster.queries.fetch_add(1, Ordering::Relaxed);
        self.pause().await;
        let answer = self.cluster.answer(&query);
        self.pause().await;
        answer
    }

    fn new_chunk(&self, payload: Bytes) -> MemoryChunk {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
        let id = ChunkId {
            session: self.session,
            counter,
        };
        MemoryChunk { id, payload }
    }

    async fn put_chunk(&self, chunk: &MemoryChunk) -> Result<(), FsError> {
        let _open = self.cluster.put_gate.read().await;
        self.pause().await;
        if let Some(fault) = *self.cluster.put_fault.lock() {
            return Err(fault);
        }
        self.cluster.puts.fetch_add(1, Ordering::Relaxed);
        self.cluster.chunks.lock().insert(chunk.id, chunk.payload.clone());
        Ok(())
    }

    async fn get_chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        self.cluster.gets.fetch_add(1, Ordering::Relaxed);
        self.pause().await;
        let chunk = self
            .cluster
            .chunks
            .lock()
            .get(&id)
            .cloned()
            .ok_or(FsError::Stale)?;
        Ok(chunk.slice(offset as usize..(offset + length) as usize))
    }

    fn set_unlinked_handler(&self, handler: UnlinkedHandler) {
        self.cluster.handlers.lock().insert(self.session, handler);
    }
}
