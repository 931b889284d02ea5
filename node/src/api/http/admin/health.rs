//! `/health/status`: reachability and clocks of the nodes. `/healthz` and `/readyz`: liveness and readiness, for
//! systems that only evaluate the status code.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde::Serialize;
use tokio::sync::watch;

use super::parts;
use crate::api::http::files::ClientHandle;
use crate::api::http::files::error::{ApiError, ErrorBody};
use crate::node::Node;
use crate::observe::health::HealthReport;

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new()
        .route("/health/status", get(status))
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
}

/// The response to `GET /healthz` while the process serves requests.
#[derive(Clone, Copy, Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Alive {
    /// Always true while the process serves requests.
    alive: bool,
}

/// The response to `GET /readyz` if the node is ready.
#[derive(Clone, Copy, Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Ready {
    /// Always true; a node that is not ready answers 503 with the reason in `message`.
    ready: bool,
}

/// Returns reachability, response times and clocks of the nodes, with a list of problems.
#[utoipa::path(
    get,
    path = "/health/status",
    tag = "node",
    responses(
        (status = 200, description = "The view of this node, and the combined view of all nodes", body = HealthReport),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn status(State(node): State<Arc<Node>>) -> Result<Json<HealthReport>, ApiError> {
    Ok(Json(parts(&node)?.health.report()))
}

/// Returns whether the process serves requests.
#[utoipa::path(
    get,
    path = "/healthz",
    tag = "node",
    responses((status = 200, description = "It serves requests", body = Alive))
)]
pub(super) async fn alive() -> Json<Alive> {
    Json(Alive { alive: true })
}

/// Returns whether this node can serve reads and writes now.
///
/// 200, or 503 with the reason. The leader is asked for each request, and confirms its leadership with a quorum,
/// within 2 s.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "node",
    responses(
        (status = 200, description = "It is ready", body = Ready),
        (status = 503, description = "It is not ready, with the reason", body = ErrorBody),
    )
)]
pub(super) async fn ready(
    State(node): State<Arc<Node>>,
    Extension(client): Extension<watch::Receiver<ClientHandle>>,
) -> Response {
    match readiness(&node, &client).await {
        Ok(()) => (StatusCode::OK, Json(Ready { ready: true })).into_response(),
        Err(reason) => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", reason)
            .hint("GET /health/status shows which nodes reach each other")
            .into_response(),
    }
}

async fn readiness(node: &Node, client: &watch::Receiver<ClientHandle>) -> Result<(), String> {
    let parts = node.parts().ok_or_else(|| node.not_ready())?;
    parts.health.can_serve().await?;
    if !parts.space.quorum_has_room() {
        return Err(
            "the disks of too many nodes are full: no quorum has free space, so nothing can be written"
                .to_string(),
        );
    }
    match &*client.borrow() {
        ClientHandle::Ready(_) => Ok(()),
        ClientHandle::Connecting { reason } => {
            Err(format!("this node has no session with the cluster yet: {reason}"))
        }
    }
}
