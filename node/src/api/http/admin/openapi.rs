//! `/openapi.json`: the description of every endpoint, generated from the code that serves it.
//!
//! A handler is described by the `#[utoipa::path]` above it and listed in [`Document`]; a test compares the document
//! with the routes of the code.

use std::sync::Arc;

use axum::routing::get;
use axum::{Json, Router};
use utoipa::OpenApi;
use utoipa::openapi::PathItem;
use utoipa::openapi::path::Operation;

use crate::api::http::files::described::Described;
use crate::api::http::files::error::ErrorBody;
use crate::node::Node;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "QuorumFS",
        description = "Files of a QuorumFS cluster over HTTP, and what its nodes tell about themselves. Any node takes \
                       any request about files. Errors are JSON with a code, a message and a hint."
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
        (name = "node", description = "How this node is"),
        (name = "membership", description = "Who belongs to the cluster"),
        (name = "healing", description = "What is missing or damaged, and what is done about it"),
        (name = "internal", description = "For who knows the cluster's secret"),
        (name = "metrics", description = "What this node does, and how well"),
    )
)]
struct Document;

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new().route("/openapi.json", get(openapi))
}

/// This document.
#[utoipa::path(
    get,
    path = "/openapi.json",
    tag = "node",
    responses((status = 200, description = "An OpenAPI 3.1 document", content_type = "application/json"))
)]
async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}

/// All of it.
fn document() -> utoipa::openapi::OpenApi {
    let mut document = Document::openapi();
    document.merge(Described::openapi());
    let paths = &mut document.paths.paths;
    // One handler answers under both; a path of a document has one description for each method.
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

/// The methods of a path that there are.
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

    /// Without a path after them, these only say that one is missing.
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
