//! `POST` and `PUT /upload/{path}`: decodes the request, stores the body, encodes the response.

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
use super::idempotency::{KEY_BYTES_MAX, Lookup, PendingUpload, Subject};
use super::path::{FilePath, display};
use super::store::{Replace, Stored, Upload};
use crate::api::http::connections::ClientProgress;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Marks a response as that of the first upload with the key.
const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// A stored file.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StoredFile {
    /// Its path from the root, without a leading slash; bytes that are not UTF-8 are replaced.
    path: String,
    /// Its length in bytes.
    size: u64,
    /// Its inode number.
    inode: u64,
    /// Entity tag of its content.
    etag: String,
    /// SHA-256 of its content, in hexadecimal; only for files of at most one chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    /// Its path, percent-encoded; only if the path is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_encoded: Option<String>,
}

/// Stores the body as a file.
///
/// The file appears complete or not at all. Missing directories are created; an existing file is replaced.
#[utoipa::path(
    method(post, put),
    path = "/upload/{path}",
    tag = "files",
    params(
        ("path" = String, Path, description = "The path: percent-encoded names, separated by slashes"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: store only if the path does not exist"),
        ("Idempotency-Key" = Option<String>, Header, description = "A repeated upload with the same key at the same node gets the response of the first; keys are lost when the node restarts (If-None-Match: * is not affected)"),
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The content of the file"),
    responses(
        (status = 201, description = "The file is stored on a quorum", body = StoredFile, headers(
            ("ETag" = String, description = "Entity tag of the content"),
            ("Location" = String, description = "Path for downloads"),
        )),
        (status = 400, description = "The path or a header is invalid", body = ErrorBody),
        (status = 409, description = "The path is not a file, or contains something other than directories", body = ErrorBody),
        (status = 412, description = "The path exists", body = ErrorBody),
        (status = 413, description = "The body is larger than a file can be", body = ErrorBody),
        (status = 415, description = "The body is a multipart form", body = ErrorBody),
        (status = 422, description = "The key was used for a different upload", body = ErrorBody),
        (status = 501, description = "If-Match is not supported for changes", body = ErrorBody),
        (status = 503, description = "No quorum answered in time", body = ErrorBody),
        (status = 507, description = "The disks are full", body = ErrorBody),
    )
)]
pub(super) async fn upload(
    State(service): State<Arc<Service>>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = FilePath::from_url(super::path_of(request.uri()))?;
    let progress = ClientProgress::of(&request, service.timeouts);
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
    let pending = match key.map(|key| service.answers.begin(&key, subject)).transpose()? {
        None => None,
        Some(Lookup::New(pending)) => Some(pending),
        Some(Lookup::Done(stored)) => {
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
        progress,
        path: path.clone(),
        replace: if conditional::wants_absent(&headers) {
            Replace::Never
        } else {
            Replace::Allowed
        },
        announced_bytes,
    };
    // A separate task: if the client disconnects, the server drops this handler at any await. The task then sees the
    // body end and cleans up.
    let task = tokio::spawn(async move {
        let stored = upload.run(body).await?;
        if let Some(pending) = pending {
            PendingUpload::complete(pending, stored.clone());
        }
        Ok::<Stored, ApiError>(stored)
    });
    let stored = task
        .await
        .map_err(|error| ApiError::internal(format!("an upload failed: {error}")))??;
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

/// Refuses requests whose body would be stored differently than the client expects.
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
            "multipart forms are not supported: the body must be the content of the file",
        )
        .hint("with curl: -T FILE, or --data-binary @FILE, instead of -F"));
    }
    if headers.contains_key(CONTENT_RANGE) {
        return Err(ApiError::bad_request(
            "partial_upload",
            "Content-Range is not supported: an upload is a whole file",
        ));
    }
    refuse_if_match(headers)
}

/// Refuses `If-Match`: the cluster has no compare-and-set for names, and a check that a concurrent writer can bypass
/// would be misleading.
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
