//! A stream of requests, each answered in any order: how many are worked on at once, and what they carry meanwhile.
//!
//! Knows nothing of what requests ask for.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::debug;

use super::carried::{CarriedBytes, StreamShare};

/// What every stream of answers is.
pub type AnswerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Answers each request of a stream by `answer`, at most `at_once_max` at a time, in the order they are done.
pub fn answer_stream<Q, A, F, Fut>(requests: Streaming<Q>, at_once_max: usize, answer: F) -> AnswerStream<A>
where
    Q: Send + 'static,
    A: Send + 'static,
    F: Fn(Q) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    // Nothing is weighed, so nothing is waited for.
    answer_weighed(
        requests,
        at_once_max,
        CarriedBytes::bounded(0).stream(),
        |_| 0,
        answer,
    )
}

/// As [`answer_stream`], for requests that carry chunks or ask for them: `bytes` tells how many. They count until the
/// answer has been sent.
pub fn answer_weighed<Q, A, F, Fut>(
    mut requests: Streaming<Q>,
    at_once_max: usize,
    share: StreamShare,
    bytes: fn(&Q) -> u32,
    answer: F,
) -> AnswerStream<A>
where
    Q: Send + 'static,
    A: Send + 'static,
    F: Fn(Q) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = A> + Send + 'static,
{
    let (tell, answers) = mpsc::channel(at_once_max);
    let places = Arc::new(Semaphore::new(at_once_max));
    tokio::spawn(async move {
        // The semaphore is never closed.
        while let Ok(place) = places.clone().acquire_owned().await {
            let request = match requests.next().await {
                Some(Ok(request)) => request,
                Some(Err(status)) => {
                    debug!(%status, "a stream of requests broke");
                    break;
                }
                None => break,
            };
            let carried = tokio::select! {
                biased;
                carried = share.carry(bytes(&request)) => carried,
                // Nobody wants to know: what this one asks for need not be done.
                () = tell.closed() => break,
            };
            let tell = tell.clone();
            let answer = answer(request);
            tokio::spawn(async move {
                let answer = answer.await;
                // A client that went away asks again elsewhere; what it asked for is done all the same.
                let _ = tell.send((answer, carried)).await;
                drop(place);
            });
        }
    });
    Box::pin(ReceiverStream::new(answers).map(|(answer, _carried)| Ok(answer)))
}
