//! A cluster in the test process: the real metadata state machine and a map of chunks behind the real gRPC service,
//! with configurable faults. The real client connects to it, so the complete REST interface is tested.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use parking_lot::Mutex;
use quorumfs_client::{Client, ClientOptions};
use quorumfs_proto::call::SessionState;
use quorumfs_proto::chunk::block_crcs;
use quorumfs_proto::limits::{BLOCK_BYTES, MESSAGE_BYTES_MAX};
use quorumfs_proto::query::Space;
use quorumfs_proto::{
    Addresses, Answer, ChunkId, ClientRequest, ClientResponse, FsError, Member, NodeId, Query, Refusal,
    Timestamp, codec,
};
use quorumfs_wire as wire;
use quorumfs_wire::file_system_server::{FileSystem, FileSystemServer};
use quorumfs_wire::{
    CallRequest, CallResponse, ChunkStatus, DiscoverRequest, DiscoverResponse, GetChunkRequest,
    GetChunkResponse, PutChunkRequest, PutChunkResponse,
};
use tokio::sync::Semaphore;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

use quorumfs_metadata::{
    ApplyResult, Failure, LogBody, LogCommand, MetadataOptions, MetadataStore, Position,
};

/// The reason that a test cluster without a quorum reports.
pub(super) const REASON: &str = "2 of 3 nodes are on holiday";

/// A test cluster; its server ends when it is dropped.
pub(super) struct TestCluster {
    pub(super) state: Arc<State>,
    _server: AbortOnDropHandle<()>,
    _directory: tempfile::TempDir,
}

/// The state of the service and its faults.
pub(super) struct State {
    member: Member,
    metadata: MetadataStore,
    index: Mutex<u64>,
    pub(super) chunks: Mutex<HashMap<ChunkId, Bytes>>,
    /// There is no leader: calls and puts are refused.
    pub(super) leaderless: AtomicBool,
    /// Chunks and commands with content are refused.
    pub(super) full: AtomicBool,
    /// Number of applied mutations.
    pub(super) mutations: AtomicU64,
    /// Each get of a chunk consumes a permit.
    pub(super) gets: Semaphore,
}

impl TestCluster {
    pub(super) async fn start() -> TestCluster {
        let directory = tempfile::tempdir().unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let options = MetadataOptions {
            cache_bytes: 1 << 20,
            ..MetadataOptions::default()
        };
        let state = Arc::new(State {
            member: Member {
                id: NodeId {
                    slot: 1,
                    incarnation: 7,
                },
                addresses: Addresses {
                    grpc: listener.local_addr().unwrap().to_string(),
                    http: String::new(),
                },
            },
            metadata: MetadataStore::open(&directory.path().join("metadata.redb"), options).unwrap(),
            index: Mutex::new(0),
            chunks: Mutex::default(),
            leaderless: AtomicBool::new(false),
            full: AtomicBool::new(false),
            mutations: AtomicU64::new(0),
            gets: Semaphore::new(Semaphore::MAX_PERMITS),
        });
        let service = FileSystemServer::new(Service(Arc::clone(&state)))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let server = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        TestCluster {
            state,
            _server: AbortOnDropHandle::new(server),
            _directory: directory,
        }
    }

    pub(super) async fn client(&self) -> Client {
        let options = ClientOptions {
            addresses: vec![self.state.member.addresses.grpc.clone()],
            description: "REST tests".to_string(),
            call_timeout: None,
            ..ClientOptions::default()
        };
        Client::connect(options).await.unwrap()
    }
}

impl State {
    /// Returns the number of inodes, including the root.
    pub(super) fn inodes(&self) -> u64 {
        self.metadata.view().unwrap().inode_count()
    }

    pub(super) fn chunk_count(&self) -> usize {
        self.chunks.lock().len()
    }

    pub(super) fn set(flag: &AtomicBool, to: bool) {
        flag.store(to, Ordering::SeqCst);
    }

