//! `GET` and `HEAD` of `/download/{path}` and `/upload/{path}`: decodes the request, selects the content, streams it.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderValue,
    LAST_MODIFIED, RANGE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::Response;
use quorumfs_fs::OpenFlags;
use quorumfs_proto::{Attributes, FsError};

use super::access::{Access, OpenFile, verdict};
use super::conditional::{self, Verdict};
use super::content::Content;
use super::error::{ApiError, ErrorBody};
use super::locate;
use super::path::FilePath;
use super::range::Selected;
use super::times;
use super::{SMALL_BYTES_MAX, Service};
use crate::api::http::connections::{ClientProgress, monitored_body};

/// Attempts if a file changes or disappears between two calls about it.
const ATTEMPTS_MAX: usize = 20;
const ATTEMPT_PAUSE_MS: u64 = 5;

/// Returns a file, or a part of it.
///
/// The response has one version of the file, that of its `ETag`, or the connection is aborted. `/upload/{path}`
/// returns the same.
#[utoipa::path(
    method(get, head),
    path = "/download/{path}",
    tag = "files",
    params(
        ("path" = String, Path, description = "The path: percent-encoded names, separated by slashes"),
        ("Range" = Option<String>, Header, description = "One range of bytes"),
        ("If-None-Match" = Option<String>, Header, description = "ETags that the client has"),
    ),
    responses(
        (status = 200, description = "The whole file", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 206, description = "The requested range", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 304, description = "The file has not changed"),
        (status = 400, description = "The path or a header is invalid", body = ErrorBody),
        (status = 404, description = "The path does not exist", body = ErrorBody),
        (status = 409, description = "It is not a regular file", body = ErrorBody),
        (status = 412, description = "The file has a different version", body = ErrorBody),
        (status = 416, description = "The range is outside the file", body = ErrorBody),
        (status = 503, description = "No quorum answered in time", body = ErrorBody),
    )
)]
pub(super) async fn download(
    State(service): State<Arc<Service>>,
    request: Request,
) -> Result<Response, ApiError> {
    let path = FilePath::from_url(super::path_of(request.uri()))?;
    let progress = ClientProgress::of(&request, service.timeouts);
    let (method, mut headers) = (request.method().clone(), request.headers().clone());
    drop(request);
    if method == Method::HEAD {
        // Ranges are defined for GET only (RFC 9110, section 14.2).
        headers.remove(RANGE);
    }
    let access = service.access().await?;
    for _ in 0..ATTEMPTS_MAX {
        let Some((file, attributes)) = open(&access, &path).await? else {
            tokio::time::sleep(Duration::from_millis(ATTEMPT_PAUSE_MS)).await;
            continue;
        };
        let selected = match conditional::evaluate(&headers, &attributes) {
            Verdict::Serve(selected) => selected,
            Verdict::NotModified => return Ok(empty(StatusCode::NOT_MODIFIED, &attributes)),
            Verdict::PreconditionFailed => return Err(precondition_failed(&attributes)),
        };
        let size = attributes.size;
        let (status, start, end) = match selected {
            Selected::Whole => (StatusCode::OK, 0, size),
            Selected::Part { start, end } => (StatusCode::PARTIAL_CONTENT, start, end),
            Selected::Unsatisfiable => return Err(unsatisfiable(size)),
        };
        let body = if method == Method::HEAD || start == end {
            Body::empty()
        } else {
            let is_small = end - start <= SMALL_BYTES_MAX as u64;
            let limiter = if is_small {
                &service.small_downloads
            } else {
                &service.downloads
            };
            let permit = service.permit(limiter, &progress).await?;
            let content = Content {
                access: access.clone(),
                file,
                version: attributes.content_version,
                range: start..end,
                permit,
            };
            if is_small {
                // Read before the response begins, so that the permit does not depend on the client.
                let Some(bytes) = content.whole().await? else {
                    tokio::time::sleep(Duration::from_millis(ATTEMPT_PAUSE_MS)).await;
                    continue;
                };
                Body::from(bytes)
            } else {
                monitored_body(content.stream(), Arc::clone(&progress))
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        describe(response.headers_mut(), &path, &attributes, start, end);
        if status == StatusCode::PARTIAL_CONTENT {
            let range = format!("bytes {start}-{}/{size}", end - 1);
            response.headers_mut().insert(CONTENT_RANGE, ascii(range));
        }
        return Ok(response);
    }
    Err(ApiError::unavailable("the file changed during each attempt"))
}

/// Finds and opens the file; `None` if it was removed meanwhile.
async fn open(access: &Access, path: &FilePath) -> Result<Option<(OpenFile, Attributes)>, ApiError> {
    let found = locate::find_entry(access, path).await?;
    if let Some(refusal) = locate::refuse_unless_file(access, path.names(), &found).await {
        return Err(refusal);
    }
    let opened = access.call(|filesystem| async move {
        let opened = filesystem
            .open(found.inode, OpenFlags::from(libc::O_RDONLY))
            .await?;
        Ok(OpenFile::new(filesystem, opened.handle))
    });
    match verdict(opened.await)? {
        Ok(file) => {
            let attributes = file.attributes()?;
            Ok(Some((file, attributes)))
        }
        Err(FsError::NotFound | FsError::Stale) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

fn describe(headers: &mut HeaderMap, path: &FilePath, attributes: &Attributes, start: u64, end: u64) {
    validators(headers, attributes);
    headers.insert(CONTENT_LENGTH, HeaderValue::from(end - start));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let (_, name) = path.split();
    let name = String::from_utf8_lossy(name.as_bytes());
    let media_type = mime_guess::from_path(name.as_ref()).first_or_octet_stream();
    headers.insert(CONTENT_TYPE, ascii(media_type.to_string()));
    // The type is guessed from the name; browsers must not guess another one from the content.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // A stored page must not run scripts in the origin of this node, whose endpoints can change the cluster.
    if may_have_scripts(&media_type) {
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    }
}

/// Whether a browser may run scripts in this type: HTML, and XML including SVG.
fn may_have_scripts(media_type: &mime_guess::Mime) -> bool {
    let subtype = media_type.subtype();
    subtype == "html" || subtype == "xml" || media_type.suffix().is_some_and(|suffix| suffix == "xml")
}

fn validators(headers: &mut HeaderMap, attributes: &Attributes) {
    headers.insert(ETAG, ascii(conditional::etag(attributes)));
    if let Some(date) = times::http_date(attributes.mtime) {
        headers.insert(LAST_MODIFIED, ascii(date));
    }
}

fn empty(status: StatusCode, attributes: &Attributes) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    validators(response.headers_mut(), attributes);
    response
}

fn precondition_failed(attributes: &Attributes) -> ApiError {
    let message = format!("the ETag of the file is {}", conditional::etag(attributes));
    ApiError::new(StatusCode::PRECONDITION_FAILED, "precondition_failed", message)
        .header(ETAG, ascii(conditional::etag(attributes)))
}

fn unsatisfiable(size: u64) -> ApiError {
    let message = format!("the range begins after the end of the file, which has {size} bytes");
    ApiError::new(
        StatusCode::RANGE_NOT_SATISFIABLE,
        "range_not_satisfiable",
        message,
    )
    .header(CONTENT_RANGE, ascii(format!("bytes */{size}")))
}

fn ascii(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("tags, dates, numbers and media types are visible ASCII")
}
