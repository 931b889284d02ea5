//! `/recovery/…`: missing content of this node, and the progress of fetching it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::parts;
use crate::api::http::files::error::{ApiError, ErrorBody};
use crate::node::Node;
use crate::replication::recovery::{RecoveryStatus, SyncReport};

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new()
        .route("/recovery/status", get(status))
        .route("/recovery/sync", post(sync))
}

/// Returns the missing content of this node and the progress of recovery.
///
/// Everything applied before the request is included.
#[utoipa::path(
    get,
    path = "/recovery/status",
    tag = "healing",
    responses(
        (status = 200, description = "Held and missing content", body = RecoveryStatus),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn status(State(node): State<Arc<Node>>) -> Result<Json<RecoveryStatus>, ApiError> {
    Ok(Json(parts(&node)?.recovery.status_now().await))
}

/// Starts a pass over all referenced chunks, unless one is running.
#[utoipa::path(
    post,
    path = "/recovery/sync",
    tag = "healing",
    responses(
        (status = 202, description = "A pass has started, or was already running", body = SyncReport),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn sync(State(node): State<Arc<Node>>) -> Result<(StatusCode, Json<SyncReport>), ApiError> {
    Ok((StatusCode::ACCEPTED, Json(parts(&node)?.recovery.sync())))
}
