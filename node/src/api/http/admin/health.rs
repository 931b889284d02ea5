//! `/health/status`: who answers whom, and whose clock is right. `/healthz` and `/readyz`: the same for machines, which
//! look at the status code alone.

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

/// What `GET /healthz` answers, as long as the process serves.
#[derive(Clone, Copy, Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Alive {
    /// Always true.
    alive: bool,
}

/// What `GET /readyz` answers when the node is ready.
#[derive(Clone, Copy, Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Ready {
    /// Always true; a node that is not ready answers 503 with a `message` that says why.
    ready: bool,
}

/// Who answers whom and how fast, and whose clock is right; what is wrong, in words.
#[utoipa::path(
    get,
    path = "/health/status",
    tag = "node",
    responses(
        (status = 200, description = "As this node sees it, and as all see it", body = HealthReport),
        (status = 503, description = "The node has not begun", body = ErrorBody),
    )
)]
pub(super) async fn status(State(node): State<Arc<Node>>) -> Result<Json<HealthReport>, ApiError> {
    Ok(Json(parts(&node)?.health.report()))
}

/// Whether the process serves.
#[utoipa::path(
    get,
    path = "/healthz",
    tag = "node",
    responses((status = 200, description = "It does", body = Alive))
)]
pub(super) async fn alive() -> Json<Alive> {
    Json(Alive { alive: true })
}

/// Whether this node can serve reads and writes now: 200, or 503 with the reason. Not what was so a while ago: the leader
/// is asked, and asks a quorum, within 2 s.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "node",
    responses(
        (status = 200, description = "It can", body = Ready),
        (status = 503, description = "It cannot, and why", body = ErrorBody),
    )
)]
pub(super) async fn ready(
    State(node): State<Arc<Node>>,
    Extension(client): Extension<watch::Receiver<ClientHandle>>,
) -> Response {
    match readiness(&node, &client).await {
        Ok(()) => (StatusCode::OK, Json(Ready { ready: true })).into_response(),
        Err(reason) => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", reason)
            .hint("GET /health/status tells who answers whom")
            .into_response(),
    }
}

async fn readiness(node: &Node, client: &watch::Receiver<ClientHandle>) -> Result<(), String> {
    let parts = node.parts().ok_or_else(|| node.not_ready())?;
    parts.health.can_serve().await?;
    if !parts.space.quorum_has_room() {
        return Err(
            "fewer than a quorum of nodes have room on their disks: nothing can be written".to_string(),
        );
    }
    match &*client.borrow() {
        ClientHandle::Ready(_) => Ok(()),
        ClientHandle::Connecting { reason } => {
            Err(format!("this node has no session of its own yet: {reason}"))
        }
    }
}
