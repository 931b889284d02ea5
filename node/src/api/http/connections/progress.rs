//! The progress of a client: a request that waits for its client is aborted when nothing is sent or received for some
//! time.
//!
//! A separate task passes the response in small frames and notices when the next one is not read: on HTTP/2 a client
//! can stop reading one response while its connection stays alive.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::Version;
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::activity::{Activity, ClientAddress};

/// Most bytes in one frame: a client that reads 4 KiB per second reads it in half of the available time.
const FRAME_BYTES_MAX: usize = 64 << 10;

/// Marks a request that is not waiting for its client.
const NOT_WAITING: u64 = u64::MAX;

/// Time-outs of clients that do nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientTimeouts {
    /// A client that sends and reads nothing for this time is disconnected.
    pub close_after: Duration,
    /// A client that sends and reads nothing for this time is disconnected if others wait.
    pub preempt_after: Duration,
}

impl Default for ClientTimeouts {
    fn default() -> ClientTimeouts {
        ClientTimeouts {
            close_after: Duration::from_secs(30),
            preempt_after: Duration::from_secs(3),
        }
    }
}

/// The progress of the client of one request.
#[derive(Debug)]
pub struct ClientProgress {
    timeouts: ClientTimeouts,
    /// The connection, if the request does not share it: bytes on it belong to the request.
    connection: Option<Arc<Activity>>,
    address: Option<ClientAddress>,
    began: Instant,
    /// Milliseconds after `began`.
    waiting_since_ms: AtomicU64,
    preempted: CancellationToken,
}

impl ClientProgress {
    /// Creates the progress of `request`.
    pub fn of(request: &Request, timeouts: ClientTimeouts) -> Arc<ClientProgress> {
        let connection = request.extensions().get::<Arc<Activity>>().cloned();
        let address = connection.as_ref().map(|activity| activity.address());
        let shared = request.version() == Version::HTTP_2;
        Arc::new(ClientProgress::new(
            timeouts,
            address,
            connection.filter(|_| !shared),
        ))
    }

    /// Creates the progress of a request from `address`, which does not share `connection`.
    pub fn new(
        timeouts: ClientTimeouts,
        address: Option<ClientAddress>,
        connection: Option<Arc<Activity>>,
    ) -> ClientProgress {
        ClientProgress {
            timeouts,
            connection,
            address,
            began: Instant::now(),
            waiting_since_ms: AtomicU64::new(NOT_WAITING),
            preempted: CancellationToken::new(),
        }
    }

    /// Returns the address of the client, if known.
    pub fn address(&self) -> Option<ClientAddress> {
        self.address
    }

    /// Returns the time-outs.
    pub fn timeouts(&self) -> ClientTimeouts {
        self.timeouts
    }

