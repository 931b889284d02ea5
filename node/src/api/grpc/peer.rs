//! The service for other nodes: consensus messages and chunks.
//!
//! Every request except `Hello`, `Join`, `Invite` and `MayRenounce` must name this cluster, so that data of two
//! clusters never mixes. A request that names another cluster, another node, or an earlier incarnation of this node is
//! refused.

use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::{Chunk, ChunkId, ClientResponse, ClusterId, Member, NodeId, Refusal};
use quorumfs_wire as wire;
use quorumfs_wire::calls::{AnswerStream, answer_calls};
use quorumfs_wire::peer_server::Peer;
use tonic::{Request, Response, Status, Streaming};

use crate::consensus::{BarrierError, Consensus, ProposeError};
use crate::integrity::completeness::{Asked, LACKING_CHUNKS_MAX, completeness};
use crate::leader::read::task_failed;
use crate::membership::changes::{ChangeError, Gone, Removal};
use crate::membership::identity::Membership;
use crate::node::{Node, Parts};
use crate::observe::metrics::report::Throughput;
use crate::replication::Verdict;
use crate::replication::messages::{get_error, get_response, put_response, put_status, requested_range};
use crate::replication::peers::VERIFY_IDS_MAX;
use crate::transport::{CLUSTER_KEY, NODE_KEY};
use quorumfs_metadata::FEATURE_LEVEL;

/// Most concurrent chunks of one stream.
const CHUNKS_PER_STREAM_MAX: usize = 64;
/// The message to other nodes while this one is starting. It does not include the reason, which may be a refusal of
/// the same nodes.
const NOT_READY: &str = "the node is still starting; its /status shows the reason";
/// Most chunk ids accepted in one query of held chunks.
const HELD_IDS_MAX: usize = 100_000;

/// The service for other nodes.
pub struct PeerService {
    node: Arc<Node>,
}

impl PeerService {
    /// Creates the service of `node`, which may not have found its cluster yet.
    pub fn new(node: Arc<Node>) -> PeerService {
        PeerService { node }
    }

    /// Returns the parts of the node for a request to this cluster and node.
    fn admit<T>(&self, request: &Request<T>) -> Result<&Parts, Status> {
        let parts = self.node.parts().ok_or_else(|| Status::unavailable(NOT_READY))?;
        self.check_recipient(request, parts.cluster)?;
        Ok(parts)
    }

    /// Like [`PeerService::admit`], for messages of the consensus: a node that lost its state still votes with its
    /// log.
    fn admit_to_consensus<T>(&self, request: &Request<T>) -> Result<Consensus, Status> {
        let consensus = self.node.consensus();
        let (cluster, consensus) = consensus.ok_or_else(|| Status::unavailable(NOT_READY))?;
        self.check_recipient(request, cluster)?;
        Ok(consensus.clone())
    }

    fn check_recipient<T>(&self, request: &Request<T>, cluster: ClusterId) -> Result<(), Status> {
        let named = request
            .metadata()
            .get(CLUSTER_KEY)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("none");
        if named != cluster.to_string() {
            return Err(Status::failed_precondition(format!(
                "this node belongs to cluster {cluster}, not {named}"
            )));
        }
        // An answer counts for the incarnation that was asked, so no other may give it.
        let own = self.node.own().id.to_string();
        match request.metadata().get(NODE_KEY) {
            Some(meant) if meant.as_bytes() != own.as_bytes() => Err(Status::failed_precondition(format!(
                "this is node {own}, but the request is for another node"
            ))),
            _ => Ok(()),
        }
    }
}

impl PeerService {
    /// Returns why the state of this node cannot be trusted; empty if it can.
    fn trouble(&self) -> String {
        let of_consensus = || {
            self.node
                .consensus()
                .and_then(|(_, consensus)| consensus.trouble())
        };
        self.node.trouble().or_else(of_consensus).unwrap_or_default()
    }
}

fn member_of(member: Option<wire::Member>) -> Result<Member, Status> {
    let member = member.ok_or_else(|| Status::invalid_argument("the request names no node"))?;
    Member::try_from(member).map_err(|error| Status::invalid_argument(error.to_string()))
}

