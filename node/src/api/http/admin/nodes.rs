//! `/nodes`: every member as it says itself that it is, for who wants to see all at once. Asked when it is asked.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use quorumfs_proto::Member;
use quorumfs_wire as wire;
use serde::Serialize;

use super::parts;
use crate::api::http::files::error::{ApiError, ErrorBody};
use crate::node::{Node, Parts};
use crate::transport::Purpose;

/// How long a node may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// One member.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct NodeView {
    /// Its number in the cluster.
    slot: u16,
    /// Where it serves HTTP.
    http_address: String,
    /// Whether it votes.
    voter: bool,
    /// Whether the node that was asked takes it for the leader.
    leader: bool,
    /// What it says; null where it does not answer.
    says: Option<NodeSays>,
    /// Why it says nothing.
    problem: Option<String>,
}

/// What a node says of itself.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct NodeSays {
    /// Bytes that its disk can hold.
    capacity_bytes: u64,
    /// Bytes of it that content may still take.
    available_bytes: u64,
    /// Whether it takes more.
    has_room: bool,
    /// Chunks of content on its disk.
    chunks_held: u64,
    /// Bytes of them.
    chunk_bytes_held: u64,
    /// Chunks that it should hold and does not.
    chunks_missing: u64,
    /// Up to where it has applied the log.
    applied_index: u64,
    /// Operations on files per second that came to it, over the last ten seconds.
    operations_per_s: f64,
    /// Bytes read from it.
    read_bytes_per_s: f64,
    /// Bytes put into files through it.
    written_bytes_per_s: f64,
    /// Half of the commands decided through it then took no longer, in microseconds; 0 where there was none.
    commit_p50_us: u64,
    /// 99 in a hundred of them.
    commit_p99_us: u64,
}

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new().route("/nodes", get(nodes))
}

/// Every member as it says itself that it is.
#[utoipa::path(
    get,
    path = "/nodes",
    tag = "membership",
    responses(
        (status = 200, description = "All members, by slot", body = Vec<NodeView>),
        (status = 503, description = "The node has not begun", body = ErrorBody),
    )
)]
pub(super) async fn nodes(State(node): State<Arc<Node>>) -> Result<Json<Vec<NodeView>>, ApiError> {
    let parts = parts(&node)?;
    let leader = parts.consensus.leader().map(|leader| leader.id);
    let voters = parts.consensus.voters();
    let mut members = parts.consensus.members();
    members.sort_by_key(|member| member.id);
    let asked = members.into_iter().map(|member| {
        let (voter, leader) = (voters.contains(&member.id), leader == Some(member.id));
        async move {
            let asked = tokio::time::timeout(ANSWER_TIMEOUT, ask(parts, &member)).await;
            let (says, problem) = match asked.unwrap_or_else(|_| Err("it does not answer".to_string())) {
                Ok(says) => (Some(says), None),
                Err(problem) => (None, Some(problem)),
            };
            NodeView {
                slot: member.id.slot,
                http_address: member.addresses.http,
                voter,
                leader,
                says,
                problem,
            }
        }
    });
    Ok(Json(futures::future::join_all(asked).await))
}

async fn ask(parts: &Parts, member: &Member) -> Result<NodeSays, String> {
    let mut peer = parts.membership_changes.peer_of(member, Purpose::Control)?;
    let answer = peer.node_status(wire::NodeStatusRequest {}).await;
    let status = answer
        .map_err(|status| status.message().to_string())?
        .into_inner();
    Ok(NodeSays {
        capacity_bytes: status.capacity_bytes,
        available_bytes: status.available_bytes,
        has_room: status.has_room,
        chunks_held: status.chunks_held,
        chunk_bytes_held: status.chunk_bytes_held,
        chunks_missing: status.chunks_missing,
        applied_index: status.applied_index,
        operations_per_s: status.operations_per_s,
        read_bytes_per_s: status.read_bytes_per_s,
        written_bytes_per_s: status.written_bytes_per_s,
        commit_p50_us: status.commit_p50_us,
        commit_p99_us: status.commit_p99_us,
    })
}
