//! One long stream of calls to a peer, answered in any order.
//!
//! Invariants:
//! - A call is answered once: by the peer, or, when the stream ends, by the reason why. None waits for ever: a stream
//!   on which calls wait and no answer comes for the line's progress time-out is given up.
//! - What a call was admitted for (its bytes) is given back when it is answered, not when its caller stops waiting:
//!   until then the bytes are in a queue.
//! - At most one stream of a line is alive, and a new one is not tried within [`RECONNECT_PAUSE_MS`] of the last
//!   one's end.
//!
//! Knows nothing of chunks.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Response, Status, Streaming};

/// Between a stream's end and the next attempt: a peer that is down is not asked in a tight loop.
pub const RECONNECT_PAUSE_MS: u64 = 100;
/// A call whose stream ended is sent once more over a new one: the peer may just have restarted.
const CALL_ATTEMPTS_MAX: u32 = 2;

/// Why a call was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// No connection, or it broke.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The peer ended the stream.
    #[error("the peer closed the stream")]
    Closed,
    /// No answer for as long as calls may wait.
    #[error("no answer for {0:?}")]
    Stalled(Duration),
}

struct Waiter<R> {
    done: oneshot::Sender<Result<R, Lost>>,
    _admission: Arc<OwnedSemaphorePermit>,
}

struct Calls<R> {
    waiting: HashMap<u64, Waiter<R>>,
    /// The last answer, or when the first of the waiting calls came.
    progress: Instant,
    ended: Option<(Instant, Lost)>,
}

struct CallStream<Q, R> {
    requests: mpsc::UnboundedSender<Q>,
    calls: Arc<Mutex<Calls<R>>>,
}

impl<R> Calls<R> {
    fn end(&mut self, reason: &Lost) {
        self.ended = Some((Instant::now(), reason.clone()));
        for (_, waiter) in self.waiting.drain() {
            // Who no longer waits does not mind, here and below.
            let _ = waiter.done.send(Err(reason.clone()));
        }
    }

    fn answer(&mut self, call_id: u64, response: R) {
        self.progress = Instant::now();
        if let Some(waiter) = self.waiting.remove(&call_id) {
            let _ = waiter.done.send(Ok(response));
        }
    }
}

/// Which requests and answers a line carries.
pub trait Protocol: Send + Sync + 'static {
    /// What is asked.
    type Request: Clone + Send + 'static;
    /// What is answered.
    type Answer: Send + 'static;
    /// Names a request.
    fn set_call_id(request: &mut Self::Request, call_id: u64);
    /// Whose answer it is.
    fn call_id(answer: &Self::Answer) -> u64;
    /// Opens the stream.
    fn open(
        &self,
        requests: UnboundedReceiverStream<Self::Request>,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Answer>>, Status>> + Send + 'static;
}

type StreamOf<P> = Arc<CallStream<<P as Protocol>::Request, <P as Protocol>::Answer>>;

/// The calls of one protocol to one peer, over one stream after another.
pub struct PeerStream<P: Protocol> {
    protocol: P,
    /// A peer that answers nothing for so long while calls wait is taken to be lost.
    progress_timeout: Duration,
    next_call: AtomicU64,
    // Locked to look at or replace the stream; never across an await.
    stream: Mutex<Option<StreamOf<P>>>,
}

impl<P: Protocol> PeerStream<P> {
    /// No stream is opened yet.
    pub fn new(protocol: P, progress_timeout: Duration) -> PeerStream<P> {
        PeerStream {
            protocol,
            progress_timeout,
            next_call: AtomicU64::new(1),
            stream: Mutex::new(None),
        }
    }

