//! The side that answers: a stream of requests, each answered when it is done.
//!
//! Contract:
//! - At most `at_once_max` requests are in work, and as many answers wait to be sent. Further requests stay in the
//!   stream's flow-control window, so that a client cannot fill memory.
//! - `answer` is called in the order of the requests; what it returns is polled where the stream is read, so it must
//!   leave work of more than some 100 µs to other threads. The answer gets the number of its request.
//! - A request that was let in is carried out, also when the client has gone. One that still waits for its admission
//!   then is dropped.
//!
//! One stream costs one task, one call an entry in the queue of answers. A task for each call would cost every call one
//! hand-over more. A panic in one call ends the stream; the client sends its calls again.

use std::pin::{Pin, pin};

use futures::stream::{self, FuturesUnordered};
use tokio::sync::mpsc;
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
    requests: impl Stream<Item = Result<Q, Status>> + Send + Unpin + 'static,
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
    tokio::spawn(async move {
        let mut admitted = pin!(admitted(requests, admission));
        let mut in_work = FuturesUnordered::new();
        let mut more = true;
        while more || !in_work.is_empty() {
            tokio::select! {
                biased;
                Some(()) = in_work.next() => {}
                // The client has gone: what waits for its admission need not be done.
                () = sender.closed(), if more => more = false,
                next = admitted.next(), if more && in_work.len() < at_once_max => match next {
                    Some((request, held)) => {
                        let (call_id, sender) = (request.call_id(), sender.clone());
                        let answer = answer(request);
                        in_work.push(async move {
                            let mut answer = answer.await;
                            answer.set_call_id(call_id);
                            // A client that went away asks again elsewhere; what it asked for is done all the same.
                            let _ = sender.send((answer, held)).await;
                        });
                    }
                    None => more = false,
                },
            }
        }
    });
    ReceiverStream::new(answers).map(|(answer, _held)| Ok(answer))
}

/// The requests, each as soon as it is let in, with what it holds. Ends where the stream of requests ends or breaks.
fn admitted<Q, L: Admission<Q>>(
    requests: impl Stream<Item = Result<Q, Status>> + Unpin,
    admission: L,
) -> impl Stream<Item = (Q, L::Held)> {
    stream::unfold((requests, admission), async |(mut requests, admission)| {
        let request = match requests.next().await? {
            Ok(request) => request,
            Err(status) => {
                tracing::debug!(%status, "a stream of requests broke");
                return None;
            }
        };
        let held = admission.admit(&request).await;
        Some(((request, held), (requests, admission)))
    })
}
