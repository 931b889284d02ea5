//! The service for mounts: streams of calls and of chunks, answered in any order.
//!
//! It decodes a message, calls the write or the read path, and encodes the answer. The number of concurrent requests
//! of a stream is bounded; further ones wait in the flow-control window of the connection, so a client cannot fill
//! memory.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt as _;
use quorumfs_measure::Ending;
use quorumfs_proto::call::SessionState;
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::{Chunk, ClientRequest, ClientResponse, Refusal, SessionId, Timestamp, codec};
use quorumfs_wire as wire;
use quorumfs_wire::calls::{AnswerStream, answer_calls};
use quorumfs_wire::file_system_server::FileSystem;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::error;

use super::transfer_budget::TransferBudget;
use crate::call_stream::{CallStream, Standing};
use crate::incoming::{certificate_of, connection_of};
use crate::leader::leases::Grant;
use crate::leader::sessions::UNLINKED_QUEUE_LEVEL;
use crate::leader::write::PutError;
use crate::node::{Node, Parts};
use crate::observe::metrics::CountedCommand;
use crate::observe::metrics::kinds::{OperationKind, Origin};
use crate::replication::messages::{get_error, get_response, put_status, requested_range};
use quorumfs_metadata::{Failure, SessionKey, UnlinkedAnswer};

/// Most concurrent calls of one stream: more than a client has lanes.
const CALLS_PER_STREAM_MAX: usize = 256;
/// Most concurrent chunks of one stream, within the budget of all streams ([`TransferBudget`]).
const CHUNKS_PER_STREAM_MAX: usize = 48;
/// Most unlinked inodes in one question to a session.
const UNLINKED_ASKED_MAX: usize = 2048;

/// The service for mounts.
pub struct FileSystemService {
    node: Arc<Node>,
    transfers: TransferBudget,
}

impl FileSystemService {
    /// Creates the service of `node`, which may not have found its cluster yet.
    pub fn new(node: Arc<Node>) -> FileSystemService {
        FileSystemService {
            node,
            transfers: TransferBudget::default(),
        }
    }
}

/// Returns the bytes that a put holds in memory.
fn put_bytes(request: &wire::PutChunkRequest) -> u32 {
    u32::try_from(request.payload.len())
        .unwrap_or(u32::MAX)
        .min(CHUNK_BYTES_MAX)
}

