//! A node in the tests: its folder, its own runtime, and a server with only the calls of the consensus.

use std::future::Future;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use futures::stream::BoxStream;
use quorumfs_proto::{Addresses, ClusterId, NodeId};
use quorumfs_wire as wire;
use quorumfs_wire::peer_server::{Peer, PeerServer};
use quorumfs_wire::*;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::super::open_session;
use crate::consensus::{
    AppliedEffects, BarrierError, Consensus, ConsensusError, ConsensusOptions, ProposeError,
};
use crate::transport::Transport;
use quorumfs_content::{ContentOptions, ContentStore};
use quorumfs_metadata::{ApplyResult, LogCommand, MetadataOptions, MetadataStore};

type Member = quorumfs_proto::Member;

/// Longest wait for any condition: the machine may be very busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

struct Service(Member, Consensus);

fn elsewhere<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not part of this test"))
}

#[tonic::async_trait]
impl Peer for Service {
    type AppendEntriesStream = BoxStream<'static, Result<RaftMessage, Status>>;
    type PushChunksStream = BoxStream<'static, Result<PutChunkResponse, Status>>;
    type FetchChunksStream = BoxStream<'static, Result<GetChunkResponse, Status>>;

    async fn append_entries(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<Self::AppendEntriesStream>, Status> {
        Ok(Response::new(self.1.append_stream(request.into_inner())))
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.1.vote(request.into_inner()).await.map(Response::new)
    }

    async fn pre_vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.1.pre_vote(request.into_inner()).await.map(Response::new)
    }

    async fn transfer_leader(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let answer = self.1.transfer_leader(request.into_inner()).await;
        answer.map(Response::new)
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotPart>>,
    ) -> Result<Response<RaftMessage>, Status> {
        let answer = self.1.install_snapshot(request.into_inner()).await;
        answer.map(Response::new)
    }

    async fn hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        Ok(Response::new(HelloResponse {
            node: Some(self.0.clone().into()),
            trouble: self.1.trouble().unwrap_or_default(),
            ..HelloResponse::default()
        }))
    }

    async fn push_chunks(
        &self,
        _: Request<Streaming<PutChunkRequest>>,
    ) -> Result<Response<Self::PushChunksStream>, Status> {
        elsewhere()
    }

    async fn fetch_chunks(
        &self,
        _: Request<Streaming<GetChunkRequest>>,
    ) -> Result<Response<Self::FetchChunksStream>, Status> {
        elsewhere()
    }

    async fn held_chunks(
        &self,
        _: Request<HeldChunksRequest>,
    ) -> Result<Response<HeldChunksResponse>, Status> {
        elsewhere()
    }

    async fn join(&self, _: Request<wire::JoinRequest>) -> Result<Response<wire::JoinResponse>, Status> {
        elsewhere()
    }
    async fn may_renounce(
        &self,
        _: Request<wire::MayRenounceRequest>,
    ) -> Result<Response<wire::MayRenounceResponse>, Status> {
        elsewhere()
    }

    async fn invite(
        &self,
        _: Request<wire::InviteRequest>,
    ) -> Result<Response<wire::InviteResponse>, Status> {
        elsewhere()
    }
    async fn add_member(
        &self,
        _: Request<wire::AddMemberRequest>,
    ) -> Result<Response<wire::AddMemberResponse>, Status> {
        elsewhere()
    }
    async fn remove_members(
        &self,
        _: Request<wire::RemoveMembersRequest>,
    ) -> Result<Response<wire::RemoveMembersResponse>, Status> {
        elsewhere()
    }
    async fn state_digest(
        &self,
        _: Request<wire::StateDigestRequest>,
    ) -> Result<Response<wire::StateDigestResponse>, Status> {
        elsewhere()
    }
    async fn begin_audit(
        &self,
        _: Request<wire::BeginAuditRequest>,
    ) -> Result<Response<wire::BeginAuditResponse>, Status> {
        elsewhere()
    }
    async fn read_index(
        &self,
        _: Request<wire::ReadIndexRequest>,
    ) -> Result<Response<wire::ReadIndexResponse>, Status> {
        elsewhere()
    }
    async fn set_replicas(
        &self,
        _: Request<wire::SetReplicasRequest>,
    ) -> Result<Response<wire::SetReplicasResponse>, Status> {
        elsewhere()
    }
    async fn content_complete(
        &self,
        _: Request<wire::ContentCompleteRequest>,
    ) -> Result<Response<wire::ContentCompleteResponse>, Status> {
        elsewhere()
    }
    async fn verify_chunks(
        &self,
        _: Request<quorumfs_wire::VerifyChunksRequest>,
    ) -> Result<Response<quorumfs_wire::VerifyChunksResponse>, Status> {
        elsewhere()
    }

    async fn node_status(
        &self,
        _: Request<NodeStatusRequest>,
    ) -> Result<Response<NodeStatusResponse>, Status> {
        elsewhere()
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        elsewhere()
    }
}

