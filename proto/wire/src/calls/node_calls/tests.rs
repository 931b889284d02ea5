//! Client and server side together, without a network: the requests are passed to [`answer_calls`].

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Semaphore, mpsc};
use tokio_stream::StreamExt as _;

use super::*;
use crate::calls::{Admission, AnswerStream, answer_calls};
use crate::messages::{GetChunkRequest, GetChunkResponse};

const LIMITS: NodeLimits = NodeLimits {
    queue_max: 64,
    streams_max: 2,
    silence_max: Duration::from_millis(200),
    pause: Duration::from_millis(10),
};

type Calls = NodeCalls<GetChunkRequest, GetChunkResponse>;
type Answers = AnswerStream<GetChunkResponse>;

fn request(offset: u32) -> GetChunkRequest {
    GetChunkRequest {
        offset,
        ..GetChunkRequest::default()
    }
}

fn response(offset: u32) -> GetChunkResponse {
    GetChunkResponse {
        offset,
        ..GetChunkResponse::default()
    }
}

/// Calls to a node whose stream number `n` (starting at 1) is `answers(n)`.
fn node(
    answers: impl Fn(usize, ReceiverStream<GetChunkRequest>) -> Result<Answers, Status> + Send + Sync + 'static,
) -> (Calls, Arc<AtomicUsize>) {
    let streams = Arc::new(AtomicUsize::new(0));
    let counted = streams.clone();
    let calls = NodeCalls::new(LIMITS, move |requests| {
        let number = counted.fetch_add(1, Ordering::Relaxed) + 1;
        let answers = answers(number, requests).map(Response::new);
        async move { answers }
    });
    (calls, streams)
}

/// Answers with the requested offset, later requests first.
fn serve(requests: ReceiverStream<GetChunkRequest>) -> Answers {
    let answer = |request: GetChunkRequest| async move {
        tokio::time::sleep(Duration::from_millis(u64::from(20 - request.offset))).await;
        response(request.offset)
    };
    Box::pin(answer_calls(requests.map(Ok), 64, (), answer))
}

#[tokio::test]
async fn every_call_gets_its_own_answer() {
    let (calls, streams) = node(|_, requests| Ok(serve(requests)));
    let asked = async |offset| calls.call(request(offset), ()).await.unwrap().offset;
    let (a, b, c) = tokio::join!(asked(1), asked(2), asked(3));
    assert_eq!((a, b, c), (1, 2, 3));
    assert_eq!(streams.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_call_whose_stream_ended_is_sent_over_one_more() {
    let (calls, streams) = node(|number, requests| match number {
        1 => Ok(Box::pin(tokio_stream::empty())),
        _ => Ok(serve(requests)),
    });
    assert_eq!(calls.call(request(5), ()).await.unwrap().offset, 5);
    assert_eq!(streams.load(Ordering::Relaxed), 2);

    let (calls, streams) = node(|_, _| Err(Status::unavailable("down")));
    let lost = calls.call(request(5), ()).await.unwrap_err();
    assert_eq!(lost, CallError::Failed("down".into()));
    assert_eq!(streams.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_silent_node_times_out_and_is_called_again() {
    let (calls, streams) = node(|number, requests| match number {
        1 => Ok(Box::pin(tokio_stream::pending())),
        _ => Ok(serve(requests)),
    });
    let began = Instant::now();
    let lost = calls.call(request(5), ()).await.unwrap_err();
    assert_eq!(lost, CallError::Timeout(LIMITS.silence_max));
    assert!(began.elapsed() >= LIMITS.silence_max);
    assert_eq!(
        streams.load(Ordering::Relaxed),
        1,
        "it is not sent over another stream"
    );
    assert_eq!(calls.call(request(6), ()).await.unwrap().offset, 6);
}

#[tokio::test]
async fn the_stream_ends_with_the_calls() {
    let (sender, mut ended) = mpsc::channel::<()>(1);
    let (calls, _) = node(move |_, requests| {
        let sender = sender.clone();
        Ok(Box::pin(serve(requests).map(move |answer| {
            let _alive = &sender;
            answer
        })))
    });
    calls.call(request(1), ()).await.unwrap();
    drop(calls);
    assert_eq!(ended.recv().await, None);
}

/// Admits as many requests as there are permits.
struct Permits(Arc<Semaphore>);

impl Admission<GetChunkRequest> for Permits {
    type Held = tokio::sync::OwnedSemaphorePermit;

    async fn admit(&self, _: &GetChunkRequest) -> Self::Held {
        self.0.clone().acquire_owned().await.unwrap()
    }
}

#[tokio::test]
async fn a_request_holds_its_admission_until_its_answer_is_taken() {
    let permits = Arc::new(Semaphore::new(1));
    let requests = tokio_stream::iter([Ok(request(1)), Ok(request(2))]);
    let admission = Permits(permits.clone());
    let mut answers = answer_calls(requests, 8, admission, |request: GetChunkRequest| async move {
        response(request.offset)
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(permits.available_permits(), 0, "the second is not let in");
    for offset in [1, 2] {
        assert_eq!(answers.next().await.unwrap().unwrap().offset, offset);
    }
    assert!(answers.next().await.is_none());
    assert_eq!(permits.available_permits(), 1);
}

#[tokio::test]
async fn concurrent_requests_are_bounded() {
    let in_work = Arc::new(AtomicUsize::new(0));
    let requests = tokio_stream::iter((0..50).map(|offset| Ok(request(offset))));
    let answers = answer_calls(requests, 4, (), move |request: GetChunkRequest| {
        let in_work = in_work.clone();
        async move {
            assert!(in_work.fetch_add(1, Ordering::SeqCst) < 4);
            tokio::task::yield_now().await;
            in_work.fetch_sub(1, Ordering::SeqCst);
            response(request.offset)
        }
    });
    assert_eq!(answers.collect::<Vec<_>>().await.len(), 50);
}

#[tokio::test]
async fn a_call_that_panics_ends_alone() {
    let requests = tokio_stream::iter((0..3).map(|offset| Ok(request(offset))));
    let answers = answer_calls(requests, 4, (), |request: GetChunkRequest| async move {
        tokio::task::yield_now().await;
        assert_ne!(request.offset, 1, "on purpose");
        response(request.offset)
    });
    let mut answered: Vec<u32> = answers.map(|answer| answer.unwrap().offset).collect().await;
    answered.sort_unstable();
    assert_eq!(answered, [0, 2]);
}

#[tokio::test]
async fn a_request_that_waits_for_admission_is_dropped_with_the_client() {
    let permits = Arc::new(Semaphore::new(1));
    let requests = tokio_stream::iter([Ok(request(1)), Ok(request(2))]);
    let answers = answer_calls(requests, 8, Permits(permits.clone()), |_: GetChunkRequest| {
        std::future::pending::<GetChunkResponse>()
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let queued = tokio::spawn({
        let permits = permits.clone();
        async move { permits.acquire_owned().await }
    });
    drop(answers);
    tokio::time::sleep(Duration::from_millis(20)).await;
    // Without the second request the next in the queue gets the permit.
    permits.add_permits(1);
    let freed = tokio::time::timeout(Duration::from_secs(10), queued);
    assert!(freed.await.is_ok());
}
