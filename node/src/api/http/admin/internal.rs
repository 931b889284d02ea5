//! `/replicate/…` and `/delete-content/…`: for the nodes and their operators, who know the cluster's secret.
//!
//! Neither can change what a file holds: a copy is taken only of a chunk that the metadata names, and only if it has
//! the digest named there; content goes only if no file names it and none ever will. Whoever does not know the secret,
//! or asks a node that was given none, is refused before anything else is looked at.

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

/// The header with the SHA-256 of the body, in hexadecimal.
const SHA256_HEADER: &str = "x-content-sha256";

/// What became of a copy that was offered.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Replicated {
    /// The chunk.
    chunk: String,
    /// Its bytes.
    bytes: u64,
    /// Whether it was missing here; else nothing was done.
    stored: bool,
}

/// What became of content that was to be deleted.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Deleted {
    /// The chunk.
    chunk: String,
    /// Bytes of disk given back at once; the rest comes back with the segment.
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
            "this node was given no secret, so nobody can show that they know it",
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
            "this is not the cluster's secret",
        )),
        None => Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "secret_required",
            "this is for who knows the cluster's secret",
        )
        .header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
        .hint("send what is in --secret-file as Authorization: Bearer …")),
    }
}

/// Takes a copy of a chunk that files name and that is missing here.
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
        (status = 200, description = "It was here", body = Replicated),
        (status = 201, description = "It is stored", body = Replicated),
        (status = 400, description = "No chunk's name, or the digest differs", body = ErrorBody),
        (status = 401, description = "No secret was shown", body = ErrorBody),
        (status = 403, description = "It is not the cluster's secret, or there is none", body = ErrorBody),
        (status = 404, description = "No file names it", body = ErrorBody),
        (status = 409, description = "The chunk has other content", body = ErrorBody),
        (status = 413, description = "Longer than a chunk", body = ErrorBody),
        (status = 503, description = "The node has not begun", body = ErrorBody),
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
            ApiError::bad_request("no_digest", format!("the header {SHA256_HEADER} has no SHA-256"))
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
        Err(error @ OfferError::OtherContent) => return Err(ApiError::conflict("other_content", error.to_string())),
        Err(OfferError::NoSpace) => return Err(quorumfs_proto::FsError::NoSpace.into()),
        Err(OfferError::Failed(reason)) => return Err(ApiError::unavailable(reason)),
    };
    let chunk = id.to_string();
    Ok((status, Json(Replicated { chunk, bytes, stored })))
}

/// Drops this node's copy of a chunk that no file names and none can name any more.
#[utoipa::path(
    post,
    path = "/delete-content/{name}",
    tag = "internal",
    params(("name" = String, Path, description = "The chunk, as /repair/verify prints it")),
    responses(
        (status = 200, description = "It is gone from this node", body = Deleted),
        (status = 400, description = "No chunk's name", body = ErrorBody),
        (status = 401, description = "No secret was shown", body = ErrorBody),
        (status = 403, description = "It is not the cluster's secret, or there is none", body = ErrorBody),
        (status = 404, description = "It is not here", body = ErrorBody),
        (status = 409, description = "Files name it, or may still come to", body = ErrorBody),
        (status = 503, description = "The node has not begun", body = ErrorBody),
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
                .hint("delete the files that name it; its content then goes by itself"))
        }
        Err(DeleteError::Unavailable(reason)) => Err(ApiError::unavailable(reason)),
    }
}

fn unknown(id: ChunkId) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no_such_chunk",
        format!("there is no chunk {id}"),
    )
}

/// From the form in which logs and `/repair/verify` print it.
fn chunk_id(name: &str) -> Result<ChunkId, ApiError> {
    let parsed = name.split_once('.').and_then(|(session, counter)| {
        Some(ChunkId {
            session: SessionId(u64::from_str_radix(session, 16).ok()?),
            counter: counter.parse().ok()?,
        })
    });
    // Only the one form that is printed: `+1` and capital letters are not it.
    parsed.filter(|id| id.to_string() == name).ok_or_else(|| {
        ApiError::bad_request("invalid_chunk", format!("{name:?} names no chunk"))
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
