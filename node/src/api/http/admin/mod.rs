//! What an administrator, a monitor or the dashboard asks of a node, and the little they can tell it to do.
//!
//! Each file has the routes of one subject; the handlers encode what the subject's own part of the node knows, and know
//! nothing of how it comes to know it. Errors are those of the REST interface.

mod dashboard;
mod health;
mod internal;
mod membership;
mod metrics;
mod nodes;
mod openapi;
mod recovery;
mod repair;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::rejection::BytesRejection;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use tower_http::timeout::RequestBodyTimeoutLayer;

use crate::api::http::connections::Patience;
use crate::api::http::files::error::ApiError;
use crate::node::{Node, Parts};
use crate::transport::ClusterSecret;

/// Most bytes of a request's body; a route that takes more says so itself. Room for a path of 4,096 bytes, every one of
/// them escaped, and some more.
const BODY_BYTES_MAX: usize = 64 << 10;

/// All of it, for `node`; `secret` is what the internal endpoints ask for.
pub fn router(node: Arc<Node>, secret: Option<ClusterSecret>) -> Router {
    Router::new()
        .merge(dashboard::routes())
        .merge(health::routes())
        .merge(membership::routes())
        .merge(metrics::routes())
        .merge(nodes::routes())
        .merge(openapi::routes())
        .merge(internal::routes(secret))
        .merge(recovery::routes())
        .merge(repair::routes())
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(RequestBodyTimeoutLayer::new(Patience::default().let_go_after))
        .with_state(node)
}

/// The body of a request, whatever it says it is: curl calls everything a form.
fn json_body<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>, example: &str) -> Result<T, ApiError> {
    let body = body.map_err(|rejected| {
        ApiError::new(rejected.status(), "body_refused", rejected.body_text()).hint(format!("send {example}"))
    })?;
    serde_json::from_slice(&body).map_err(|error| {
        ApiError::bad_request(
            "invalid_json",
            format!("the body is not what it must be: {error}"),
        )
        .hint(format!("send {example}"))
    })
}

/// What the node is made of; 503 before it is.
fn parts(node: &Node) -> Result<&Parts, ApiError> {
    node.parts()
        .ok_or_else(|| ApiError::unavailable(node.not_ready()))
}
