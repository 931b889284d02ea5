//! What an administrator, a monitor or the dashboard asks of a node, and the little they can tell it to do.
//!
//! Each file has the routes of one subject; the handlers encode what the subject's own part of the node knows, and know
//! nothing of how it comes to know it. Errors are those of the REST interface.

mod metrics;
mod openapi;
mod recovery;

use std::sync::Arc;

use axum::Router;

use crate::api::rest::error::ApiError;
use crate::node::{Node, Parts};

/// All of it, for `node`.
pub fn router(node: Arc<Node>) -> Router {
    Router::new()
        .merge(metrics::routes())
        .merge(openapi::routes())
        .merge(recovery::routes())
        .with_state(node)
}

/// What the node is made of; 503 before it is.
fn parts(node: &Node) -> Result<&Parts, ApiError> {
    node.parts()
        .ok_or_else(|| ApiError::unavailable(node.not_ready()))
}
