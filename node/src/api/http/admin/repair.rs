//! `/repair/…`: what was verified and found bad on this node, and verifying one file on all.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use quorumfs_proto::{FsError, Name};
use quorumfs_wire as wire;
use serde::Deserialize;

use super::membership::of_the_leader;
use super::{json_body, parts};
use crate::api::http::files::error::{ApiError, ErrorBody};
use crate::integrity::audit::AuditReport;
use crate::integrity::repair::RepairStatus;
use crate::integrity::repair::verify::{FileVerdict, VerifyError};
use crate::node::Node;
use crate::transport::Peer;

/// Most bytes of a path (PATH_MAX of Linux).
const PATH_BYTES_MAX: usize = 4096;

/// What is to be verified.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct VerifyRequest {
    /// The file's path from the root, names with `/` between them; a `/` in front is allowed.
    file_path: String,
    /// From which offset of the file on; 0 if not said.
    #[serde(default)]
    from: u64,
}

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new()
        .route("/repair/status", get(status))
        .route("/repair/verify", post(verify))
        .route("/repair/audit", get(audit).post(begin_audit))
}

/// What was verified on this node, what was found, and how far the scrub is.
#[utoipa::path(
    get,
    path = "/repair/status",
    tag = "healing",
    responses(
        (status = 200, description = "What the scrub did and found", body = RepairStatus),
        (status = 503, description = "The node has not begun", body = ErrorBody),
    )
)]
pub(super) async fn status(State(node): State<Arc<Node>>) -> Result<Json<RepairStatus>, ApiError> {
    let repair = Arc::clone(&parts(&node)?.repair);
    let status = tokio::task::spawn_blocking(move || repair.status()).await;
    status
        .map(Json)
        .map_err(|panicked| ApiError::internal(panicked.to_string()))
}

/// How this node's metadata compared with the others' when that was last asked.
#[utoipa::path(
    get,
    path = "/repair/audit",
    tag = "healing",
    responses(
        (status = 200, description = "The last comparison; null before the first", body = Option<AuditReport>),
        (status = 503, description = "The node has not begun", body = ErrorBody),
    )
)]
pub(super) async fn audit(State(node): State<Arc<Node>>) -> Result<Json<Option<AuditReport>>, ApiError> {
    Ok(Json(parts(&node)?.auditor.report()))
}

/// Has all nodes compare their metadata.
///
/// One that a majority contradicts makes its own anew.
#[utoipa::path(
    post,
    path = "/repair/audit",
    tag = "healing",
    responses(
        (status = 202, description = "They do; GET tells what came of it"),
        (status = 503, description = "No leader, or not all members can", body = ErrorBody),
    )
)]
pub(super) async fn begin_audit(State(node): State<Arc<Node>>) -> Result<StatusCode, ApiError> {
    let ask = |mut leader: Peer| async move {
        let answer = leader.begin_audit(wire::BeginAuditRequest {}).await?.into_inner();
        Ok((!answer.not_leader).then_some(()))
    };
    of_the_leader(&node, ask).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Has every node read its copies of a file from disk, repairs what is bad, and tells both.
#[utoipa::path(
    post,
    path = "/repair/verify",
    tag = "healing",
    request_body = VerifyRequest,
    responses(
        (status = 200, description = "Each node's verdict on each chunk, and what was repaired", body = FileVerdict),
        (status = 400, description = "No JSON object as it must be, or no path", body = ErrorBody),
        (status = 404, description = "There is no such file", body = ErrorBody),
        (status = 409, description = "It is no regular file", body = ErrorBody),
        (status = 413, description = "The body is too long", body = ErrorBody),
        (status = 503, description = "The node has not begun, or the metadata cannot be read", body = ErrorBody),
    )
)]
pub(super) async fn verify(
    State(node): State<Arc<Node>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<FileVerdict>, ApiError> {
    let asked: VerifyRequest = json_body(body, r#"{"file_path": "docs/letter.txt"}"#)?;
    let path = names(&asked.file_path)?;
    let verified = parts(&node)?
        .repair
        .verify_file(path, &asked.file_path, asked.from)
        .await;
    verified.map(Json).map_err(|error| match error {
        VerifyError::Verdict(FsError::NotFound | FsError::Stale) => ApiError::new(
            StatusCode::NOT_FOUND,
            "not_found",
            format!("there is no file {:?}", asked.file_path),
        ),
        VerifyError::Verdict(FsError::InvalidArgument) => {
            ApiError::conflict("not_a_file", format!("{:?} is no regular file", asked.file_path))
        }
        VerifyError::Verdict(verdict) => verdict.into(),
        VerifyError::Fault(fault) => ApiError::unavailable(fault.to_string()),
        VerifyError::Internal(reason) => ApiError::internal(reason),
    })
}

/// The names of a path. Nothing is resolved: `.` and `..` are refused.
fn names(path: &str) -> Result<Vec<Name>, ApiError> {
    let invalid = |reason: String| {
        ApiError::bad_request("invalid_path", reason)
            .hint("names of 1 to 255 bytes with '/' between them, as in docs/letter.txt")
    };
    if path.len() > PATH_BYTES_MAX {
        return Err(invalid(format!("the path is longer than {PATH_BYTES_MAX} bytes")));
    }
    let path = path.strip_prefix('/').unwrap_or(path);
    path.split('/')
        .map(|name| {
            let checked = Name::new(name.as_bytes().to_vec());
            checked.map_err(|error| invalid(format!("{name:?} is not a name: {error}")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_names_and_nothing_else() {
        let count = |path: &str| names(path).map(|names| names.len()).ok();
        assert_eq!(count("a/b c/ü"), Some(3));
        assert_eq!(count("/a"), Some(1));
        for wrong in ["", "/", "a//b", "a/", "../a", "a/./b", "a\0b", &"x".repeat(5000)] {
            assert_eq!(count(wrong), None, "{wrong:?}");
        }
    }
}
