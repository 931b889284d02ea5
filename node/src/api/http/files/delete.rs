//! `DELETE /upload/{path}`: removes a file, a link or an empty directory.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use quorumfs_proto::{FileKind, FsError};

use super::Service;
use super::access::verdict;
use super::error::{ApiError, ErrorBody};
use super::locate::{self, display_names};
use super::path::{FilePath, encode_path};
use super::upload::refuse_if_match;

/// Attempts if the kind of the inode at the path changes meanwhile.
const ATTEMPTS_MAX: usize = 8;

/// Removes a file, a link or an empty directory.
#[utoipa::path(
    delete,
    path = "/upload/{path}",
    tag = "files",
    params(("path" = String, Path, description = "The path: percent-encoded names, separated by slashes")),
    responses(
        (status = 204, description = "It is removed"),
        (status = 400, description = "The path is invalid", body = ErrorBody),
        (status = 404, description = "The path does not exist", body = ErrorBody),
        (status = 409, description = "The directory is not empty, or the path contains a link", body = ErrorBody),
        (status = 501, description = "If-Match is not supported for changes", body = ErrorBody),
        (status = 503, description = "No quorum answered in time", body = ErrorBody),
    )
)]
pub(super) async fn delete(
    State(service): State<Arc<Service>>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let path = FilePath::from_url(super::path_of(request.uri()))?;
    refuse_if_match(request.headers())?;
    drop(request);
    let access = service.access().await?;
    let (parents, name) = path.split();
    for _ in 0..ATTEMPTS_MAX {
        let found = locate::find_entry(&access, &path).await?;
        let parent = access.resolve(parents).await?.inode;
        let name = name.clone();
        let removed = access.change(|filesystem| async move {
            match found.kind {
                FileKind::Directory => filesystem.remove_directory(parent, name.as_bytes()).await,
                _ => filesystem.unlink(parent, name.as_bytes()).await,
            }
        });
        match verdict(removed.await)? {
            Ok(_) => return Ok(StatusCode::NO_CONTENT),
            Err(FsError::NotEmpty) => return Err(not_empty(&path)),
            Err(FsError::NotFound | FsError::IsDirectory | FsError::NotDirectory | FsError::Stale) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(ApiError::unavailable("the path changed during each attempt"))
}

fn not_empty(path: &FilePath) -> ApiError {
    let prefix = encode_path(&path.to_bytes());
    let message = format!("the directory '{}' is not empty", display_names(path.names()));
    ApiError::conflict("directory_not_empty", message).hint(format!(
        "only an empty directory can be deleted; GET /files?prefix={prefix}/&kind=all lists its entries"
    ))
}
