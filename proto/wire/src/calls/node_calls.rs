//! The calls of one kind to one node, over consecutive streams.
//!
//! A stream is opened for the first call. After a stream ends, the next call opens another, not before
//! [`NodeLimits::pause`] has passed. If calls are outstanding and no answer arrives for [`NodeLimits::silence_max`]
//! (including the time to open the stream), the stream is closed and its calls end as [`CallError::Timeout`]; they are
//! not sent over another stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

use super::Numbered;
use super::multiplexer::{CallError, Limits, Multiplexer, next_answer};

/// Bounds of [`NodeCalls`].
#[derive(Clone, Copy, Debug)]
pub struct NodeLimits {
    /// Most requests in the queue to the stream.
    pub queue_max: usize,
    /// Most streams over which one call is sent.
    pub streams_max: u32,
    /// Time without an answer, while calls are outstanding, after which the node is considered unreachable.
    pub silence_max: Duration,
    /// Time between the end of a stream and the start of the next, so that a node that is down is not called in a
    /// tight loop.
    pub pause: Duration,
}

/// The calls of one kind to one node. Dropping it ends the stream.
pub struct NodeCalls<Q, R, H = ()> {
    calls: Arc<Multiplexer<Q, R, H>>,
    driver: AbortHandle,
}

impl<Q, R, H> NodeCalls<Q, R, H>
where
    Q: Numbered + Clone + Send + 'static,
    R: Numbered + Send + 'static,
    H: Send + 'static,
{
    /// Creates the calls; `open` opens a stream for the given requests. Must be called in a tokio runtime, which runs
    /// the task that reads the answers.
    pub fn new<Open, Opening, Answers>(limits: NodeLimits, open: Open) -> NodeCalls<Q, R, H>
    where
        Open: Fn(ReceiverStream<Q>) -> Opening + Send + Sync + 'static,
        Opening: Future<Output = Result<Response<Answers>, Status>> + Send,
        Answers: Stream<Item = Result<R, Status>> + Send + Unpin,
    {
        let multiplexer = Limits {
            queue_max: limits.queue_max,
            streams_max: limits.streams_max,
            resend: None,
        };
        let calls = Arc::new(Multiplexer::new(multiplexer, ()));
        let task_calls = Arc::clone(&calls);
        let driver = tokio::spawn(async move {
            loop {
                task_calls.calls_outstanding().await;
                let opening = open(task_calls.attach());
                let error = tokio::select! {
                    error = deliver_answers(opening, &task_calls) => error,
                    () = wait_for_silence(&task_calls, limits.silence_max) => CallError::Timeout(limits.silence_max),
                };
                tracing::debug!(reason = %error, "a stream of calls to a node ended");
                match error {
                    CallError::Timeout(_) => task_calls.end_all(&error),
                    _ => drop(task_calls.detach(&error)),
                }
                tokio::time::sleep(limits.pause).await;
            }
        });
        NodeCalls {
            calls,
            driver: driver.abort_handle(),
        }
    }

    /// Sends `request` and returns the answer; `held` is kept until the call ends.
    ///
    /// # Errors
    /// A [`CallError`].
    pub async fn call(&self, request: Q, held: H) -> Result<R, CallError> {
        let answer = self.calls.submit(request, held).answer().await;
        answer.map(|(answer, _)| answer)
    }
}

impl<Q, R, H> Drop for NodeCalls<Q, R, H> {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Delivers answers until the stream ends; returns why it ended.
async fn deliver_answers<Q, R, H>(
    opening: impl Future<Output = Result<Response<impl Stream<Item = Result<R, Status>> + Unpin>, Status>>,
    calls: &Multiplexer<Q, R, H>,
) -> CallError
where
    Q: Numbered + Clone,
    R: Numbered,
{
    let mut answers = match opening.await {
        Ok(response) => response.into_inner(),
        Err(status) => return CallError::from(&status),
    };
    loop {
        match next_answer(&mut answers).await {
            Ok(answer) => calls.answer(answer.call_id(), answer),
            Err(error) => return error,
        }
    }
}

/// Returns when calls have been outstanding for `max` without an answer.
async fn wait_for_silence<Q: Numbered + Clone, R, H>(calls: &Multiplexer<Q, R, H>, max: Duration) {
    loop {
        let deadline = calls.silent_since().unwrap_or_else(Instant::now) + max;
        if deadline <= Instant::now() {
            return;
        }
        tokio::time::sleep_until(deadline.into()).await;
    }
}

#[cfg(test)]
mod tests;
