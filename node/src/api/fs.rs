//! The service for mounts: streams of calls and of chunks, each answered in any order.
//!
//! Decodes an envelope, calls the write or the read path, encodes the answer. So many requests of one stream are
//! worked on at once; further ones wait in the connection's flow-control window, so a client cannot fill memory.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use quorumfs_measure::Ending;
use quorumfs_proto::call::SessionState;
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::wire::file_system_server::FileSystem;
use quorumfs_proto::{Call, CallReply, Refusal, SessionId, Timestamp, codec, wire};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, error};

use super::carried::{CarriedBytes, StreamShare};
use crate::cluster::leases::Grant;
use crate::cluster::metrics::CountedCommand;
use crate::cluster::metrics::kinds::{OperationKind, Origin};
use crate::content::wire::{get_response, range_asked, stored_chunk};
use crate::metadata::Failure;
use crate::node::{Node, Parts};
use crate::write::PutError;

/// Requests of one stream worked on at once: more than a client has lanes.
const CALLS_PER_STREAM_MAX: usize = 256;
/// Chunks of one stream worked on at once, as far as the budget of all streams ([`CarriedBytes`]) goes.
const CHUNKS_PER_STREAM_MAX: usize = 48;
/// Unlinked inodes a session is asked about at once.
const UNLINKED_ASKED_MAX: usize = 1000;

/// What every stream of answers is.
pub type AnswerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// See the module.
pub struct FileSystemService {
    node: Arc<Node>,
    carried: CarriedBytes,
}

impl FileSystemService {
    /// Serves `node`, from before it has found its cluster.
    pub fn new(node: Arc<Node>) -> FileSystemService {
        FileSystemService {
            node,
            carried: CarriedBytes::default(),
        }
    }
}

/// Answers each request of a stream by `answer`, at most `at_once_max` at a time, in the order they are done.
pub fn answer_stream<Q, A, F, Fut>(requests: Streaming<Q>, at_once_max: usize, answer: F) -> AnswerStream<A>
where
    Q: Send + 'static,
    A: Send + 'static,
    F: Fn(Q) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    // Nothing is weighed, so nothing is waited for.
    answer_weighed(
        requests,
        at_once_max,
        CarriedBytes::bounded(0).stream(),
        |_| 0,
        answer,
    )
}

/// As [`answer_stream`], for requests that carry chunks or ask for them: `bytes` tells how many. They count until the
/// answer has been sent.
pub fn answer_weighed<Q, A, F, Fut>(
    mut requests: Streaming<Q>,
    at_once_max: usize,
    share: StreamShare,
    bytes: fn(&Q) -> u32,
    answer: F,
) -> AnswerStream<A>
where
    Q: Send + 'static,
    A: Send + 'static,
    F: Fn(Q) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let (tell, answers) = mpsc::channel(at_once_max);
    let places = Arc::new(Semaphore::new(at_once_max));
    tokio::spawn(async move {
        // The semaphore is never closed.
        while let Ok(place) = places.clone().acquire_owned().await {
            let request = match requests.next().await {
                Some(Ok(request)) => request,
                Some(Err(status)) => {
                    debug!(%status, "a stream of requests broke");
                    break;
                }
                None => break,
            };
            let carried = tokio::select! {
                biased;
                carried = share.carry(bytes(&request)) => carried,
                // Nobody wants to know: what this one asks for need not be done.
                () = tell.closed() => break,
            };
            let tell = tell.clone();
            let answer = answer(request);
            tokio::spawn(async move {
                let answer = answer.await;
                // A client that went away asks again elsewhere; what it asked for is done all the same.
                let _ = tell.send((answer, carried)).await;
                drop(place);
            });
        }
    });
    Box::pin(ReceiverStream::new(answers).map(|(answer, _carried)| Ok(answer)))
}

/// What a put has in memory.
fn bytes_put(request: &wire::PutChunkRequest) -> u32 {
    u32::try_from(request.payload.len())
        .unwrap_or(u32::MAX)
        .min(CHUNK_BYTES_MAX)
}

