//! The contract of the multiplexer, one test for each clause. The test controls the stream.

use std::sync::Arc;
use std::time::Duration;

use tokio_stream::StreamExt as _;

use super::*;
use crate::messages::GetChunkRequest;

const LIMITS: Limits = Limits {
    queue_max: 8,
    streams_max: 2,
    resend: None,
};

type Calls<S = ()> = Multiplexer<GetChunkRequest, &'static str, Arc<()>, S>;

fn calls(limits: Limits) -> Calls {
    Multiplexer::new(limits, ())
}

fn request(offset: u32) -> GetChunkRequest {
    GetChunkRequest {
        offset,
        ..GetChunkRequest::default()
    }
}

/// Submits a call that holds an arbitrary value.
fn submit<S>(calls: &Calls<S>, offset: u32) -> PendingCall<'_, GetChunkRequest, &'static str, Arc<()>, S>
where
    S: OnSend<GetChunkRequest, Arc<()>>,
{
    calls.submit(request(offset), Arc::default())
}

/// Returns offset and call id of the requests in `stream`.
fn queued(stream: &mut ReceiverStream<GetChunkRequest>) -> Vec<(u32, u64)> {
    let mut found = Vec::new();
    while let Ok(request) = stream.as_mut().try_recv() {
        found.push((request.offset, request.call_id));
    }
    found
}

#[tokio::test]
async fn answers_come_in_any_order_and_each_ends_its_own_call() {
    let calls = calls(LIMITS);
    let mut stream = calls.attach();
    let (first, second) = (submit(&calls, 10), submit(&calls, 20));
    let sent = queued(&mut stream);
    assert_eq!(
        sent.iter().map(|(offset, _)| *offset).collect::<Vec<_>>(),
        [10, 20]
    );
    calls.answer(sent[1].1, "second");
    calls.answer(99, "to nobody");
    calls.answer(sent[0].1, "first");
    assert_eq!(second.answer().await, Ok(("second", 1)));
    assert_eq!(first.answer().await, Ok(("first", 1)));
    assert_eq!(calls.silent_since(), None);
}

#[tokio::test]
async fn calls_wait_for_a_stream_and_enter_every_stream_in_the_order_of_submission() {
    let calls = calls(LIMITS);
    let waiting: Vec<_> = (0..3).map(|offset| submit(&calls, offset)).collect();
    calls.calls_outstanding().await;
    let mut first = calls.attach();
    let later = submit(&calls, 3);
    let sent = queued(&mut first);
    assert_eq!(sent, [(0, 1), (1, 2), (2, 3), (3, 4)]);
    calls.answer(2, "one");
    calls.detach(&CallError::Ended);
    assert_eq!(first.next().await, None, "the requests of a stream end with it");
    let mut second = calls.attach();
    assert_eq!(queued(&mut second), [(0, 1), (2, 3), (3, 4)]);
    for call_id in [1, 3, 4] {
        calls.answer(call_id, "twice");
    }
    let mut answers = Vec::new();
    for waiting in waiting {
        answers.push(waiting.answer().await.unwrap());
    }
    assert_eq!(answers, [("twice", 2), ("one", 1), ("twice", 2)]);
    assert_eq!(later.answer().await, Ok(("twice", 2)));
}

#[tokio::test]
async fn a_call_ends_with_the_last_stream_that_it_may_use() {
    let calls = calls(LIMITS);
    let _first = calls.attach();
    let old = submit(&calls, 1);
    calls.detach(&CallError::Ended);
    let between = submit(&calls, 2);
    let _second = calls.attach();
    let lost = CallError::Failed("reset".into());
    assert!(calls.detach(&lost).is_some(), "one call may still be sent");
    assert_eq!(old.answer().await, Err(lost));
    let mut third = calls.attach();
    assert_eq!(queued(&mut third), [(2, 2)]);
    calls.end_all(&CallError::Timeout(Duration::from_secs(1)));
    assert_eq!(
        between.answer().await,
        Err(CallError::Timeout(Duration::from_secs(1)))
    );
}

