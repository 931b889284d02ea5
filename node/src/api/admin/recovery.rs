//! `/recovery/…`: what of the content is missing on this node.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::parts;
use crate::api::rest::error::ApiError;
use crate::node::Node;

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new().route("/recovery/status", get(status))
}

/// Compares named with held first, so that the numbers are of now.
async fn status(State(node): State<Arc<Node>>) -> Result<Json<Value>, ApiError> {
    let recovery = Arc::clone(&parts(&node)?.recovery);
    let counted = tokio::task::spawn_blocking(move || recovery.compare().map(|_| recovery.status())).await;
    match counted {
        Ok(Ok(status)) => Ok(Json(json!(status))),
        Ok(Err(fault)) => Err(ApiError::unavailable(fault.to_string())),
        Err(panicked) => Err(ApiError::internal(panicked.to_string())),
    }
}
