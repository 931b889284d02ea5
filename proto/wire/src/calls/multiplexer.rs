//! The side that asks: many calls at once over one bidirectional stream, answered in any order.
//!
//! Contract:
//! - **Answers.** A call ends once: with its answer, or with the reason why there is none ([`Lost`]).
//! - **Order.** Calls enter a stream in the order in which they were submitted, on the first stream and on every later
//!   one. Answers come in any order.
//! - **A stream that ends.** [`Multiplexer::detach`] ends the calls that were sent over [`Limits::streams_max`]
//!   streams. The others are sent over the next stream. So a request may arrive several times; with
//!   [`Limits::resend`] also on one stream. It must be one that does no harm then.
//! - **Cancellation.** A dropped [`Waiting`] withdraws its call: it is not sent again. If it is on a stream, what it
//!   holds (`H`, for example a permit) is given back with its answer or with the end of the stream, because until then
//!   its bytes may be in a queue.
//! - **Backpressure.** [`Multiplexer::submit`] never waits. The callers bound the number of calls. The queue to the
//!   stream has a bound of its own; a call that does not fit is sent by [`Multiplexer::resend_due`], or ends as
//!   [`Lost::QueueFull`] where nothing is sent again.
//!
//! One call costs one entry in the queue to the stream and one oneshot channel; no task. The lock is never held across
//! an await.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::Numbered;

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// There is no connection, or it broke.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The node ended the stream.
    #[error("the node ended the stream")]
    Ended,
    /// Calls waited for this time and none was answered.
    #[error("no answer in {} ms", .0.as_millis())]
    Silent(Duration),
    /// The queue to the stream has no room.
    #[error("too many requests wait for the connection")]
    QueueFull,
    /// The multiplexer is closed.
    #[error("the connection is closed")]
    Closed,
}

impl From<&Status> for Lost {
    fn from(status: &Status) -> Lost {
        Lost::Failed(describe(status).into())
    }
}

/// What a status says, with the reason beneath it: "transport error" alone does not help.
pub fn describe(status: &Status) -> String {
    let mut text = status.message().to_string();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text = format!("{text}: {reason}");
        }
        source = error.source();
    }
    text
}

/// The next answer of a stream.
///
/// # Errors
/// Why the stream ended.
pub async fn next_answer<R>(
    answers: &mut (impl Stream<Item = Result<R, Status>> + Unpin),
) -> Result<R, Lost> {
    match answers.next().await {
        Some(answer) => answer.map_err(|status| Lost::from(&status)),
        None => Err(Lost::Ended),
    }
}

/// When a call is sent again on the same stream.
#[derive(Clone, Copy, Debug)]
pub struct Resend {
    /// After this time without an answer. It doubles with each sending on one stream.
    pub after: Duration,
    /// Until it is this long.
    pub after_max: Duration,
}

/// Bounds of a [`Multiplexer`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests in the queue to the stream.
    pub queue_max: usize,
    /// Streams over which one call is sent.
    pub streams_max: u32,
    /// `None`: a call is sent once on each stream.
    pub resend: Option<Resend>,
}

/// Completes requests of type `Q` when they are sent; `H` is what their calls hold.
pub trait OnSend<Q, H>: Send {
    /// What comes next is sent over a new stream.
    fn begin_stream(&mut self) {}

    /// `request` is about to be sent; `is_first`: for the first time on this stream.
    fn prepare(&mut self, request: &mut Q, held: &mut H, is_first: bool) {
        let _ = (request, held, is_first);
    }
}

/// Requests are sent as they are.
impl<Q, H> OnSend<Q, H> for () {}

/// Calls with requests `Q` and answers `A`; see the module. Each holds an `H` as long as it is outstanding; `S`
/// completes requests when they are sent.
pub struct Multiplexer<Q, A, H = (), S = ()> {
    limits: Limits,
    state: Mutex<State<Q, A, H, S>>,
    /// Calls are outstanding and there is no stream.
    wanted: Notify,
}

struct State<Q, A, H, S> {
    next_call_id: u64,
    /// In the order of submission.
    outstanding: BTreeMap<u64, Call<Q, A, H>>,
    /// Into the current stream.
    outbound: Option<mpsc::Sender<Q>>,
    /// On the current stream; at first when it began.
    last_answer: Instant,
    on_send: S,
    closed: bool,
}

struct Call<Q, A, H> {
    /// `None`: withdrawn.
    request: Option<Q>,
    answer: oneshot::Sender<Result<(A, u32), Lost>>,
    held: H,
    submitted_at: Instant,
    /// Since when it waits on the current stream.
    waits_since: Instant,
    last_sent_at: Instant,
    resend_after: Duration,
    sends: u32,
    streams: u32,
    is_on_stream: bool,
}