    /// Waits until `condition` holds, at most for two keep-alive intervals.
    pub(super) async fn until(&self, what: &str, condition: impl Fn(&State) -> bool) {
        for _ in 0..600 {
            if condition(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("never: {what}");
    }

    fn apply(&self, body: LogBody) -> ApplyResult {
        let mut index = self.index.lock();
        let result = self.apply_one(&mut index, body);
        // Reclaims like a leader, until nothing is left.
        loop {
            let view = self.metadata.view().unwrap();
            let Some(inode) = view.reclaimable(1).unwrap().pop() else {
                return result;
            };
            let extents_max = 1000;
            self.apply_one(&mut index, LogBody::ReclaimUnlinked { inode, extents_max });
        }
    }

    fn apply_one(&self, index: &mut u64, body: LogBody) -> ApplyResult {
        *index += 1;
        let stamp = Timestamp::from(SystemTime::now());
        let mut batch = self.metadata.begin();
        let applied = batch.apply(*index, &LogCommand { stamp, body }).unwrap();
        batch.publish(Position {
            index: *index,
            ..Position::default()
        });
        let mut chunks = self.chunks.lock();
        for inline in applied.effects.inline {
            chunks.insert(inline.id, inline.payload);
        }
        for named in &applied.effects.named {
            assert!(chunks.contains_key(named), "content before metadata");
        }
        for dead in applied.effects.dead {
            chunks.remove(&dead);
        }
        applied.result
    }

    fn call(&self, call: ClientRequest) -> ClientResponse {
        if self.leaderless.load(Ordering::SeqCst) {
            let reason = REASON.to_string();
            return ClientResponse::Refused(Refusal::Unavailable { reason });
        }
        match call {
            ClientRequest::Mutate(mutation) => {
                let full = self.full.load(Ordering::SeqCst);
                if full && !mutation.command.frees_space() && !mutation.command.chunks.is_empty() {
                    return ClientResponse::Outcome(Err(FsError::NoSpace));
                }
                self.mutations.fetch_add(1, Ordering::SeqCst);
                match self.apply(LogBody::Call(mutation)) {
                    ApplyResult::Outcome(outcome) => ClientResponse::Outcome(outcome),
                    ApplyResult::UnknownSession => ClientResponse::Refused(Refusal::UnknownSession),
                    ApplyResult::StaleSequence => ClientResponse::Refused(Refusal::StaleSequence),
                    ApplyResult::Done | ApplyResult::Crowded(_) | ApplyResult::WrongKey => {
                        unreachable!("a mutation has an outcome")
                    }
                    ApplyResult::NeverDecided => ClientResponse::Refused(Refusal::NeverDecided),
                }
            }
            ClientRequest::Query(query) => ClientResponse::Answer(self.answer(&query)),
            ClientRequest::OpenSession { session, description } => {
                self.apply(LogBody::OpenSession { session, description });
                ClientResponse::Session(SessionState::default())
            }
            ClientRequest::OpenSessionWithKey {
                session, description, ..
            } => {
                self.apply(LogBody::OpenSession { session, description });
                ClientResponse::Session(SessionState::default())
            }
            ClientRequest::KeepAlive { session } | ClientRequest::AnswerUnlinked { session, .. } => {
                let view = self.metadata.view().unwrap();
                let unlinked = view.unlinked_waiting_for(session, 1000).unwrap();
                ClientResponse::Session(SessionState { unlinked })
            }
            ClientRequest::CloseSession { session } | ClientRequest::CloseSessionWithKey { session, .. } => {
                self.apply(LogBody::EndSession { session });
                ClientResponse::Session(SessionState::default())
            }
        }
    }

    fn answer(&self, query: &Query) -> Result<Answer, FsError> {
        if *query == Query::Space {
            return Ok(Answer::Space(Space {
                capacity_bytes: 1 << 40,
                available_bytes: 1 << 40,
                inodes: self.inodes(),
            }));
        }
        Failure::split(self.metadata.view().unwrap().answer(query)).unwrap()
    }

    fn put(&self, request: PutChunkRequest) -> PutChunkResponse {
        let status = if self.leaderless.load(Ordering::SeqCst) {
            ChunkStatus::Unavailable
        } else if self.full.load(Ordering::SeqCst) {
            ChunkStatus::NoSpace
        } else {
            assert_eq!(block_crcs(&request.payload), request.block_crcs);
            let id = request.chunk.unwrap().into();
            self.chunks.lock().insert(id, request.payload);
            ChunkStatus::Ok
        };
        PutChunkResponse {
            call_id: request.call_id,
            status: status.into(),
            detail: REASON.to_string(),
            leader: String::new(),
        }
    }

    async fn get(&self, request: GetChunkRequest) -> GetChunkResponse {
        self.gets.acquire().await.unwrap().forget();
        let id: ChunkId = request.chunk.unwrap().into();
        let mut response = GetChunkResponse {
            call_id: request.call_id,
            status: ChunkStatus::NotFound.into(),
            ..GetChunkResponse::default()
        };
        if let Some(chunk) = self.chunks.lock().get(&id) {
            let start = request.offset / BLOCK_BYTES * BLOCK_BYTES;
            let end = (request.offset + request.length).next_multiple_of(BLOCK_BYTES);
            response.payload = chunk.slice(start as usize..chunk.len().min(end as usize));
            response.block_crcs = block_crcs(&response.payload);
            response.offset = start;
            response.status = ChunkStatus::Ok.into();
        }
        response
    }
}

struct Service(Arc<State>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Most concurrent requests of one stream.
const CONCURRENT: usize = 64;

#[tonic::async_trait]
impl FileSystem for Service {
    type CallsStream = Answers<CallResponse>;
    type PutChunksStream = Answers<PutChunkResponse>;
    type GetChunksStream = Answers<GetChunkResponse>;

    async fn calls(
        &self,
        requests: Request<Streaming<CallRequest>>,
    ) -> Result<Response<Self::CallsStream>, Status> {
        let state = Arc::clone(&self.0);
        let answers = requests.into_inner().map(move |request| {
            let CallRequest { call_id, call, .. } = request?;
            let reply = state.call(codec::decode(&call).unwrap());
            Ok(CallResponse {
                call_id,
                reply: codec::encode(&reply),
                lease_ms: 0,
                ..CallResponse::default()
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn put_chunks(
        &self,
        requests: Request<Streaming<PutChunkRequest>>,
    ) -> Result<Response<Self::PutChunksStream>, Status> {
        let state = Arc::clone(&self.0);
        let answers = requests.into_inner().map(move |request| Ok(state.put(request?)));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn get_chunks(
        &self,
        requests: Request<Streaming<GetChunkRequest>>,
    ) -> Result<Response<Self::GetChunksStream>, Status> {
        let state = Arc::clone(&self.0);
        let answers = requests
            .into_inner()
            .map(move |request| {
                let state = Arc::clone(&state);
                async move { Ok(state.get(request?).await) }
            })
            .buffer_unordered(CONCURRENT);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn discover(&self, _: Request<DiscoverRequest>) -> Result<Response<DiscoverResponse>, Status> {
        let member = wire::Member::from(self.0.member.clone());
        let leaderless = self.0.leaderless.load(Ordering::SeqCst);
        Ok(Response::new(DiscoverResponse {
            cluster_id: vec![1; 16].into(),
            node: Some(member.clone()),
            leader: (!leaderless).then(|| member.clone()),
            members: vec![member],
        }))
    }
}
