//! Work that comes to its end although its caller goes away: what was begun for a request must not stop half way.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::future::BoxFuture;

/// Work that is run to its end: by whoever waits for it, and in a task of its own from when this is dropped.
pub struct ToEnd<T: 'static> {
    work: Option<BoxFuture<'static, T>>,
    when_dropped: fn(BoxFuture<'static, T>) -> BoxFuture<'static, T>,
}

impl<T> ToEnd<T> {
    /// `work`, which goes on unchanged when this is dropped.
    pub fn new(work: impl Future<Output = T> + Send + 'static) -> ToEnd<T> {
        ToEnd::with(work, |work| work)
    }

    /// `work`, which goes on as `when_dropped` makes of it.
    pub fn with(
        work: impl Future<Output = T> + Send + 'static,
        when_dropped: fn(BoxFuture<'static, T>) -> BoxFuture<'static, T>,
    ) -> ToEnd<T> {
        ToEnd {
            work: Some(Box::pin(work)),
            when_dropped,
        }
    }
}

impl<T> Future for ToEnd<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let work = self.work.as_mut().expect("it is not polled after its end");
        let polled = work.as_mut().poll(context);
        if polled.is_ready() {
            self.work = None;
        }
        polled
    }
}

impl<T> Drop for ToEnd<T> {
    fn drop(&mut self) {
        // Without a runtime the process is about to end.
        if let (Some(work), Ok(runtime)) = (self.work.take(), tokio::runtime::Handle::try_current()) {
            let rest = (self.when_dropped)(work);
            runtime.spawn(async move { drop(rest.await) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn work_that_is_dropped_half_way_comes_to_its_end() {
        let (step, mut steps) = tokio::sync::mpsc::unbounded_channel();
        let go = Arc::new(tokio::sync::Notify::new());
        let waits = go.clone();
        let mut work = ToEnd::new(async move {
            step.send("begun").unwrap();
            waits.notified().await;
            step.send("ended").unwrap();
        });
        assert!(futures::poll!(&mut work).is_pending());
        assert_eq!(steps.recv().await, Some("begun"));
        drop(work);
        go.notify_one();
        assert_eq!(steps.recv().await, Some("ended"));
        assert_eq!(ToEnd::new(async { 7 }).await, 7);
    }
}
