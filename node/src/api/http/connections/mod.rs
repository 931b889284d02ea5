//! Serves HTTP connections, such that clients which neither send nor read do not block others.
//!
//! - The number of connections is bounded in total and for each client ([`slots`]). When the bound is reached, a new
//!   connection replaces the one that has been idle longest.
//! - A connection without a request in progress is closed after [`ClientTimeouts::close_after`], even if part of a
//!   request head has arrived; so is one whose client reads nothing of a response for this time. While the node
//!   processes a request, the connection stays open.
//! - On HTTP/2 the same applies to each response separately ([`progress`]).
//!
//! Does not know what is served.

mod activity;
mod progress;
mod slots;
#[cfg(test)]
mod tests;

pub use activity::{Activity, ClientAddress};
pub use progress::{ClientProgress, ClientTimeouts, monitored_body};

use std::convert::Infallible;
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderValue, Version};
use axum::response::Response;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tower::Service as _;

use activity::{Metered, RequestGuard};
use slots::{ConnectionSlot, ConnectionSlots};

/// Most concurrent requests of an HTTP/2 connection.
const STREAMS_MAX: u32 = 32;
/// Most bytes that the HTTP library buffers for an HTTP/1 connection in each direction.
const BUFFER_BYTES_MAX: usize = 128 << 10;
/// Responses up to this size are passed to an HTTP/2 connection at once; its window is 64 KiB.
const UNMONITORED_BYTES_MAX: u64 = 16 << 10;
/// Number of checks of a client within its time-out.
const CHECKS_PER_TIMEOUT: u32 = 15;
/// Delay after a failed accept, for example without free file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// The response to a client whose connections are all in use, at the limit.
const REFUSAL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 2\r\n\
    content-type: application/json\r\ncontent-length: 138\r\n\r\n\
    {\"code\":\"unavailable\",\"message\":\"all connections that this client may have are in use\",\"hint\":\"use fewer connections, or try again later\"}";

/// Limits of connections and time-outs of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most connections in total. Each needs a file descriptor, and so do the content store and the log.
    pub connections_max: usize,
    /// Most connections from one client.
    pub per_client_max: usize,
    /// Time-outs of clients that do nothing.
    pub timeouts: ClientTimeouts,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections_max: 1024,
            per_client_max: 512,
            timeouts: ClientTimeouts::default(),
        }
    }
}

/// Serves `router` on `listener` until `stop` completes and the requests in progress at that time have ended.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: impl Future<Output = ()>) {
    let slots = ConnectionSlots::new(
        limits.connections_max,
        limits.per_client_max,
        limits.timeouts.preempt_after,
    );
    let (stopping, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => match slots.admit(address.ip()) {
                Some(slot) => {
                    let serving =
                        serve_connection(stream, slot, router.clone(), limits.timeouts, stopped.clone());
                    connections.spawn(serving);
                }
                None => refuse(stream),
            },
            Err(error) if is_connection_error(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept HTTP connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let _ = stopping.send(true);
    while connections.join_next().await.is_some() {}
}

/// Whether accept(2) failed because of the connection itself, for example because the client has disconnected.
fn is_connection_error(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// Sends [`REFUSAL`] and closes the connection. The send does not block; if it fails, the client gets no response.
fn refuse(stream: TcpStream) {
    if let Ok(mut stream) = stream.into_std() {
        let _ = stream.write_all(REFUSAL);
    }
}

async fn serve_connection(
    stream: TcpStream,
    slot: ConnectionSlot,
    router: Router,
    timeouts: ClientTimeouts,
    mut stopped: watch::Receiver<bool>,
) {
    // Without TCP_NODELAY the end of a response may wait for the client's acknowledgement. A failure only costs time.
    let _ = stream.set_nodelay(true);
    let activity = &slot.activity;
    let service = {
        let activity = Arc::clone(activity);
        service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            answer(
                request.map(Body::new),
                router.clone(),
                Arc::clone(&activity),
                timeouts,
            )
        })
    };
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.close_after)
        .max_buf_size(BUFFER_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(timeouts.close_after)
        .keep_alive_timeout(timeouts.close_after)
        .max_concurrent_streams(STREAMS_MAX);
    let metered = Metered::new(stream, Arc::clone(activity));
    let connection = builder.serve_connection(TokioIo::new(metered), service);
    tokio::pin!(connection);
    let mut checks = tokio::time::interval(timeouts.close_after / CHECKS_PER_TIMEOUT);
    let mut is_shutting_down = false;
    loop {
        let is_stopping = tokio::select! {
            // The result of the connection is irrelevant to the server.
            _ = &mut connection => break,
            () = slot.evicted.cancelled() => break,
            stopping = stopped.wait_for(|stopped| *stopped), if !is_shutting_down => stopping.is_ok(),
            _ = checks.tick() => false,
        };
        activity.update();
        let is_idle = activity.idle().is_some_and(|idle| idle >= timeouts.close_after);
        if activity.stalled() >= timeouts.close_after || (is_idle && is_shutting_down) {
            tracing::debug!(
                is_idle,
                "closing the connection of an HTTP client that does nothing"
            );
            break;
        }
        if is_idle || is_stopping {
            // On HTTP/2 a request that arrives at this moment is refused explicitly, so the client can retry it.
            connection.as_mut().graceful_shutdown();
            is_shutting_down = true;
        }
    }
}

/// Lets `router` answer `request`, which is in progress until its response is delivered.
async fn answer(
    mut request: Request,
    mut router: Router,
    activity: Arc<Activity>,
    timeouts: ClientTimeouts,
) -> Result<Response, Infallible> {
    let guard = activity.request();
    request.extensions_mut().insert(activity);
    let is_shared = request.version() == Version::HTTP_2;
    let progress = is_shared.then(|| ClientProgress::of(&request, timeouts));
    let response = router.call(request).await?;
    Ok(match progress {
        Some(progress) => with_guard(monitored(response, progress), guard),
        None => with_guard(response, guard),
    })
}

/// Wraps the body of `response`, so that it ends with an error if the client does not read it.
fn monitored(mut response: Response, progress: Arc<ClientProgress>) -> Response {
    let size = response.body().size_hint();
    if size.upper().is_some_and(|bytes| bytes <= UNMONITORED_BYTES_MAX) {
        return response;
    }
    if let Some(bytes) = size.exact() {
        let headers = response.headers_mut();
        headers
            .entry(CONTENT_LENGTH)
            .or_insert_with(|| HeaderValue::from(bytes));
    }
    response.map(|body| monitored_body(body.into_data_stream(), progress))
}

fn with_guard(response: Response, guard: RequestGuard) -> Response {
    response.map(|body| Body::new(GuardedBody { body, _guard: guard }))
}

/// The body of a response; its request is in progress until the body is dropped.
struct GuardedBody {
    body: Body,
    _guard: RequestGuard,
}

impl HttpBody for GuardedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
