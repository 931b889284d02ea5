//! A fake cluster with configurable faults: nodes that share one state, each behind a proxy that can be frozen or cut.
//!
//! It handles lanes like the real state machine (same number: the stored answer; next number: execution; otherwise
//! `StaleSequence`), and records all requests, so that tests can compare what was sent with what took effect.

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::call::{Mutation, SessionState};
use quorumfs_proto::chunk::block_crcs;
use quorumfs_proto::query::Space;
use quorumfs_proto::{
    Addresses, Answer, ChunkBody, ChunkId, ClientRequest, ClientResponse, Command, FsError, InodeNumber,
    Lane, Member, NodeId, Operation, OperationResult, Outcome, Refusal, SessionId, codec,
};
use quorumfs_wire as wire;
use quorumfs_wire::ChunkStatus;
use quorumfs_wire::file_system_server::{FileSystem, FileSystemServer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::proxy::proxy;

/// How a node handles one call.
pub enum Act {
    /// Answers normally.
    Normal,
    /// Answers normally after this time.
    After(Duration),
    /// Executes the call and loses the answer.
    DoAndSwallow,
    /// Loses the call.
    Lose,
    /// Executes the call and breaks the stream.
    DoAndBreak,
    /// Answers this without executing the call.
    Reply(ClientResponse),
    /// Like [`Act::Reply`], after this time.
    ReplyAfter(Duration, ClientResponse),
}

/// How a node handles one put.
pub enum PutAct {
    Normal,
    After(Duration),
    Status(ChunkStatus),
    Break,
    Swallow,
}

/// How a node handles one get.
pub enum GetAct {
    Normal,
    Status(ChunkStatus),
    /// Answers with one wrong bit.
    Damage,
    Swallow,
}

type OnCall = Box<dyn FnMut(usize, &ClientRequest) -> Act + Send>;
type OnPut = Box<dyn FnMut(usize, ChunkId) -> PutAct + Send>;
type OnGet = Box<dyn FnMut(usize, ChunkId) -> GetAct + Send>;

/// The state of the cluster and the recorded requests.
pub struct World {
    pub cluster_id: [u8; 16],
    /// The leader, and the leader that each node names.
    pub leader: Option<usize>,
    pub beliefs: Vec<Option<usize>>,
    pub addresses: Vec<String>,
    /// The time of the leader's clock; 0 if it does not send it.
    pub clock_ns: i64,
    pub sessions: HashSet<SessionId>,
    /// Sessions that have ended and are remembered.
    pub ended: HashSet<SessionId>,
    pub lanes: HashMap<(SessionId, Lane), (u64, ClientResponse)>,
    /// Every sending of a mutation that arrived at a leader.
    pub received: Vec<Mutation>,
    /// Mutations that have a verdict, each once.
    pub executed: Vec<Mutation>,
    pub names: HashSet<Vec<u8>>,
    pub chunks: HashMap<ChunkId, Bytes>,
    /// Chunks that the leader knows to be durable.
    pub confirmed: HashSet<ChunkId>,
    pub puts: Vec<(usize, ChunkId)>,
    pub gets: Vec<(usize, ChunkId)>,
    pub closed: Vec<SessionId>,
    pub unlinked: Vec<InodeNumber>,
    /// Sent once with the answer to a keep-alive.
    pub question: Option<wire::UnlinkedQuestion>,
    /// Answers to it: from, through, held.
    pub answers: Vec<(u64, u64, Vec<InodeNumber>)>,
    /// The sessions that streams announced.
    pub hellos: Vec<wire::SessionHello>,
    /// The sender of answers of the newest stream.
    pub back: Option<mpsc::WeakSender<Result<wire::CallResponse, Status>>>,
    pub calls_streams: usize,
    pub discovers: usize,
    pub put_bytes_under_way: usize,
    pub put_bytes_under_way_max: usize,
    pub mutations_under_way: usize,
    pub mutations_under_way_max: usize,
    pub on_call: OnCall,
    pub on_put: OnPut,
    pub on_get: OnGet,
}

impl World {
    /// Makes all nodes name `leader`.
    pub fn elect(&mut self, leader: Option<usize>) {
        self.leader = leader;
        self.beliefs.iter_mut().for_each(|belief| *belief = leader);
        // A new leader only knows chunks that a command refers to.
        self.confirmed.clear();
    }

    /// Ends all sessions; what they decided is remembered.
    pub fn end_sessions(&mut self) {
        self.ended.extend(std::mem::take(&mut self.sessions));
    }

    fn mutate(&mut self, mutation: Mutation) -> ClientResponse {
        let request = mutation.request;
        let lane = self.lanes.get(&(request.session, request.lane));
        let last = lane.map_or(0, |(sequence, _)| *sequence);
        if !self.sessions.contains(&request.session) {
            return match lane {
                _ if !self.ended.contains(&request.session) => {
                    ClientResponse::Refused(Refusal::UnknownSession)
                }
                Some((sequence, reply)) if *sequence == request.sequence => reply.clone(),
                _ => ClientResponse::Refused(Refusal::NeverDecided),
            };
        }
        match lane {
            Some((sequence, reply)) if *sequence == request.sequence => return reply.clone(),
            _ if request.sequence != last + 1 => return ClientResponse::Refused(Refusal::StaleSequence),
            _ => {}
        }
        let unsure: Vec<ChunkId> = mutation
            .command
            .chunks
            .iter()
            .filter(|chunk| matches!(chunk.body, ChunkBody::Stored) && !self.confirmed.contains(&chunk.id))
            .map(|chunk| chunk.id)
            .collect();
        if !unsure.is_empty() {
            return ClientResponse::Refused(Refusal::PutAgain { chunks: unsure });
        }
        let reply = ClientResponse::Outcome(self.apply(&mutation.command));
        self.lanes
            .insert((request.session, request.lane), (request.sequence, reply.clone()));
        self.executed.push(mutation);
        reply
    }

    fn apply(&mut self, command: &Command) -> Result<Outcome, FsError> {
        let mut results = Vec::new();
        for operation in &command.operations {
            results.push(match operation {
                Operation::Create { name, .. } => {
                    if !self.names.insert(name.as_bytes().to_vec()) {
                        return Err(FsError::Exists);
                    }
                    OperationResult::Entry {
                        inode: InodeNumber(100 + self.names.len() as u64),
                        created: true,
                    }
                }
                Operation::Write { .. } => OperationResult::Entry {
                    inode: InodeNumber(7),
                    created: false,
                },
                _ => OperationResult::Done,
            });
        }
        Ok(Outcome {
            results,
            touched: Vec::new(),
            index: self.executed.len() as u64 + 1,
        })
    }

    fn answer(&mut self, call: ClientRequest) -> ClientResponse {
        if let ClientRequest::AnswerUnlinked {
            from, through, held, ..
        } = &call
        {
            self.answers.push((*from, *through, held.clone()));
        }
        match call {
            ClientRequest::Mutate(mutation) => self.mutate(mutation),
            ClientRequest::Query(_) => ClientResponse::Answer(Ok(Answer::Space(Space {
                capacity_bytes: 1,
                available_bytes: 1,
                inodes: self.executed.len() as u64,
            }))),
            ClientRequest::OpenSession { session, .. }
            | ClientRequest::OpenSessionWithKey { session, .. } => {
                self.sessions.insert(session);
                ClientResponse::Session(SessionState::default())
            }
            ClientRequest::KeepAlive { session } | ClientRequest::AnswerUnlinked { session, .. }
                if self.sessions.contains(&session) =>
            {
                ClientResponse::Session(SessionState {
                    unlinked: self.unlinked.clone(),
                })
            }
            ClientRequest::KeepAlive { .. } | ClientRequest::AnswerUnlinked { .. } => {
                ClientResponse::Refused(Refusal::UnknownSession)
            }
            ClientRequest::CloseSession { session } | ClientRequest::CloseSessionWithKey { session, .. } => {
                self.sessions.remove(&session);
                self.closed.push(session);
                ClientResponse::Session(SessionState::default())
            }
        }
    }

    fn member(&self, node: usize) -> Member {
        Member {
            id: NodeId {
                slot: node as u16 + 1,
                incarnation: 77,
            },
            addresses: Addresses {
                grpc: self.addresses[node].clone(),
                http: String::new(),
            },
        }
    }
}

/// The state of the network between a client and a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    Open,
    /// Like a stopped process: connections are accepted, and no bytes are forwarded.
    Frozen,
    /// Like a dead process: no connection is accepted, and open ones are reset.
    Cut,
}