/// A running node.
struct Running {
    /// Dropping it ends everything of the node, including connections, as a kill does.
    runtime: Runtime,
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    effects: mpsc::Receiver<AppliedEffects>,
}

pub struct TestNode {
    member: Member,
    folder: tempfile::TempDir,
    options: ConsensusOptions,
    running: Option<Running>,
}

impl TestNode {
    fn new(id: NodeId, grpc: String, change: &impl Fn(&mut ConsensusOptions)) -> TestNode {
        let folder = tempfile::tempdir().unwrap();
        let mut options = ConsensusOptions::new(id, ClusterId([7; 16]), folder.path().join("log"));
        options.wal.file_bytes = 4 << 20;
        change(&mut options);
        let addresses = Addresses {
            grpc,
            http: String::new(),
        };
        TestNode {
            member: Member { id, addresses },
            folder,
            options,
            running: None,
        }
    }

    async fn start(&mut self) -> Result<(), ConsensusError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let metadata = Arc::new(
            MetadataStore::open(
                &self.folder.path().join("metadata.redb"),
                MetadataOptions::default(),
            )
            .unwrap(),
        );
        let content_options = ContentOptions {
            segment_bytes: 4 << 20,
            reserve_bytes: 0,
            ..ContentOptions::default()
        };
        let content = ContentStore::open(&self.folder.path().join("content"), content_options).unwrap();
        let content = Arc::new(content.0);
        let transport = Arc::new(Transport::new(None));
        let (sender, effects) = mpsc::channel(10_000);
        let (address, member) = (self.member.addresses.grpc.clone(), self.member.clone());
        let (options, metadata_too, content_too) = (self.options.clone(), metadata.clone(), content.clone());
        let started = runtime.spawn(async move {
            let consensus = Consensus::start(options, metadata_too, content_too, transport, sender).await?;
            let listener = TcpListener::bind(address).await.unwrap();
            let service = PeerServer::new(Service(member, consensus.clone()))
                .max_decoding_message_size(quorumfs_proto::limits::MESSAGE_BYTES_MAX);
            tokio::spawn(
                tonic::transport::Server::builder()
                    .add_service(service)
                    // The builder's own `tcp_nodelay` does not apply to a listener given to it; without the option an
                    // answer waits 40 ms for a delayed acknowledgement.
                    .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))),
            );
            Ok(consensus)
        });
        let started: Result<Consensus, ConsensusError> = started.await.unwrap();
        match started {
            Ok(consensus) => {
                self.running = Some(Running {
                    runtime,
                    consensus,
                    metadata,
                    content,
                    effects,
                });
                Ok(())
            }
            Err(error) => {
                runtime.shutdown_background();
                Err(error)
            }
        }
    }

    /// Stops everything at once, without a message to other nodes.
    fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            let Running {
                runtime, consensus, ..
            } = running;
            tokio::task::block_in_place(|| {
                runtime.shutdown_timeout(Duration::from_secs(10));
                // These threads would have died with the process.
                consensus.0.flusher.stop();
                consensus.0.log.close();
            });
        }
    }

    pub fn member(&self) -> Member {
        self.member.clone()
    }

    pub fn consensus(&self) -> Consensus {
        self.running.as_ref().unwrap().consensus.clone()
    }

    pub fn metadata(&self) -> &MetadataStore {
        &self.running.as_ref().unwrap().metadata
    }

    pub fn content(&self) -> &ContentStore {
        &self.running.as_ref().unwrap().content
    }

    /// Additional duration of each flush of its log; can be set at any time.
    pub fn flush_delay_ms(&self) -> &AtomicU64 {
        &self.options.wal.flush_delay_ms
    }

    pub fn log_directory(&self) -> PathBuf {
        self.options.directory.clone()
    }

    pub fn content_directory(&self) -> PathBuf {
        self.folder.path().join("content")
    }

    pub fn take_effects(&mut self) -> Vec<AppliedEffects> {
        let effects = &mut self.running.as_mut().unwrap().effects;
        std::iter::from_fn(|| effects.try_recv().ok()).collect()
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.consensus.0.flusher.stop();
            running.runtime.shutdown_background();
        }
    }
}

pub struct Cluster {
    nodes: Vec<TestNode>,
}

