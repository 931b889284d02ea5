//! The service for mounts: streams of calls and of chunks, each answered in any order.
//!
//! Decodes an envelope, calls the write or the read path, encodes the answer. So many requests of one stream are
//! worked on at once; further ones wait in the connection's flow-control window, so a client cannot fill memory.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use quorumfs_proto::call::SessionState;
use quorumfs_proto::wire::file_system_server::FileSystem;
use quorumfs_proto::{Call, CallReply, ChunkId, Refusal, Sha256, codec, limits, wire};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, error};

use crate::content::{ChunkRange, ContentError, StoredChunk};
use crate::server::{Node, Parts};
use crate::write::PutError;

/// Requests of one stream worked on at once: more than a client has lanes.
const CALLS_PER_STREAM_MAX: usize = 256;
/// Chunks of one stream worked on at once: at most so many MiB of one client in memory.
const CHUNKS_PER_STREAM_MAX: usize = 48;
/// Unlinked inodes a session is asked about at once.
const UNLINKED_ASKED_MAX: usize = 1000;

/// What every stream of answers is.
pub type AnswerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// See the module.
pub struct FileSystemService {
    node: Arc<Node>,
}

impl FileSystemService {
    /// Serves `node`, from before it has found its cluster.
    pub fn new(node: Arc<Node>) -> FileSystemService {
        FileSystemService { node }
    }
}

/// Answers each request of a stream by `answer`, at most `at_once_max` at a time, in the order they are done.
pub fn answer_stream<Q, A, F, Fut>(mut requests: Streaming<Q>, at_once_max: usize, answer: F) -> AnswerStream<A>
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
            let tell = tell.clone();
            let answer = answer(request);
            tokio::spawn(async move {
                let answer = answer.await;
                // A client that went away asks again elsewhere; what it asked for is done all the same.
                let _ = tell.send(Ok(answer)).await;
                drop(place);
            });
        }
    });
    Box::pin(ReceiverStream::new(answers))
}

#[tonic::async_trait]
impl FileSystem for FileSystemService {
    type CallsStream = AnswerStream<wire::CallResponse>;
    type PutChunksStream = AnswerStream<wire::PutChunkResponse>;
    type GetChunksStream = AnswerStream<wire::GetChunkResponse>;

    async fn calls(&self, request: Request<Streaming<wire::CallRequest>>) -> Result<Response<Self::CallsStream>, Status> {
        let node = self.node.clone();
        let answer = move |request: wire::CallRequest| {
            let node = node.clone();
            async move {
                let reply = match codec::decode::<Call>(&request.call) {
                    Ok(call) => carry_out(&node, call).await,
                    Err(error) => CallReply::Refused(Refusal::Invalid { reason: error.to_string() }),
                };
                wire::CallResponse { call_id: request.call_id, reply: codec::encode(&reply) }
            }
        };
        Ok(Response::new(answer_stream(request.into_inner(), CALLS_PER_STREAM_MAX, answer)))
    }

    async fn put_chunks(
        &self,
        request: Request<Streaming<wire::PutChunkRequest>>,
    ) -> Result<Response<Self::PutChunksStream>, Status> {
        let node = self.node.clone();
        let answer = move |request: wire::PutChunkRequest| {
            let node = node.clone();
            async move { put_chunk(&node, request).await }
        };
        Ok(Response::new(answer_stream(request.into_inner(), CHUNKS_PER_STREAM_MAX, answer)))
    }

    async fn get_chunks(
        &self,
        request: Request<Streaming<wire::GetChunkRequest>>,
    ) -> Result<Response<Self::GetChunksStream>, Status> {
        let node = self.node.clone();
        let answer = move |request: wire::GetChunkRequest| {
            let node = node.clone();
            async move {
                let Some(parts) = node.parts() else {
                    return chunk_refused(request.call_id, wire::ChunkStatus::Unavailable, &node.not_ready());
                };
                let Some(id) = request.chunk.map(ChunkId::from) else {
                    return chunk_refused(request.call_id, wire::ChunkStatus::Invalid, "no chunk is named");
                };
                let range = parts.reader.chunk(id, request.offset, request.length).await;
                encode_range(request.call_id, range)
            }
        };
        Ok(Response::new(answer_stream(request.into_inner(), CHUNKS_PER_STREAM_MAX, answer)))
    }

