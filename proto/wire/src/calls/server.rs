//! The side that answers: a stream of requests, each answered when it is done.
//!
//! Contract:
//! - At most `at_once_max` requests are in work, and as many answers wait to be sent. Further requests stay in the
//!   stream's flow-control window, so that a client cannot fill memory.
//! - `answer` is called in the order of the requests; what it returns runs as a task of its own. The answer gets the
//!   number of its request.
//! - A request that was let in is carried out, also when the client has gone. One that still waits for its admission
//!   then is dropped.
//!
//! One call costs one task and one entry in the queue of answers.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::Numbered;

/// What the services name a stream of answers.
pub type AnswerStream<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

/// What lets a request in.
pub trait Admission<Q>: Send + Sync + 'static {
    /// What a request holds until its answer has been sent.
    type Held: Send + 'static;

    /// Waits until `request` may be worked on.
    fn admit(&self, request: &Q) -> impl Future<Output = Self::Held> + Send;
}

/// Every request is let in.
impl<Q: Sync> Admission<Q> for () {
    type Held = ();

    async fn admit(&self, _request: &Q) {}
}

/// Answers each request of a stream by `answer`, at most `at_once_max` at a time.
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
    let places = Arc::new(Semaphore::new(at_once_max));
    tokio::spawn(async move {
        // The semaphore is never closed.
        while let Ok(place) = places.clone().acquire_owned().await {
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
                // The client has gone: what this one asks for need not be done.
                () = sender.closed() => break,
            };
            let call_id = request.call_id();
            let sender = sender.clone();
            let answer = answer(request);
            tokio::spawn(async move {
                let mut answer = answer.await;
                answer.set_call_id(call_id);
                // A client that went away asks again elsewhere; what it asked for is done all the same.
                let _ = sender.send((answer, held)).await;
                drop(place);
            });
        }
    });
    ReceiverStream::new(answers).map(|(answer, _held)| Ok(answer))
}
