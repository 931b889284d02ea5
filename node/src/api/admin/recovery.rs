//! `/recovery/…`: what of the content is missing on this node, and how far it is with fetching it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::parts;
use crate::api::rest::error::ApiError;
use crate::healing::recovery::{RecoveryStatus, SyncReport};
use crate::node::Node;

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new()
        .route("/recovery/status", get(status))
        .route("/recovery/sync", post(sync))
}

/// How far it is, with everything accounted for that was applied before.
async fn status(State(node): State<Arc<Node>>) -> Result<Json<RecoveryStatus>, ApiError> {
    Ok(Json(parts(&node)?.recovery.status_now().await))
}

/// Begins a pass over everything that is named, unless one is under way: 202.
async fn sync(State(node): State<Arc<Node>>) -> Result<(StatusCode, Json<SyncReport>), ApiError> {
    Ok((StatusCode::ACCEPTED, Json(parts(&node)?.recovery.sync())))
}
