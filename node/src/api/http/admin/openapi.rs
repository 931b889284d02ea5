//! `/openapi.json`: the description of all endpoints, generated from their code.
//!
//! A handler is described by its `#[utoipa::path]` and listed in [`Document`]; a test compares the document with the
//! routes in the code.

use std::sync::Arc;

use axum::routing::get;
use axum::{Json, Router};
use utoipa::OpenApi;
use utoipa::openapi::PathItem;
use utoipa::openapi::path::Operation;

use crate::api::http::files::error::ErrorBody;
use crate::api::http::files::openapi::FilesDocument;
use crate::node::Node;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "QuorumFS",
        description = "Access to the files of a QuorumFS cluster, and administration of its nodes. Any node serves any \
                       request about files. Errors are JSON with a code, a message and a hint."
    ),
    paths(
        super::dashboard::page,
        super::health::alive,
        super::health::ready,
        super::health::status,
        super::internal::delete_content,
        super::internal::replicate,
        super::membership::add,
        super::membership::remove,
        super::membership::set_replicas,
        super::membership::show,
        super::nodes::nodes,
        super::recovery::status,
        super::recovery::sync,
        super::repair::audit,
        super::repair::begin_audit,
        super::repair::status,
        super::repair::verify,
        super::metrics::metrics,
        super::metrics::tradeoffs,
        openapi,
    ),
    components(schemas(ErrorBody)),
    tags(
        (name = "files", description = "Files and directories"),
        (name = "node", description = "Status of this node"),
        (name = "membership", description = "Members of the cluster"),
        (name = "healing", description = "Missing and damaged content, and its repair"),
        (name = "internal", description = "Endpoints that require the secret of the cluster"),
        (name = "metrics", description = "Counters, rates and latencies of this node"),
    )
)]
struct Document;

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new().route("/openapi.json", get(openapi))
}

/// Returns this document.
#[utoipa::path(
    get,
    path = "/openapi.json",
    tag = "node",
    responses((status = 200, description = "An OpenAPI 3.1 document", content_type = "application/json"))
)]
async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}

/// Returns the complete document.
fn document() -> utoipa::openapi::OpenApi {
    let mut document = Document::openapi();
    document.merge(FilesDocument::openapi());
    let paths = &mut document.paths.paths;
    // Both paths have the same handler for reads, but a handler is described under one path only.
    let read = paths.get("/download/{path}").cloned();
    if let (Some(read), Some(upload)) = (read, paths.get_mut("/upload/{path}")) {
        upload.get = read.get;
        upload.head = read.head;
    }
    for (path, item) in paths {
        let name = path.replace(['/', '{', '}', '.', '-'], " ");
        let name = name.split_whitespace().collect::<Vec<_>>().join("_");
        for (method, operation) in operations(item) {
            operation.operation_id = Some(format!("{method}_{name}"));
        }
    }
    document
}

/// Returns the existing operations of a path, with their methods.
fn operations(item: &mut PathItem) -> impl Iterator<Item = (&'static str, &mut Operation)> {
    let all = [
        ("get", &mut item.get),
        ("head", &mut item.head),
        ("post", &mut item.post),
        ("put", &mut item.put),
        ("delete", &mut item.delete),
    ];
    all.into_iter()
        .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    /// Routes without a path, which only report that it is missing.
    const BARE: [&str; 4] = ["/upload", "/upload/", "/download", "/download/"];

    /// The literal first arguments of `.route(` in the sources below `folder`, tests left out.
    fn routes_in(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                routes_in(&path, found);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            for call in code.split(".route(").skip(1) {
                if let Some(literal) = call.trim_start().strip_prefix('"') {
                    found.insert(literal.split('"').next().unwrap().replace("{*", "{"));
                }
            }
        }
    }

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let mut routes = BTreeSet::new();
        routes_in(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api"),
            &mut routes,
        );
        routes.retain(|route| !BARE.contains(&route.as_str()));
        assert!(
            routes.contains("/files") && routes.contains("/upload/{path}"),
            "{routes:?}"
        );
        let described: BTreeSet<String> = document().paths.paths.into_keys().collect();
        let missing: Vec<_> = routes.difference(&described).collect();
        assert!(missing.is_empty(), "served, and not described: {missing:?}");
        let extra: Vec<_> = described.difference(&routes).collect();
        assert!(extra.is_empty(), "described, and not served: {extra:?}");
    }

    #[test]
    fn every_operation_has_its_own_name_and_a_way_to_fail_or_none() {
        let mut document = document();
        let mut names: BTreeMap<String, usize> = BTreeMap::new();
        for item in document.paths.paths.values_mut() {
            for (_, operation) in operations(item) {
                *names.entry(operation.operation_id.clone().unwrap()).or_default() += 1;
                assert!(operation.summary.is_some(), "{:?}", operation.operation_id);
                assert!(!operation.responses.responses.is_empty());
            }
        }
        assert!(names.values().all(|count| *count == 1), "{names:?}");
        let text = serde_json::to_string(&document).unwrap();
        for expected in [
            "\"head_upload_path\"",
            "\"hint\"",
            "\"#/components/schemas/ErrorBody\"",
        ] {
            assert!(text.contains(expected), "no {expected}");
        }
    }
}
