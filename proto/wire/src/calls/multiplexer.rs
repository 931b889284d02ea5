//! The client side: many concurrent calls over one bidirectional stream, answered in any order.
//!
//! Contract:
//! - **Answers.** A call ends once: with its answer or with a [`CallError`].
//! - **Order.** Calls enter each stream in the order of submission. Answers come in any order.
//! - **End of a stream.** [`Multiplexer::detach`] ends the calls that were sent over [`Limits::streams_max`] streams.
//!   The others are sent over the next stream. A request may therefore arrive several times, with [`Limits::resend`]
//!   also on one stream, so it must be idempotent.
//! - **Cancellation.** Dropping a [`PendingCall`] withdraws the call: it is not sent again. If it was sent on the
//!   current stream, what it holds (`H`, for example a permit) is released with its answer or with the end of the
//!   stream, because until then its bytes may be in a queue.
//! - **Backpressure.** [`Multiplexer::submit`] never waits. The callers bound the number of calls. The queue to the
//!   stream has a separate bound; a call that does not fit is sent by [`Multiplexer::resend_due`], or ends as
//!   [`CallError::QueueFull`] if nothing is resent.
//!
//! A call costs one queue entry and one oneshot channel, and no task. The lock is never held across an await.

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
pub enum CallError {
    /// The connection could not be made, or it broke; with the reason.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The node ended the stream without an error.
    #[error("the node ended the stream")]
    Ended,
    /// No call was answered in this time although some were outstanding.
    #[error("no answer in {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The queue to the stream is full.
    #[error("the queue of requests to the node is full")]
    QueueFull,
    /// The multiplexer is closed.
    #[error("the connection is closed")]
    Closed,
}

impl From<&Status> for CallError {
    fn from(status: &Status) -> CallError {
        CallError::Failed(describe(status).into())
    }
}

/// Returns the message of `status` with the messages of its sources, which name the cause of a "transport error".
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

/// Returns the next answer of a stream.
///
/// # Errors
/// The error with which the stream ended.
pub async fn next_answer<R>(
    answers: &mut (impl Stream<Item = Result<R, Status>> + Unpin),
) -> Result<R, CallError> {
    match answers.next().await {
        Some(answer) => answer.map_err(|status| CallError::from(&status)),
        None => Err(CallError::Ended),
    }
}

/// When a call without an answer is sent again on the same stream.
#[derive(Clone, Copy, Debug)]
pub struct Resend {
    /// Time after which a call is first sent again. It doubles with each sending on one stream.
    pub after: Duration,
    /// Upper bound of that time.
    pub after_max: Duration,
}

/// Bounds of a [`Multiplexer`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most requests in the queue to the stream.
    pub queue_max: usize,
    /// Most streams over which one call is sent.
    pub streams_max: u32,
    /// When a call is sent again on one stream; `None` means never.
    pub resend: Option<Resend>,
}

/// Completes requests of type `Q` just before they are sent. `H` is the type of what calls hold.
pub trait OnSend<Q, H>: Send {
    /// Called when a new stream begins; later requests are sent over it.
    fn begin_stream(&mut self) {}

    /// Called before `request` is sent; `is_first` is true for the first time on this stream.
    fn prepare(&mut self, request: &mut Q, held: &mut H, is_first: bool) {
        let _ = (request, held, is_first);
    }
}

/// Sends requests unchanged.
impl<Q, H> OnSend<Q, H> for () {}

/// Concurrent calls with requests `Q` and answers `A`. Each call holds an `H` while it is outstanding; `S` completes
/// requests just before they are sent. The module documentation has the contract.
pub struct Multiplexer<Q, A, H = (), S = ()> {
    limits: Limits,
    state: Mutex<State<Q, A, H, S>>,
    /// Notified when a call is submitted while there is no stream.
    stream_needed: Notify,
}

struct State<Q, A, H, S> {
    next_call_id: u64,
    /// By call id, which is the order of submission.
    outstanding: BTreeMap<u64, Call<Q, A, H>>,
    /// Queue to the current stream.
    outbound: Option<mpsc::Sender<Q>>,
    /// Time of the last answer on the current stream; before the first one, when the stream began.
    last_answer: Instant,
    on_send: S,
    closed: bool,
}

struct Call<Q, A, H> {
    /// `None` after the call was withdrawn.
    request: Option<Q>,
    answer: oneshot::Sender<Result<(A, u32), CallError>>,
    held: H,
    submitted_at: Instant,
    /// Start of the wait on the current stream.
    waiting_since: Instant,
    last_sent_at: Instant,
    resend_after: Duration,
    sends: u32,
    streams: u32,
    is_on_stream: bool,
}

impl<Q: Clone, A, H> Call<Q, A, H> {
    fn begin_stream(&mut self, now: Instant, resend_after: Duration) {
        self.waiting_since = now;
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
        let slot = outbound.try_reserve()?;
        on_send.prepare(request, &mut self.held, !self.is_on_stream);
        slot.send(request.clone());
        self.sends = self.sends.saturating_add(1);
        if !self.is_on_stream {
            self.is_on_stream = true;
            self.streams = self.streams.saturating_add(1);
        }
        Ok(())
    }
}

/// A call that was submitted. Dropping it withdraws the call.
pub struct PendingCall<'a, Q, A, H, S> {
    multiplexer: &'a Multiplexer<Q, A, H, S>,
    call_id: u64,
    answer: oneshot::Receiver<Result<(A, u32), CallError>>,
    is_ended: bool,
}

