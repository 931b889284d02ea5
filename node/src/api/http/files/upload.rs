//! `POST` and `PUT /upload/{path}`: decodes the request, has it stored, encodes the answer.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::{
    CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, IF_MATCH, LOCATION,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use quorumfs_proto::limits::FILE_BYTES_MAX;
use serde::Serialize;
use utoipa::ToSchema;

use super::Service;
use super::conditional;
use super::error::{ApiError, ErrorBody};
use super::idempotency::{KEY_BYTES_MAX, Lookup, Subject, UnderWay};
use super::path::{FilePath, display};
use super::store::{Replace, Stored, Upload};
use crate::api::http::connections::Pace;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Says that the answer is the one that the first upload with this key got.
const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// What was stored.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StoredFile {
    /// Its path from the root, without a slash in front; what is not UTF-8 is replaced.
    path: String,
    /// Its length in bytes.
    size: u64,
    /// Its number.
    inode: u64,
    /// Of this version.
    etag: String,
    /// Of its bytes, in hexadecimal, where it was computed on the way.
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    /// Its path, percent-encoded, where it is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_encoded: Option<String>,
}

/// Store the body as a file.
///
/// It appears at once and whole, or not at all; missing directories are made; a file of that name is replaced.
#[utoipa::path(
    method(post, put),
    path = "/upload/{path}",
    tag = "files",
    params(
        ("path" = String, Path, description = "Names, percent-encoded, with slashes between them"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: only if nothing has the name"),
        ("Idempotency-Key" = Option<String>, Header, description = "Answers an upload that is repeated at the same node as the first; a node that starts anew has forgotten it (If-None-Match: * has not)"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The file's bytes"),
    responses(
        (status = 201, description = "Stored on a quorum", body = StoredFile, headers(
            ("ETag" = String, description = "Of this version"),
            ("Location" = String, description = "Where to download it"),
        )),
        (status = 400, description = "A path or header that cannot be", body = ErrorBody),
        (status = 409, description = "Something is in the way", body = ErrorBody),
        (status = 412, description = "Something has the name", body = ErrorBody),
        (status = 413, description = "Larger than a file can be", body = ErrorBody),
        (status = 415, description = "A multipart form", body = ErrorBody),
        (status = 422, description = "The key was used for another upload", body = ErrorBody),
        (status = 501, description = "If-Match is not supported here", body = ErrorBody),
        (status = 503, description = "No quorum in time", body = ErrorBody),
        (status = 507, description = "The disks are full", body = ErrorBody),
    )
)]
pub(super) async fn upload(
    State(service): State<Arc<Service>>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = FilePath::from_url(super::path_of(request.uri()))?;
    let pace = Pace::of(&request, service.patience);
    let (head, body) = request.into_parts();
    let headers = head.headers;
    refuse_unsupported(&headers)?;
    let announced_bytes = content_length(&headers)?;
    let key = idempotency_key(&headers)?;
    let access = service.access().await?;

    let subject = Subject {
        path: path.to_bytes(),
        size_bytes: announced_bytes,
    };
    let under_way = match key.map(|key| service.answers.begin(&key, subject)).transpose()? {
        None => None,
        Some(Lookup::Fresh(under_way)) => Some(under_way),
        Some(Lookup::Known(stored)) => {
            let mut response = created(&path, &stored);
            response
                .headers_mut()
                .insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
            return Ok(response);
        }
    };
    let upload = Upload {
        access,
        service: Arc::clone(&service),
        pace,
        path: path.clone(),
        replace: if conditional::wants_absent(&headers) {
            Replace::Never
        } else {
            Replace::Allowed
        },
        announced_bytes,
    };
    // In a task of its own: when the client goes away, the server drops this handler in the middle of whatever it
    // waits for. The task then sees the body break off and cleans up in order.
    let task = tokio::spawn(async move {
        let stored = upload.run(body).await?;
        if let Some(under_way) = under_way {
            UnderWay::answered(under_way, stored.clone());
        }
        Ok::<Stored, ApiError>(stored)
    });
    let stored = task
        .await
        .map_err(|error| ApiError::internal(format!("upload: {error}")))??;
    Ok(created(&path, &stored))
}

fn created(path: &FilePath, stored: &Stored) -> Response {
    let bytes = path.to_bytes();
    let tag = conditional::etag(&stored.attributes);
    let body = StoredFile {
        path: display(&bytes).to_string(),
        size: stored.attributes.size,
        inode: stored.attributes.inode.0,
        etag: tag.clone(),
        sha256: stored.sha256.map(|sha256| sha256.to_string()),
        path_encoded: std::str::from_utf8(&bytes).is_err().then(|| path.encoded()),
    };
    let headers = [(ETAG, tag), (LOCATION, format!("/download/{}", path.encoded()))];
    (StatusCode::CREATED, headers, Json(body)).into_response()
}

/// What would be stored as something else than its sender means.
fn refuse_unsupported(headers: &HeaderMap) -> Result<(), ApiError> {
    let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    if media_type.is_some_and(|media_type| {
        media_type
            .trim_start()
            .to_ascii_lowercase()
            .starts_with("multipart/")
    }) {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "multipart",
            "a multipart form is not taken: the body must be the bytes of the file",
        )
        .hint("with curl: -T FILE, or --data-binary @FILE, instead of -F"));
    }
    if headers.contains_key(CONTENT_RANGE) {
        return Err(ApiError::bad_request(
            "partial_upload",
            "Content-Range is not taken: an upload is the whole file",
        ));
    }
    refuse_if_match(headers)
}

/// The cluster has no compare-and-set for names, and a check that another writer can slip past is worse than none.
pub(super) fn refuse_if_match(headers: &HeaderMap) -> Result<(), ApiError> {
    if headers.contains_key(IF_MATCH) {
        return Err(ApiError::new(
            StatusCode::NOT_IMPLEMENTED,
            "precondition_not_supported",
            "If-Match is supported for reads only",
        ));
    }
    Ok(())
}

fn content_length(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get(CONTENT_LENGTH) else {
        return Ok(None);
    };
    let length: Option<u64> = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    match length {
        None => Err(ApiError::bad_request(
            "content_length",
            "Content-Length is not a number",
        )),
        Some(length) if length > FILE_BYTES_MAX => Err(quorumfs_proto::FsError::FileTooLarge.into()),
        length => Ok(length),
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= KEY_BYTES_MAX => Ok(Some(key.to_string())),
        _ => Err(ApiError::bad_request(
            "idempotency_key",
            format!("Idempotency-Key must be 1 to {KEY_BYTES_MAX} printable characters"),
        )),
    }
}
