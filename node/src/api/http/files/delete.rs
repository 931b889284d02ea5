//! `DELETE /upload/{path}`: removes a file, a link or an empty directory.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use quorumfs_proto::{FileKind, FsError};

use super::Service;
use super::access::verdict;
use super::error::{ApiError, ErrorBody};
use super::path::{FilePath, encode_path};
use super::places::{self, shown};
use super::upload::refuse_if_match;

/// How often the path is looked at again because what lies there changed its kind meanwhile.
const ATTEMPTS_MAX: usize = 8;

/// Remove a file, a link or an empty directory.
#[utoipa::path(
    delete,
    path = "/upload/{path}",
    tag = "files",
    params(("path" = String, Path, description = "Names, percent-encoded, with slashes between them")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 400, description = "A path that cannot be", body = ErrorBody),
        (status = 404, description = "Nothing has the name", body = ErrorBody),
        (status = 409, description = "A directory that is not empty, or a link on the way", body = ErrorBody),
        (status = 501, description = "If-Match is not supported here", body = ErrorBody),
        (status = 503, description = "No quorum in time", body = ErrorBody),
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
        let found = places::find(&access, &path).await?;
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
    Err(ApiError::unavailable(
        "the path changed each time it was looked at",
    ))
}

fn not_empty(path: &FilePath) -> ApiError {
    let prefix = encode_path(&path.to_bytes());
    let message = format!("the directory '{}' is not empty", shown(path.names()));
    ApiError::conflict("directory_not_empty", message).hint(format!(
        "an empty directory can be deleted; GET /files?prefix={prefix}/&kind=all lists what is in it"
    ))
}
