//! The endpoints for administrators, monitoring and the dashboard.
//!
//! Each file has the routes of one subject. The handlers only encode what another module of the node knows. Errors are
//! those of the REST interface.

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

use crate::api::http::connections::ClientTimeouts;
use crate::api::http::files::error::ApiError;
use crate::node::{Node, Parts};
use crate::transport::ClusterSecret;

/// Default limit of a request body: a path of 4,096 bytes with every byte escaped, and more. Routes with other limits
/// set them.
const BODY_BYTES_MAX: usize = 64 << 10;

/// Returns the routes for `node`; `secret` authenticates the internal endpoints.
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
        .layer(RequestBodyTimeoutLayer::new(
            ClientTimeouts::default().close_after,
        ))
        .with_state(node)
}

/// Decodes a JSON body, whatever its `Content-Type`, because curl labels every body a form.
fn json_body<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>, example: &str) -> Result<T, ApiError> {
    let body = body.map_err(|rejected| {
        ApiError::new(rejected.status(), "body_refused", rejected.body_text()).hint(format!("send {example}"))
    })?;
    serde_json::from_slice(&body).map_err(|error| {
        ApiError::bad_request("invalid_json", format!("the body is not valid: {error}"))
            .hint(format!("send {example}"))
    })
}

/// Returns the parts of the node; 503 if it is still starting.
fn parts(node: &Node) -> Result<&Parts, ApiError> {
    node.parts()
        .ok_or_else(|| ApiError::unavailable(node.not_ready()))
}
