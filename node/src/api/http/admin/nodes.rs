//! `/nodes`: the status of every member, requested from all members for each call.

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

/// Time limit for the answer of a node.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// A member and its report.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct NodeView {
    /// Its number in the cluster.
    slot: u16,
    /// The `host:port` of its HTTP service.
    http_address: String,
    /// Whether it is a voter.
    voter: bool,
    /// Whether the asked node considers it the leader.
    leader: bool,
    /// Its own report; null if it did not answer.
    says: Option<NodeSummary>,
    /// Why there is no report.
    problem: Option<String>,
}

/// The report of a node about itself.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct NodeSummary {
    /// Capacity of its disk, in bytes.
    capacity_bytes: u64,
    /// Bytes available for content.
    available_bytes: u64,
    /// Whether it accepts content and log entries.
    has_room: bool,
    /// Chunks of content on its disk.
    chunks_held: u64,
    /// Sum of their lengths, in bytes.
    chunk_bytes_held: u64,
    /// Chunks that it should hold and does not.
    chunks_missing: u64,
    /// Index of its last applied log entry.
    applied_index: u64,
    /// File operations per second through it, averaged over the last ten seconds.
    operations_per_s: f64,
    /// Bytes read from it per second.
    read_bytes_per_s: f64,
    /// Bytes written to files through it per second.
    written_bytes_per_s: f64,
    /// Median commit latency of commands through it in that time, in microseconds; 0 if there were none.
    commit_p50_us: u64,
    /// 99th percentile of the commit latency, in microseconds.
    commit_p99_us: u64,
}

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new().route("/nodes", get(nodes))
}

/// Returns the status of every member.
#[utoipa::path(
    get,
    path = "/nodes",
    tag = "membership",
    responses(
        (status = 200, description = "All members, by slot", body = Vec<NodeView>),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn nodes(State(node): State<Arc<Node>>) -> Result<Json<Vec<NodeView>>, ApiError> {
    let parts = parts(&node)?;
    let leader = parts.consensus.leader().map(|leader| leader.id);
    let voters = parts.consensus.voters();
    let mut members = parts.consensus.members();
    members.sort_by_key(|member| member.id);
    let views = members.into_iter().map(|member| {
        let (voter, leader) = (voters.contains(&member.id), leader == Some(member.id));
        async move {
            let report = tokio::time::timeout(ANSWER_TIMEOUT, ask(parts, &member)).await;
            let (says, problem) = match report
                .unwrap_or_else(|_| Err(format!("no answer in {} s", ANSWER_TIMEOUT.as_secs())))
            {
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
    Ok(Json(futures::future::join_all(views).await))
}

async fn ask(parts: &Parts, member: &Member) -> Result<NodeSummary, String> {
    let mut peer = parts.membership_changes.peer_of(member, Purpose::Control)?;
    let answer = peer.node_status(wire::NodeStatusRequest {}).await;
    let status = answer
        .map_err(|status| status.message().to_string())?
        .into_inner();
    Ok(NodeSummary {
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
