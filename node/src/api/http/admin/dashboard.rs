//! `/`: the dashboard, a single HTML file that only uses the endpoints of this node.

use std::sync::Arc;

use axum::Router;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::IntoResponse;
use axum::routing::get;

use crate::node::Node;

const PAGE: &str = include_str!("dashboard.html");
/// The page loads and runs nothing but itself, even if a file name contains markup.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new().route("/", get(page))
}

/// Returns the dashboard.
#[utoipa::path(
    get,
    path = "/",
    tag = "node",
    responses((status = 200, description = "An HTML page", content_type = "text/html", body = String))
)]
pub(super) async fn page() -> impl IntoResponse {
    (
        [
            (CONTENT_TYPE, "text/html; charset=utf-8"),
            (CONTENT_SECURITY_POLICY, POLICY),
            (CACHE_CONTROL, "no-cache"),
        ],
        PAGE,
    )
}
