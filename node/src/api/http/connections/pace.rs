//! Whether a client keeps up: a request that waits for its client is given up when nothing comes or goes for a while.
//!
//! What is sent is handed over in small frames by a task of its own, which sees when nobody takes the next one: over HTTP/2 a
//! client can stop to read one answer while its connection lives on.

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

/// Most bytes that are handed over at once: a client of 4 KiB a second takes them in half the time it has.
const FRAME_BYTES_MAX: usize = 64 << 10;

/// The request is not waiting for its client.
const NOT_WAITING: u64 = u64::MAX;

/// How long clients are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Who sends or takes nothing for so long is let go of.
    pub let_go_after: Duration,
    /// Who sends or takes nothing for so long gives way to others that wait.
    pub yields_after: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            let_go_after: Duration::from_secs(30),
            yields_after: Duration::from_secs(3),
        }
    }
}

/// One request's pace.
#[derive(Debug)]
pub struct Pace {
    patience: Patience,
    /// The connection, where the request has it for itself: what moves there is the request's.
    connection: Option<Arc<Activity>>,
    address: Option<ClientAddress>,
    began: Instant,
    /// Milliseconds since it began.
    waits_since_ms: AtomicU64,
    gives_way: CancellationToken,
}

impl Pace {
    /// That of `request`.
    pub fn of(request: &Request, patience: Patience) -> Arc<Pace> {
        let connection = request.extensions().get::<Arc<Activity>>().cloned();
        let address = connection.as_ref().map(|activity| activity.address());
        let shared = request.version() == Version::HTTP_2;
        Arc::new(Pace::new(patience, address, connection.filter(|_| !shared)))
    }

    /// That of a request from `address` that has `connection` for itself.
    pub fn new(
        patience: Patience,
        address: Option<ClientAddress>,
        connection: Option<Arc<Activity>>,
    ) -> Pace {
        Pace {
            patience,
            connection,
            address,
            began: Instant::now(),
            waits_since_ms: AtomicU64::new(NOT_WAITING),
            gives_way: CancellationToken::new(),
        }
    }

    /// Where the client is, if it came over a connection.
    pub fn address(&self) -> Option<ClientAddress> {
        self.address
    }

