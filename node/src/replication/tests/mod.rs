//! Pushes, fetches and queries with a peer in the test process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_content::{ContentError, ContentOptions, ContentStore, Unlisted};
use quorumfs_proto::{Addresses, Chunk, ChunkId, Member, NodeId, SessionId};
use quorumfs_wire as wire;
use quorumfs_wire::calls::{AnswerStream, answer_calls};
use quorumfs_wire::peer_server::{Peer, PeerServer};
use quorumfs_wire::*;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::{Request, Response, Status, Streaming};

use super::messages::{get_response, put_response, put_status, requested_range};
use super::peers::{FetchError, PeerChunks, PushError};
use crate::transport::Transport;

/// Returns the id of the test chunk `counter`.
fn id(counter: u64) -> ChunkId {
    ChunkId {
        session: SessionId(7),
        counter,
    }
}

/// Returns a chunk whose bytes depend on its number.
fn chunk(counter: u64, length: usize) -> Chunk {
    let mut payload = vec![0; length];
    SmallRng::seed_from_u64(counter).fill(&mut payload[..]);
    Chunk::new(id(counter), payload.into()).unwrap()
}

fn open(directory: &std::path::Path) -> ContentStore {
    let options = ContentOptions {
        segment_bytes: 4 << 20,
        reserve_bytes: 64 << 10,
        unlisted: Unlisted::SetAside,
    };
    ContentStore::open(directory, options).unwrap().0
}

fn assert_served(store: &ContentStore, chunk: &Chunk) {
    assert_eq!(&store.read_whole(chunk.id()).unwrap(), chunk);
}

/// The fault of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Honest,
    /// Accepts calls and never answers.
    Silent,
    /// Its disk is full.
    Full,
    /// Changes a byte of each answer.
    Damaging,
    /// Sends the bytes and matching CRCs of another chunk.
    Lying,
}

struct TestPeer {
    store: Arc<ContentStore>,
    manner: Arc<Mutex<Manner>>,
}

fn unimplemented<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not part of this test"))
}

#[tonic::async_trait]
impl Peer for TestPeer {
    type PushChunksStream = AnswerStream<PutChunkResponse>;
    type FetchChunksStream = AnswerStream<GetChunkResponse>;
    type AppendEntriesStream = AnswerStream<RaftMessage>;

    async fn may_renounce(
        &self,
        _: Request<quorumfs_wire::MayRenounceRequest>,
    ) -> Result<Response<quorumfs_wire::MayRenounceResponse>, Status> {
        unimplemented()
    }

