//! Limits the concurrent requests of one kind, in total and for each client, and preempts stalled ones when others
//! wait.
//!
//! A request holds a permit while it holds memory. At the limit, a new request takes the permit of the one whose
//! client has been inactive longest; if all clients are active, it waits. One client has at most three quarters of the
//! permits.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::error::ApiError;
use crate::api::http::connections::ClientProgress;

/// The permits for one kind of request.
#[derive(Debug)]
pub(super) struct RequestLimiter {
    /// Plural name of the requests, for messages.
    what: &'static str,
    requests_max: usize,
    per_client_max: usize,
    // Locked at most for one iteration over all permits.
    in_use: Mutex<InUse>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct InUse {
    permits: BTreeMap<u64, Arc<ClientProgress>>,
    next: u64,
}

/// The permit of a request, released when it is dropped.
#[derive(Debug)]
pub(super) struct RequestPermit {
    limiter: Arc<RequestLimiter>,
    number: u64,
}

impl RequestLimiter {
    /// Creates `requests_max` permits for requests named `what`.
    pub(super) fn new(what: &'static str, requests_max: usize) -> Arc<RequestLimiter> {
        Arc::new(RequestLimiter {
            what,
            requests_max,
            per_client_max: requests_max - requests_max / 4,
            in_use: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// Waits for a permit for the request with `progress`.
    ///
    /// # Errors
    /// 503 if none is free in `timeout`.
    pub(super) async fn acquire(
        self: &Arc<RequestLimiter>,
        progress: &Arc<ClientProgress>,
        timeout: Duration,
    ) -> Result<RequestPermit, ApiError> {
        let acquiring = async {
            loop {
                let freed = self.freed.notified();
                tokio::pin!(freed);
                freed.as_mut().enable();
                if let Some(number) = self.try_acquire(progress) {
                    return number;
                }
                // A client that is active now may stall shortly.
                let _ = tokio::time::timeout(progress.timeouts().preempt_after / 4, freed).await;
            }
        };
        match tokio::time::timeout(timeout, acquiring).await {
            Ok(number) => Ok(RequestPermit {
                limiter: Arc::clone(self),
                number,
            }),
            Err(_) => Err(ApiError::unavailable(format!(
                "this node has reached its limit of concurrent {}, in total or from this client",
                self.what
            ))),
        }
    }

    fn try_acquire(&self, progress: &Arc<ClientProgress>) -> Option<u64> {
        let client = progress.address();
        let mut in_use = self.in_use.lock();
        let of_client = |permit: &ClientProgress| client.is_some() && permit.address() == client;
        let own = in_use.permits.values().filter(|permit| of_client(permit)).count();
        let client_is_full = own >= self.per_client_max;
        if client_is_full || in_use.permits.len() >= self.requests_max {
            let candidates = in_use
                .permits
                .iter()
                .filter(|(_, permit)| !client_is_full || of_client(permit))
                .map(|(number, permit)| (permit.stalled(), *number));
            let (stalled, slowest) = candidates.max()?;
            if stalled < progress.timeouts().preempt_after {
                return None;
            }
            if let Some(permit) = in_use.permits.remove(&slowest) {
                permit.preempt();
            }
        }
        let number = in_use.next;
        in_use.next += 1;
        in_use.permits.insert(number, Arc::clone(progress));
        Some(number)
    }
}

impl RequestPermit {
    /// Returns the number of permits in use.
    pub(super) fn in_use(&self) -> usize {
        self.limiter.in_use.lock().permits.len()
    }
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.limiter.in_use.lock().permits.remove(&self.number);
        self.limiter.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::api::http::connections::ClientTimeouts;

    const TIMEOUTS: ClientTimeouts = ClientTimeouts {
        close_after: Duration::from_secs(600),
        preempt_after: Duration::from_millis(40),
    };
    const SOON: Duration = Duration::from_millis(10);

    fn request(of: u8) -> Arc<ClientProgress> {
        Arc::new(ClientProgress::new(
            TIMEOUTS,
            Some(IpAddr::from([10, 0, 0, of]).into()),
            None,
        ))
    }

    #[tokio::test]
    async fn one_client_leaves_a_quarter_to_others() {
        let limiter = RequestLimiter::new("tests", 4);
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(limiter.acquire(&request(1), SOON).await.unwrap());
        }
        let refused = limiter.acquire(&request(1), SOON).await.unwrap_err();
        assert_eq!(refused.status.as_u16(), 503);
        let other = limiter.acquire(&request(2), SOON).await.unwrap();
        assert!(
            limiter.acquire(&request(2), SOON).await.is_err(),
            "all permits are in use"
        );
        drop(other);
        limiter.acquire(&request(2), SOON).await.unwrap();
    }

    #[tokio::test]
    async fn a_waiting_request_gets_the_released_permit() {
        let limiter = RequestLimiter::new("tests", 1);
        let held = limiter.acquire(&request(1), SOON).await.unwrap();
        let (one, two) = (request(1), request(2));
        let waiting = limiter.acquire(&one, TIMEOUTS.close_after);
        let ending = async {
            tokio::time::sleep(SOON).await;
            drop(held);
        };
        let (permit, ()) = tokio::join!(waiting, ending);
        assert!(limiter.acquire(&two, SOON).await.is_err());
        drop(permit.unwrap());
        assert!(limiter.in_use.lock().permits.is_empty());
    }

    #[tokio::test]
    async fn stalled_requests_are_preempted_and_active_ones_are_not() {
        let limiter = RequestLimiter::new("tests", 2);
        let (busy, stalled) = (request(1), request(2));
        let _busy_permit = limiter.acquire(&busy, SOON).await.unwrap();
        let stalled_permit = limiter.acquire(&stalled, SOON).await.unwrap();
        let never = {
            let stalled = Arc::clone(&stalled);
            tokio::spawn(async move { stalled.wait_for_client(std::future::pending::<()>()).await })
        };
        let _permit = limiter.acquire(&request(3), TIMEOUTS.close_after).await.unwrap();
        assert_eq!(never.await.unwrap(), None, "it was given up");
        // Its permit was taken already; the new holder keeps it.
        drop(stalled_permit);
        assert!(
            limiter
                .acquire(&request(4), TIMEOUTS.preempt_after * 3)
                .await
                .is_err()
        );
        assert_eq!(busy.wait_for_client(async { 7 }).await, Some(7));
    }
}