impl<Q, A, H, S> PendingCall<'_, Q, A, H, S> {
    /// Waits for the answer; returns it with the number of times the request was sent.
    ///
    /// # Errors
    /// A [`CallError`]. The request may have arrived all the same, except after [`CallError::QueueFull`].
    pub async fn answer(mut self) -> Result<(A, u32), CallError> {
        let answer = (&mut self.answer).await;
        self.is_ended = true;
        answer.unwrap_or(Err(CallError::Closed))
    }
}

impl<Q, A, H, S> Drop for PendingCall<'_, Q, A, H, S> {
    fn drop(&mut self) {
        if !self.is_ended {
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
    /// Creates a multiplexer without a stream.
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
            stream_needed: Notify::new(),
        }
    }

    /// Submits `request`: it is sent at once if there is a stream, otherwise over the next one. `held` is kept until
    /// the call ends.
    pub fn submit(&self, mut request: Q, held: H) -> PendingCall<'_, Q, A, H, S> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state.lock();
        let call_id = state.next_call_id;
        state.next_call_id += 1;
        let waiting = PendingCall {
            multiplexer: self,
            call_id,
            answer: receiver,
            is_ended: false,
        };
        if state.closed {
            // `held` is dropped outside the lock. Dropping the sender ends the call.
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
            waiting_since: now,
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
                self.stream_needed.notify_one();
                Ok(())
            }
        };
        if self.has_no_room(&sent) {
            drop(state);
            end([call], &CallError::QueueFull);
        } else {
            state.outstanding.insert(call_id, call);
        }
        waiting
    }

    /// Returns as soon as a call is outstanding, so that a stream is needed.
    pub async fn calls_outstanding(&self) {
        while self.state.lock().outstanding.is_empty() {
            self.stream_needed.notified().await;
        }
    }

    /// Begins a stream and returns its requests: all outstanding calls in the order of submission, then later calls.
    /// It ends with [`Multiplexer::detach`].
    pub fn attach(&self) -> ReceiverStream<Q> {
        let (outbound, requests) = mpsc::channel(self.limits.queue_max);
        let mut state = self.state.lock();
        let now = Instant::now();
        let State {
            outstanding, on_send, ..
        } = &mut *state;
        on_send.begin_stream();
        let rejected: Vec<_> = outstanding
            .extract_if(.., |_, call| {
                call.begin_stream(now, self.resend_after());
                let sent = call.send(&outbound, on_send, now);
                self.has_no_room(&sent)
            })
            .collect();
        state.last_answer = now;
        state.outbound = Some(outbound).filter(|_| !state.closed);
        drop(state);
        end(rejected.into_iter().map(|(_, call)| call), &CallError::QueueFull);
        ReceiverStream::new(requests)
    }

    /// Notes that the node accepted the stream: silence is measured from now.
    pub fn opened(&self) {
        self.state.lock().last_answer = Instant::now();
    }

    /// Ends the stream. Calls that reached [`Limits::streams_max`] end as `error`. Returns when the oldest remaining
    /// call was submitted.
    pub fn detach(&self, error: &CallError) -> Option<Instant> {
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
        end(over.into_iter().map(|(_, call)| call), error);
        waiting_since
    }

    /// Ends the stream and all calls as `error`.
    pub fn end_all(&self, error: &CallError) {
        let mut state = self.state.lock();
        state.outbound = None;
        let over = std::mem::take(&mut state.outstanding);
        drop(state);
        end(over.into_values(), error);
    }

    /// Ends all calls, including later ones, as [`CallError::Closed`]; nothing more is sent.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.end_all(&CallError::Closed);
    }

    /// Ends a call with its answer. An unknown `call_id` is ignored.
    pub fn answer(&self, call_id: u64, answer: A) {
        let mut state = self.state.lock();
        state.last_answer = Instant::now();
        let call = state.outstanding.remove(&call_id);
        drop(state);
        if let Some(call) = call {
            // Fails if the caller dropped the call, which is no error.
            let _ = call.answer.send(Ok((answer, call.sends)));
        }
    }

    /// Notes that an answer to a call arrived, without ending the call. Returns a copy of what the call holds, if it
    /// is outstanding.
    pub fn note_answer(&self, call_id: u64) -> Option<H>
    where
        H: Clone,
    {
        let mut state = self.state.lock();
        state.last_answer = Instant::now();
        state.outstanding.get(&call_id).map(|call| call.held.clone())
    }

    /// Resends the calls whose resend time on the current stream has passed.
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
                // A call that does not fit into the queue is sent by a later invocation.
                let _ = call.send(outbound, on_send, now);
                call.resend_after = (2 * call.resend_after).min(resend.after_max);
            }
        }
    }

    /// Start of the current silence: calls are outstanding and no answer has arrived since. `None` if no call is
    /// outstanding.
    pub fn silent_since(&self) -> Option<Instant> {
        let state = self.state.lock();
        let (_, oldest) = state.outstanding.first_key_value()?;
        Some(oldest.waiting_since.max(state.last_answer))
    }

    fn resend_after(&self) -> Duration {
        self.limits.resend.map_or(Duration::MAX, |resend| resend.after)
    }

    /// Whether a call must end because the queue is full. If the reader of the queue is gone, the call waits: the end
    /// of the stream is about to be noticed.
    fn has_no_room(&self, sent: &Result<(), TrySendError<()>>) -> bool {
        matches!(sent, Err(TrySendError::Full(()))) && self.limits.resend.is_none()
    }
}

fn end<Q, A, H>(calls: impl IntoIterator<Item = Call<Q, A, H>>, error: &CallError) {
    for call in calls {
        // The caller may have gone.
        let _ = call.answer.send(Err(error.clone()));
    }
}

#[cfg(test)]
mod tests;
