//! `/membership`: the members of the cluster and the number of copies of content; adds and removes nodes.
//!
//! Any node accepts a change and forwards it to the leader; after a change of leader, to the new one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use quorumfs_proto::Member;
use quorumfs_wire as wire;
use serde::{Deserialize, Serialize};
use tonic::Code;

use super::{json_body, parts};
use crate::api::http::files::error::{ApiError, ErrorBody};
use crate::config::is_host_and_port;
use crate::node::Node;
use crate::transport::{Peer, Purpose};

/// Time limit of a change: the remaining nodes may have to fetch content first.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(150);
/// Delay between attempts while leadership changes.
const RETRY_INTERVAL: Duration = Duration::from_millis(300);
/// The largest possible number of members.
const REPLICAS_MAX: u8 = 9;
/// Time for which a change is attempted while there is no leader.
const LEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// A member of the cluster.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct MemberView {
    /// Its number in the cluster.
    slot: u16,
    /// The random id of its data folder, in hexadecimal.
    incarnation: String,
    /// The `host:port` of its gRPC service, for nodes and mounts.
    grpc_address: String,
    /// The `host:port` of its HTTP service.
    http_address: String,
    /// Whether it is a voter; a learner becomes one later.
    voter: bool,
    /// Number of log entries that it lags behind; null if this node is not the leader.
    behind_entries: Option<u64>,
}

/// The members of the cluster and the number of copies.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct MembershipView {
    /// The members, by slot.
    members: Vec<MemberView>,
    /// Number of voters that may fail at the same time.
    failures_tolerated: usize,
    /// Configured number of copies of each chunk.
    replicas: u8,
    /// Actual number of copies of each chunk: `replicas`, but at least a majority of the voters and at most all.
    copies: usize,
    /// Why a requested removal is not complete; null if there is none. Only the leader knows it, and the response to
    /// the request itself.
    removal: Option<String>,
}

/// The node to add.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AddRequest {
    /// `HOST:PORT` of the gRPC service of a node that waits for membership.
    grpc_address: String,
}

/// The number of copies to configure.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplicasRequest {
    /// 1 to 9; the number of copies is at least a majority of the voters.
    #[schema(minimum = 1, maximum = 9)]
    replicas: u8,
}

/// The members to remove.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RemoveRequest {
    /// Their slots; they are removed in one change.
    slots: BTreeSet<u16>,
}

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new()
        .route("/membership", get(show))
        .route("/membership/add", post(add))
        .route("/membership/remove", post(remove))
        .route("/membership/replicas", post(set_replicas))
}