/// What the answer to a get will have in memory, but for what it is widened by.
fn bytes_got(request: &wire::GetChunkRequest) -> u32 {
    request.length.min(CHUNK_BYTES_MAX)
}

#[tonic::async_trait]
impl FileSystem for FileSystemService {
    type CallsStream = AnswerStream<wire::CallResponse>;
    type PutChunksStream = AnswerStream<wire::PutChunkResponse>;
    type GetChunksStream = AnswerStream<wire::GetChunkResponse>;

    async fn calls(
        &self,
        request: Request<Streaming<wire::CallRequest>>,
    ) -> Result<Response<Self::CallsStream>, Status> {
        let node = self.node.clone();
        let answer = move |mut request: wire::CallRequest| {
            let node = node.clone();
            async move {
                let (reply, grant) = match codec::decode::<Call>(&request.call) {
                    Ok(call) => measured(&node, call, &mut request).await,
                    Err(error) => {
                        let reason = error.to_string();
                        (CallReply::Refused(Refusal::Invalid { reason }), Grant::Nothing)
                    }
                };
                let (reply, never_decided) = match reply {
                    CallReply::Refused(Refusal::NeverDecided) => {
                        (CallReply::Refused(Refusal::UnknownSession), true)
                    }
                    reply => (reply, false),
                };
                wire::CallResponse {
                    call_id: request.call_id,
                    clock_ns: clock_ns(&node, &reply),
                    reply: codec::encode(&reply),
                    lease_ms: grant.lease_ms(),
                    never_decided,
                }
            }
        };
        Ok(Response::new(answer_stream(
            request.into_inner(),
            CALLS_PER_STREAM_MAX,
            answer,
        )))
    }

    async fn put_chunks(
        &self,
        request: Request<Streaming<wire::PutChunkRequest>>,
    ) -> Result<Response<Self::PutChunksStream>, Status> {
        let node = self.node.clone();
        let answer = move |request: wire::PutChunkRequest| {
            let node = node.clone();
            async move {
                let (began, bytes) = (Instant::now(), request.payload.len() as u64);
                let session = request.chunk.as_ref().map_or(0, |chunk| chunk.session);
                let response = put_chunk(&node, request).await;
                count_chunk(
                    &node,
                    OperationKind::PutChunk,
                    session,
                    response.status(),
                    bytes,
                    began,
                );
                response
            }
        };
        Ok(Response::new(answer_weighed(
            request.into_inner(),
            CHUNKS_PER_STREAM_MAX,
            self.carried.stream(),
            bytes_put,
            answer,
        )))
    }

    async fn get_chunks(
        &self,
        request: Request<Streaming<wire::GetChunkRequest>>,
    ) -> Result<Response<Self::GetChunksStream>, Status> {
        let node = self.node.clone();
        let answer = move |request: wire::GetChunkRequest| {
            let node = node.clone();
            async move {
                let (began, session) = (Instant::now(), request.session);
                let response = get_chunk(&node, &request).await;
                let (status, bytes) = (response.status(), response.payload.len() as u64);
                count_chunk(&node, OperationKind::Read, session, status, bytes, began);
                response
            }
        };
        Ok(Response::new(answer_weighed(
            request.into_inner(),
            CHUNKS_PER_STREAM_MAX,
            self.carried.stream(),
            bytes_got,
            answer,
        )))
    }

    async fn discover(
        &self,
        _: Request<wire::DiscoverRequest>,
    ) -> Result<Response<wire::DiscoverResponse>, Status> {
        let own = Some(self.node.own().clone().into());
        let answer = match self.node.parts() {
            None => wire::DiscoverResponse {
                cluster_id: Bytes::new(),
                node: own,
                leader: None,
                members: Vec::new(),
            },
            Some(parts) => wire::DiscoverResponse {
                cluster_id: Bytes::copy_from_slice(&parts.cluster.0),
                node: own,
                leader: parts.consensus.leader().map(Into::into),
                members: parts.consensus.members().into_iter().map(Into::into).collect(),
            },
        };
        Ok(Response::new(answer))
    }
}