    async fn discover(&self, _: Request<wire::DiscoverRequest>) -> Result<Response<wire::DiscoverResponse>, Status> {
        let own = Some(self.node.own().clone().into());
        let answer = match self.node.parts() {
            None => wire::DiscoverResponse { cluster_id: Bytes::new(), node: own, leader: None, members: Vec::new() },
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

async fn carry_out(node: &Node, call: Call) -> CallReply {
    let Some(parts) = node.parts() else {
        return CallReply::Refused(Refusal::Unavailable { reason: node.not_ready() });
    };
    if !parts.consensus.is_leader() {
        let leader = parts.consensus.leader().map(|member| member.addresses.grpc);
        return CallReply::Refused(Refusal::NotLeader { leader });
    }
    match call {
        Call::Mutate(mutation) => {
            parts.sessions.heard_of(mutation.request.session);
            parts.writer.mutate(mutation).await
        }
        Call::Query(query) => parts.reader.query(&query).await,
        Call::OpenSession { session, description } => {
            parts.sessions.heard_of(session);
            parts.writer.open_session(session, description).await
        }
        Call::CloseSession { session } => parts.writer.end_session(session).await,
        Call::KeepAlive { session } => keep_alive(parts, session),
    }
}

fn keep_alive(parts: &Parts, session: quorumfs_proto::SessionId) -> CallReply {
    let state = parts.metadata.view().and_then(|view| match view.session(session)? {
        Some(record) if record.ended_at.is_none() => {
            Ok(Some(SessionState { unlinked: view.unlinked_waiting_for(session, UNLINKED_ASKED_MAX)? }))
        }
        _ => Ok(None),
    });
    match state {
        Ok(Some(state)) => {
            parts.sessions.heard_of(session);
            CallReply::Session(state)
        }
        Ok(None) => CallReply::Refused(Refusal::UnknownSession),
        Err(fault) => {
            error!(%fault, "metadata cannot be read");
            CallReply::Refused(Refusal::Unavailable { reason: fault.to_string() })
        }
    }
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
    let chunk = match decode_chunk(request) {
        Ok(chunk) => chunk,
        Err(reason) => return answer(wire::ChunkStatus::Invalid, reason.to_string(), String::new()),
    };
    match parts.writer.put_chunk(chunk).await {
        Ok(()) => answer(wire::ChunkStatus::Ok, String::new(), String::new()),
        Err(PutError::NotLeader(leader)) => {
            let leader = leader.map(|member| member.addresses.grpc).unwrap_or_default();
            answer(wire::ChunkStatus::NotLeader, String::new(), leader)
        }
        Err(error) => {
            let status = match &error {
                PutError::NoSpace => wire::ChunkStatus::NoSpace,
                PutError::Corrupt => wire::ChunkStatus::Corrupt,
                PutError::NotLeader(_) | PutError::Unavailable(_) => wire::ChunkStatus::Unavailable,
            };
            answer(status, error.to_string(), String::new())
        }
    }
}

/// A chunk as it arrived, within bounds; its checksums are checked by who stores it.
pub fn decode_chunk(request: wire::PutChunkRequest) -> Result<StoredChunk, &'static str> {
    let id = request.chunk.map(ChunkId::from).ok_or("no chunk is named")?;
    let sha256 = Sha256(request.sha256.as_ref().try_into().map_err(|_| "the SHA-256 is not 32 bytes long")?);
    if request.payload.is_empty() || request.payload.len() > limits::CHUNK_BYTES_MAX as usize {
        return Err("a chunk is 1 byte to 1 MiB long");
    }
    Ok(StoredChunk { id, sha256, payload: request.payload, block_crcs: request.block_crcs })
}

/// A range of a chunk, or why there is none, as it travels.
pub fn encode_range(call_id: u64, range: Result<ChunkRange, ContentError>) -> wire::GetChunkResponse {
    match range {
        Ok(range) => wire::GetChunkResponse {
            call_id,
            status: wire::ChunkStatus::Ok.into(),
            detail: String::new(),
            offset: range.offset,
            payload: range.payload,
            block_crcs: range.block_crcs,
        },
        Err(error) => {
            let status = match &error {
                ContentError::NotFound { .. } => wire::ChunkStatus::NotFound,
                ContentError::Corrupt { .. } => wire::ChunkStatus::Corrupt,
                _ => wire::ChunkStatus::Unavailable,
            };
            chunk_refused(call_id, status, &error.to_string())
        }
    }
}

/// Why there is no range of a chunk, as it travels.
pub fn chunk_refused(call_id: u64, status: wire::ChunkStatus, detail: &str) -> wire::GetChunkResponse {
    wire::GetChunkResponse { call_id, status: status.into(), detail: detail.to_string(), ..Default::default() }
}
