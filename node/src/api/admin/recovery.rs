//! `/recovery/…`: what of the content is missing on this node.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};

use super::parts;
use crate::api::rest::error::{ApiError, ErrorBody};
use crate::healing::recovery::RecoveryStatus;
use crate::node::Node;

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new().route("/recovery/status", get(status))
}

/// How much content this node lacks.
///
/// Compares named with held first, so that the numbers are of now.
#[utoipa::path(
    get,
    path = "/recovery/status",
    tag = "node",
    responses(
        (status = 200, description = "What is held and what is missing", body = RecoveryStatus),
        (status = 503, description = "The node has not begun", body = ErrorBody),
    )
)]
pub(super) async fn status(State(node): State<Arc<Node>>) -> Result<Json<RecoveryStatus>, ApiError> {
    let recovery = Arc::clone(&parts(&node)?.recovery);
    let counted = tokio::task::spawn_blocking(move || recovery.compare().map(|_| recovery.status())).await;
    match counted {
        Ok(Ok(status)) => Ok(Json(status)),
        Ok(Err(fault)) => Err(ApiError::unavailable(fault.to_string())),
        Err(panicked) => Err(ApiError::internal(panicked.to_string())),
    }
}