/// Returns the bytes that the answer to a get holds in memory, without the widening to blocks.
fn get_bytes(request: &wire::GetChunkRequest) -> u32 {
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
        let extensions = request.extensions();
        let (stream, nudges) = CallStream::new(certificate_of(extensions), connection_of(extensions));
        let stream = Arc::new(stream);
        let answer = move |mut request: wire::CallRequest| {
            let (node, stream) = (node.clone(), stream.clone());
            // Processed at once, not in the task of the request, because the following requests rely on it.
            if let Some(hello) = request.hello.take() {
                stream.hello(&hello);
                stream.comes_from(&request.local_addresses);
            }
            async move {
                let answered = match codec::decode::<ClientRequest>(&request.call) {
                    Ok(call) => execute_measured(&node, &stream, call, &mut request).await,
                    Err(error) => {
                        let reason = error.to_string();
                        ClientResponse::Refused(Refusal::Invalid { reason }).into()
                    }
                };
                wire::CallResponse {
                    clock_ns: clock_ns(&node, &answered.reply),
                    reply: codec::encode(&answered.reply),
                    lease_ms: answered.grant.lease_ms(),
                    unlinked: answered.question,
                    ..wire::CallResponse::default()
                }
            }
        };
        let answers = answer_calls(request.into_inner(), CALLS_PER_STREAM_MAX, (), answer);
        let nudges = ReceiverStream::new(nudges).map(|()| {
            Ok(wire::CallResponse {
                keep_alive_now: true,
                ..wire::CallResponse::default()
            })
        });
        Ok(Response::new(Box::pin(futures::stream::select(answers, nudges))))
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
        Ok(Response::new(Box::pin(answer_calls(
            request.into_inner(),
            CHUNKS_PER_STREAM_MAX,
            self.transfers.stream(put_bytes),
            answer,
        ))))
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
        Ok(Response::new(Box::pin(answer_calls(
            request.into_inner(),
            CHUNKS_PER_STREAM_MAX,
            self.transfers.stream(get_bytes),
            answer,
        ))))
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

/// The result of a call.
struct CallResult {
    reply: ClientResponse,
    /// The lease that the answer grants.
    grant: Grant,
    /// A question to the session.
    question: Option<wire::UnlinkedQuestion>,
}

impl From<ClientResponse> for CallResult {
    fn from(reply: ClientResponse) -> CallResult {
        CallResult {
            reply,
            grant: Grant::Nothing,
            question: None,
        }
    }
}

/// Returns the leader's clock for an answer with `reply`; 0 if this node may not be the leader.
fn clock_ns(node: &Node, reply: &ClientResponse) -> i64 {
    let time = match reply {
        ClientResponse::Refused(_) => None,
        ClientResponse::Outcome(_) | ClientResponse::Answer(_) | ClientResponse::Session(_) => {
            node.parts().and_then(|parts| parts.write_path.time())
        }
    };
    time.map_or(0, Timestamp::unix_ns)
}

/// Executes a call and records its metrics.
async fn execute_measured(
    node: &Node,
    stream: &CallStream,
    call: ClientRequest,
    request: &mut wire::CallRequest,
) -> CallResult {
    enum Counted {
        Command(CountedCommand),
        Query(OperationKind),
        Session,
    }
    let (session, counted) = match &call {
        ClientRequest::Mutate(mutation) => (
            mutation.request.session,
            Counted::Command(CountedCommand::of(&mutation.command)),
        ),
        ClientRequest::Query(query) => (
            SessionId(request.session),
            Counted::Query(OperationKind::of_query(query)),
        ),
        ClientRequest::OpenSession { session, .. }
        | ClientRequest::OpenSessionWithKey { session, .. }
        | ClientRequest::KeepAlive { session }
        | ClientRequest::AnswerUnlinked { session, .. }
        | ClientRequest::CloseSession { session }
        | ClientRequest::CloseSessionWithKey { session, .. } => (*session, Counted::Session),
    };
    let is_close = matches!(
        call,
        ClientRequest::CloseSession { .. } | ClientRequest::CloseSessionWithKey { .. }
    );
    let began = Instant::now();
    let statistics = request.statistics.take();
    let answered = execute(node, stream, call, request).await;
    let reply = &answered.reply;
    let took = began.elapsed();
    let metrics = node.metrics();
    let origin = origin_of(node, session);
    match counted {
        Counted::Command(counted) => metrics.command(origin, counted, reply, took),
        Counted::Query(kind) => metrics.query(origin, kind, reply, took),
        Counted::Session => {
            metrics.session(origin, reply, took);
            if !matches!(reply, ClientResponse::Session(_)) {
                return answered;
            }
            if is_close {
                metrics.mounts.closed(session);
            } else if let Some(statistics) = statistics {
                let description = description_of(node, session).unwrap_or_default();
                metrics.mounts.heard(session, description, statistics.into());
            }
        }
    }
    answered
}

/// Returns whether a session belongs to a mount or a node; reads the metadata once for each session.
fn origin_of(node: &Node, session: SessionId) -> Origin {
    let describe = || match session.0 {
        // Peers, and programs without this field, do not send the session.
        0 => None,
        _ => description_of(node, session),
    };
    node.metrics().origin(session, describe)
}

fn description_of(node: &Node, session: SessionId) -> Option<String> {
    let view = node.parts()?.metadata.view().ok()?;
    // A failure to read is reported by whoever needs the data.
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
    let Some(parts) = node.parts() else {
        return get_error(wire::ChunkStatus::Unavailable, node.not_ready());
    };
    match requested_range(request) {
        Ok((id, offset, length)) => get_response(parts.read_path.chunk(id, offset, length).await),
        Err(malformed) => get_error(malformed.status(), malformed.to_string()),
    }
}

async fn execute(
    node: &Node,
    stream: &CallStream,
    call: ClientRequest,
    request: &wire::CallRequest,
) -> CallResult {
    let Some(parts) = node.parts() else {
        return ClientResponse::from(Refusal::unavailable(node.not_ready())).into();
    };
    if !parts.consensus.is_leader() {
        return ClientResponse::from(Refusal::not_leader(parts.consensus.leader())).into();
    }
    let term = parts.consensus.term();
    match call {
        ClientRequest::Mutate(mutation) => {
            let session = mutation.request.session;
            match standing(parts, stream, session).await {
                Standing::Proven => parts.sessions.note_call(session, stream),
                Standing::Unknown => return ClientResponse::Refused(Refusal::UnknownSession).into(),
                Standing::Refused(refusal) => return ClientResponse::Refused(refusal).into(),
            }
            if mutation.command.releases_only() {
                return parts.rewriter.mutate(mutation).await.into();
            }
            let admission = parts.leases.admit(session, request.holds_lease, term).await;
            with_grant_if_decided(parts.rewriter.mutate(mutation).await, admission.grant)
        }
        ClientRequest::Query(query) => {
            let session = SessionId(request.session);
            let found = match session.0 {
                0 => Standing::Unknown,
                _ => standing(parts, stream, session).await,
            };
            match found {
                Standing::Proven => {
                    let admission = parts.leases.admit(session, request.holds_lease, term).await;
                    with_grant_if_decided(parts.read_path.query(&query).await, admission.grant)
                }
                // A call without a session cannot hold the lease, but waits for the lease of others too.
                Standing::Unknown => {
                    let _admission = parts.leases.admit(SessionId(0), false, term).await;
                    parts.read_path.query(&query).await.into()
                }
                Standing::Refused(refusal) => ClientResponse::Refused(refusal).into(),
            }
        }
        ClientRequest::OpenSession { session, description } => {
            open_session(node, parts, stream, session, description, None).await
        }
        ClientRequest::OpenSessionWithKey {
            session,
            description,
            secret,
        } => {
            let key = stream.key_of_new(session, &secret);
            open_session(node, parts, stream, session, description, Some(key)).await
        }
        ClientRequest::CloseSession { session } => close_session(parts, stream, session).await,
        ClientRequest::CloseSessionWithKey { session, secret } => {
            stream.key_of_new(session, &secret);
            close_session(parts, stream, session).await
        }
        ClientRequest::KeepAlive { session } => match standing(parts, stream, session).await {
            Standing::Proven => keep_alive(parts, stream, session, request, 1).await,
            Standing::Unknown => ClientResponse::Refused(Refusal::UnknownSession).into(),
            Standing::Refused(refusal) => ClientResponse::Refused(refusal).into(),
        },
        ClientRequest::AnswerUnlinked {
            session,
            from,
            through,
            held,
        } => {
            match standing(parts, stream, session).await {
                Standing::Proven => {}
                Standing::Unknown => return ClientResponse::Refused(Refusal::UnknownSession).into(),
                Standing::Refused(refusal) => return ClientResponse::Refused(refusal).into(),
            }
            if held.len() > 2 * UNLINKED_ASKED_MAX {
                let reason = String::from("the answer has more inodes than the question");
                return ClientResponse::Refused(Refusal::Invalid { reason }).into();
            }
            let answer = UnlinkedAnswer {
                session,
                from,
                through,
                held,
            };
            match parts.sessions.answer_unlinked(answer).await {
                // A smaller question waits for the next keep-alive, so that not every unlink causes a command.
                Ok(()) => keep_alive(parts, stream, session, request, UNLINKED_ASKED_MAX).await,
                Err(refusal) => ClientResponse::Refused(refusal).into(),
            }
        }
    }
}

/// Returns whether calls of a stream may act for `session`.
async fn standing(parts: &Parts, stream: &CallStream, session: SessionId) -> Standing {
    let mut standing = stream.standing(&parts.metadata, session);
    if matches!(standing, Ok(Standing::Unknown)) {
        // A new leader may not have applied the opening of the session yet. A former leader must not report it as
        // unknown, because the client would then give up everything it holds.
        if let Err(refusal) = parts.read_path.barrier().await {
            return Standing::Refused(refusal);
        }
        standing = stream.standing(&parts.metadata, session);
    }
    standing.unwrap_or_else(|fault| Standing::Refused(unreadable(&fault)))
}

fn unreadable(fault: &Failure) -> Refusal {
    error!(%fault, "cannot read the metadata");
    Refusal::unavailable(fault)
}

/// Attaches `grant` if the reply confirms leadership; a refusal does not.
fn with_grant_if_decided(reply: ClientResponse, grant: Grant) -> CallResult {
    let grant = match reply {
        ClientResponse::Outcome(_) | ClientResponse::Answer(_) => grant,
        ClientResponse::Refused(_) | ClientResponse::Session(_) => Grant::Nothing,
    };
    CallResult {
        grant,
        ..CallResult::from(reply)
    }
}

async fn open_session(
    node: &Node,
    parts: &Parts,
    stream: &CallStream,
    session: SessionId,
    description: String,
    key: Option<SessionKey>,
) -> CallResult {
    if let Err(refusal) = parts.sessions.admit_new(session) {
        return ClientResponse::Refused(refusal).into();
    }
    let was_known = parts
        .metadata
        .view()
        .map_err(Failure::from)
        .and_then(|view| Ok(view.session(session)?.is_some()));
    let origin = description.clone();
    let reply = parts.write_path.open_session(session, description, key).await;
    if matches!(reply, ClientResponse::Session(_)) {
        // If the session exists already, another client may have opened it.
        if matches!(was_known, Ok(false)) {
            stream.has_opened(session);
        }
        node.metrics().opened(session, &origin);
        parts.sessions.note_call(session, stream);
    }
    reply.into()
}

async fn close_session(parts: &Parts, stream: &CallStream, session: SessionId) -> CallResult {
    match standing(parts, stream, session).await {
        Standing::Proven => parts.write_path.end_session(session).await.into(),
        Standing::Unknown => ClientResponse::Refused(Refusal::UnknownSession).into(),
        Standing::Refused(refusal) => ClientResponse::Refused(refusal).into(),
    }
}

/// Records a keep-alive. Returns the state of the session, and a question if it has at least `asked_min` inodes.
async fn keep_alive(
    parts: &Parts,
    stream: &CallStream,
    session: SessionId,
    request: &wire::CallRequest,
    asked_min: usize,
) -> CallResult {
    let found = session_state(parts, session, request.answers_unlinked);
    let (state, question) = match found {
        Ok(Some(found)) => found,
        // The session was known, so it has ended; this is final for all leaders.
        Ok(None) => return ClientResponse::Refused(Refusal::UnknownSession).into(),
        Err(fault) => {
            return ClientResponse::from(unreadable(&fault)).into();
        }
    };
    let kept = parts.sessions.note_keep_alive(session, stream, request).await;
    if let Err(refusal) = kept {
        return ClientResponse::Refused(refusal).into();
    }
    CallResult {
        question: question.filter(|question| question.inodes.len() >= asked_min),
        ..CallResult::from(ClientResponse::Session(state))
    }
}

/// Returns the state of a live session and a question to it; `None` if it has ended.
fn session_state(
    parts: &Parts,
    session: SessionId,
    answers_unlinked: bool,
) -> Result<Option<(SessionState, Option<wire::UnlinkedQuestion>)>, Failure> {
    let view = parts.metadata.view()?;
    match view.session(session)? {
        Some(record) if record.ended.is_none() => {}
        _ => return Ok(None),
    }
    let unlinked = parts.sessions.held_to_ask(&view, session)?;
    let may_ask = answers_unlinked && view.feature_level() >= UNLINKED_QUEUE_LEVEL;
    let page = match may_ask {
        true => view.unlinked_page(session, UNLINKED_ASKED_MAX)?,
        false => None,
    };
    let question = page.map(|page| wire::UnlinkedQuestion {
        from: page.from,
        through: page.through,
        inodes: page.inodes.into_iter().map(|inode| inode.0).collect(),
    });
    Ok(Some((SessionState { unlinked }, question)))
}

async fn put_chunk(node: &Node, request: wire::PutChunkRequest) -> wire::PutChunkResponse {
    use wire::ChunkStatus;
    let Some(parts) = node.parts() else {
        return put_status(ChunkStatus::Unavailable, node.not_ready());
    };
    let chunk = match Chunk::try_from(request) {
        Ok(chunk) => chunk,
        Err(malformed) => return put_status(malformed.status(), malformed.to_string()),
    };
    match parts.write_path.put_chunk(chunk).await {
        Ok(()) => put_status(ChunkStatus::Ok, String::new()),
        Err(PutError::NotLeader(leader)) => wire::PutChunkResponse {
            status: ChunkStatus::NotLeader.into(),
            leader: leader.map(|member| member.addresses.grpc).unwrap_or_default(),
            ..wire::PutChunkResponse::default()
        },
        Err(PutError::NoSpace) => put_status(ChunkStatus::NoSpace, PutError::NoSpace.to_string()),
        Err(PutError::Unavailable(reason)) => put_status(ChunkStatus::Unavailable, reason),
    }
}