pub struct Fake {
    pub world: Arc<Mutex<World>>,
    wires: Vec<watch::Sender<Wire>>,
}

impl Fake {
    /// Starts `nodes` nodes; the first is the leader.
    pub async fn start(nodes: usize) -> Fake {
        let world = Arc::new(Mutex::new(World {
            cluster_id: *b"sixteen bytes id",
            leader: Some(0),
            beliefs: vec![Some(0); nodes],
            addresses: Vec::new(),
            clock_ns: 0,
            sessions: HashSet::new(),
            ended: HashSet::new(),
            lanes: HashMap::new(),
            received: Vec::new(),
            executed: Vec::new(),
            names: HashSet::new(),
            chunks: HashMap::new(),
            confirmed: HashSet::new(),
            puts: Vec::new(),
            gets: Vec::new(),
            closed: Vec::new(),
            unlinked: Vec::new(),
            question: None,
            answers: Vec::new(),
            hellos: Vec::new(),
            back: None,
            calls_streams: 0,
            discovers: 0,
            put_bytes_under_way: 0,
            put_bytes_under_way_max: 0,
            mutations_under_way: 0,
            mutations_under_way_max: 0,
            on_call: Box::new(|_, _| Act::Normal),
            on_put: Box::new(|_, _| PutAct::Normal),
            on_get: Box::new(|_, _| GetAct::Normal),
        }));
        let mut wires = Vec::new();
        for index in 0..nodes {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let behind = listener.local_addr().unwrap();
            let node = FakeNode {
                index,
                world: world.clone(),
            };
            tokio::spawn(
                tonic::transport::Server::builder()
                    .initial_stream_window_size(8 << 20)
                    .initial_connection_window_size(32 << 20)
                    .max_frame_size(256 << 10)
                    .add_service(FileSystemServer::new(node).max_decoding_message_size(4 << 20))
                    .serve_with_incoming(TcpListenerStream::new(listener)),
            );
            let (address, wire) = proxy(behind).await;
            world.lock().addresses.push(address.to_string());
            wires.push(wire);
        }
        Fake { world, wires }
    }