/// The leader's clock, to go with `reply`; 0 where this node may not lead.
fn clock_ns(node: &Node, reply: &CallReply) -> i64 {
    let time = match reply {
        CallReply::Refused(_) => None,
        CallReply::Outcome(_) | CallReply::Answer(_) | CallReply::Session(_) => {
            node.parts().and_then(|parts| parts.writer.time())
        }
    };
    time.map_or(0, Timestamp::unix_ns)
}

/// Carries out a call and counts it.
async fn measured(node: &Node, call: Call, request: &mut wire::CallRequest) -> (CallReply, Grant) {
    enum Counted {
        Command(CountedCommand),
        Query(OperationKind),
        Session,
    }
    let (session, counted) = match &call {
        Call::Mutate(mutation) => (
            mutation.request.session,
            Counted::Command(CountedCommand::of(&mutation.command)),
        ),
        Call::Query(query) => (
            SessionId(request.session),
            Counted::Query(OperationKind::of_query(query)),
        ),
        Call::OpenSession { session, description } => {
            node.metrics().opened(*session, description);
            (*session, Counted::Session)
        }
        Call::KeepAlive { session } | Call::CloseSession { session } => (*session, Counted::Session),
    };
    let is_close = matches!(call, Call::CloseSession { .. });
    let began = Instant::now();
    let statistics = request.statistics.take();
    let (reply, grant) = carry_out(node, call, request).await;
    let took = began.elapsed();
    let metrics = node.metrics();
    let origin = origin_of(node, session);
    match counted {
        Counted::Command(counted) => metrics.command(origin, counted, &reply, took),
        Counted::Query(kind) => metrics.query(origin, kind, &reply, took),
        Counted::Session => {
            metrics.session(origin, &reply, took);
            if is_close {
                metrics.mounts.closed(session);
            } else if let (CallReply::Session(_), Some(statistics)) = (&reply, statistics) {
                let description = description_of(node, session).unwrap_or_default();
                metrics.mounts.heard(session, description, statistics.into());
            }
        }
    }
    (reply, grant)
}

/// Whether a session is a mount's or a node's; asked of the metadata once for each.
fn origin_of(node: &Node, session: SessionId) -> Origin {
    let describe = || match session.0 {
        // Peers, and programs older than the field, do not say who asks.
        0 => None,
        _ => description_of(node, session),
    };
    node.metrics().origin(session, describe)
}

fn description_of(node: &Node, session: SessionId) -> Option<String> {
    let view = node.parts()?.metadata.view().ok()?;
    // What cannot be read is not known; whoever needs it says so.
    Some(view.session(session).ok()??.description)
}

fn count_chunk(
    node: &Node,
    kind: OperationKind,
    session: u64,
    status: wire::ChunkStatus,
    bytes: u64,
    began: Instant,
) {
    let ending = match status {
        wire::ChunkStatus::Ok => Ending::Done,
        _ => Ending::Failed,
    };
    let origin = origin_of(node, SessionId(session));
    node.metrics()
        .operation(origin, kind)
        .record(ending, bytes, began.elapsed());
}

async fn get_chunk(node: &Node, request: &wire::GetChunkRequest) -> wire::GetChunkResponse {
    let call_id = request.call_id;
    let Some(parts) = node.parts() else {
        return chunk_refused(call_id, wire::ChunkStatus::Unavailable, node.not_ready());
    };
    match range_asked(request) {
        Ok((id, offset, length)) => get_response(call_id, parts.reader.chunk(id, offset, length).await),
        Err(malformed) => chunk_refused(call_id, malformed.status(), malformed.to_string()),
    }
}

