//! The REST interface: files over HTTP, on every node.
//!
//! It is an edge of [`quorumfs_fs::Filesystem`], as a mount is, under the node's own session. So any node takes any
//! request, and what REST writes is in the mounts, and the other way round. This module knows HTTP and paths; it knows
//! nothing of commands, chunks, consensus or peers.
//!
//! | request | does |
//! |---|---|
//! | `POST`, `PUT /upload/{path}` | stores the body as the file: 201 |
//! | `GET`, `HEAD /download/{path}`, `/upload/{path}` | the file: 200, a part of it: 206, nothing new: 304 |
//! | `DELETE /upload/{path}` | removes a file, a link, an empty directory: 204 |
//! | `GET /files` | lists files: 200 and a JSON array |
//! | `GET /recovery/status` | how much content this node lacks, counted now: 200 and a JSON object |
//! | `GET /health/status`, `/healthz`, `/readyz` | who answers whom; whether it lives, and can serve now: 200 or 503 |
//! | `GET /status` | what the node says of itself: 200 and a JSON object, with a quorum or without |
//!
//! What users can rely on:
//!
//! - **Paths** are the bytes between the slashes, percent-decoded, taken as they are: an empty component, `.`, `..`, NUL,
//!   an encoded slash, a name over 255 bytes, a path over 4,096 bytes are 400.
//! - **An upload** appears at once and whole, or not at all. It replaces a file (its readers keep the old one) and keeps
//!   the replaced file's owner and permissions, without set-id bits; a new file is 0644 and belongs to whom the directory
//!   belongs to. Missing directories are made (0755). A directory, a link or a device at the path is 409, as is
//!   anything but a directory on the way. `If-None-Match: *` stores only where nothing is (412). `Idempotency-Key` (per
//!   node, in memory) answers a repeated upload as the first. After a 503 the outcome may be unknown; to repeat an
//!   upload is always safe.
//! - **A download** is one version of the file, the one of its `ETag`; if the file is written in place so that this
//!   version cannot be finished, the connection breaks off: never a mix. One range or suffix range per request.
//! - **Symbolic links** are listed and deleted, but not followed: where one points depends on where a tree is mounted.
//!   On the way or at the end of a path one is 409 with its target.
//! - **Deleting** a directory that is not empty is 409; there is no recursive delete.
//! - **`GET /files`**: `prefix` (any beginning of a path), `limit` (1,000; at most 10,000), `after`, `recursive` (true),
//!   `kind` (of a tree `file,symlink`; of a level `all`). Sorted by the bytes of the paths. There is a next page if, and
//!   only if, there is a `Link: …; rel="next"` header (`X-Next-After` has its cursor). A page can be shorter than the limit when the
//!   walk took as long as a request may. Paths that are not UTF-8 have a `path_encoded` too.
//! - **Failures** are JSON `{code, message, hint}`. When no quorum answers within the time-out it is 503 with the reason
//!   and `Retry-After`.
//! - **Bounds**: all uploads together hold at most 176 MiB, all downloads 144 MiB. Requests above the number that this allows wait for their turn, at most as long as the time-out (503). One client has three
//!   quarters of the turns at most. Who neither sends nor takes a byte for 3 s gives way to requests that wait, and is let go
//!   of after 30 s. Files and uploads of at most 64 KiB have turns of their own, which they hold only while the node is at work.

mod access;
mod conditional;
mod content;
mod delete;
pub(in crate::api) mod described;
mod download;
pub(in crate::api) mod error;
mod idempotency;
mod incoming;
mod list;
mod origin;
mod path;
mod places;
mod range;
mod store;
mod times;
mod turns;
mod upload;
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
use idempotency::Idempotency;
use store::Stored;
use turns::{Turn, Turns};

use super::connections::{Pace, Patience};
use super::status::{StatusClient, StatusReport};

