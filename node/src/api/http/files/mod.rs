//! The REST interface: files over HTTP, on every node.
//!
//! Like a mount, it uses [`quorumfs_fs::Filesystem`], with the session of the node. So any node serves any request,
//! and files written over REST are visible in the mounts and vice versa. This module knows HTTP and paths; it does not
//! know commands, chunks, consensus or peers.
//!
//! | request | effect |
//! |---|---|
//! | `POST`, `PUT /upload/{path}` | stores the body as a file: 201 |
//! | `GET`, `HEAD /download/{path}`, `/upload/{path}` | returns the file: 200, a part of it: 206, not modified: 304 |
//! | `DELETE /upload/{path}` | removes a file, a link or an empty directory: 204 |
//! | `GET /files` | lists files: 200 and a JSON array |
//! | `GET /recovery/status` | missing content of this node: 200 and a JSON object |
//! | `GET /health/status`, `/healthz`, `/readyz` | reachability of nodes; liveness; readiness: 200 or 503 |
//! | `GET /status` | status of this node, with or without a quorum: 200 and a JSON object |
//!
//! Guarantees:
//!
//! - **Paths** are bytes between slashes, percent-decoded and not normalised. An empty component, `.`, `..`, NUL, an
//!   encoded slash, a name over 255 bytes or a path over 4,096 bytes is 400.
//! - **An upload** is atomic: the file appears complete or not at all. It replaces a file (open readers keep the old
//!   one) and keeps its owner and permissions, without set-id bits. A new file has mode 0644 and the owner of the
//!   directory. Missing directories are created (0755). A directory, link or device at the path is 409, and so is
//!   anything but a directory on the way. `If-None-Match: *` stores the file only if the path does not exist (412).
//!   `Idempotency-Key` (per node, in memory) answers a repeated upload like the first. After a 503 the outcome may be
//!   unknown; repeating an upload is always safe.
//! - **A download** is one version of the file, that of its `ETag`. If the file is written in place and the version
//!   cannot be completed, the connection is aborted; versions are never mixed. A request may have one range or suffix
//!   range.
//! - **Symbolic links** are listed and deleted, but not followed, because the meaning of a target depends on the mount
//!   point. A link in a path or at its end is 409 with its target.
//! - **Deletion** of a directory that is not empty is 409; there is no recursive deletion.
//! - **`GET /files`**: `prefix` (the beginning of a path), `limit` (1,000; at most 10,000), `after`, `recursive`
//!   (true), `kind` (`file,symlink` if recursive, `all` otherwise). The entries are sorted by the bytes of their
//!   paths. There is a next page if and only if the response has a `Link: …; rel="next"` header (`X-Next-After` has
//!   its cursor). A page may be shorter than the limit if the walk took as long as a request may. Paths that are not
//!   UTF-8 also have a `path_encoded`.
//! - **Failures** are JSON `{code, message, hint}`. If no quorum answers in time, it is 503 with the reason and
//!   `Retry-After`.
//! - **Bounds**: all uploads together hold at most 176 MiB, all downloads 144 MiB. Requests beyond the corresponding
//!   number wait, at most as long as the time-out (503). One client has at most three quarters of the permits. A
//!   client that sends and reads nothing for 3 s loses its permit to waiting requests, and is disconnected after 30 s.
//!   Files and uploads of at most 64 KiB have separate permits, which they hold only while the node processes them.

mod access;
mod conditional;
mod content;
mod delete;
mod download;
pub(in crate::api) mod error;
mod idempotency;
mod limiter;
mod list;
mod locate;
pub(in crate::api) mod openapi;
mod origin;
mod path;
mod range;
mod store;
mod times;
mod upload;
mod upload_body;
mod walk;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use quorumfs_client::Client;
use quorumfs_fs::{Filesystem, FsOptions};
use serde_json::{Value, json};
use tokio::sync::watch;
use tower_http::catch_panic::CatchPanicLayer;

use access::Access;
use error::ApiError;
use idempotency::IdempotencyCache;
use limiter::{RequestLimiter, RequestPermit};
use store::Stored;

use super::connections::{ClientProgress, ClientTimeouts};
use super::status::{StatusClient, StatusReport};

/// Default time for which a request waits for a quorum.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Most concurrent uploads; each holds one chunk that is being filled.
const UPLOADS_MAX: usize = 64;
/// Most bytes of all uploads that are being stored in the cluster.
const DIRTY_BYTES_MAX: u64 = 48 << 20;
/// Most concurrent downloads; each holds one chunk that is being sent.
const DOWNLOADS_MAX: usize = 64;
/// Size of the chunk cache, including the readahead of all downloads.
const CACHE_BYTES: u64 = 64 << 20;
/// Largest size of small files and uploads; each connection may hold as many bytes without a permit.
const SMALL_BYTES_MAX: usize = 64 << 10;
/// Most concurrent downloads of small files, and most concurrent small uploads: 8 MiB each.
const SMALL_MAX: usize = 128;
/// Most concurrent listings; each holds up to 20 MiB of entries and its page.
const LISTINGS_MAX: usize = 4;

/// Returns the status of the node as a JSON object.
pub type StatusSource = Arc<dyn Fn() -> Value + Send + Sync>;

/// Returns the options of the filesystem of a node.
pub fn filesystem_options() -> FsOptions {
    FsOptions {
        cache_bytes: CACHE_BYTES,
        dirty_bytes_max: DIRTY_BYTES_MAX,
        ..FsOptions::default()
    }
}

