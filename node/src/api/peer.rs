//! The service for the other nodes: consensus messages and chunks. Every request but `Hello` must name this node's
//! cluster; one that names another is refused, so that folders of two clusters never mix.

use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::wire::peer_server::Peer;
use quorumfs_proto::{ChunkId, wire};
use tonic::{Request, Response, Status, Streaming};

use super::fs::{AnswerStream, answer_stream, chunk_refused};
use crate::content::wire::{get_response, put_response, range_asked, stored_chunk};
use crate::node::{Node, Parts};
use crate::read::task_failed;
use crate::transport::CLUSTER_KEY;

/// Chunks of one stream worked on at once.
const CHUNKS_PER_STREAM_MAX: usize = 64;
/// Chunks one question may name.
const HELD_ASKED_MAX: usize = 100_000;

/// See the module.
pub struct PeerService {
    node: Arc<Node>,
}

impl PeerService {
    /// Serves `node`, from before it has found its cluster.
    pub fn new(node: Arc<Node>) -> PeerService {
        PeerService { node }
    }

    /// The parts, for a request that names this cluster.
    fn admit<T>(&self, request: &Request<T>) -> Result<&Parts, Status> {
        let parts = self
            .node
            .parts()
            .ok_or_else(|| Status::unavailable(self.node.not_ready()))?;
        let named = request
            .metadata()
            .get(CLUSTER_KEY)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("none");
        if named != parts.cluster.to_string() {
            let own = parts.cluster;
            return Err(Status::failed_precondition(format!(
                "this node belongs to cluster {own}, not to {named}"
            )));
        }
        Ok(parts)
    }
}

#[tonic::async_trait]
impl Peer for PeerService {
    type AppendEntriesStream = AnswerStream<wire::RaftMessage>;
    type PushChunksStream = AnswerStream<wire::PutChunkResponse>;
    type FetchChunksStream = AnswerStream<wire::GetChunkResponse>;

    async fn hello(&self, _: Request<wire::HelloRequest>) -> Result<Response<wire::HelloResponse>, Status> {
        let membership = self.node.membership();
        let (cluster_id, members) = match &membership {
            Some(known) => (Bytes::copy_from_slice(&known.cluster.0), known.founders.clone()),
            None => (Bytes::new(), Vec::new()),
        };
        Ok(Response::new(wire::HelloResponse {
            node: Some(self.node.own().clone().into()),
            cluster_id,
            empty: membership.is_none(),
            members: members.into_iter().map(Into::into).collect(),
        }))
    }

    async fn append_entries(
        &self,
        request: Request<Streaming<wire::RaftMessage>>,
    ) -> Result<Response<Self::AppendEntriesStream>, Status> {
        let consensus = self.admit(&request)?.consensus.clone();
        Ok(Response::new(Box::pin(
            consensus.append_stream(request.into_inner()),
        )))
    }

    async fn vote(&self, request: Request<wire::RaftMessage>) -> Result<Response<wire::RaftMessage>, Status> {
        let consensus = self.admit(&request)?.consensus.clone();
        consensus.vote(request.into_inner()).await.map(Response::new)
    }

    async fn pre_vote(
        &self,
        request: Request<wire::RaftMessage>,
    ) -> Result<Response<wire::RaftMessage>, Status> {
        let consensus = self.admit(&request)?.consensus.clone();
        consensus.pre_vote(request.into_inner()).await.map(Response::new)
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::RaftMessage>,
    ) -> Result<Response<wire::RaftMessage>, Status> {
        let consensus = self.admit(&request)?.consensus.clone();
        consensus
            .transfer_leader(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<wire::SnapshotPiece>>,
    ) -> Result<Response<wire::RaftMessage>, Status> {
        let consensus = self.admit(&request)?.consensus.clone();
        consensus
            .install_snapshot(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn push_chunks(
        &self,
        request: Request<Streaming<wire::PutChunkRequest>>,
    ) -> Result<Response<Self::PushChunksStream>, Status> {
        let content = self.admit(&request)?.content.clone();
        let answer = move |request: wire::PutChunkRequest| {
            let content = content.clone();
            async move {
                let call_id = request.call_id;
                match stored_chunk(request) {
                    Ok(chunk) => put_response(call_id, &content.put(chunk).await),
                    Err(malformed) => wire::PutChunkResponse {
                        call_id,
                        status: malformed.status().into(),
                        detail: malformed.to_string(),
                        leader: String::new(),
                    },
                }
            }
        };
        Ok(Response::new(answer_stream(
            request.into_inner(),
            CHUNKS_PER_STREAM_MAX,
            answer,
        )))
    }

    async fn fetch_chunks(
        &self,
        request: Request<Streaming<wire::GetChunkRequest>>,
    ) -> Result<Response<Self::FetchChunksStream>, Status> {
        let content = self.admit(&request)?.content.clone();
        let answer = move |request: wire::GetChunkRequest| {
            let content = content.clone();
            async move {
                let call_id = request.call_id;
                let (id, offset, length) = match range_asked(&request) {
                    Ok(asked) => asked,
                    Err(malformed) => {
                        return chunk_refused(call_id, malformed.status(), malformed.to_string());
                    }
                };
                let range = tokio::task::spawn_blocking(move || content.read(id, offset, length)).await;
                get_response(call_id, range.unwrap_or_else(|failed| Err(task_failed(failed))))
            }
        };
        Ok(Response::new(answer_stream(
            request.into_inner(),
            CHUNKS_PER_STREAM_MAX,
            answer,
        )))
    }

    async fn held_chunks(
        &self,
        request: Request<wire::HeldChunksRequest>,
    ) -> Result<Response<wire::HeldChunksResponse>, Status> {
        let parts = self.admit(&request)?;
        let chunks = request.get_ref().chunks.as_slice();
        if chunks.len() > HELD_ASKED_MAX {
            return Err(Status::invalid_argument(format!(
                "at most {HELD_ASKED_MAX} chunks may be asked about at once"
            )));
        }
        let held = chunks
            .iter()
            .map(|id| parts.content.holds(ChunkId::from(*id)))
            .collect();
        Ok(Response::new(wire::HeldChunksResponse { held }))
    }

    async fn node_status(
        &self,
        request: Request<wire::NodeStatusRequest>,
    ) -> Result<Response<wire::NodeStatusResponse>, Status> {
        let parts = self.admit(&request)?;
        let room = parts.space.own();
        let recovery = parts.recovery.status();
        Ok(Response::new(wire::NodeStatusResponse {
            node: Some(self.node.own().clone().into()),
            capacity_bytes: room.capacity_bytes,
            available_bytes: room.available_bytes,
            has_room: room.has_room,
            chunks_held: recovery.held_chunks,
            chunk_bytes_held: recovery.held_bytes,
            chunks_missing: recovery.missing_chunks,
            applied_index: parts.metadata.position().index,
        }))
    }

    async fn probe(
        &self,
        request: Request<wire::ProbeRequest>,
    ) -> Result<Response<wire::ProbeResponse>, Status> {
        let health = self.admit(&request)?.health.clone();
        Ok(Response::new(health.answer(request.into_inner()).await))
    }
}