    /// Sends `request` and waits for its answer; `admission` is what it holds of a bound until it is answered.
    pub async fn call(
        &self,
        request: P::Request,
        admission: OwnedSemaphorePermit,
    ) -> Result<P::Answer, Lost> {
        let admission = Arc::new(admission);
        let mut attempt = 1;
        loop {
            let answer = match self.stream() {
                Ok(stream) => match self.send(&stream, request.clone(), Arc::clone(&admission)) {
                    Ok(answer) => answer.await.unwrap_or(Err(Lost::Closed)),
                    Err(lost) => Err(lost),
                },
                Err(lost) => Err(lost),
            };
            match answer {
                Ok(answer) => return Ok(answer),
                Err(lost) if attempt == CALL_ATTEMPTS_MAX || matches!(lost, Lost::Stalled(_)) => {
                    return Err(lost);
                }
                Err(_) => {}
            }
            attempt += 1;
            tokio::time::sleep(Duration::from_millis(RECONNECT_PAUSE_MS)).await;
        }
    }

    fn send(
        &self,
        stream: &CallStream<P::Request, P::Answer>,
        mut request: P::Request,
        admission: Arc<OwnedSemaphorePermit>,
    ) -> Result<oneshot::Receiver<Result<P::Answer, Lost>>, Lost> {
        let call_id = self.next_call.fetch_add(1, Ordering::Relaxed);
        P::set_call_id(&mut request, call_id);
        let (done, answer) = oneshot::channel();
        let waiter = Waiter {
            done,
            _admission: admission,
        };
        let mut calls = stream.calls.lock();
        if let Some((_, lost)) = &calls.ended {
            return Err(lost.clone());
        }
        if calls.waiting.is_empty() {
            calls.progress = Instant::now();
        }
        calls.waiting.insert(call_id, waiter);
        if stream.requests.send(request).is_err() {
            // The transport has let go of the stream; its end is about to be noticed.
            calls.waiting.remove(&call_id);
            return Err(Lost::Closed);
        }
        Ok(answer)
    }

    fn stream(&self) -> Result<StreamOf<P>, Lost> {
        let mut current = self.stream.lock();
        if let Some(stream) = &*current {
            match &stream.calls.lock().ended {
                None => return Ok(Arc::clone(stream)),
                Some((at, lost)) if at.elapsed() < Duration::from_millis(RECONNECT_PAUSE_MS) => {
                    return Err(lost.clone());
                }
                Some(_) => {}
            }
        }
        let (requests, queue) = mpsc::unbounded_channel();
        let calls = Arc::new(Mutex::new(Calls {
            waiting: HashMap::new(),
            progress: Instant::now(),
            ended: None,
        }));
        let opening = self.protocol.open(UnboundedReceiverStream::new(queue));
        let driven = Arc::clone(&calls);
        let timeout = self.progress_timeout;
        tokio::spawn(async move {
            let reason = tokio::select! {
                reason = receive::<P>(opening, &driven) => reason,
                () = stalled(&driven, timeout) => Lost::Stalled(timeout),
            };
            tracing::debug!(%reason, "a stream of chunks to a peer ended");
            driven.lock().end(&reason);
        });
        let stream = Arc::new(CallStream { requests, calls });
        *current = Some(Arc::clone(&stream));
        Ok(stream)
    }
}

/// Hands out answers until the stream ends; returns why it did.
async fn receive<P: Protocol>(
    opening: impl Future<Output = Result<Response<Streaming<P::Answer>>, Status>>,
    calls: &Mutex<Calls<P::Answer>>,
) -> Lost {
    let failed = |status: &Status| Lost::Failed(format!("{}: {}", status.code(), status.message()).into());
    let mut answers = match opening.await {
        Ok(response) => response.into_inner(),
        Err(status) => return failed(&status),
    };
    loop {
        match answers.message().await {
            Ok(Some(answer)) => calls.lock().answer(P::call_id(&answer), answer),
            Ok(None) => return Lost::Closed,
            Err(status) => return failed(&status),
        }
    }
}

/// Returns when calls have waited too long without any being answered.
async fn stalled<R>(calls: &Mutex<Calls<R>>, timeout: Duration) {
    loop {
        let deadline = {
            let calls = calls.lock();
            if calls.waiting.is_empty() {
                Instant::now() + timeout
            } else {
                calls.progress + timeout
            }
        };
        if deadline <= Instant::now() {
            return;
        }
        tokio::time::sleep_until(deadline).await;
    }
}