/// Returns the gRPC address of the leader, empty if unknown; converts other errors to a status.
fn leader_or_status(error: ChangeError) -> Result<String, Status> {
    match error {
        ChangeError::NotLeader(leader) => Ok(leader.map(|member| member.addresses.grpc).unwrap_or_default()),
        ChangeError::Refused(reason) => Err(Status::failed_precondition(reason)),
        ChangeError::Unavailable(reason) => Err(Status::unavailable(reason)),
        ChangeError::NobodyThere(reason) => Err(Status::not_found(reason)),
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
            empty: self.node.folder().is_fresh(),
            members: members.into_iter().map(Into::into).collect(),
            feature_level: FEATURE_LEVEL,
            trouble: self.trouble(),
        }))
    }

    async fn join(
        &self,
        request: Request<wire::JoinRequest>,
    ) -> Result<Response<wire::JoinResponse>, Status> {
        let parts = self.node.parts().ok_or_else(|| Status::unavailable(NOT_READY))?;
        let request = request.into_inner();
        let wanted = ClusterId::from_bytes(&request.cluster_id);
        if wanted.is_some_and(|wanted| wanted != parts.cluster) {
            let own = parts.cluster;
            return Err(Status::failed_precondition(format!(
                "this node belongs to cluster {own}"
            )));
        }
        let member = member_of(request.node)?;
        let joined = parts
            .membership_changes
            .take_in(&member, request.feature_level)
            .await;
        let (not_leader, leader, members) = match joined {
            Ok(members) => (false, String::new(), members),
            Err(error) => {
                let leader = leader_or_status(error)?;
                (true, leader, Vec::new())
            }
        };
        Ok(Response::new(wire::JoinResponse {
            not_leader,
            leader,
            cluster_id: Bytes::copy_from_slice(&parts.cluster.0),
            members: members.into_iter().map(Into::into).collect(),
        }))
    }

    async fn may_renounce(
        &self,
        request: Request<wire::MayRenounceRequest>,
    ) -> Result<Response<wire::MayRenounceResponse>, Status> {
        // Without the reason, because nodes that wait for each other would quote each other.
        let parts = self
            .node
            .parts()
            .ok_or_else(|| Status::unavailable("the node does not take part in the consensus"))?;
        let request = request.into_inner();
        let of = ClusterId::from_bytes(&request.cluster_id);
        if !of.is_some_and(|of| of == parts.cluster || self.node.folder().replaces(of)) {
            let own = parts.cluster;
            return Err(Status::failed_precondition(format!(
                "this node belongs to cluster {own}"
            )));
        }
        let node = member_of(request.node)?.id;
        let (not_leader, leader) = match parts.membership_changes.may_renounce(node, request.entry).await {
            Ok(()) => (false, String::new()),
            Err(error) => (true, leader_or_status(error)?),
        };
        Ok(Response::new(wire::MayRenounceResponse { not_leader, leader }))
    }

    async fn invite(
        &self,
        request: Request<wire::InviteRequest>,
    ) -> Result<Response<wire::InviteResponse>, Status> {
        let request = request.into_inner();
        if member_of(request.node)?.id != self.node.own().id {
            return Err(Status::failed_precondition("the invitation is for another node"));
        }
        let cluster = ClusterId::from_bytes(&request.cluster_id)
            .ok_or_else(|| Status::invalid_argument("the request names no cluster"))?;
        if self
            .node
            .membership()
            .is_some_and(|known| known.cluster != cluster)
        {
            return Err(Status::failed_precondition(
                "this node belongs to another cluster",
            ));
        }
        *self.node.invitation().lock() = Some(Membership {
            cluster,
            founders: Vec::new(),
        });
        Ok(Response::new(wire::InviteResponse {}))
    }

    async fn add_member(
        &self,
        request: Request<wire::AddMemberRequest>,
    ) -> Result<Response<wire::AddMemberResponse>, Status> {
        let parts = self.admit(&request)?;
        let added = parts
            .membership_changes
            .invite(&request.get_ref().grpc_address)
            .await;
        let (leader, node) = match added {
            Ok(member) => (None, Some(member.into())),
            Err(error) => (Some(leader_or_status(error)?), None),
        };
        Ok(Response::new(wire::AddMemberResponse {
            not_leader: leader.is_some(),
            leader: leader.unwrap_or_default(),
            node,
        }))
    }

    async fn remove_members(
        &self,
        request: Request<wire::RemoveMembersRequest>,
    ) -> Result<Response<wire::RemoveMembersResponse>, Status> {
        let parts = self.admit(&request)?;
        let slots = request.get_ref().slots.iter().map(|slot| u16::try_from(*slot));
        let slots = slots
            .collect::<Result<_, _>>()
            .map_err(|_| Status::invalid_argument("the slot is above 65535"))?;
        let gone = match request.get_ref().repeated_request {
            true => Gone::PassOver,
            false => Gone::Refuse,
        };
        let mut answer = wire::RemoveMembersResponse::default();
        match parts.membership_changes.remove(&slots, gone).await {
            Ok(Removal::Done) => {}
            Ok(Removal::Out(reason)) => (answer.pending, answer.out) = (reason, true),
            Ok(Removal::Pending(reason)) => answer.pending = reason,
            Err(error) => (answer.leader, answer.not_leader) = (leader_or_status(error)?, true),
        }
        Ok(Response::new(answer))
    }

    async fn set_replicas(
        &self,
        request: Request<wire::SetReplicasRequest>,
    ) -> Result<Response<wire::SetReplicasResponse>, Status> {
        let parts = self.admit(&request)?;
        let replicas = u8::try_from(request.get_ref().replicas)
            .map_err(|_| Status::invalid_argument("the number of replicas is above 255"))?;
        let leader = match parts.write_path.set_replicas(replicas).await {
            ClientResponse::Refused(Refusal::NotLeader { leader }) => Some(leader.unwrap_or_default()),
            ClientResponse::Refused(Refusal::Unavailable { reason }) => {
                return Err(Status::unavailable(reason));
            }
            ClientResponse::Refused(_) => return Err(Status::internal("the command was refused")),
            ClientResponse::Outcome(_) | ClientResponse::Session(_) | ClientResponse::Answer(_) => None,
        };
        Ok(Response::new(wire::SetReplicasResponse {
            not_leader: leader.is_some(),
            leader: leader.unwrap_or_default(),
        }))
    }

    async fn content_complete(
        &self,
        request: Request<wire::ContentCompleteRequest>,
    ) -> Result<Response<wire::ContentCompleteResponse>, Status> {
        let parts = self.admit(&request)?;
        let wire::ContentCompleteRequest {
            voters,
            through_index,
        } = request.into_inner();
        let voters = voters.into_iter().map(|voter| {
            let slot =
                u16::try_from(voter.slot).map_err(|_| Status::invalid_argument("the slot is above 65535"))?;
            Ok(NodeId {
                slot,
                incarnation: voter.incarnation,
            })
        });
        let layout = parts
            .placement
            .prepare_for(voters.collect::<Result<_, Status>>()?);
        let asked = Asked {
            layout,
            own: parts.consensus.id(),
            through_index,
        };
        let ledger =
            |layout: &_, through_index| parts.recovery.lacking(layout, through_index, LACKING_CHUNKS_MAX);
        let result = completeness(parts.metadata.clone(), parts.content.clone(), ledger, asked).await;
        let found = result.map_err(|fault| Status::unavailable(fault.to_string()))?;
        Ok(Response::new(wire::ContentCompleteResponse {
            complete: found.missing == 0,
            through_index: found.through_index,
            missing: found.missing,
        }))
    }

    async fn append_entries(
        &self,
        request: Request<Streaming<wire::RaftMessage>>,
    ) -> Result<Response<Self::AppendEntriesStream>, Status> {
        let consensus = self.admit_to_consensus(&request)?;
        Ok(Response::new(consensus.append_stream(request.into_inner())))
    }

    async fn vote(&self, request: Request<wire::RaftMessage>) -> Result<Response<wire::RaftMessage>, Status> {
        let consensus = self.admit_to_consensus(&request)?;
        consensus.vote(request.into_inner()).await.map(Response::new)
    }

    async fn pre_vote(
        &self,
        request: Request<wire::RaftMessage>,
    ) -> Result<Response<wire::RaftMessage>, Status> {
        let consensus = self.admit_to_consensus(&request)?;
        consensus.pre_vote(request.into_inner()).await.map(Response::new)
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::RaftMessage>,
    ) -> Result<Response<wire::RaftMessage>, Status> {
        let consensus = self.admit_to_consensus(&request)?;
        consensus
            .transfer_leader(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<wire::SnapshotPart>>,
    ) -> Result<Response<wire::RaftMessage>, Status> {
        let consensus = self.admit_to_consensus(&request)?;
        consensus
            .install_snapshot(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn push_chunks(
        &self,
        request: Request<Streaming<wire::PutChunkRequest>>,
    ) -> Result<Response<Self::PushChunksStream>, Status> {
        let parts = self.admit(&request)?;
        let (content, recovery) = (parts.content.clone(), parts.recovery.clone());
        let answer = move |request: wire::PutChunkRequest| {
            let (content, recovery) = (content.clone(), recovery.clone());
            async move {
                let chunk = match Chunk::try_from(request) {
                    Ok(chunk) => chunk,
                    Err(malformed) => return put_status(malformed.status(), malformed.to_string()),
                };
                let id = chunk.id();
                let put = content.put(chunk).await;
                if put.is_ok() {
                    recovery.on_pushed(id).await;
                }
                put_response(&put)
            }
        };
        Ok(Response::new(Box::pin(answer_calls(
            request.into_inner(),
            CHUNKS_PER_STREAM_MAX,
            (),
            answer,
        ))))
    }

    async fn fetch_chunks(
        &self,
        request: Request<Streaming<wire::GetChunkRequest>>,
    ) -> Result<Response<Self::FetchChunksStream>, Status> {
        let parts = self.admit(&request)?;
        let (content, repair) = (parts.content.clone(), parts.repair.clone());
        let answer = move |request: wire::GetChunkRequest| {
            let (content, repair) = (content.clone(), repair.clone());
            async move {
                let (id, offset, length) = match requested_range(&request) {
                    Ok(asked) => asked,
                    Err(malformed) => return get_error(malformed.status(), malformed.to_string()),
                };
                let range = tokio::task::spawn_blocking(move || content.read(id, offset, length)).await;
                let range = range.unwrap_or_else(|failed| Err(task_failed(failed)));
                if let Err(bad) = &range
                    && bad.is_bad_copy()
                {
                    // The caller asks another node; this copy must be repaired.
                    let reason = bad.to_string();
                    tokio::spawn(async move { repair.found_bad(id, reason).await });
                }
                get_response(range)
            }
        };
        Ok(Response::new(Box::pin(answer_calls(
            request.into_inner(),
            CHUNKS_PER_STREAM_MAX,
            (),
            answer,
        ))))
    }

    async fn held_chunks(
        &self,
        request: Request<wire::HeldChunksRequest>,
    ) -> Result<Response<wire::HeldChunksResponse>, Status> {
        let parts = self.admit(&request)?;
        let (content, placement) = (parts.content.clone(), parts.placement.clone());
        let chunks = request.into_inner().chunks;
        if chunks.len() > HELD_IDS_MAX {
            return Err(Status::invalid_argument(format!(
                "the query has more than {HELD_IDS_MAX} chunks"
            )));
        }
        // Blocks while copies are deleted, which may wait for the disk: not on a runtime thread.
        let answered = tokio::task::spawn_blocking(move || {
            let holds = |id: &wire::ChunkId| content.holds(ChunkId::from(*id));
            placement.with_epoch(|| chunks.iter().map(holds).collect())
        });
        let (placement_epoch, held) = answered
            .await
            .map_err(|failed| Status::internal(failed.to_string()))?;
        Ok(Response::new(wire::HeldChunksResponse {
            held,
            placement_epoch,
        }))
    }

    async fn verify_chunks(
        &self,
        request: Request<wire::VerifyChunksRequest>,
    ) -> Result<Response<wire::VerifyChunksResponse>, Status> {
        let repair = self.admit(&request)?.repair.clone();
        let ids: Vec<ChunkId> = request
            .into_inner()
            .chunks
            .into_iter()
            .map(ChunkId::from)
            .collect();
        if ids.len() > VERIFY_IDS_MAX {
            return Err(Status::invalid_argument(format!(
                "the request has more than {VERIFY_IDS_MAX} chunks"
            )));
        }
        let verdicts = repair.verify_own(ids).await;
        let answer = |verdict: Verdict| {
            let (status, detail) = match verdict {
                Verdict::Healthy => (wire::ChunkStatus::Ok, String::new()),
                Verdict::Missing => (wire::ChunkStatus::NotFound, String::new()),
                Verdict::Corrupt(what) => (wire::ChunkStatus::Corrupt, what),
                Verdict::Unknown(why) => (wire::ChunkStatus::Unavailable, why),
            };
            wire::ChunkVerdict {
                status: status.into(),
                detail,
            }
        };
        Ok(Response::new(wire::VerifyChunksResponse {
            verdicts: verdicts.into_iter().map(answer).collect(),
        }))
    }

    async fn state_digest(
        &self,
        request: Request<wire::StateDigestRequest>,
    ) -> Result<Response<wire::StateDigestResponse>, Status> {
        let digest = self.admit(&request)?.auditor.digest_at(request.get_ref().index);
        Ok(Response::new(wire::StateDigestResponse {
            sha256: digest.map_or_else(Bytes::new, |digest| Bytes::copy_from_slice(&digest.0)),
        }))
    }

    async fn begin_audit(
        &self,
        request: Request<wire::BeginAuditRequest>,
    ) -> Result<Response<wire::BeginAuditResponse>, Status> {
        let not_leader = match self.admit(&request)?.auditor.begin().await {
            Ok(()) => false,
            Err(ProposeError::NotLeader { .. }) => true,
            Err(error) => return Err(Status::unavailable(error.to_string())),
        };
        Ok(Response::new(wire::BeginAuditResponse { not_leader }))
    }

    async fn read_index(
        &self,
        request: Request<wire::ReadIndexRequest>,
    ) -> Result<Response<wire::ReadIndexResponse>, Status> {
        let parts = self.admit(&request)?;
        let refused = |error: BarrierError| Status::unavailable(error.to_string());
        parts.consensus.barrier().await.map_err(refused)?;
        Ok(Response::new(wire::ReadIndexResponse {
            index: parts.metadata.position().index,
        }))
    }

    async fn node_status(
        &self,
        request: Request<wire::NodeStatusRequest>,
    ) -> Result<Response<wire::NodeStatusResponse>, Status> {
        let parts = self.admit(&request)?;
        let room = parts.space.own();
        let recovery = parts.recovery.status();
        let now = Throughput::gather(self.node.metrics());
        Ok(Response::new(wire::NodeStatusResponse {
            node: Some(self.node.own().clone().into()),
            capacity_bytes: room.capacity_bytes,
            available_bytes: room.available_bytes,
            has_room: room.has_room,
            chunks_held: recovery.held_chunks,
            chunk_bytes_held: recovery.held_bytes,
            chunks_missing: recovery.missing_chunks,
            applied_index: parts.metadata.position().index,
            feature_level: FEATURE_LEVEL,
            operations_per_s: now.operations_per_s,
            read_bytes_per_s: now.read_bytes_per_s,
            written_bytes_per_s: now.written_bytes_per_s,
            commit_p50_us: now.commit_latency.p50_us,
            commit_p99_us: now.commit_latency.p99_us,
            cluster_full: parts.consensus.is_leader() && !parts.space.quorum_has_room(),
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
