//! A stream that can be taken away from its reader.
//!
//! openraft makes the requests to a follower from state that consecutive streams share, and takes the end of the
//! answers for the end of the requests. But the connection owns the requests and drops them some time later: until then
//! it would take requests that are meant for the next stream.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use parking_lot::Mutex;

/// The reader's side of the stream.
pub struct Revocable<S>(Arc<Mutex<Option<S>>>);

/// Drops the stream when it is dropped itself: from then on the stream is not polled.
pub struct RevokeOnDrop<S>(Arc<Mutex<Option<S>>>);

/// Wraps `stream`; returns the reader's side and the guard.
pub fn revocable<S>(stream: S) -> (Revocable<S>, RevokeOnDrop<S>) {
    // Locked while the stream is polled, which does not block.
    let shared = Arc::new(Mutex::new(Some(stream)));
    (Revocable(shared.clone()), RevokeOnDrop(shared))
}

impl<S: Stream + Unpin> Stream for Revocable<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        match self.0.lock().as_mut() {
            Some(stream) => Pin::new(stream).poll_next(context),
            None => Poll::Ready(None),
        }
    }
}

impl<S> Drop for RevokeOnDrop<S> {
    fn drop(&mut self) {
        let stream = self.0.lock().take();
        drop(stream);
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _};

    use super::*;

    #[test]
    fn a_stream_that_was_taken_back_is_gone_and_gives_nothing() {
        let alive = Arc::new(());
        let held = alive.clone();
        let numbers = futures::stream::iter(0..).map(move |number: u32| {
            let _held = &held;
            number
        });
        let (mut reader, revoke) = revocable(numbers);
        assert_eq!(reader.next().now_or_never(), Some(Some(0)));
        drop(revoke);
        assert_eq!(Arc::strong_count(&alive), 1);
        assert_eq!(reader.next().now_or_never(), Some(None));
    }
}
