//! The calls of one kind to one node, over one stream after another.
//!
//! Owes: a stream is opened with the first call, and after the end of one with the next call, not before
//! [`NodeLimits::pause`] has passed. A stream on which calls wait and no answer comes for
//! [`NodeLimits::silence_max`], opening included, is given up, and its calls end as [`Lost::Silent`]: they are not
//! sent over another one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};

use super::Numbered;
use super::multiplexer::{Limits, Lost, Multiplexer, next_answer};

/// Bounds of [`NodeCalls`].
#[derive(Clone, Copy, Debug)]
pub struct NodeLimits {
    /// Requests in the queue to the stream.
    pub queue_max: usize,
    /// Streams over which one call is sent.
    pub streams_max: u32,
    /// A node that answers nothing for this time while calls wait is taken to be lost.
    pub silence_max: Duration,
    /// Between the end of a stream and the next: a node that is down is not asked in a tight loop.
    pub pause: Duration,
}

/// See the module. Dropping it ends the stream.
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
    /// Calls over the streams that `open` opens for their requests. Needs a tokio runtime, which then carries the
    /// task that reads the answers.
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
        let driven = Arc::clone(&calls);
        let driver = tokio::spawn(async move {
            loop {
                driven.wanted().await;
                let opening = open(driven.attach());
                let lost = tokio::select! {
                    lost = hand_out(opening, &driven) => lost,
                    () = silence(&driven, limits.silence_max) => Lost::Silent(limits.silence_max),
                };
                tracing::debug!(reason = %lost, "a stream of calls to a node ended");
                match lost {
                    Lost::Silent(_) => driven.end_all(&lost),
                    _ => drop(driven.detach(&lost)),
                }
                tokio::time::sleep(limits.pause).await;
            }
        });
        NodeCalls {
            calls,
            driver: driver.abort_handle(),
        }
    }

    /// Asks the node; the call has `held` until it is over.
    ///
    /// # Errors
    /// Why there is no answer.
    pub async fn call(&self, request: Q, held: H) -> Result<R, Lost> {
        let answer = self.calls.submit(request, held).answer().await;
        answer.map(|(answer, _)| answer)
    }
}

impl<Q, R, H> Drop for NodeCalls<Q, R, H> {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Hands out answers until the stream ends; returns why it did.
async fn hand_out<Q, R, H>(
    opening: impl Future<Output = Result<Response<impl Stream<Item = Result<R, Status>> + Unpin>, Status>>,
    calls: &Multiplexer<Q, R, H>,
) -> Lost
where
    Q: Numbered + Clone,
    R: Numbered,
{
    let mut answers = match opening.await {
        Ok(response) => response.into_inner(),
        Err(status) => return Lost::from(&status),
    };
    loop {
        match next_answer(&mut answers).await {
            Ok(answer) => calls.answer(answer.call_id(), answer),
            Err(lost) => return lost,
        }
    }
}

/// Returns when calls have waited for `max` without any answer.
async fn silence<Q: Numbered + Clone, R, H>(calls: &Multiplexer<Q, R, H>, max: Duration) {
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
