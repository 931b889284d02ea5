//! `/replicate/…` and `/delete-content/…`: for nodes and operators that have the secret of the cluster.
//!
//! Neither can change the content of a file: a copy is only stored for a chunk that files refer to, and only with the
//! digest in the metadata; content is only deleted if no file refers to it or ever will. A request without the secret,
//! or to a node without one, is refused before anything else is checked.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::post;
use axum::{Json, Router};
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::{ChunkId, SessionId, Sha256};
use serde::Serialize;

use super::parts;
use crate::api::http::files::error::{ApiError, ErrorBody};
use crate::integrity::sweep::DeleteError;
use crate::node::Node;
use crate::replication::recovery::{OfferError, OfferOutcome};
use crate::transport::ClusterSecret;

/// Header with the SHA-256 of the body, in hexadecimal.
const SHA256_HEADER: &str = "x-content-sha256";

/// The response to an uploaded copy.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Replicated {
    /// Id of the chunk.
    chunk: String,
    /// Its length, in bytes.
    bytes: u64,
    /// Whether the chunk was missing and is now stored; `false` if it was already held.
    stored: bool,
}

/// The response to a deletion.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Deleted {
    /// Id of the chunk.
    chunk: String,
    /// Bytes of disk freed at once; the rest is freed with the segment.
    freed_bytes: u64,
}

pub(super) fn routes(secret: Option<ClusterSecret>) -> Router<Arc<Node>> {
    Router::new()
        .route(
            "/replicate/{name}",
            post(replicate).layer(DefaultBodyLimit::max(CHUNK_BYTES_MAX as usize)),
        )
        .route("/delete-content/{name}", post(delete_content))
        .layer(from_fn_with_state(Arc::new(secret), require_secret))
}

async fn require_secret(
    State(secret): State<Arc<Option<ClusterSecret>>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Some(secret) = secret.as_ref() else {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "no_secret_configured",
            "this node has no secret, so the request cannot be authenticated",
        )
        .hint("start the nodes with the same --secret-file"));
    };
    let shown = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let shown = shown.and_then(|value| value.strip_prefix(b"Bearer "));
    match shown {
        Some(shown) if secret.is(shown) => Ok(next.run(request).await),
        Some(_) => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "wrong_secret",
            "the secret is not that of the cluster",
        )),
        None => Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "secret_required",
            "this endpoint requires the secret of the cluster",
        )
        .header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
        .hint("send the content of --secret-file as Authorization: Bearer …")),
    }
}

/// Stores a copy of a chunk that files refer to, if it is missing on this node.
#[utoipa::path(
    post,
    path = "/replicate/{name}",
    tag = "internal",
    params(
        ("name" = String, Path, description = "The chunk, as /repair/verify prints it"),
        ("x-content-sha256" = String, Header, description = "SHA-256 of the body, in hexadecimal"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "The chunk was already held", body = Replicated),
        (status = 201, description = "The chunk is stored", body = Replicated),
        (status = 400, description = "The name is invalid, or the digest differs", body = ErrorBody),
        (status = 401, description = "The secret is missing", body = ErrorBody),
        (status = 403, description = "The secret is wrong, or the node has none", body = ErrorBody),
        (status = 404, description = "No file refers to the chunk", body = ErrorBody),
        (status = 409, description = "The chunk has other content", body = ErrorBody),
        (status = 413, description = "The body is larger than a chunk", body = ErrorBody),
        (status = 503, description = "The node is still starting", body = ErrorBody),
        (status = 507, description = "The disk is full", body = ErrorBody),
    )
)]
pub(super) async fn replicate(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<Replicated>), ApiError> {
    let id = chunk_id(&name)?;
    let payload =
        body.map_err(|rejected| ApiError::new(rejected.status(), "body_refused", rejected.body_text()))?;
    let sha256 = headers
        .get(SHA256_HEADER)
        .and_then(|value| Sha256::from_hex(value.as_bytes()))
        .ok_or_else(|| {
            ApiError::bad_request(
                "no_digest",
                format!("the header {SHA256_HEADER} is missing or is not a SHA-256"),
            )
            .hint("64 hexadecimal digits, as sha256sum prints them")
        })?;
    let bytes = payload.len() as u64;
    let offered = parts(&node)?.recovery.offer(id, sha256, payload).await;
    let (status, stored) = match offered {
        Ok(OfferOutcome::Stored) => (StatusCode::CREATED, true),
        Ok(OfferOutcome::AlreadyHeld) => (StatusCode::OK, false),
        Err(OfferError::NotNamed) => return Err(unknown(id)),
        Err(error @ OfferError::WrongDigest) => {
            return Err(ApiError::bad_request("digest_differs", error.to_string()));
        }
        Err(error @ OfferError::OtherContent) => {
            return Err(ApiError::conflict("other_content", error.to_string()));
        }
        Err(OfferError::NoSpace) => return Err(quorumfs_proto::FsError::NoSpace.into()),
        Err(OfferError::Failed(reason)) => return Err(ApiError::unavailable(reason)),
    };
    let chunk = id.to_string();
    Ok((status, Json(Replicated { chunk, bytes, stored })))
}