impl Cluster {
    /// Starts `count` nodes and creates a cluster of them.
    pub async fn start(count: u16, change: impl Fn(&mut ConsensusOptions)) -> Cluster {
        let mut nodes = Vec::new();
        for slot in 1..=count {
            // The port is free again when the node binds it; no other process takes ports in the order of the kernel's
            // choice.
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = port.local_addr().unwrap().to_string();
            let id = NodeId {
                slot,
                incarnation: u64::from(slot) * 100,
            };
            nodes.push((TestNode::new(id, address, &change), port));
        }
        let mut cluster = Cluster { nodes: Vec::new() };
        for (mut node, port) in nodes {
            drop(port);
            node.start().await.unwrap();
            cluster.nodes.push(node);
        }
        let members: Vec<Member> = cluster.nodes.iter().map(TestNode::member).collect();
        let first = cluster.nodes[0].consensus();
        assert!(first.is_empty());
        first.initialize(members).await.unwrap();
        assert!(!first.is_empty());
        cluster
    }

    pub fn ids(&self) -> Vec<NodeId> {
        self.nodes.iter().map(|node| node.member.id).collect()
    }

    pub fn others(&self, id: NodeId) -> Vec<NodeId> {
        self.ids().into_iter().filter(|other| *other != id).collect()
    }

    pub fn node(&self, id: NodeId) -> &TestNode {
        self.nodes.iter().find(|node| node.member.id == id).unwrap()
    }

    pub fn node_mut(&mut self, id: NodeId) -> &mut TestNode {
        self.nodes.iter_mut().find(|node| node.member.id == id).unwrap()
    }

    pub fn running(&self) -> impl Iterator<Item = &TestNode> {
        self.nodes.iter().filter(|node| node.running.is_some())
    }

    pub fn kill(&mut self, id: NodeId) {
        self.node_mut(id).kill();
    }

    pub async fn restart(&mut self, id: NodeId) {
        self.try_restart(id).await.unwrap();
    }

    pub async fn try_restart(&mut self, id: NodeId) -> Result<(), ConsensusError> {
        self.node_mut(id).start().await
    }

    /// Starts an empty node in the place of `id`, under a new incarnation; returns its id.
    pub async fn start_wiped(&mut self, id: NodeId) -> NodeId {
        let fresh = NodeId {
            incarnation: id.incarnation + 1,
            ..id
        };
        let address = self.node(id).member.addresses.grpc.clone();
        let mut node = TestNode::new(fresh, address, &|_| {});
        node.start().await.unwrap();
        self.nodes.push(node);
        fresh
    }

    /// Waits for a leader on which a majority of the running nodes agree.
    pub async fn leader(&self) -> NodeId {
        let mut found = None;
        eventually("there is a leader", || {
            found = self
                .running()
                .map(|node| node.consensus())
                .find(|consensus| consensus.is_leader() && consensus.status().writable)
                .map(|consensus| consensus.id());
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    async fn insist<T, E: std::fmt::Debug, Fut: Future<Output = Result<T, E>>>(
        &self,
        what: impl Fn(Consensus) -> Fut,
    ) -> T {
        let began = Instant::now();
        loop {
            let leader = self.leader().await;
            let tried =
                tokio::time::timeout(Duration::from_secs(10), what(self.node(leader).consensus())).await;
            match tried {
                Ok(Ok(done)) => return done,
                other => assert!(began.elapsed() < PATIENCE, "{:?}", other.map(|r| r.err())),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Has `command` decided by the leader.
    pub async fn propose(&self, command: LogCommand) -> ApplyResult {
        self.insist::<_, ProposeError, _>(|consensus| {
            let command = command.clone();
            async move { consensus.propose(command).await }
        })
        .await
    }

    /// Waits for a barrier at the leader.
    pub async fn barrier(&self) {
        self.insist::<_, BarrierError, _>(|consensus| async move { consensus.barrier().await })
            .await;
    }

    /// Opens a session for each number, many at a time.
    pub async fn open_sessions(&mut self, numbers: Range<u64>) {
        let numbers: Vec<u64> = numbers.collect();
        for some in numbers.chunks(64) {
            let each = some
                .iter()
                .map(|number| self.propose(open_session(*number, format!("session {number}"))));
            for result in futures::future::join_all(each).await {
                assert_eq!(result, ApplyResult::Done);
            }
        }
    }

    pub async fn shutdown(mut self) {
        for node in &mut self.nodes {
            if let Some(running) = node.running.take() {
                running.consensus.shutdown().await;
                running.runtime.shutdown_background();
            }
        }
    }
}