/// Returns the members of the cluster.
#[utoipa::path(
    get,
    path = "/membership",
    tag = "membership",
    responses(
        (status = 200, description = "All members, by slot", body = MembershipView),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn show(State(node): State<Arc<Node>>) -> Result<Json<MembershipView>, ApiError> {
    view(&node).map(Json)
}

fn view(node: &Node) -> Result<MembershipView, ApiError> {
    let parts = parts(node)?;
    let consensus = &parts.consensus;
    let voters = consensus.voters();
    let mut members: Vec<MemberView> = consensus
        .members()
        .into_iter()
        .map(|member| MemberView {
            slot: member.id.slot,
            incarnation: format!("{:016x}", member.id.incarnation),
            voter: voters.contains(&member.id),
            behind_entries: consensus.lag_of(member.id),
            grpc_address: member.addresses.grpc,
            http_address: member.addresses.http,
        })
        .collect();
    members.sort_by_key(|member| (member.slot, !member.voter));
    Ok(MembershipView {
        members,
        failures_tolerated: voters.len().saturating_sub(1) / 2,
        replicas: parts.placement.replicas(),
        copies: parts.placement.copies(),
        removal: parts.membership_changes.pending_removal(),
    })
}

/// Adds a node that waits for membership.
///
/// The node becomes a learner. It is promoted to voter when it has all content, if the number of voters is odd with
/// it.
#[utoipa::path(
    post,
    path = "/membership/add",
    tag = "membership",
    request_body = AddRequest,
    responses(
        (status = 202, description = "The node is a learner now", body = MembershipView),
        (status = 400, description = "The body is invalid", body = ErrorBody),
        (status = 409, description = "The change is not allowed", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 422, description = "No node answers at the address", body = ErrorBody),
        (status = 503, description = "There is no leader", body = ErrorBody),
    )
)]
pub(super) async fn add(
    State(node): State<Arc<Node>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<MembershipView>), ApiError> {
    let AddRequest { grpc_address } = json_body(body, r#"{"grpc_address": "HOST:PORT"}"#)?;
    if !is_host_and_port(&grpc_address) {
        return Err(ApiError::bad_request(
            "invalid_address",
            format!("grpc_address '{grpc_address}' is not of the form HOST:PORT, as in 127.0.0.1:3030"),
        ));
    }
    let ask = |mut leader: Peer| {
        let request = wire::AddMemberRequest {
            grpc_address: grpc_address.clone(),
        };
        async move {
            let answer = leader.add_member(request).await?.into_inner();
            Ok((!answer.not_leader).then_some(()))
        }
    };
    call_leader(&node, ask).await?;
    Ok((StatusCode::ACCEPTED, Json(view(&node)?)))
}

/// Removes members in one change.
///
/// The remaining nodes first fetch what they will have to hold; then the members are removed and may be stopped.
///
/// - 200: they are removed. If `removal` is not null, the remaining nodes still fetch the latest writes; keep the data
///   folders of the removed nodes until it is null.
/// - 202: the removal takes longer than the request waits. The leader continues it while it leads. Repeat the request
///   to see the progress, and to resume it after a change of leader.
///
/// Another removal replaces a pending one, and `/membership/add` of one of its nodes cancels it.
#[utoipa::path(
    post,
    path = "/membership/remove",
    tag = "membership",
    request_body = RemoveRequest,
    responses(
        (status = 200, description = "They are removed", body = MembershipView),
        (status = 202, description = "They are removed when the remaining nodes hold everything", body = MembershipView),
        (status = 400, description = "The body is invalid", body = ErrorBody),
        (status = 409, description = "The change is not allowed", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 503, description = "There is no leader", body = ErrorBody),
    )
)]
pub(super) async fn remove(
    State(node): State<Arc<Node>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<MembershipView>), ApiError> {
    let RemoveRequest { slots } = json_body(body, r#"{"slots": [4, 5]}"#)?;
    if slots.is_empty() {
        return Err(ApiError::bad_request(
            "no_slots",
            "slots is empty; give at least one",
        ));
    }
    // A leader that did not refuse may have applied the change even if its answer was lost.
    let may_have_been_applied = AtomicBool::new(false);
    let ask = |mut leader: Peer| {
        let request = wire::RemoveMembersRequest {
            slots: slots.iter().map(|slot| u32::from(*slot)).collect(),
            repeated_request: may_have_been_applied.load(Ordering::Relaxed),
        };
        let may_have_been_applied = &may_have_been_applied;
        async move {
            let began = Instant::now();
            let answer = leader
                .remove_members(request)
                .await
                .map(|answer| answer.into_inner());
            // A node that is not the leader refuses at once and has changed nothing.
            if answer.is_err() || began.elapsed() > RETRY_INTERVAL {
                may_have_been_applied.store(true, Ordering::Relaxed);
            }
            let answer = answer?;
            Ok((!answer.not_leader).then_some((answer.pending, answer.out)))
        }
    };
    let (pending, out) = call_leader(&node, ask).await?;
    let mut view = view(&node)?;
    let status = match (pending.is_empty(), out) {
        (true, _) => {
            view.removal = None;
            StatusCode::OK
        }
        (false, true) => {
            view.removal = Some(format!("the members are removed; {pending}"));
            StatusCode::OK
        }
        (false, false) => {
            view.removal = Some(format!(
                "{pending}. The leader continues; after a change of leader, repeat the request"
            ));
            StatusCode::ACCEPTED
        }
    };
    Ok((status, Json(view)))
}

/// Sets the number of copies of each chunk.
///
/// Copies are created or deleted after the response; `/recovery/status` shows the progress.
#[utoipa::path(
    post,
    path = "/membership/replicas",
    tag = "membership",
    request_body = ReplicasRequest,
    responses(
        (status = 200, description = "The number is set", body = MembershipView),
        (status = 400, description = "The body is invalid", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 503, description = "There is no leader", body = ErrorBody),
    )
)]
pub(super) async fn set_replicas(
    State(node): State<Arc<Node>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<MembershipView>, ApiError> {
    let ReplicasRequest { replicas } = json_body(body, r#"{"replicas": 3}"#)?;
    if !(1..=REPLICAS_MAX).contains(&replicas) {
        return Err(ApiError::bad_request(
            "replicas_out_of_bounds",
            format!("replicas is {replicas}; it must be 1 to {REPLICAS_MAX}"),
        ));
    }
    let ask = |mut leader: Peer| {
        let request = wire::SetReplicasRequest {
            replicas: replicas.into(),
        };
        async move {
            let answer = leader.set_replicas(request).await?.into_inner();
            Ok((!answer.not_leader).then_some(()))
        }
    };
    call_leader(&node, ask).await?;
    // The leader has applied the change; this node shows it as soon as it has applied it too.
    let parts = parts(&node)?;
    let deadline = Instant::now() + LEADER_TIMEOUT;
    while parts.placement.replicas() != replicas && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    view(&node).map(Json)
}

/// Calls the leader, until one has answered. `ask` returns `None` if it asked a node that is not the leader.
///
/// # Errors
/// 409 if the leader refuses the change, 422 if it finds no node at an address, 503 if no leader answers in time.
pub(super) async fn call_leader<Answer, Ask, Asking>(node: &Node, ask: Ask) -> Result<Answer, ApiError>
where
    Ask: Fn(Peer) -> Asking,
    Asking: Future<Output = Result<Option<Answer>, tonic::Status>>,
{
    let parts = parts(node)?;
    let mut deadline = Instant::now() + LEADER_TIMEOUT;
    let deadline_max = Instant::now() + CHANGE_TIMEOUT;
    let mut reason = "no leader is known".to_string();
    while Instant::now() < deadline {
        let leader: Option<Member> = parts.consensus.leader();
        let peer = leader.map(|leader| parts.membership_changes.peer_of(&leader, Purpose::Control));
        let sent_at = Instant::now();
        match peer {
            None => {}
            Some(Err(error)) => reason = error,
            Some(Ok(peer)) => {
                match tokio::time::timeout(CHANGE_TIMEOUT, ask(peer)).await {
                    Ok(Ok(Some(answer))) => return Ok(answer),
                    Ok(Ok(None)) => {
                        reason = "leadership is changing".to_string();
                        // The time in which a node processed the request does not count as time without a leader.
                        deadline = deadline_max.min(deadline + sent_at.elapsed());
                    }
                    Ok(Err(status)) if status.code() == Code::FailedPrecondition => {
                        return Err(ApiError::conflict("membership_refused", status.message()));
                    }
                    Ok(Err(status)) if status.code() == Code::NotFound => {
                        return Err(ApiError::new(
                        StatusCode::UNPROCESSABLE_ENTITY,
                        "no_node_there",
                        status.message(),
                    )
                    .hint("start the node with --join and the address of a member, and give its gRPC address"));
                    }
                    Ok(Err(status)) => reason = status.message().to_string(),
                    Err(_) => return Err(ApiError::unavailable("the leader did not answer in time")),
                }
            }
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
    Err(ApiError::unavailable(reason))
}