impl<Q: Clone, A, H> Call<Q, A, H> {
    fn begin_stream(&mut self, now: Instant, resend_after: Duration) {
        self.waits_since = now;
        self.resend_after = resend_after;
        self.is_on_stream = false;
    }

    fn send(
        &mut self,
        outbound: &mpsc::Sender<Q>,
        on_send: &mut impl OnSend<Q, H>,
        now: Instant,
    ) -> Result<(), TrySendError<()>> {
        self.last_sent_at = now;
        let Some(request) = &mut self.request else {
            return Ok(());
        };
        let place = outbound.try_reserve()?;
        on_send.prepare(request, &mut self.held, !self.is_on_stream);
        place.send(request.clone());
        self.sends = self.sends.saturating_add(1);
        if !self.is_on_stream {
            self.is_on_stream = true;
            self.streams = self.streams.saturating_add(1);
        }
        Ok(())
    }
}

/// A submitted call. Dropping it withdraws the call.
pub struct Waiting<'a, Q, A, H, S> {
    multiplexer: &'a Multiplexer<Q, A, H, S>,
    call_id: u64,
    answer: oneshot::Receiver<Result<(A, u32), Lost>>,
    is_over: bool,
}

impl<Q, A, H, S> Waiting<'_, Q, A, H, S> {
    /// The answer, and how often the request was sent for it.
    ///
    /// # Errors
    /// Why there is none. The request may have arrived all the same, except with [`Lost::QueueFull`].
    pub async fn answer(mut self) -> Result<(A, u32), Lost> {
        let answer = (&mut self.answer).await;
        self.is_over = true;
        answer.unwrap_or(Err(Lost::Closed))
    }
}

impl<Q, A, H, S> Drop for Waiting<'_, Q, A, H, S> {
    fn drop(&mut self) {
        if !self.is_over {
            self.multiplexer.withdraw(self.call_id);
        }
    }
}

impl<Q, A, H, S> Multiplexer<Q, A, H, S> {
    fn withdraw(&self, call_id: u64) {
        let mut state = self.state.lock();
        let withdrawn = match state.outstanding.get_mut(&call_id) {
            Some(call) if call.is_on_stream => (call.request.take(), None),
            Some(_) => (None, state.outstanding.remove(&call_id)),
            None => (None, None),
        };
        drop(state);
        drop(withdrawn);
    }
}

