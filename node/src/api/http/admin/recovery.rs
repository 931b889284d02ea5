//! `/recovery/…`: what of the content is missing on this node, and how far it is with fetching it.

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

/// How much content this node lacks, and how fast it comes.
///
/// Everything that was applied before is accounted for.
#[utoipa::path(
    get,
    path = "/recovery/status",
    tag = "healing",
    responses(
        (status = 200, description = "What is held and what is missing", body = RecoveryStatus),
        (status = 503, description = "The node has not begun", body = ErrorBody),
    )
)]
pub(super) async fn status(State(node): State<Arc<Node>>) -> Result<Json<RecoveryStatus>, ApiError> {
    Ok(Json(parts(&node)?.recovery.status_now().await))
}

/// Begins a pass over everything that is named, unless one is under way.
#[utoipa::path(
    post,
    path = "/recovery/sync",
    tag = "healing",
    responses(
        (status = 202, description = "What was begun, or is under way already", body = SyncReport),
        (status = 503, description = "The node has not begun", body = ErrorBody),
    )
)]
pub(super) async fn sync(State(node): State<Arc<Node>>) -> Result<(StatusCode, Json<SyncReport>), ApiError> {
    Ok((StatusCode::ACCEPTED, Json(parts(&node)?.recovery.sync())))
}
