//! `/repair/…`: results of the scrub on this node, verification of a file on all nodes, and comparison of metadata.

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

use super::membership::call_leader;
use super::{json_body, parts};
use crate::api::http::files::error::{ApiError, ErrorBody};
use crate::integrity::audit::AuditReport;
use crate::integrity::repair::RepairStatus;
use crate::integrity::repair::verify::{FileVerdict, VerifyError};
use crate::node::Node;
use crate::transport::Peer;

/// Most bytes of a path (PATH_MAX of Linux).
const PATH_BYTES_MAX: usize = 4096;

/// The file to verify.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct VerifyRequest {
    /// Path of the file from the root, with `/` between names; a leading `/` is allowed.
    file_path: String,
    /// Offset in the file from which to verify, in bytes; 0 by default.
    #[serde(default)]
    from: u64,
}

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new()
        .route("/repair/status", get(status))
        .route("/repair/verify", post(verify))
        .route("/repair/audit", get(audit).post(begin_audit))
}

/// Returns the progress and the results of the scrub on this node.
#[utoipa::path(
    get,
    path = "/repair/status",
    tag = "healing",
    responses(
        (status = 200, description = "Progress and results of the scrub", body = RepairStatus),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn status(State(node): State<Arc<Node>>) -> Result<Json<RepairStatus>, ApiError> {
    let repair = Arc::clone(&parts(&node)?.repair);
    let status = tokio::task::spawn_blocking(move || repair.status()).await;
    status
        .map(Json)
        .map_err(|panicked| ApiError::internal(panicked.to_string()))
}

/// Returns the result of the last comparison of this node's metadata with the other nodes'.
#[utoipa::path(
    get,
    path = "/repair/audit",
    tag = "healing",
    responses(
        (status = 200, description = "The last comparison; null before the first", body = Option<AuditReport>),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn audit(State(node): State<Arc<Node>>) -> Result<Json<Option<AuditReport>>, ApiError> {
    Ok(Json(parts(&node)?.auditor.report()))
}

/// Starts a comparison of the metadata of all nodes.
///
/// A node whose metadata differs from that of a majority rebuilds it.
#[utoipa::path(
    post,
    path = "/repair/audit",
    tag = "healing",
    responses(
        (status = 202, description = "The comparison has started; GET returns its result"),
        (status = 503, description = "There is no leader, or not all members support it", body = ErrorBody),
    )
)]
pub(super) async fn begin_audit(State(node): State<Arc<Node>>) -> Result<StatusCode, ApiError> {
    let ask = |mut leader: Peer| async move {
        let answer = leader.begin_audit(wire::BeginAuditRequest {}).await?.into_inner();
        Ok((!answer.not_leader).then_some(()))
    };
    call_leader(&node, ask).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Verifies a file: every node reads its copies from disk, and bad copies are repaired.
#[utoipa::path(
    post,
    path = "/repair/verify",
    tag = "healing",
    request_body = VerifyRequest,
    responses(
        (status = 200, description = "The result of each node for each chunk, and the repairs", body = FileVerdict),
        (status = 400, description = "The body or the path is invalid", body = ErrorBody),
        (status = 404, description = "The file does not exist", body = ErrorBody),
        (status = 409, description = "It is not a regular file", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 503, description = "The node is still starting, or cannot read the metadata", body = ErrorBody),
    )
)]
pub(super) async fn verify(
    State(node): State<Arc<Node>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<FileVerdict>, ApiError> {
    let request: VerifyRequest = json_body(body, r#"{"file_path": "docs/letter.txt"}"#)?;
    let path = names(&request.file_path)?;
    let verified = parts(&node)?
        .repair
        .verify_file(path, &request.file_path, request.from)
        .await;
    verified.map(Json).map_err(|error| match error {
        VerifyError::Verdict(FsError::NotFound | FsError::Stale) => ApiError::new(
            StatusCode::NOT_FOUND,
            "not_found",
            format!("'{}' does not exist", request.file_path),
        ),
        VerifyError::Verdict(FsError::InvalidArgument) => ApiError::conflict(
            "not_a_file",
            format!("'{}' is not a regular file", request.file_path),
        ),
        VerifyError::Verdict(verdict) => verdict.into(),
        VerifyError::Fault(fault) => ApiError::unavailable(fault.to_string()),
        VerifyError::Internal(reason) => ApiError::internal(reason),
    })
}

/// Splits a path into names. Nothing is resolved: `.` and `..` are refused.
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
            checked.map_err(|error| invalid(format!("'{name}' is not a valid name: {error}")))
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
