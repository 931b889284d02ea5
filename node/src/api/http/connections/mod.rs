//! Serves HTTP connections, so that clients which neither read nor speak hold up nobody.
//!
//! - There are as many places as the process can well have open ([`places`]), of which one client has a half at most. When
//!   they are taken, the connection that has been idle longest is closed for the one that comes.
//! - Who has no request under way for [`Patience::let_go_after`], not even a whole head of one, is let go of; so is who takes
//!   nothing of an answer for that long. A client is waited for, for as long as it takes, while the node is at work.
//! - Over HTTP/2 the same holds for each answer by itself ([`pace`]).
//!
//! Knows nothing of what is served.

mod activity;
mod pace;
mod places;
#[cfg(test)]
mod tests;

pub use activity::{Activity, ClientAddress};
pub use pace::{Pace, Patience, paced};

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
use places::{ConnectionSlot, ConnectionSlots};

/// Requests under way in one HTTP/2 connection.
const STREAMS_MAX: u32 = 32;
/// What the HTTP library holds of one HTTP/1 connection, each way.
const BUFFER_BYTES_MAX: usize = 128 << 10;
/// Answers up to this size are handed to an HTTP/2 connection whole; it has a window of 64 KiB for them.
const UNPACED_BYTES_MAX: u64 = 16 << 10;
/// How many times within its patience a connection looks at its client.
const LOOKS_PER_PATIENCE: u32 = 15;
/// After an accept that failed because the process has no more files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// What a client is told that has its share of connections, all of them in use.
const REFUSAL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 2\r\n\
    content-type: application/json\r\ncontent-length: 118\r\n\r\n\
    {\"code\":\"unavailable\",\"message\":\"this client has as many connections in use as it may\",\"hint\":\"use fewer, or wait\"}   ";

/// How many connections there may be, and how long they are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// In all. Each takes a file descriptor, and the content store and the log need theirs.
    pub connections_max: usize,
    /// From one address.
    pub per_client_max: usize,
    /// With clients that do nothing.
    pub patience: Patience,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections_max: 1024,
            per_client_max: 512,
            patience: Patience::default(),
        }
    }
}

/// Serves `router` on `listener` until `stop` is done and the requests under way then have ended.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: impl Future<Output = ()>) {
    let places = ConnectionSlots::new(
        limits.connections_max,
        limits.per_client_max,
        limits.patience.yields_after,
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
            Ok((stream, address)) => match places.admit(address.ip()) {
                Some(place) => {
                    let serving =
                        serve_connection(stream, place, router.clone(), limits.patience, stopped.clone());
                    connections.spawn(serving);
                }
                None => refuse(stream),
            },
            Err(error) if is_of_the_connection(&error) => {}
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

/// Whether accepting failed because the client was gone already (accept(2)).
fn is_of_the_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// Says why and closes. A client whose network does not take it at once is not told.
fn refuse(stream: TcpStream) {
    if let Ok(mut stream) = stream.into_std() {
        let _ = stream.write_all(REFUSAL);
    }
}

async fn serve_connection(
    stream: TcpStream,
    place: ConnectionSlot,
    router: Router,
    patience: Patience,
    mut stopped: watch::Receiver<bool>,
) {
    // Without it the end of an answer waits for the client's acknowledgement. Where it cannot be set, it does.
    let _ = stream.set_nodelay(true);
    let activity = &place.activity;
    let service = {
        let activity = Arc::clone(activity);
        service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            answer(
                request.map(Body::new),
                router.clone(),
                Arc::clone(&activity),
                patience,
            )
        })
    };
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.let_go_after)
        .max_buf_size(BUFFER_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(patience.let_go_after)
        .keep_alive_timeout(patience.let_go_after)
        .max_concurrent_streams(STREAMS_MAX);
    let metered = Metered::new(stream, Arc::clone(activity));
    let connection = builder.serve_connection(TokioIo::new(metered), service);
    tokio::pin!(connection);
    let mut looks = tokio::time::interval(patience.let_go_after / LOOKS_PER_PATIENCE);
    let mut told_to_end = false;
    loop {
        let is_stopping = tokio::select! {
            // How it ended matters to the client alone.
            _ = &mut connection => break,
            () = place.leave.cancelled() => break,
            stopping = stopped.wait_for(|stopped| *stopped), if !told_to_end => stopping.is_ok(),
            _ = looks.tick() => false,
        };
        activity.look();
        let is_idle = activity.idle().is_some_and(|idle| idle >= patience.let_go_after);
        if activity.stalled() >= patience.let_go_after || (is_idle && told_to_end) {
            tracing::debug!(is_idle, "an HTTP client is let go of");
            break;
        }
        if is_idle || is_stopping {
            // Over HTTP/2 a client that asks at this very moment is told that it was not heard.
            connection.as_mut().graceful_shutdown();
            told_to_end = true;
        }
    }
}

/// Has `router` answer `request`, which is under way until its answer is handed over.
async fn answer(
    mut request: Request,
    mut router: Router,
    activity: Arc<Activity>,
    patience: Patience,
) -> Result<Response, Infallible> {
    let guard = activity.request();
    request.extensions_mut().insert(activity);
    let is_shared = request.version() == Version::HTTP_2;
    let pace = is_shared.then(|| Pace::of(&request, patience));
    let response = router.call(request).await?;
    Ok(match pace {
        Some(pace) => held(at_its_pace(response, pace), guard),
        None => held(response, guard),
    })
}

/// `response` with a body that is given up when the client does not take it.
fn at_its_pace(mut response: Response, pace: Arc<Pace>) -> Response {
    let size = response.body().size_hint();
    if size.upper().is_some_and(|bytes| bytes <= UNPACED_BYTES_MAX) {
        return response;
    }
    if let Some(bytes) = size.exact() {
        let headers = response.headers_mut();
        headers
            .entry(CONTENT_LENGTH)
            .or_insert_with(|| HeaderValue::from(bytes));
    }
    response.map(|body| paced(body.into_data_stream(), pace))
}

fn held(response: Response, guard: RequestGuard) -> Response {
    response.map(|body| Body::new(HeldBody { body, _guard: guard }))
}

/// The body of an answer; its request is under way for as long as it is there.
struct HeldBody {
    body: Body,
    _guard: RequestGuard,
}

impl HttpBody for HeldBody {
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