    /// Waits for `what`, which depends on the client; `None` if the client times out.
    pub async fn wait_for_client<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        self.waiting_since_ms.store(self.now_ms(), Ordering::Relaxed);
        let done = tokio::select! {
            biased;
            done = what => Some(done),
            () = self.timed_out() => None,
        };
        self.waiting_since_ms.store(NOT_WAITING, Ordering::Relaxed);
        done
    }

    /// Returns the time for which the request has waited for an inactive client.
    pub fn stalled(&self) -> Duration {
        let since_ms = self.waiting_since_ms.load(Ordering::Relaxed);
        if since_ms == NOT_WAITING {
            return Duration::ZERO;
        }
        let waited = Duration::from_millis(self.now_ms().saturating_sub(since_ms));
        let connection = self.connection.as_ref();
        connection.map_or(waited, |activity| waited.min(activity.since_progress()))
    }

    /// Aborts the request, because others wait.
    pub fn preempt(&self) {
        self.preempted.cancel();
    }

    async fn timed_out(&self) {
        loop {
            let left = self.timeouts.close_after.saturating_sub(self.stalled());
            if left.is_zero() {
                return;
            }
            tokio::select! {
                () = self.preempted.cancelled() => return,
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

enum BodyEvent {
    Frame(Bytes),
    Failed(axum::BoxError),
    End,
}

/// Returns a body with the bytes of `source`. If the client times out, `source` is dropped and the body ends with an
/// error.
pub fn monitored_body<E>(
    source: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    progress: Arc<ClientProgress>,
) -> Body
where
    E: Into<axum::BoxError> + Send + 'static,
{
    let (frames, events) = mpsc::channel(1);
    tokio::spawn(forward(source, progress, frames));
    Body::from_stream(stream::unfold(Some(events), async |events| {
        let mut events = events?;
        match events.recv().await {
            Some(BodyEvent::Frame(frame)) => Some((Ok(frame), Some(events))),
            Some(BodyEvent::Failed(error)) => Some((Err(error), None)),
            Some(BodyEvent::End) => None,
            None => {
                let timed_out = io::Error::from(io::ErrorKind::TimedOut);
                Some((Err(axum::BoxError::from(timed_out)), None))
            }
        }
    }))
}

async fn forward<E>(
    source: impl Stream<Item = Result<Bytes, E>> + Send,
    progress: Arc<ClientProgress>,
    frames: mpsc::Sender<BodyEvent>,
) where
    E: Into<axum::BoxError> + Send,
{
    tokio::pin!(source);
    loop {
        let next = tokio::select! {
            next = source.next() => next,
            // The client has disconnected.
            () = frames.closed() => return,
        };
        let mut event = match next {
            Some(Ok(bytes)) => BodyEvent::Frame(bytes),
            Some(Err(error)) => BodyEvent::Failed(error.into()),
            None => BodyEvent::End,
        };
        while let BodyEvent::Frame(bytes) = &mut event {
            if bytes.is_empty() {
                break;
            }
            let frame = bytes.split_to(bytes.len().min(FRAME_BYTES_MAX));
            match progress.wait_for_client(frames.reserve()).await {
                Some(Ok(slot)) => slot.send(BodyEvent::Frame(frame)),
                Some(Err(_)) | None => return,
            }
        }
        if !matches!(event, BodyEvent::Frame(_)) {
            // The last event: the source has ended, and only this event is still held.
            let _ = progress.wait_for_client(frames.send(event)).await;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    const CLOSE_AFTER: Duration = Duration::from_millis(400);

    fn progress() -> Arc<ClientProgress> {
        let timeouts = ClientTimeouts {
            close_after: CLOSE_AFTER,
            preempt_after: Duration::from_millis(50),
        };
        Arc::new(ClientProgress::new(timeouts, None, None))
    }

    async fn is_dropped(guard: &Arc<()>) {
        while Arc::strong_count(guard) > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Returns frames of 1 MiB and a guard that is dropped with them.
    fn source(mebibytes: usize, guard: Arc<()>) -> impl Stream<Item = Result<Bytes, io::Error>> {
        stream::iter((0..mebibytes).map(move |_| {
            let _held = &guard;
            Ok(Bytes::from_static(&[7; 1 << 20]))
        }))
    }

    #[tokio::test]
    async fn all_of_it_arrives_in_order() {
        let body = monitored_body(source(3, Arc::default()), progress());
        assert_eq!(to_bytes(body, usize::MAX).await.unwrap().len(), 3 << 20);
        let failing = stream::iter([Ok(Bytes::from_static(b"x")), Err(io::Error::other("broken"))]);
        assert!(to_bytes(monitored_body(failing, progress()), 100).await.is_err());
    }

    #[tokio::test]
    async fn an_unread_body_is_dropped_and_ends_with_an_error() {
        let guard = Arc::new(());
        let mut body = monitored_body(source(3, Arc::clone(&guard)), progress()).into_data_stream();
        for _ in 0..4 {
            body.next().await.unwrap().unwrap();
            tokio::time::sleep(CLOSE_AFTER / 4).await;
        }
        assert_eq!(Arc::strong_count(&guard), 2, "the client read in time");
        is_dropped(&guard).await;
        // One frame that was already passed, then the error.
        body.next().await.unwrap().unwrap();
        assert!(body.next().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_stalled_request_can_be_preempted() {
        let guard = Arc::new(());
        let long = ClientTimeouts {
            close_after: Duration::from_secs(600),
            ..progress().timeouts()
        };
        let progress = Arc::new(ClientProgress::new(long, None, None));
        let _body = monitored_body(source(3, Arc::clone(&guard)), Arc::clone(&progress));
        while progress.stalled() < long.preempt_after {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        progress.preempt();
        is_dropped(&guard).await;
    }
}