#[tokio::test]
async fn what_a_withdrawn_call_holds_is_released_with_its_answer_or_its_stream() {
    let calls = calls(LIMITS);
    let held = Arc::new(());
    drop(calls.submit(request(1), held.clone()));
    assert_eq!(Arc::strong_count(&held), 1, "it was never sent");
    let mut stream = calls.attach();
    assert_eq!(queued(&mut stream), []);
    drop(calls.submit(request(2), held.clone()));
    drop(calls.submit(request(3), held.clone()));
    assert_eq!(Arc::strong_count(&held), 3);
    assert_eq!(queued(&mut stream), [(2, 2), (3, 3)]);
    calls.answer(2, "too late");
    assert_eq!(Arc::strong_count(&held), 2);
    assert_eq!(calls.detach(&CallError::Ended), None);
    assert_eq!(Arc::strong_count(&held), 1);
    assert_eq!(queued(&mut calls.attach()), [], "it is not sent again");
}

#[tokio::test]
async fn a_full_queue_ends_a_call_that_is_sent_once() {
    let calls = calls(Limits {
        queue_max: 1,
        ..LIMITS
    });
    let _stream = calls.attach();
    let first = submit(&calls, 1);
    assert_eq!(submit(&calls, 2).answer().await, Err(CallError::QueueFull));
    calls.answer(1, "one");
    assert_eq!(first.answer().await, Ok(("one", 1)));
}

#[tokio::test]
async fn a_call_is_resent_on_the_same_stream_with_growing_delays() {
    let ms = Duration::from_millis;
    let calls = calls(Limits {
        queue_max: 1,
        streams_max: u32::MAX,
        resend: Some(Resend {
            after: ms(20),
            after_max: ms(40),
        }),
    });
    let mut stream = calls.attach();
    let (first, second) = (submit(&calls, 1), submit(&calls, 2));
    calls.resend_due();
    assert_eq!(queued(&mut stream), [(1, 1)], "the other did not fit");
    tokio::time::sleep(ms(25)).await;
    calls.resend_due();
    assert_eq!(queued(&mut stream), [(1, 1)]);
    calls.answer(1, "one");
    assert_eq!(first.answer().await, Ok(("one", 2)));
    // The second waits twice as long after an attempt with a full queue.
    tokio::time::sleep(ms(45)).await;
    calls.resend_due();
    assert_eq!(queued(&mut stream), [(2, 2)]);
    calls.answer(2, "two");
    assert_eq!(
        second.answer().await,
        Ok(("two", 1)),
        "sendings that did not fit do not count"
    );
}

#[tokio::test]
async fn silence_is_counted_from_the_oldest_call_or_the_last_answer() {
    let calls = calls(LIMITS);
    let _stream = calls.attach();
    assert_eq!(calls.silent_since(), None);
    let before = Instant::now();
    let _calls = (submit(&calls, 1), submit(&calls, 2));
    let since = calls.silent_since().unwrap();
    assert!(before <= since && since <= Instant::now());
    let before = Instant::now();
    calls.answer(1, "one");
    assert!(calls.silent_since().unwrap() >= before);
}

/// Numbers the sendings of a stream.
#[derive(Default)]
struct Stamp {
    sent: u32,
}

impl OnSend<GetChunkRequest, Arc<()>> for Stamp {
    fn begin_stream(&mut self) {
        self.sent = 0;
    }

    fn prepare(&mut self, request: &mut GetChunkRequest, _: &mut Arc<()>, is_first: bool) {
        self.sent += 1;
        request.length = if is_first { self.sent } else { 0 };
    }
}

#[tokio::test]
async fn requests_are_completed_when_they_are_sent() {
    let calls: Calls<Stamp> = Multiplexer::new(LIMITS, Stamp::default());
    let mut first = calls.attach();
    let _waiting = (submit(&calls, 1), submit(&calls, 2));
    assert_eq!(first.next().await.unwrap().length, 1);
    assert_eq!(first.next().await.unwrap().length, 2);
    calls.detach(&CallError::Ended);
    let mut second = calls.attach();
    assert_eq!(
        second.next().await.unwrap().length,
        1,
        "a new stream was told nothing"
    );
}

#[tokio::test]
async fn nothing_waits_for_a_closed_multiplexer() {
    let calls = calls(LIMITS);
    let waiting = submit(&calls, 1);
    calls.close();
    assert_eq!(waiting.answer().await, Err(CallError::Closed));
    assert_eq!(submit(&calls, 2).answer().await, Err(CallError::Closed));
    assert_eq!(calls.attach().next().await, None);
}
