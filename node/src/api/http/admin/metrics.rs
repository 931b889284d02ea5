//! `/metrics` and `/metrics/tradeoffs`: the counters of this node, and an analysis of them.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::header::{ACCEPT, CONTENT_TYPE, VARY};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use quorumfs_measure::Snapshot;
use quorumfs_proto::limits::INLINE_BYTES_MAX;
use serde::Deserialize;
use utoipa::IntoParams;

use super::parts;
use crate::api::http::files::error::{ApiError, ErrorBody};
use crate::node::{Node, Parts};
use crate::observe::metrics::kinds::{OperationKind, Origin};
use crate::observe::metrics::report::{MetricsReport, Sources, voters};
use crate::observe::metrics::tradeoffs::{self, Inputs, Tradeoffs};
use crate::observe::metrics::{Metrics, exposition};

pub(super) fn routes() -> Router<Arc<Node>> {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/metrics/tradeoffs", get(tradeoffs))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct FormatQuery {
    /// `json` or `prometheus`; takes precedence over the `Accept` header.
    format: Option<String>,
}

/// The format of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Prometheus,
}

impl Format {
    /// Returns the requested format, JSON by default.
    fn select(query: &FormatQuery, headers: &HeaderMap) -> Result<Format, ApiError> {
        match query.format.as_deref() {
            Some("json") => return Ok(Format::Json),
            Some("prometheus") => return Ok(Format::Prometheus),
            Some(other) => {
                let message = format!("format '{other}' is unknown");
                return Err(ApiError::bad_request("invalid_parameter", message)
                    .hint("format=json or format=prometheus"));
            }
            None => {}
        }
        let accepted = headers.get_all(ACCEPT).into_iter();
        let ranges = accepted
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','));
        // The first known type wins: clients that accept several list the preferred one first, as scrapers do.
        for range in ranges {
            match range.split(';').next().unwrap_or_default().trim() {
                "application/json" => return Ok(Format::Json),
                "text/plain" | "application/openmetrics-text" => return Ok(Format::Prometheus),
                _ => {}
            }
        }
        Ok(Format::Json)
    }
}

/// Returns the counters of this node since it started.
///
/// The leader counts the calls of all clients; other nodes count only requests that they received themselves. The
/// format is JSON, or the Prometheus text format 0.0.4 if the `Accept` header names `text/plain` or OpenMetrics, or
/// with `?format=prometheus`.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "metrics",
    params(FormatQuery),
    responses(
        (status = 200, description = "Counts, rates and latencies", content(
            (MetricsReport = "application/json"),
            (String = "text/plain"),
        )),
        (status = 400, description = "The format is unknown", body = ErrorBody),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn metrics(
    State(node): State<Arc<Node>>,
    query: Result<Query<FormatQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Query(query) =
        query.map_err(|error| ApiError::bad_request("invalid_parameter", error.body_text()))?;
    let format = Format::select(&query, &headers)?;
    let sources = sources(&node, parts(&node)?);
    let mut response = match format {
        Format::Json => Json(MetricsReport::gather(node.metrics(), sources)).into_response(),
        Format::Prometheus => {
            let text = exposition::text(node.metrics(), sources)
                .map_err(|error| ApiError::internal(error.to_string()))?;
            ([(CONTENT_TYPE, exposition::CONTENT_TYPE)], text).into_response()
        }
    };
    response
        .headers_mut()
        .insert(VARY, HeaderValue::from_static("accept"));
    Ok(response)
}

/// Returns an analysis of the number of copies: benefits and costs of the current setting and of others, and
/// recommendations.
///
/// It is based on the measurements of this node since it started, so ask the leader. Each figure says whether it was
/// measured or estimated, and from what.
#[utoipa::path(
    get,
    path = "/metrics/tradeoffs",
    tag = "metrics",
    responses(
        (status = 200, description = "The analysis", body = Tradeoffs),
        (status = 503, description = "The node is still starting", body = ErrorBody),
    )
)]
pub(super) async fn tradeoffs(State(node): State<Arc<Node>>) -> Result<Json<Tradeoffs>, ApiError> {
    let parts = parts(&node)?;
    Ok(Json(tradeoffs::analyse(&inputs(node.metrics(), parts))))
}

fn sources<'a>(node: &'a Node, parts: &'a Parts) -> Sources<'a> {
    Sources {
        consensus: &parts.consensus,
        content: &parts.content,
        space: &parts.space,
        placement: &parts.placement,
        tasks: node.tasks(),
    }
}

fn inputs(metrics: &Metrics, parts: &Parts) -> Inputs {
    let measured = parts.consensus.measured();
    let counted = &metrics.replication;
    let (own, peer) = (counted.own_copies.snapshot(), counted.peer_copies.snapshot());
    let questions = [
        OperationKind::Lookup,
        OperationKind::GetAttributes,
        OperationKind::Extents,
    ];
    Inputs {
        nodes: voters(&parts.consensus),
        replicas: parts.placement.replicas(),
        inline_bytes_max: INLINE_BYTES_MAX,
        commits: metrics.commits.snapshot().durations,
        log_flushes: measured.flush_times,
        content_flushes: parts.content.flush_times(),
        to_quorum: counted.to_quorum.snapshot().durations,
        metadata_reads: merged_durations(metrics, &questions),
        content_reads: merged_durations(metrics, &[OperationKind::Read]),
        brought_bytes: counted.to_quorum.bytes(),
        copied_bytes: own.bytes + peer.bytes,
        own_copies: own.durations,
        peer_copies: peer.durations,
        available_bytes: parts.space.cluster_bytes().1,
    }
}

/// Returns the durations of all operations of these kinds, of all origins.
fn merged_durations(metrics: &Metrics, kinds: &[OperationKind]) -> Snapshot {
    let counters = Origin::ALL
        .into_iter()
        .flat_map(|origin| kinds.iter().map(move |kind| metrics.operation(origin, *kind)));
    let snapshots = counters.map(|counter| counter.snapshot().durations);
    let merged = snapshots.reduce(|all, one| all.merged(&one));
    merged.unwrap_or_else(|| quorumfs_measure::Distribution::new().snapshot())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(format: Option<&str>, accept: &[&'static str]) -> Option<Format> {
        let mut headers = HeaderMap::new();
        for value in accept {
            headers.append(ACCEPT, HeaderValue::from_static(value));
        }
        let query = FormatQuery {
            format: format.map(str::to_string),
        };
        Format::select(&query, &headers).ok()
    }

    #[test]
    fn scrapers_get_text_and_people_json() {
        assert_eq!(wanted(None, &[]), Some(Format::Json));
        assert_eq!(wanted(None, &["*/*"]), Some(Format::Json));
        assert_eq!(
            wanted(None, &["text/html,application/json;q=0.9,*/*"]),
            Some(Format::Json)
        );
        assert_eq!(wanted(None, &["text/plain"]), Some(Format::Prometheus));
        // The header that Prometheus sends.
        let scraper =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1";
        assert_eq!(wanted(None, &[scraper]), Some(Format::Prometheus));
        assert_eq!(
            wanted(Some("prometheus"), &["application/json"]),
            Some(Format::Prometheus)
        );
        assert_eq!(wanted(Some("json"), &["text/plain"]), Some(Format::Json));
        assert_eq!(wanted(Some("xml"), &[]), None);
    }
}