/// What a call is answered, and whether the lease goes with it.
async fn carry_out(node: &Node, call: Call, request: &wire::CallRequest) -> (CallReply, Grant) {
    let Some(parts) = node.parts() else {
        let reason = node.not_ready();
        return (
            CallReply::Refused(Refusal::Unavailable { reason }),
            Grant::Nothing,
        );
    };
    if !parts.consensus.is_leader() {
        let leader = parts.consensus.leader().map(|member| member.addresses.grpc);
        return (CallReply::Refused(Refusal::NotLeader { leader }), Grant::Nothing);
    }
    let term = parts.consensus.term();
    let reply = match call {
        Call::Mutate(mutation) => {
            let session = mutation.request.session;
            parts.sessions.heard_of(session);
            if mutation.command.releases_only() {
                return (parts.writer.mutate(mutation).await, Grant::Nothing);
            }
            let admission = parts.leases.admit(session, request.holds_lease, term).await;
            return only_if_decided(parts.writer.mutate(mutation).await, admission.grant);
        }
        Call::Query(query) => {
            let session = SessionId(request.session);
            let admission = parts.leases.admit(session, request.holds_lease, term).await;
            return only_if_decided(parts.reader.query(&query).await, admission.grant);
        }
        Call::OpenSession { session, description } => {
            parts.sessions.heard_of(session);
            parts.writer.open_session(session, description).await
        }
        Call::CloseSession { session } => parts.writer.end_session(session).await,
        Call::KeepAlive { session } => keep_alive(parts, session).await,
    };
    (reply, Grant::Nothing)
}

/// A refusal confirms nothing, so nothing is granted with it.
fn only_if_decided(reply: CallReply, grant: Grant) -> (CallReply, Grant) {
    match reply {
        CallReply::Outcome(_) | CallReply::Answer(_) => (reply, grant),
        CallReply::Refused(_) | CallReply::Session(_) => (reply, Grant::Nothing),
    }
}

async fn keep_alive(parts: &Parts, session: SessionId) -> CallReply {
    let mut state = session_state(parts, session);
    if matches!(state, Ok(None)) {
        // A new leader may not have applied yet what opened it; and one that leads no more must not say so at all: the
        // client would give up all that it holds.
        if let Err(refusal) = parts.reader.barrier().await {
            return CallReply::Refused(refusal);
        }
        state = session_state(parts, session);
    }
    match state {
        Ok(Some(state)) => {
            parts.sessions.heard_of(session);
            CallReply::Session(state)
        }
        Ok(None) => CallReply::Refused(Refusal::UnknownSession),
        Err(fault) => {
            error!(%fault, "metadata cannot be read");
            CallReply::Refused(Refusal::Unavailable {
                reason: fault.to_string(),
            })
        }
    }
}

/// What a living session should know; `None`: it is not known, or has ended.
fn session_state(parts: &Parts, session: SessionId) -> Result<Option<SessionState>, Failure> {
    let view = parts.metadata.view()?;
    Ok(match view.session(session)? {
        Some(record) if record.ended.is_none() => Some(SessionState {
            unlinked: view.unlinked_waiting_for(session, UNLINKED_ASKED_MAX)?,
        }),
        _ => None,
    })
}

async fn put_chunk(node: &Node, request: wire::PutChunkRequest) -> wire::PutChunkResponse {
    let call_id = request.call_id;
    let answer = |status: wire::ChunkStatus, detail: String, leader: String| wire::PutChunkResponse {
        call_id,
        status: status.into(),
        detail,
        leader,
    };
    let Some(parts) = node.parts() else {
        return answer(wire::ChunkStatus::Unavailable, node.not_ready(), String::new());
    };
    let chunk = match stored_chunk(request) {
        Ok(chunk) => chunk,
        Err(malformed) => return answer(malformed.status(), malformed.to_string(), String::new()),
    };
    match parts.writer.put_chunk(chunk).await {
        Ok(()) => answer(wire::ChunkStatus::Ok, String::new(), String::new()),
        Err(PutError::NotLeader(leader)) => {
            let leader = leader.map(|member| member.addresses.grpc).unwrap_or_default();
            answer(wire::ChunkStatus::NotLeader, String::new(), leader)
        }
        Err(PutError::NoSpace) => answer(
            wire::ChunkStatus::NoSpace,
            PutError::NoSpace.to_string(),
            String::new(),
        ),
        Err(PutError::Unavailable(reason)) => answer(wire::ChunkStatus::Unavailable, reason, String::new()),
    }
}

/// Why there is no range of a chunk, as it travels.
pub fn chunk_refused(call_id: u64, status: wire::ChunkStatus, detail: String) -> wire::GetChunkResponse {
    wire::GetChunkResponse {
        call_id,
        status: status.into(),
        detail,
        ..Default::default()
    }
}