/// The node's filesystem, which exists after the node has connected to its cluster.
#[derive(Clone)]
pub enum ClientHandle {
    /// The node is not connected yet.
    Connecting {
        /// Why the node is not connected.
        reason: String,
    },
    /// The filesystem is available.
    Ready(Arc<Filesystem<Client>>),
}

/// The dependencies of the REST interface.
#[derive(Clone)]
pub struct RestState {
    /// The node's filesystem.
    pub client: watch::Receiver<ClientHandle>,
    /// The status for `GET /status`; its `reason` is also the message of a 503.
    pub status: StatusSource,
    /// Further routes; their errors and panics are answered as here.
    pub admin: Router,
    /// Time for which a request waits for a quorum ([`REQUEST_TIMEOUT`]).
    pub request_timeout: Duration,
    /// Time-outs of clients that send and read nothing.
    pub timeouts: ClientTimeouts,
}

/// Returns the routes of the REST interface. Must be called in a tokio runtime.
pub fn router(state: RestState) -> Router {
    let service = Arc::new(Service {
        client: state.client,
        status: state.status,
        request_timeout: state.request_timeout,
        timeouts: state.timeouts,
        answers: Arc::new(IdempotencyCache::new()),
        uploads: RequestLimiter::new("uploads", UPLOADS_MAX),
        small_uploads: RequestLimiter::new("small uploads", SMALL_MAX),
        downloads: RequestLimiter::new("downloads", DOWNLOADS_MAX),
        small_downloads: RequestLimiter::new("small downloads", SMALL_MAX),
        lists: RequestLimiter::new("listings", LISTINGS_MAX),
    });
    // `get` also answers HEAD. The routes without a path report that it is missing instead of 404.
    let file = get(download::download)
        .post(upload::upload)
        .put(upload::upload)
        .delete(delete::delete);
    let read_only = get(download::download);
    Router::new()
        .route("/upload", file.clone())
        .route("/upload/", file.clone())
        .route("/upload/{*path}", file)
        .route("/download", read_only.clone())
        .route("/download/", read_only.clone())
        .route("/download/{*path}", read_only)
        .route("/files", get(list::list))
        .route("/status", get(status))
        .with_state(service)
        .merge(state.admin)
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::disable())
        .layer(axum::middleware::from_fn(origin::reject_cross_site))
        .layer(CatchPanicLayer::custom(panicked))
}

/// The state that all requests share.
struct Service {
    client: watch::Receiver<ClientHandle>,
    status: StatusSource,
    request_timeout: Duration,
    timeouts: ClientTimeouts,
    answers: Arc<IdempotencyCache<Stored>>,
    uploads: Arc<RequestLimiter>,
    small_uploads: Arc<RequestLimiter>,
    downloads: Arc<RequestLimiter>,
    small_downloads: Arc<RequestLimiter>,
    lists: Arc<RequestLimiter>,
}

impl Service {
    /// Returns the filesystem; 503 if the node does not connect in time.
    async fn access(&self) -> Result<Access, ApiError> {
        let mut client = self.client.clone();
        let ready = client.wait_for(|handle| matches!(handle, ClientHandle::Ready(_)));
        let handle = match tokio::time::timeout(self.request_timeout, ready).await {
            Ok(Ok(handle)) => handle.clone(),
            Ok(Err(_)) | Err(_) => self.client.borrow().clone(),
        };
        let filesystem = match handle {
            ClientHandle::Ready(filesystem) => filesystem,
            ClientHandle::Connecting { reason } => return Err(ApiError::unavailable(reason)),
        };
        Ok(Access {
            filesystem,
            timeout: self.request_timeout,
            status: Arc::clone(&self.status),
        })
    }

    /// Waits for a permit of `limiter`.
    async fn permit(
        &self,
        limiter: &Arc<RequestLimiter>,
        progress: &Arc<ClientProgress>,
    ) -> Result<RequestPermit, ApiError> {
        limiter.acquire(progress, self.request_timeout).await
    }
}

/// Returns the path after the first segment of a URL, percent-encoded.
fn path_of(uri: &Uri) -> &str {
    let path = uri.path().strip_prefix('/').unwrap_or(uri.path());
    path.split_once('/').map_or("", |(_, path)| path)
}

/// Returns the status of this node.
///
/// Its identity, the leader, and whether it can write or why not; with or without a quorum.
#[utoipa::path(
    get,
    path = "/status",
    tag = "node",
    responses((status = 200, description = "The node's status", body = StatusReport))
)]
async fn status(State(service): State<Arc<Service>>) -> Json<Value> {
    let mut status = (service.status)();
    let obstacle = match &*service.client.borrow() {
        ClientHandle::Connecting { reason } => Some(reason.clone()),
        ClientHandle::Ready(_) => None,
    };
    status["client"] = json!(StatusClient::new(obstacle));
    Json(status)
}

async fn not_found(uri: Uri) -> ApiError {
    let message = format!("there is no endpoint {}", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "no_such_endpoint", message)
        .hint("/upload/PATH, /download/PATH, /files, /status")
}

async fn method_not_allowed(method: Method, request: Request) -> ApiError {
    let message = format!("{} does not support {method}", request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        .hint("the Allow header lists the supported methods")
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_default();
    ApiError::internal(format!("a request panicked: {text}")).into_response()
}
