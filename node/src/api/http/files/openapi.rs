//! The part of the OpenAPI document for the REST interface.

use utoipa::OpenApi;

/// The endpoints for files, and `/status`.
#[derive(OpenApi)]
#[openapi(paths(
    super::upload::upload,
    super::download::download,
    super::delete::delete,
    super::list::list,
    super::status,
))]
pub(in crate::api) struct FilesDocument;
