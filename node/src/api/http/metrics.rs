//! Metrics of all HTTP requests: endpoint, status, bytes of the body, and the time until the last byte of the response
//! was delivered or the client disconnected.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};

use crate::node::Node;
use crate::observe::metrics::Metrics;
use crate::observe::metrics::kinds::Endpoint;

/// Adds a layer to `router` that records its requests in the metrics of `node`.
pub fn with_request_metrics(router: Router, node: &Node) -> Router {
    router.layer(from_fn_with_state(node.metrics().clone(), count))
}

async fn count(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let endpoint = Endpoint::of_request(request.method().as_str(), request.uri().path());
    let received = Arc::new(AtomicU64::new(0));
    let request = request.map(|body| {
        Body::new(CountedBody {
            body,
            bytes: received.clone(),
            record: None,
        })
    });
    let response = next.run(request).await;
    let record = RequestRecord {
        metrics,
        endpoint,
        status: response.status().as_u16(),
        received,
        sent: Arc::default(),
        began,
    };
    response.map(|body| {
        Body::new(CountedBody {
            body,
            bytes: record.sent.clone(),
            record: Some(record),
        })
    })
}

/// A request in progress; recorded when its response ends.
struct RequestRecord {
    metrics: Arc<Metrics>,
    endpoint: Endpoint,
    status: u16,
    received: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    began: Instant,
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let bytes = match self.endpoint {
            Endpoint::Upload => &self.received,
            _ => &self.sent,
        };
        self.metrics.http(
            self.endpoint,
            self.status,
            bytes.load(Ordering::Relaxed),
            self.began.elapsed(),
        );
    }
}

/// A body that counts its bytes.
struct CountedBody {
    body: Body,
    bytes: Arc<AtomicU64>,
    /// Dropped with the body: after the last byte, or when the client disconnects.
    record: Option<RequestRecord>,
}

impl HttpBody for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                self.bytes.fetch_add(length, Ordering::Relaxed);
            }
            Poll::Ready(None | Some(Err(_))) => drop(self.record.take()),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::metrics::kinds::Endpoint;
    use axum::http::StatusCode;
    use axum::routing::{get, post};
    use tower::ServiceExt as _;

    async fn ask(router: &Router, method: &str, path: &str, body: &'static str) -> Response {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .body(Body::from(body))
            .unwrap();
        router.clone().oneshot(request).await.unwrap()
    }

    #[tokio::test]
    async fn bytes_and_statuses_are_counted_when_the_answer_is_over() {
        let metrics = Arc::new(Metrics::new());
        let router = Router::new()
            .route("/download/x", get(|| async { "twelve bytes" }))
            .route(
                "/upload/x",
                post(|body: Bytes| async move { (StatusCode::CREATED, body.len().to_string()) }),
            )
            .layer(from_fn_with_state(metrics.clone(), count));
        let response = ask(&router, "GET", "/download/x", "").await;
        assert_eq!(
            metrics.http_requests(Endpoint::Download).0.count(),
            0,
            "not over yet"
        );
        assert_eq!(
            response.body().size_hint().exact(),
            Some(12),
            "the length stays known"
        );
        let body = axum::body::to_bytes(response.into_body(), 100).await.unwrap();
        assert_eq!(&body[..], b"twelve bytes");
        let (downloads, classes) = metrics.http_requests(Endpoint::Download);
        assert_eq!(
            (downloads.count(), downloads.bytes(), classes),
            (1, 12, [1, 0, 0, 0])
        );
        drop(ask(&router, "POST", "/upload/x", "four").await);
        let (uploads, _) = metrics.http_requests(Endpoint::Upload);
        assert_eq!((uploads.count(), uploads.bytes()), (1, 4));
        drop(ask(&router, "GET", "/nothing/here", "").await);
        let (other, classes) = metrics.http_requests(Endpoint::Other);
        assert_eq!((other.failures(), classes), (1, [0, 0, 1, 0]));
    }
}