    /// How long clients are waited for.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Waits for the client to do `what`; `None` when it is given up.
    pub async fn client_does<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        self.waits_since_ms.store(self.now_ms(), Ordering::Relaxed);
        let done = tokio::select! {
            biased;
            done = what => Some(done),
            () = self.given_up() => None,
        };
        self.waits_since_ms.store(NOT_WAITING, Ordering::Relaxed);
        done
    }

    /// How long the request has waited for a client that does nothing.
    pub fn stalled(&self) -> Duration {
        let since_ms = self.waits_since_ms.load(Ordering::Relaxed);
        if since_ms == NOT_WAITING {
            return Duration::ZERO;
        }
        let waited = Duration::from_millis(self.now_ms().saturating_sub(since_ms));
        let connection = self.connection.as_ref();
        connection.map_or(waited, |activity| waited.min(activity.since_moved()))
    }

    /// Others wait, and this one stalls: it is given up now.
    pub fn give_way(&self) {
        self.gives_way.cancel();
    }

    async fn given_up(&self) {
        loop {
            let left = self.patience.let_go_after.saturating_sub(self.stalled());
            if left.is_zero() {
                return;
            }
            tokio::select! {
                () = self.gives_way.cancelled() => return,
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

enum Handed {
    Frame(Bytes),
    Failed(axum::BoxError),
    End,
}

/// A body of what `source` yields; `source` is dropped when the client is given up, and the body then ends with an error.
pub fn paced<E>(source: impl Stream<Item = Result<Bytes, E>> + Send + 'static, pace: Arc<Pace>) -> Body
where
    E: Into<axum::BoxError> + Send + 'static,
{
    let (frames, handed) = mpsc::channel(1);
    tokio::spawn(hand_over(source, pace, frames));
    Body::from_stream(stream::unfold(Some(handed), async |handed| {
        let mut handed = handed?;
        match handed.recv().await {
            Some(Handed::Frame(frame)) => Some((Ok(frame), Some(handed))),
            Some(Handed::Failed(error)) => Some((Err(error), None)),
            Some(Handed::End) => None,
            None => {
                let given_up = io::Error::from(io::ErrorKind::TimedOut);
                Some((Err(axum::BoxError::from(given_up)), None))
            }
        }
    }))
}

async fn hand_over<E>(
    source: impl Stream<Item = Result<Bytes, E>> + Send,
    pace: Arc<Pace>,
    frames: mpsc::Sender<Handed>,
) where
    E: Into<axum::BoxError> + Send,
{
    tokio::pin!(source);
    loop {
        let next = tokio::select! {
            next = source.next() => next,
            // The client has gone away.
            () = frames.closed() => return,
        };
        let mut handed = match next {
            Some(Ok(bytes)) => Handed::Frame(bytes),
            Some(Err(error)) => Handed::Failed(error.into()),
            None => Handed::End,
        };
        while let Handed::Frame(bytes) = &mut handed {
            if bytes.is_empty() {
                break;
            }
            let frame = bytes.split_to(bytes.len().min(FRAME_BYTES_MAX));
            match pace.client_does(frames.reserve()).await {
                Some(Ok(place)) => place.send(Handed::Frame(frame)),
                Some(Err(_)) | None => return,
            }
        }
        if !matches!(handed, Handed::Frame(_)) {
            // The last thing said: the source is done, and nothing is held any more but this.
            let _ = pace.client_does(frames.send(handed)).await;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    const LET_GO_AFTER: Duration = Duration::from_millis(400);

    fn pace() -> Arc<Pace> {
        let patience = Patience {
            let_go_after: LET_GO_AFTER,
            yields_after: Duration::from_millis(50),
        };
        Arc::new(Pace::new(patience, None, None))
    }

    async fn is_dropped(guard: &Arc<()>) {
        while Arc::strong_count(guard) > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// So many bytes in frames of 1 MiB, and a guard that is dropped with them.
    fn source(mebibytes: usize, guard: Arc<()>) -> impl Stream<Item = Result<Bytes, io::Error>> {
        stream::iter((0..mebibytes).map(move |_| {
            let _held = &guard;
            Ok(Bytes::from_static(&[7; 1 << 20]))
        }))
    }

    #[tokio::test]
    async fn all_of_it_arrives_in_order() {
        let body = paced(source(3, Arc::default()), pace());
        assert_eq!(to_bytes(body, usize::MAX).await.unwrap().len(), 3 << 20);
        let failing = stream::iter([Ok(Bytes::from_static(b"x")), Err(io::Error::other("broken"))]);
        assert!(to_bytes(paced(failing, pace()), 100).await.is_err());
    }

    #[tokio::test]
    async fn what_nobody_takes_is_dropped_and_the_rest_is_an_error() {
        let guard = Arc::new(());
        let mut body = paced(source(3, Arc::clone(&guard)), pace()).into_data_stream();
        for _ in 0..4 {
            body.next().await.unwrap().unwrap();
            tokio::time::sleep(LET_GO_AFTER / 4).await;
        }
        assert_eq!(Arc::strong_count(&guard), 2, "it was taken from in time");
        is_dropped(&guard).await;
        // What was handed over already, then the error.
        body.next().await.unwrap().unwrap();
        assert!(body.next().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn who_stalls_can_be_made_to_give_way() {
        let guard = Arc::new(());
        let patient = Patience {
            let_go_after: Duration::from_secs(600),
            ..pace().patience()
        };
        let pace = Arc::new(Pace::new(patient, None, None));
        let _body = paced(source(3, Arc::clone(&guard)), Arc::clone(&pace));
        while pace.stalled() < patient.yields_after {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        pace.give_way();
        is_dropped(&guard).await;
    }
}
