//! The server side: a stream of requests, each answered when it is done.
//!
//! Contract:
//! - At most `at_once_max` requests are processed concurrently, and at most that number of answers wait to be sent.
//!   Further requests stay in the flow-control window of the stream, so a client cannot fill memory.
//! - `answer` is called in the order of the requests; the future that it returns runs in a separate task. The answer
//!   gets the call id of its request.
//! - An admitted request is processed even if the client disconnects. A request that waits for admission at that time
//!   is dropped.
//!
//! A call costs one task and one entry in the queue of answers.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::Numbered;

/// The type of the streams of answers that the services return.
pub type AnswerStream<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

/// Admission control: decides when a request may be processed.
pub trait Admission<Q>: Send + Sync + 'static {
    /// Held from the admission of a request until its answer has been sent.
    type Held: Send + 'static;

    /// Waits until `request` may be processed.
    fn admit(&self, request: &Q) -> impl Future<Output = Self::Held> + Send;
}

/// Admits every request at once.
impl<Q: Sync> Admission<Q> for () {
    type Held = ();

    async fn admit(&self, _request: &Q) {}
}

/// Answers each request of a stream with `answer`, at most `at_once_max` at a time. The module documentation has the
/// contract.
pub fn answer_calls<Q, A, F, Fut>(
    mut requests: impl Stream<Item = Result<Q, Status>> + Send + Unpin + 'static,
    at_once_max: usize,
    admission: impl Admission<Q>,
    answer: F,
) -> impl Stream<Item = Result<A, Status>> + Send + Unpin + 'static
where
    Q: Numbered + Send + Sync + 'static,
    A: Numbered + Send + 'static,
    F: Fn(Q) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let (sender, answers) = mpsc::channel(at_once_max);
    let slots = Arc::new(Semaphore::new(at_once_max));
    tokio::spawn(async move {
        // The semaphore is never closed.
        while let Ok(slot) = slots.clone().acquire_owned().await {
            let request = match requests.next().await {
                Some(Ok(request)) => request,
                Some(Err(status)) => {
                    tracing::debug!(%status, "a stream of requests broke");
                    break;
                }
                None => break,
            };
            let held = tokio::select! {
                biased;
                held = admission.admit(&request) => held,
                // The client has disconnected, so the request need not be processed.
                () = sender.closed() => break,
            };
            let call_id = request.call_id();
            let sender = sender.clone();
            let answer = answer(request);
            tokio::spawn(async move {
                let mut answer = answer.await;
                answer.set_call_id(call_id);
                // Fails if the client disconnected; it sends the call to another node.
                let _ = sender.send((answer, held)).await;
                drop(slot);
            });
        }
    });
    ReceiverStream::new(answers).map(|(answer, _held)| Ok(answer))
}
