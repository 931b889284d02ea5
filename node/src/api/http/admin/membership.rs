//! `/membership`: who belongs to the cluster and on how many content is kept; takes nodes in and out.
//!
//! Any node takes a change and passes it to the leader, after a change of leader to the next.

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

/// How long a change may take: those that remain may have to fetch content first.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(150);
/// Between two tries while leadership moves.
const RETRY_INTERVAL: Duration = Duration::from_millis(300);
/// As many as there may be members.
const REPLICAS_MAX: u8 = 9;
/// How long a change is tried while no leader takes it.
const LEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// One member.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct MemberView {
    /// Its number in the cluster.
    slot: u16,
    /// The random id of its data folder, in hexadecimal.
    incarnation: String,
    /// Where nodes and mounts reach it.
    grpc_address: String,
    /// Where it serves HTTP.
    http_address: String,
    /// Whether it votes; one that does not is on its way to.
    voter: bool,
    /// By how many log entries it is behind; null where this node does not lead.
    behind_entries: Option<u64>,
}

/// All members.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct MembershipView {
    /// By slot.
    members: Vec<MemberView>,
    /// How many of the voters may fail at once.
    failures_tolerated: usize,
    /// On how many nodes each chunk is to be kept, where there are so many.
    replicas: u8,
    /// On how many nodes each chunk is kept: `replicas`, but a majority of the voters at the least.
    copies: usize,
    /// Why a removal that was asked for is not done yet; null where there is none, and, but in the answer to who asked for
    /// it, where this node does not lead.
    removal: Option<String>,
}

/// Whom to take in.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Addition {
    /// `HOST:PORT` of the gRPC service of a node that waits to belong to a cluster.
    grpc_address: String,
}

/// On how many nodes to keep content.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplicasWanted {
    /// 1 to 9; a majority of the voters is kept at the least.
    #[schema(minimum = 1, maximum = 9)]
    replicas: u8,
}

/// Whom to take out.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Removal {
    /// Their numbers in the cluster; together, in one change.
    slots: BTreeSet<u16>,
}

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new()
        .route("/membership", get(show))
        .route("/membership/add", post(add))
        .route("/membership/remove", post(remove))
        .route("/membership/replicas", post(set_replicas))
}

