//! `/metrics` and `/metrics/tradeoffs`: what this node counted, and what follows from it.

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
pub(super) struct FormatAsked {
    /// `json` or `prometheus`; stronger than the `Accept` header.
    format: Option<String>,
}

/// How metrics are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Prometheus,
}

impl Format {
    /// What is asked for; JSON where nothing is.
    fn wanted(asked: &FormatAsked, headers: &HeaderMap) -> Result<Format, ApiError> {
        match asked.format.as_deref() {
            Some("json") => return Ok(Format::Json),
            Some("prometheus") => return Ok(Format::Prometheus),
            Some(other) => {
                let message = format!("format '{other}' is not known");
                return Err(ApiError::bad_request("invalid_parameter", message)
                    .hint("format=json or format=prometheus"));
            }
            None => {}
        }
        let accepted = headers.get_all(ACCEPT).into_iter();
        let ranges = accepted
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','));
        // In the order they are named: who wants both has put the better one first, as scrapers do.
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

/// What this node counted since it started.
///
/// The leader counts what clients ask of the cluster; the other nodes only what came to them. Prometheus' text
/// (exposition format 0.0.4) where the `Accept` header names `text/plain` or OpenMetrics, or with
/// `?format=prometheus`; else JSON.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "metrics",
    params(FormatAsked),
    responses(
        (status = 200, description = "Counts, rates and latencies", content(
            (MetricsReport = "application/json"),
            (String = "text/plain"),
        )),
        (status = 400, description = "No such format", body = ErrorBody),
        (status = 503, description = "The node has not begun", body = ErrorBody),
    )
)]
pub(super) async fn metrics(
    State(node): State<Arc<Node>>,
    asked: Result<Query<FormatAsked>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Query(asked) =
        asked.map_err(|error| ApiError::bad_request("invalid_parameter", error.body_text()))?;
    let format = Format::wanted(&asked, &headers)?;
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

/// What the present setting gives and costs, what others would, and what to change.
///
/// Made of what this node measured since it started: ask the leader. Each figure says whether it was measured or
/// estimated, and from what.
#[utoipa::path(
    get,
    path = "/metrics/tradeoffs",
    tag = "metrics",
    responses(
        (status = 200, description = "The analysis", body = Tradeoffs),
        (status = 503, description = "The node has not begun", body = ErrorBody),
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
        metadata_reads: together(metrics, &questions),
        content_reads: together(metrics, &[OperationKind::Read]),
        brought_bytes: counted.to_quorum.bytes(),
        copied_bytes: own.bytes + peer.bytes,
        own_copies: own.durations,
        peer_copies: peer.durations,
        available_bytes: parts.space.cluster_bytes().1,
    }
}

/// Durations of these kinds, of all origins.
fn together(metrics: &Metrics, kinds: &[OperationKind]) -> Snapshot {
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
        let asked = FormatAsked {
            format: format.map(str::to_string),
        };
        Format::wanted(&asked, &headers).ok()
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
        // Prometheus itself.
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