/// How long a request waits for a quorum, unless told otherwise.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Uploads under way at once; each holds a chunk that fills.
const UPLOADS_MAX: usize = 64;
/// Bytes on their way to the cluster, of all uploads.
const DIRTY_BYTES_MAX: u64 = 48 << 20;
/// Downloads under way at once; each holds a chunk that is sent.
const DOWNLOADS_MAX: usize = 64;
/// Chunks that are kept, among them what was fetched ahead of all downloads.
const CACHE_BYTES: u64 = 64 << 20;
/// Files and uploads of at most so many bytes are small: each connection may hold as many beside the turns.
const SMALL_BYTES_MAX: usize = 64 << 10;
/// Small files that are fetched at once, and small uploads that are stored: 8 MiB each.
const SMALL_MAX: usize = 128;
/// Listings under way at once; each holds up to 20 MiB of entries and its page.
const LISTS_MAX: usize = 4;

/// What the node says of itself.
pub type StatusSource = Arc<dyn Fn() -> Value + Send + Sync>;

/// How the filesystem of a node behaves.
pub fn filesystem_options() -> FsOptions {
    FsOptions {
        cache_bytes: CACHE_BYTES,
        dirty_bytes_max: DIRTY_BYTES_MAX,
        ..FsOptions::default()
    }
}

/// The node's own filesystem over the cluster, which it has only when the cluster is there.
#[derive(Clone)]
pub enum ClientHandle {
    /// Not yet.
    Connecting {
        /// Why not, in words.
        reason: String,
    },
    /// Here it is.
    Ready(Arc<Filesystem<Client>>),
}

/// What the REST interface is built on.
#[derive(Clone)]
pub struct RestState {
    /// The node's own filesystem over the cluster.
    pub client: watch::Receiver<ClientHandle>,
    /// For `GET /status`: a JSON object. Its `reason` is also what a 503 says.
    pub status: StatusSource,
    /// Routes that others serve; errors and panics there are answered as here.
    pub admin: Router,
    /// How long a request waits for a quorum ([`REQUEST_TIMEOUT`]).
    pub request_timeout: Duration,
    /// How long clients that neither send nor take anything are waited for.
    pub patience: Patience,
}

/// The routes of the REST interface. Needs a runtime around it.
pub fn router(state: RestState) -> Router {
    let service = Arc::new(Service {
        client: state.client,
        status: state.status,
        request_timeout: state.request_timeout,
        patience: state.patience,
        answers: Arc::new(Idempotency::new()),
        uploads: Turns::new("uploads", UPLOADS_MAX),
        small_uploads: Turns::new("small uploads", SMALL_MAX),
        downloads: Turns::new("downloads", DOWNLOADS_MAX),
        small_downloads: Turns::new("small downloads", SMALL_MAX),
        lists: Turns::new("lists", LISTS_MAX),
    });
    // `get` answers HEAD too. The bare forms are there to say what is missing rather than 404.
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
        .layer(axum::middleware::from_fn(origin::refuse_other_sites))
        .layer(CatchPanicLayer::custom(panicked))
}

/// What all requests share.
struct Service {
    client: watch::Receiver<ClientHandle>,
    status: StatusSource,
    request_timeout: Duration,
    patience: Patience,
    answers: Arc<Idempotency<Stored>>,
    uploads: Arc<Turns>,
    small_uploads: Arc<Turns>,
    downloads: Arc<Turns>,
    small_downloads: Arc<Turns>,
    lists: Arc<Turns>,
}

impl Service {
    /// The filesystem; 503 where there is none in time.
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

    /// Waits for a turn.
    async fn turn(&self, of: &Arc<Turns>, pace: &Arc<Pace>) -> Result<Turn, ApiError> {
        of.take(pace, self.request_timeout).await
    }
}

/// The path after the first segment of a request's URL, percent-encoded as it came.
fn path_of(uri: &Uri) -> &str {
    let path = uri.path().strip_prefix('/').unwrap_or(uri.path());
    path.split_once('/').map_or("", |(_, path)| path)
}

/// What the node says of itself.
///
/// Who it is, who leads, whether it can write and if not why; with a quorum or without.
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
    let message = format!("there is nothing at {}", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "no_such_endpoint", message)
        .hint("/upload/PATH, /download/PATH, /files, /status")
}

async fn method_not_allowed(method: Method, request: Request) -> ApiError {
    let message = format!("{} does not take {method}", request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        .hint("the Allow header lists what it takes")
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_default();
    ApiError::internal(format!("a request panicked: {text}")).into_response()
}