/// Who belongs to the cluster.
#[utoipa::path(
    get,
    path = "/membership",
    tag = "membership",
    responses(
        (status = 200, description = "All members, by slot", body = MembershipView),
        (status = 503, description = "The node has not begun", body = ErrorBody),
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

/// Takes in a node that waits to belong to a cluster.
///
/// It becomes a voter by itself when it has everything, and when with it the number of voters stays odd.
#[utoipa::path(
    post,
    path = "/membership/add",
    tag = "membership",
    request_body = Addition,
    responses(
        (status = 202, description = "It is a learner", body = MembershipView),
        (status = 400, description = "No JSON object as it must be", body = ErrorBody),
        (status = 409, description = "It must not be", body = ErrorBody),
        (status = 413, description = "The body is too long", body = ErrorBody),
        (status = 422, description = "No node answers at the address", body = ErrorBody),
        (status = 503, description = "No leader", body = ErrorBody),
    )
)]
pub(super) async fn add(
    State(node): State<Arc<Node>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<MembershipView>), ApiError> {
    let Addition { grpc_address } = json_body(body, r#"{"grpc_address": "HOST:PORT"}"#)?;
    if !is_host_and_port(&grpc_address) {
        return Err(ApiError::bad_request(
            "invalid_address",
            format!("grpc_address {grpc_address:?} is not HOST:PORT, as in 127.0.0.1:3030"),
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
    of_the_leader(&node, ask).await?;
    Ok((StatusCode::ACCEPTED, Json(view(&node)?)))
}

/// Takes members out, together.
///
/// Those that remain fetch what they will have to hold; then the others leave and may be stopped. 200: they are out, and
/// where `removal` is not null those that remain still fetch what was written at the last moment (keep the folders of those
/// that left until it is done). 202: that takes longer than the request waits. The leader goes on by itself, as long as it
/// leads; ask again to see how far it is, and after a change of leader for it to go on. Another removal takes its place, and
/// `/membership/add` of one of them ends it.
#[utoipa::path(
    post,
    path = "/membership/remove",
    tag = "membership",
    request_body = Removal,
    responses(
        (status = 200, description = "They are out", body = MembershipView),
        (status = 202, description = "They leave when those that remain hold everything", body = MembershipView),
        (status = 400, description = "No JSON object as it must be", body = ErrorBody),
        (status = 409, description = "It must not be", body = ErrorBody),
        (status = 413, description = "The body is too long", body = ErrorBody),
        (status = 503, description = "No leader", body = ErrorBody),
    )
)]
pub(super) async fn remove(
    State(node): State<Arc<Node>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<MembershipView>), ApiError> {
    let Removal { slots } = json_body(body, r#"{"slots": [4, 5]}"#)?;
    if slots.is_empty() {
        return Err(ApiError::bad_request(
            "no_slots",
            "slots is empty: name at least one",
        ));
    }
    // A leader that was asked and did not say no may have done it, whatever became of its answer.
    let asked_before = AtomicBool::new(false);
    let ask = |mut leader: Peer| {
        let request = wire::RemoveMembersRequest {
            slots: slots.iter().map(|slot| u32::from(*slot)).collect(),
            repeated_request: asked_before.load(Ordering::Relaxed),
        };
        let asked_before = &asked_before;
        async move {
            let began = Instant::now();
            let answer = leader
                .remove_members(request)
                .await
                .map(|answer| answer.into_inner());
            // Who does not lead says so at once, and has done nothing.
            if answer.is_err() || began.elapsed() > RETRY_INTERVAL {
                asked_before.store(true, Ordering::Relaxed);
            }
            let answer = answer?;
            Ok((!answer.not_leader).then_some((answer.pending, answer.out)))
        }
    };
    let (pending, out) = of_the_leader(&node, ask).await?;
    let mut view = view(&node)?;
    let status = match (pending.is_empty(), out) {
        (true, _) => {
            view.removal = None;
            StatusCode::OK
        }
        (false, true) => {
            view.removal = Some(format!("they are out; {pending}"));
            StatusCode::OK
        }
        (false, false) => {
            view.removal = Some(format!(
                "{pending}. The leader goes on by itself; should another lead before it is done, ask again"
            ));
            StatusCode::ACCEPTED
        }
    };
    Ok((status, Json(view)))
}

/// Sets on how many nodes each chunk is kept.
///
/// Copies are made, or let go where others have them, after it is answered; `/recovery/status` tells how far that is.
#[utoipa::path(
    post,
    path = "/membership/replicas",
    tag = "membership",
    request_body = ReplicasWanted,
    responses(
        (status = 200, description = "It is so from now on", body = MembershipView),
        (status = 400, description = "No JSON object as it must be", body = ErrorBody),
        (status = 413, description = "The body is too long", body = ErrorBody),
        (status = 503, description = "No leader", body = ErrorBody),
    )
)]
pub(super) async fn set_replicas(
    State(node): State<Arc<Node>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<MembershipView>, ApiError> {
    let ReplicasWanted { replicas } = json_body(body, r#"{"replicas": 3}"#)?;
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
    of_the_leader(&node, ask).await?;
    // The leader has applied it; this node shows it as soon as it has.
    let parts = parts(&node)?;
    let give_up = Instant::now() + LEADER_TIMEOUT;
    while parts.placement.replicas() != replicas && Instant::now() < give_up {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    view(&node).map(Json)
}

/// Asks whoever leads, until one who does has answered. `ask` answers nothing where it asked the wrong one.
pub(super) async fn of_the_leader<Answer, Ask, Asking>(node: &Node, ask: Ask) -> Result<Answer, ApiError>
where
    Ask: Fn(Peer) -> Asking,
    Asking: Future<Output = Result<Option<Answer>, tonic::Status>>,
{
    let parts = parts(node)?;
    let mut give_up = Instant::now() + LEADER_TIMEOUT;
    let give_up_at_last = Instant::now() + CHANGE_TIMEOUT;
    let mut reason = "no leader is known".to_string();
    while Instant::now() < give_up {
        let leader: Option<Member> = parts.consensus.leader();
        let peer = leader.map(|leader| parts.membership_changes.peer_of(&leader, Purpose::Control));
        let asked = Instant::now();
        match peer {
            None => {}
            Some(Err(error)) => reason = error,
            Some(Ok(peer)) => match tokio::time::timeout(CHANGE_TIMEOUT, ask(peer)).await {
                Ok(Ok(Some(answer))) => return Ok(answer),
                Ok(Ok(None)) => {
                    reason = "leadership is moving".to_string();
                    // As long as one was at it, it was not looked for.
                    give_up = give_up_at_last.min(give_up + asked.elapsed());
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
                    .hint("start it with --join and the address of a member, and name its gRPC address"));
                }
                Ok(Err(status)) => reason = status.message().to_string(),
                Err(_) => return Err(ApiError::unavailable("the leader did not answer in time")),
            },
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
    Err(ApiError::unavailable(reason))
}