/// Deletes this node's copy of a chunk that no file refers to or ever will.
#[utoipa::path(
    post,
    path = "/delete-content/{name}",
    tag = "internal",
    params(("name" = String, Path, description = "The chunk, as /repair/verify prints it")),
    responses(
        (status = 200, description = "The copy is deleted", body = Deleted),
        (status = 400, description = "The name is invalid", body = ErrorBody),
        (status = 401, description = "The secret is missing", body = ErrorBody),
        (status = 403, description = "The secret is wrong, or the node has none", body = ErrorBody),
        (status = 404, description = "This node has no copy", body = ErrorBody),
        (status = 409, description = "Files refer to the chunk, or may still do so", body = ErrorBody),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn delete_content(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    let id = chunk_id(&name)?;
    let deleted = parts(&node)?.sweeper.delete(id).await;
    match deleted {
        Ok(freed_bytes) => Ok(Json(Deleted {
            chunk: id.to_string(),
            freed_bytes,
        })),
        Err(DeleteError::NotHeld) => Err(unknown(id)),
        Err(error @ (DeleteError::Referenced | DeleteError::MayBeNamed)) => {
            Err(ApiError::conflict("referenced", error.to_string())
                .hint("delete the files that refer to it; the content is then freed automatically"))
        }
        Err(DeleteError::Unavailable(reason)) => Err(ApiError::unavailable(reason)),
    }
}

fn unknown(id: ChunkId) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no_such_chunk",
        format!("chunk {id} does not exist"),
    )
}

/// Parses a chunk id in the form that logs and `/repair/verify` print.
fn chunk_id(name: &str) -> Result<ChunkId, ApiError> {
    let parsed = name.split_once('.').and_then(|(session, counter)| {
        Some(ChunkId {
            session: SessionId(u64::from_str_radix(session, 16).ok()?),
            counter: counter.parse().ok()?,
        })
    });
    // Only the printed form is accepted, without `+` or capital letters.
    parsed.filter(|id| id.to_string() == name).ok_or_else(|| {
        ApiError::bad_request("invalid_chunk", format!("'{name}' is not a chunk id"))
            .hint("16 hexadecimal digits, a dot and a number, as /repair/verify prints them")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_named_as_it_is_printed() {
        let id = ChunkId {
            session: SessionId(0x2a),
            counter: 7,
        };
        assert_eq!(chunk_id(&id.to_string()).ok(), Some(id));
        for wrong in [
            "",
            "2a.7",
            "000000000000002A.7",
            "000000000000002a.+7",
            "000000000000002a",
        ] {
            assert!(chunk_id(wrong).is_err(), "{wrong:?}");
        }
    }
}
