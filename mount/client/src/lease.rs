//! The lease as this client reckons it: whether it alone uses the filesystem, and so may answer from what it knows.
//!
//! Counted from when the request was sent that was answered with it. What was learned under a lease may be used as long
//! as the lease has not lapsed since; its number tells, for it changes whenever one begins anew.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::SessionId;

/// The clocks of two machines may run this much apart: a lease is reckoned shorter by a twentieth.
const DRIFT_DIVISOR: u32 = 20;

/// See the module. The lock is held for a comparison.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    session: u64,
    until: Option<Instant>,
    number: u64,
}

impl Lease {
    /// A new session begins without a lease.
    pub(crate) fn begin(&self, session: SessionId) {
        let mut state = self.state.lock();
        state.session = session.0;
        state.until = None;
    }

    /// A request sent at `sent_at` was answered with a lease of `lease_ms`; 0: with none.
    pub(crate) fn granted(&self, sent_at: Instant, lease_ms: u32) {
        if lease_ms == 0 {
            return;
        }
        let until = sent_at + Duration::from_millis(u64::from(lease_ms - lease_ms / DRIFT_DIVISOR));
        let mut state = self.state.lock();
        match state.until {
            // Still held when the request was sent, so nobody else came in between.
            Some(held) if held >= sent_at => state.until = Some(held.max(until)),
            _ => {
                state.number += 1;
                state.until = Some(until);
            }
        }
    }

    /// The session, and whether it holds the lease now.
    pub(crate) fn claim(&self) -> (u64, bool) {
        let state = self.state.lock();
        let held = state.until.is_some_and(|until| until > Instant::now());
        (state.session, held)
    }

    /// How long the lease holds from now, and its number; `None`: it is not held.
    pub(crate) fn held(&self) -> Option<(Duration, u64)> {
        let state = self.state.lock();
        let left = state.until?.checked_duration_since(Instant::now())?;
        (!left.is_zero()).then_some((left, state.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_lapsed_begins_anew() {
        let lease = Lease::default();
        assert_eq!(lease.held(), None);
        let now = Instant::now();
        lease.granted(now, 60_000);
        let (left, first) = lease.held().unwrap();
        assert!(
            left <= Duration::from_millis(57_000),
            "reckoned short of what was granted"
        );
        lease.granted(now + Duration::from_secs(1), 60_000);
        assert_eq!(lease.held().unwrap().1, first, "renewed in time it is the same");
        lease.granted(now + Duration::from_secs(600), 60_000);
        assert_eq!(lease.held().unwrap().1, first + 1);
        lease.begin(SessionId(2));
        assert_eq!(lease.claim(), (2, false));
    }
}
