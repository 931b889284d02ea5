//! What of the OpenAPI document the REST interface brings: its handlers, each described where it is.

use utoipa::OpenApi;

/// The part of the document about files and `/status`.
#[derive(OpenApi)]
#[openapi(paths(
    super::upload::upload,
    super::download::download,
    super::delete::delete,
    super::list::list,
    super::status,
))]
pub(in crate::api) struct Described;