    pub fn addresses(&self) -> Vec<String> {
        self.world.lock().addresses.clone()
    }

    pub fn freeze(&self, node: usize) {
        self.wires[node].send_replace(Wire::Frozen);
    }

    pub fn cut(&self, node: usize) {
        self.wires[node].send_replace(Wire::Cut);
    }

    pub fn mend(&self, node: usize) {
        self.wires[node].send_replace(Wire::Open);
    }

    pub fn on_call(&self, act: impl FnMut(usize, &ClientRequest) -> Act + Send + 'static) {
        self.world.lock().on_call = Box::new(act);
    }

    pub fn on_put(&self, act: impl FnMut(usize, ChunkId) -> PutAct + Send + 'static) {
        self.world.lock().on_put = Box::new(act);
    }

    pub fn on_get(&self, act: impl FnMut(usize, ChunkId) -> GetAct + Send + 'static) {
        self.world.lock().on_get = Box::new(act);
    }
}

struct FakeNode {
    index: usize,
    world: Arc<Mutex<World>>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl FileSystem for FakeNode {
    type CallsStream = Answers<wire::CallResponse>;
    type PutChunksStream = Answers<wire::PutChunkResponse>;
    type GetChunksStream = Answers<wire::GetChunkResponse>;

    async fn calls(
        &self,
        request: Request<Streaming<wire::CallRequest>>,
    ) -> Result<Response<Self::CallsStream>, Status> {
        let mut calls = request.into_inner();
        let (answers, receiver) = mpsc::channel(1024);
        let (world, index) = (self.world.clone(), self.index);
        world.lock().calls_streams += 1;
        world.lock().back = Some(answers.downgrade());
        tokio::spawn(async move {
            while let Ok(Some(envelope)) = calls.message().await {
                let call: ClientRequest = codec::decode(&envelope.call).unwrap();
                world.lock().hellos.extend(envelope.hello);
                let (reply, delay) = {
                    let mut world = world.lock();
                    if world.leader != Some(index) {
                        let leader = world.beliefs[index].map(|leader| world.addresses[leader].clone());
                        (ClientResponse::Refused(Refusal::NotLeader { leader }), None)
                    } else {
                        if let ClientRequest::Mutate(mutation) = &call {
                            world.received.push(mutation.clone());
                        }
                        let mut on_call = std::mem::replace(&mut world.on_call, Box::new(|_, _| Act::Normal));
                        let act = on_call(index, &call);
                        world.on_call = on_call;
                        match act {
                            Act::Normal => (world.answer(call), None),
                            Act::After(delay) => {
                                world.mutations_under_way += 1;
                                world.mutations_under_way_max =
                                    world.mutations_under_way_max.max(world.mutations_under_way);
                                (world.answer(call), Some(delay))
                            }
                            Act::DoAndSwallow => {
                                world.answer(call);
                                continue;
                            }
                            Act::Lose => continue,
                            Act::DoAndBreak => {
                                world.answer(call);
                                return;
                            }
                            Act::Reply(reply) => (reply, None),
                            Act::ReplyAfter(delay, reply) => {
                                world.mutations_under_way += 1;
                                (reply, Some(delay))
                            }
                        }
                    }
                };
                let asks = matches!(reply, ClientResponse::Session(_)) && envelope.answers_unlinked;
                let question = world.lock().question.take_if(|_| asks);
                let response = wire::CallResponse {
                    clock_ns: world.lock().clock_ns,
                    unlinked: question,
                    call_id: envelope.call_id,
                    reply: codec::encode(&reply),
                    lease_ms: 0,
                    ..wire::CallResponse::default()
                };
                let (answers, world) = (answers.clone(), world.clone());
                tokio::spawn(async move {
                    if let Some(delay) = delay {
                        tokio::time::sleep(delay).await;
                        world.lock().mutations_under_way -= 1;
                    }
                    let _ = answers.send(Ok(response)).await;
                });
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn put_chunks(
        &self,
        request: Request<Streaming<wire::PutChunkRequest>>,
    ) -> Result<Response<Self::PutChunksStream>, Status> {
        let mut puts = request.into_inner();
        let (answers, receiver) = mpsc::channel(1024);
        let (world, index) = (self.world.clone(), self.index);
        tokio::spawn(async move {
            while let Ok(Some(put)) = puts.message().await {
                let id: ChunkId = put.chunk.unwrap().into();
                let bytes = put.payload.len();
                let mut response = wire::PutChunkResponse {
                    call_id: put.call_id,
                    status: ChunkStatus::Ok.into(),
                    ..Default::default()
                };
                let mut delay = None;
                {
                    let mut world = world.lock();
                    world.puts.push((index, id));
                    if world.leader != Some(index) {
                        response.set_status(ChunkStatus::NotLeader);
                        let leader = world.beliefs[index];
                        response.leader =
                            leader.map_or_else(String::new, |leader| world.addresses[leader].clone());
                    } else {
                        let mut on_put =
                            std::mem::replace(&mut world.on_put, Box::new(|_, _| PutAct::Normal));
                        let act = on_put(index, id);
                        world.on_put = on_put;
                        match act {
                            PutAct::Normal => {}
                            PutAct::After(time) => delay = Some(time),
                            PutAct::Status(status) => response.set_status(status),
                            PutAct::Break => return,
                            PutAct::Swallow => continue,
                        }
                    }
                    if response.status() == ChunkStatus::Ok {
                        world.chunks.insert(id, put.payload);
                        world.confirmed.insert(id);
                    }
                    world.put_bytes_under_way += bytes;
                    world.put_bytes_under_way_max =
                        world.put_bytes_under_way_max.max(world.put_bytes_under_way);
                }
                let (answers, world) = (answers.clone(), world.clone());
                tokio::spawn(async move {
                    if let Some(delay) = delay {
                        tokio::time::sleep(delay).await;
                    }
                    world.lock().put_bytes_under_way -= bytes;
                    let _ = answers.send(Ok(response)).await;
                });
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn get_chunks(
        &self,
        request: Request<Streaming<wire::GetChunkRequest>>,
    ) -> Result<Response<Self::GetChunksStream>, Status> {
        let mut gets = request.into_inner();
        let (answers, receiver) = mpsc::channel(1024);
        let (world, index) = (self.world.clone(), self.index);
        tokio::spawn(async move {
            while let Ok(Some(get)) = gets.message().await {
                let id: ChunkId = get.chunk.unwrap().into();
                let mut response = wire::GetChunkResponse {
                    call_id: get.call_id,
                    status: ChunkStatus::NotFound.into(),
                    ..Default::default()
                };
                {
                    let mut world = world.lock();
                    world.gets.push((index, id));
                    if let Some(payload) = world.chunks.get(&id) {
                        let begin = get.offset / 4096 * 4096;
                        let end = (get.offset + get.length).next_multiple_of(4096);
                        let end = (end as usize).min(payload.len());
                        response.set_status(ChunkStatus::Ok);
                        response.offset = begin;
                        response.payload = payload.slice(begin as usize..end);
                        response.block_crcs = block_crcs(&response.payload);
                    }
                    let mut on_get = std::mem::replace(&mut world.on_get, Box::new(|_, _| GetAct::Normal));
                    let act = on_get(index, id);
                    world.on_get = on_get;
                    match act {
                        GetAct::Normal => {}
                        GetAct::Status(status) => response.set_status(status),
                        GetAct::Damage => {
                            let mut payload = response.payload.to_vec();
                            payload[0] ^= 1;
                            response.payload = payload.into();
                        }
                        GetAct::Swallow => continue,
                    }
                }
                let _ = answers.send(Ok(response)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn discover(
        &self,
        _: Request<wire::DiscoverRequest>,
    ) -> Result<Response<wire::DiscoverResponse>, Status> {
        let mut world = self.world.lock();
        world.discovers += 1;
        let members = 0..world.addresses.len();
        Ok(Response::new(wire::DiscoverResponse {
            cluster_id: Bytes::copy_from_slice(&world.cluster_id),
            node: Some(world.member(self.index).into()),
            leader: world.beliefs[self.index].map(|leader| world.member(leader).into()),
            members: members.map(|node| world.member(node).into()).collect(),
        }))
    }
}