    async fn push_chunks(
        &self,
        request: Request<Streaming<PutChunkRequest>>,
    ) -> Result<Response<Self::PushChunksStream>, Status> {
        let store = Arc::clone(&self.store);
        let manner = Arc::clone(&self.manner);
        let answer = move |request: PutChunkRequest| {
            let store = Arc::clone(&store);
            let manner = *manner.lock();
            async move {
                match manner {
                    Manner::Silent => std::future::pending().await,
                    Manner::Full => put_response(&Err(ContentError::NoSpace)),
                    _ => match Chunk::try_from(request) {
                        Ok(chunk) => put_response(&store.put(chunk).await),
                        Err(error) => put_status(error.status(), error.to_string()),
                    },
                }
            }
        };
        let answers = answer_calls(request.into_inner(), 64, (), answer);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_chunks(
        &self,
        request: Request<Streaming<GetChunkRequest>>,
    ) -> Result<Response<Self::FetchChunksStream>, Status> {
        let store = Arc::clone(&self.store);
        let manner = Arc::clone(&self.manner);
        let answer = move |request: GetChunkRequest| {
            let (id, offset, length) = requested_range(&request).unwrap();
            let mut answer = get_response(store.read(id, offset, length));
            match *manner.lock() {
                Manner::Damaging => {
                    let mut bytes = answer.payload.to_vec();
                    bytes[9] ^= 1;
                    answer.payload = bytes.into();
                }
                Manner::Lying => {
                    let other = chunk(12_345, answer.payload.len());
                    answer.payload = other.payload().clone();
                    answer.block_crcs = other.block_crcs().to_vec();
                }
                _ => {}
            }
            std::future::ready(answer)
        };
        let answers = answer_calls(request.into_inner(), 64, (), answer);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn held_chunks(
        &self,
        request: Request<HeldChunksRequest>,
    ) -> Result<Response<HeldChunksResponse>, Status> {
        let chunks = request.into_inner().chunks;
        let held = chunks.into_iter().map(|id| self.store.holds(id.into())).collect();
        Ok(Response::new(HeldChunksResponse {
            held,
            placement_epoch: 1,
        }))
    }

    async fn hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        unimplemented()
    }
    async fn append_entries(
        &self,
        _: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<Self::AppendEntriesStream>, Status> {
        unimplemented()
    }
    async fn vote(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        unimplemented()
    }
    async fn pre_vote(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        unimplemented()
    }
    async fn transfer_leader(&self, _: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        unimplemented()
    }
    async fn install_snapshot(
        &self,
        _: Request<Streaming<SnapshotPart>>,
    ) -> Result<Response<RaftMessage>, Status> {
        unimplemented()
    }
    async fn join(&self, _: Request<wire::JoinRequest>) -> Result<Response<wire::JoinResponse>, Status> {
        unimplemented()
    }
    async fn invite(
        &self,
        _: Request<wire::InviteRequest>,
    ) -> Result<Response<wire::InviteResponse>, Status> {
        unimplemented()
    }
    async fn add_member(
        &self,
        _: Request<wire::AddMemberRequest>,
    ) -> Result<Response<wire::AddMemberResponse>, Status> {
        unimplemented()
    }
    async fn remove_members(
        &self,
        _: Request<wire::RemoveMembersRequest>,
    ) -> Result<Response<wire::RemoveMembersResponse>, Status> {
        unimplemented()
    }
    async fn state_digest(
        &self,
        _: Request<wire::StateDigestRequest>,
    ) -> Result<Response<wire::StateDigestResponse>, Status> {
        unimplemented()
    }
    async fn begin_audit(
        &self,
        _: Request<wire::BeginAuditRequest>,
    ) -> Result<Response<wire::BeginAuditResponse>, Status> {
        unimplemented()
    }
    async fn read_index(
        &self,
        _: Request<wire::ReadIndexRequest>,
    ) -> Result<Response<wire::ReadIndexResponse>, Status> {
        unimplemented()
    }
    async fn set_replicas(
        &self,
        _: Request<wire::SetReplicasRequest>,
    ) -> Result<Response<wire::SetReplicasResponse>, Status> {
        unimplemented()
    }
    async fn content_complete(
        &self,
        _: Request<wire::ContentCompleteRequest>,
    ) -> Result<Response<wire::ContentCompleteResponse>, Status> {
        unimplemented()
    }
    async fn verify_chunks(
        &self,
        _: Request<quorumfs_wire::VerifyChunksRequest>,
    ) -> Result<Response<quorumfs_wire::VerifyChunksResponse>, Status> {
        unimplemented()
    }

    async fn node_status(
        &self,
        _: Request<NodeStatusRequest>,
    ) -> Result<Response<NodeStatusResponse>, Status> {
        unimplemented()
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        unimplemented()
    }
}

/// A peer and a client of it.
struct Pair {
    chunks: Arc<PeerChunks>,
    member: quorumfs_proto::Member,
    store: Arc<ContentStore>,
    manner: Arc<Mutex<Manner>>,
    server: Option<Serving>,
    _folder: tempfile::TempDir,
}

/// A server with its own runtime, whose connections end with it.
struct Serving {
    runtime: tokio::runtime::Runtime,
    _stop: oneshot::Sender<()>,
}

impl Pair {
    async fn new(manner: Manner) -> Pair {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(open(folder.path()));
        let manner = Arc::new(Mutex::new(manner));
        let (serving, address) = serve(&store, &manner, "127.0.0.1:0");
        let transport = Arc::new(Transport::new(None));
        Pair {
            chunks: Arc::new(PeerChunks::with_progress_timeout(
                transport,
                Duration::from_millis(500),
            )),
            member: Member {
                id: NodeId {
                    slot: 2,
                    incarnation: 22,
                },
                addresses: Addresses {
                    grpc: address,
                    http: String::new(),
                },
            },
            store,
            manner,
            server: Some(serving),
            _folder: folder,
        }
    }

    fn stop(&mut self) {
        self.server.take().unwrap().runtime.shutdown_background();
    }

    fn start(&mut self) {
        self.server = Some(serve(&self.store, &self.manner, &self.member.addresses.grpc).0);
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.runtime.shutdown_background();
        }
    }
}

fn serve(store: &Arc<ContentStore>, manner: &Arc<Mutex<Manner>>, at: &str) -> (Serving, String) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let listener = {
        let began = Instant::now();
        loop {
            match std::net::TcpListener::bind(at) {
                Ok(listener) => break listener,
                Err(error) if began.elapsed() > Duration::from_secs(5) => panic!("{at}: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    };
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = PeerServer::new(TestPeer {
        store: Arc::clone(store),
        manner: Arc::clone(manner),
    })
    .max_decoding_message_size(4 << 20)
    .max_encoding_message_size(4 << 20);
    let (stop, stopped) = oneshot::channel::<()>();
    runtime.spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, async {
                let _ = stopped.await;
            })
            .await
            .unwrap();
    });
    let serving = Serving { runtime, _stop: stop };
    (serving, address)
}

#[tokio::test]
async fn chunks_are_pushed_held_and_fetched() {
    let pair = Pair::new(Manner::Honest).await;
    let chunks: Vec<Chunk> = (0..60)
        .map(|counter| chunk(counter, if counter % 2 == 0 { 1 << 20 } else { 5000 }))
        .collect();
    let pushes = chunks.iter().map(|chunk| pair.chunks.push(&pair.member, chunk));
    for result in futures::future::join_all(pushes).await {
        result.unwrap();
    }
    chunks.iter().for_each(|chunk| {
        assert!(pair.store.holds(chunk.id()));
        assert_served(&pair.store, chunk);
    });
    let ids: Vec<ChunkId> = (50..70).map(id).collect();
    let held = pair.chunks.held(&pair.member, &ids).await.unwrap();
    assert_eq!(held, (50..70).map(|counter| counter < 60).collect::<Vec<_>>());

    let fetches = chunks.iter().map(|chunk| {
        let length = chunk.payload().len() as u32;
        pair.chunks
            .fetch_whole(&pair.member, chunk.id(), length, chunk.sha256())
    });
    for (fetched, chunk) in futures::future::join_all(fetches).await.into_iter().zip(&chunks) {
        assert_eq!(&fetched.unwrap(), chunk);
    }
    let range = pair.chunks.fetch(&pair.member, id(0), 5000, 9000).await.unwrap();
    assert_eq!(
        range.exactly(5000, 9000).unwrap(),
        chunks[0].payload().slice(5000..14_000)
    );
    assert_eq!(
        pair.chunks.fetch(&pair.member, id(99), 0, 1).await,
        Err(FetchError::NotFound { peer: pair.member.id })
    );
}

#[tokio::test]
async fn what_does_not_match_is_not_returned() {
    let pair = Pair::new(Manner::Damaging).await;
    let chunk = chunk(1, 30_000);
    pair.store.put(chunk.clone()).await.unwrap();
    let fetched = pair.chunks.fetch(&pair.member, chunk.id(), 0, 100).await;
    assert!(matches!(fetched, Err(FetchError::Corrupt { .. })), "{fetched:?}");
    *pair.manner.lock() = Manner::Lying;
    let fetched = pair
        .chunks
        .fetch_whole(&pair.member, chunk.id(), 30_000, chunk.sha256())
        .await;
    assert!(matches!(fetched, Err(FetchError::Corrupt { .. })), "{fetched:?}");
    *pair.manner.lock() = Manner::Honest;
    for wrong in [29_999, 30_001] {
        let fetched = pair
            .chunks
            .fetch_whole(&pair.member, chunk.id(), wrong, chunk.sha256())
            .await;
        assert!(matches!(fetched, Err(FetchError::Corrupt { .. })), "{fetched:?}");
    }
}

#[tokio::test]
async fn a_full_peer_reports_no_space() {
    let pair = Pair::new(Manner::Full).await;
    assert_eq!(
        pair.chunks.push(&pair.member, &chunk(1, 100)).await,
        Err(PushError::NoSpace { peer: pair.member.id })
    );
}

#[tokio::test]
async fn a_peer_that_does_not_answer_fills_its_queue_and_is_given_up() {
    let pair = Pair::new(Manner::Silent).await;
    let began = Instant::now();
    let pushes = (0..80).map(|counter| {
        let chunk = chunk(counter, 1 << 20);
        let pair = &pair;
        async move { pair.chunks.push(&pair.member, &chunk).await }
    });
    let results = futures::future::join_all(pushes).await;
    let full = PushError::QueueFull { peer: pair.member.id };
    assert_eq!(
        results
            .iter()
            .filter(|result| **result == Err(full.clone()))
            .count(),
        16
    );
    let unreachable = results
        .iter()
        .filter(|result| matches!(result, Err(PushError::Unreachable { .. })))
        .count();
    assert_eq!(unreachable, 64, "{:?}", results[0]);
    assert!(began.elapsed() < Duration::from_secs(5));
    // The queue is free again, and the peer is called again.
    *pair.manner.lock() = Manner::Honest;
    tokio::time::sleep(Duration::from_millis(150)).await;
    pair.chunks.push(&pair.member, &chunk(200, 1000)).await.unwrap();
}

#[tokio::test]
async fn a_cancelled_push_keeps_its_permit_until_its_bytes_have_left_the_queue() {
    let pair = Pair::new(Manner::Silent).await;
    let model = chunk(1, 1 << 20);
    for counter in 0..64 {
        let chunk = chunk(counter, 1 << 20);
        let push = pair.chunks.push(&pair.member, &chunk);
        assert!(
            tokio::time::timeout(Duration::from_millis(1), push)
                .await
                .is_err()
        );
    }
    assert_eq!(
        pair.chunks.push(&pair.member, &model).await,
        Err(PushError::QueueFull { peer: pair.member.id })
    );
}

#[tokio::test]
async fn a_peer_that_comes_back_is_found_again() {
    let mut pair = Pair::new(Manner::Honest).await;
    pair.chunks.push(&pair.member, &chunk(1, 1000)).await.unwrap();
    for turn in 0..3 {
        pair.stop();
        let push = pair.chunks.push(&pair.member, &chunk(100 + turn, 1000)).await;
        assert!(matches!(push, Err(PushError::Unreachable { .. })), "{push:?}");
        let fetch = pair.chunks.fetch(&pair.member, id(1), 0, 10).await;
        assert!(matches!(fetch, Err(FetchError::Unreachable { .. })), "{fetch:?}");
        pair.start();
        tokio::time::sleep(Duration::from_millis(150)).await;
        pair.chunks
            .push(&pair.member, &chunk(200 + turn, 1000))
            .await
            .unwrap();
        pair.chunks.fetch(&pair.member, id(1), 0, 10).await.unwrap();
    }
    // A restart between two calls has no effect.
    pair.stop();
    pair.start();
    pair.chunks.push(&pair.member, &chunk(300, 1000)).await.unwrap();
    assert!(pair.store.holds(id(300)));
    pair.chunks.forget(pair.member.id);
    pair.chunks.push(&pair.member, &chunk(301, 1000)).await.unwrap();
}
