//! The server side: a stream of requests, each answered when it is done.
//!
//! Contract:
//! - At most `at_once_max` requests are processed concurrently, and at most that number of answers wait to be sent.
//!   Further requests stay in the flow-control window of the stream, so a client cannot fill memory.
//! - `answer` is called in the order of the requests; the future that it returns is polled by the task that reads the
//!   stream, so it moves work of more than some 100 µs to other threads. The answer gets the call id of its request.
//! - An admitted request is processed even if the client disconnects. A request that waits for admission at that time
//!   is dropped.
//!
//! A stream costs one task, a call one entry in the queue of answers: a task for each call would add a hand-over to
//! every call. A panic in a call ends that call, without an answer.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;

use futures::FutureExt as _;
use futures::future::OptionFuture;
use futures::stream::{self, FuturesUnordered};
use tokio::sync::mpsc;
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
        // None after the end of the requests.
        let mut admitted = Some(Box::pin(admitted(requests, admission)));
        let mut in_work = FuturesUnordered::new();
        while admitted.is_some() || !in_work.is_empty() {
            let more = admitted.is_some();
            let next = OptionFuture::from(admitted.as_mut().map(|admitted| admitted.next()));
            tokio::select! {
                biased;
                Some(()) = in_work.next() => {}
                // The client has disconnected, so a request that waits for admission need not be processed.
                () = sender.closed(), if more => admitted = None,
                Some(next) = next, if in_work.len() < at_once_max => match next {
                    Some((request, held)) => {
                        let (call_id, sender) = (request.call_id(), sender.clone());
                        // After a panic the future is dropped without another poll. The panic hook has logged it.
                        let answer = AssertUnwindSafe(answer(request)).catch_unwind();
                        in_work.push(async move {
                            let Ok(mut answer) = answer.await else {
                                return;
                            };
                            answer.set_call_id(call_id);
                            // Fails if the client disconnected; it sends the call to another node.
                            let _ = sender.send((answer, held)).await;
                        });
                    }
                    None => admitted = None,
                },
            }
        }
    });
    ReceiverStream::new(answers).map(|(answer, _held)| Ok(answer))
}

/// Yields each request after its admission, with what the admission holds. Ends where `requests` ends or fails.
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