impl<Q, A, H, S> Multiplexer<Q, A, H, S>
where
    Q: Numbered + Clone,
    S: OnSend<Q, H>,
{
    /// Without a stream.
    pub fn new(limits: Limits, on_send: S) -> Multiplexer<Q, A, H, S> {
        Multiplexer {
            limits,
            state: Mutex::new(State {
                next_call_id: 1,
                outstanding: BTreeMap::new(),
                outbound: None,
                last_answer: Instant::now(),
                on_send,
                closed: false,
            }),
            wanted: Notify::new(),
        }
    }

    /// Sends `request` at once if there is a stream, or else over the next one.
    pub fn submit(&self, mut request: Q, held: H) -> Waiting<'_, Q, A, H, S> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state.lock();
        let call_id = state.next_call_id;
        state.next_call_id += 1;
        let waiting = Waiting {
            multiplexer: self,
            call_id,
            answer: receiver,
            is_over: false,
        };
        if state.closed {
            // Nothing is released under the lock, and dropping the sender ends the call.
            drop(state);
            return waiting;
        }
        request.set_call_id(call_id);
        let now = Instant::now();
        let mut call = Call {
            request: Some(request),
            answer: sender,
            held,
            submitted_at: now,
            waits_since: now,
            last_sent_at: now,
            resend_after: self.resend_after(),
            sends: 0,
            streams: 0,
            is_on_stream: false,
        };
        let State {
            outbound, on_send, ..
        } = &mut *state;
        let sent = match outbound {
            Some(outbound) => call.send(outbound, on_send, now),
            None => {
                self.wanted.notify_one();
                Ok(())
            }
        };
        if self.has_no_room(&sent) {
            drop(state);
            end([call], &Lost::QueueFull);
        } else {
            state.outstanding.insert(call_id, call);
        }
        waiting
    }

    /// Returns when calls are outstanding: a stream is to be attached then.
    pub async fn wanted(&self) {
        while self.state.lock().outstanding.is_empty() {
            self.wanted.notified().await;
        }
    }

    /// A new stream: everything outstanding is in it, in the order of submission, and later calls follow. Ends when it
    /// is detached.
    pub fn attach(&self) -> ReceiverStream<Q> {
        let (outbound, requests) = mpsc::channel(self.limits.queue_max);
        let mut state = self.state.lock();
        let now = Instant::now();
        let State {
            outstanding, on_send, ..
        } = &mut *state;
        on_send.begin_stream();
        let surplus: Vec<_> = outstanding
            .extract_if(.., |_, call| {
                call.begin_stream(now, self.resend_after());
                let sent = call.send(&outbound, on_send, now);
                self.has_no_room(&sent)
            })
            .collect();
        state.last_answer = now;
        state.outbound = Some(outbound).filter(|_| !state.closed);
        drop(state);
        end(surplus.into_iter().map(|(_, call)| call), &Lost::QueueFull);
        ReceiverStream::new(requests)
    }

    /// The node has accepted the stream: silence counts from now.
    pub fn opened(&self) {
        self.state.lock().last_answer = Instant::now();
    }

    /// The stream is over: calls that may not be sent over another one end as `lost`. Answers since when the oldest of
    /// the others waits.
    pub fn detach(&self, lost: &Lost) -> Option<Instant> {
        let mut state = self.state.lock();
        state.outbound = None;
        let is_over =
            |call: &Call<Q, A, H>| call.request.is_none() || call.streams >= self.limits.streams_max;
        let over: Vec<_> = state
            .outstanding
            .extract_if(.., |_, call| {
                call.is_on_stream = false;
                is_over(call)
            })
            .collect();
        let waiting_since = state
            .outstanding
            .first_key_value()
            .map(|(_, call)| call.submitted_at);
        drop(state);
        end(over.into_iter().map(|(_, call)| call), lost);
        waiting_since
    }

    /// The stream is over, and every call ends as `lost`.
    pub fn end_all(&self, lost: &Lost) {
        let mut state = self.state.lock();
        state.outbound = None;
        let over = std::mem::take(&mut state.outstanding);
        drop(state);
        end(over.into_values(), lost);
    }

    /// Nothing is sent from now on: all calls, also later ones, end as [`Lost::Closed`].
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.end_all(&Lost::Closed);
    }

    /// Ends a call with its answer. One that is not outstanding is passed over.
    pub fn answer(&self, call_id: u64, answer: A) {
        let mut state = self.state.lock();
        state.last_answer = Instant::now();
        let call = state.outstanding.remove(&call_id);
        drop(state);
        if let Some(call) = call {
            // The caller may have gone.
            let _ = call.answer.send(Ok((answer, call.sends)));
        }
    }

    /// An answer to a call has come that may not end it: what the call holds, if it is outstanding.
    pub fn heard(&self, call_id: u64) -> Option<H>
    where
        H: Clone,
    {
        let mut state = self.state.lock();
        state.last_answer = Instant::now();
        state.outstanding.get(&call_id).map(|call| call.held.clone())
    }

    /// Sends again what has waited long enough for its answer on the current stream.
    pub fn resend_due(&self) {
        let Some(resend) = self.limits.resend else {
            return;
        };
        let mut state = self.state.lock();
        let now = Instant::now();
        let State {
            outstanding,
            outbound: Some(outbound),
            on_send,
            ..
        } = &mut *state
        else {
            return;
        };
        for call in outstanding.values_mut() {
            if now.duration_since(call.last_sent_at) >= call.resend_after {
                // What does not fit now comes with a later turn.
                let _ = call.send(outbound, on_send, now);
                call.resend_after = (2 * call.resend_after).min(resend.after_max);
            }
        }
    }

    /// Since when calls wait without any answer on the current stream; `None`: none waits.
    pub fn silent_since(&self) -> Option<Instant> {
        let state = self.state.lock();
        let (_, oldest) = state.outstanding.first_key_value()?;
        Some(oldest.waits_since.max(state.last_answer))
    }

    fn resend_after(&self) -> Duration {
        self.limits.resend.map_or(Duration::MAX, |resend| resend.after)
    }

    /// Whether a call is to end because the queue is full. One that meets a queue whose reader is gone waits: the end
    /// of the stream is about to be noticed.
    fn has_no_room(&self, sent: &Result<(), TrySendError<()>>) -> bool {
        matches!(sent, Err(TrySendError::Full(()))) && self.limits.resend.is_none()
    }
}

fn end<Q, A, H>(calls: impl IntoIterator<Item = Call<Q, A, H>>, lost: &Lost) {
    for call in calls {
        // The caller may have gone.
        let _ = call.answer.send(Err(lost.clone()));
    }
}

#[cfg(test)]
mod tests;
