//! The lease as this client reckons it: whether it alone uses the filesystem, and so may answer from what it knows.
//!
//! Counted from when the request was sent that was answered with it, by a clock that goes on while the machine sleeps.
//! What was learned under a lease may be used as long as the lease has not lapsed since; its number tells, for it
//! changes whenever one begins anew.
//!
//! Invariant: between any two moments at which [`Lease::held`] answers the same number the lease never lapsed.

use std::ops::Add;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use quorumfs_proto::SessionId;

/// The clocks of two machines may run this much apart: a lease is reckoned shorter by a twentieth.
const DRIFT_DIVISOR: u32 = 20;

/// A moment by CLOCK_BOOTTIME: since this machine was started, times of sleep included. `std::time::Instant` stands still
/// during those, and a lease that was reckoned by it would outlive the leader's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    pub(crate) fn now() -> BootTime {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME);
        BootTime(Duration::from(now.expect("Linux has this clock since 2.6.39")))
    }

    /// Since this machine was started.
    pub(crate) fn uptime(self) -> Duration {
        self.0
    }

    /// As [`BootTime::uptime`], in nanoseconds.
    pub(crate) fn uptime_ns(self) -> i64 {
        i64::try_from(self.0.as_nanos()).unwrap_or(i64::MAX)
    }

    /// So long after the start.
    #[cfg(test)]
    pub(crate) fn after(uptime: Duration) -> BootTime {
        BootTime(uptime)
    }

    fn until(self, later: BootTime) -> Duration {
        later.0.saturating_sub(self.0)
    }
}

impl Add<Duration> for BootTime {
    type Output = BootTime;

    fn add(self, duration: Duration) -> BootTime {
        BootTime(self.0 + duration)
    }
}

/// See the module. The lock is held for a comparison.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    session: u64,
    /// When the session began to count; what was asked before was not granted to it.
    began: Option<BootTime>,
    until: Option<BootTime>,
    number: u64,
}

impl State {
    fn granted(&mut self, sent_at: BootTime, lease_ms: u32, now: BootTime) {
        if lease_ms == 0 || self.began.is_some_and(|began| sent_at < began) {
            return;
        }
        let until = sent_at + Duration::from_millis(u64::from(lease_ms - lease_ms / DRIFT_DIVISOR));
        match self.until {
            // Held throughout, so nobody else came in between. (That it was held when the request was sent says less:
            // it may have lapsed before the answer came.)
            Some(held) if held > now => self.until = Some(held.max(until)),
            _ if until > now => {
                self.number += 1;
                self.until = Some(until);
            }
            // It came too late to be of use.
            _ => {}
        }
    }

    fn held(&self, now: BootTime) -> Option<(Duration, u64)> {
        let left = now.until(self.until?);
        (!left.is_zero()).then_some((left, self.number))
    }
}

impl Lease {
    /// A new session begins without a lease.
    pub(crate) fn begin(&self, session: SessionId) {
        let mut state = self.state.lock();
        state.session = session.0;
        state.began = Some(BootTime::now());
        state.until = None;
    }

    /// A request sent at `sent_at` was answered with a lease of `lease_ms`; 0: with none.
    pub(crate) fn granted(&self, sent_at: BootTime, lease_ms: u32) {
        // The clock is read under the lock: no other grant comes between the two.
        let mut state = self.state.lock();
        state.granted(sent_at, lease_ms, BootTime::now());
    }

    /// The session, and whether it holds the lease now.
    pub(crate) fn claim(&self) -> (u64, bool) {
        let state = self.state.lock();
        (state.session, state.held(BootTime::now()).is_some())
    }

    /// How long the lease holds from now, and its number; `None`: it is not held.
    pub(crate) fn held(&self) -> Option<(Duration, u64)> {
        let state = self.state.lock();
        state.held(BootTime::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    #[test]
    fn a_lease_that_lapsed_begins_anew() {
        let mut state = State::default();
        assert_eq!(state.held(at(0)), None);
        state.granted(at(0), 60_000, at(1));
        let (left, first) = state.held(at(1)).unwrap();
        assert_eq!(
            left,
            Duration::from_secs(56),
            "from the sending, and reckoned short of what was granted"
        );
        state.granted(at(30), 60_000, at(31));
        assert_eq!(
            state.held(at(80)).unwrap().1,
            first,
            "renewed in time it is the same"
        );
        assert_eq!(state.held(at(87)), None);
        state.granted(at(88), 60_000, at(89));
        assert_eq!(state.held(at(90)).unwrap().1, first + 1);
    }

    #[test]
    fn a_gap_between_sending_and_answer_ends_a_lease() {
        let mut state = State::default();
        state.granted(at(0), 20_000, at(0));
        let first = state.held(at(1)).unwrap().1;
        // Sent while it was held, answered when it was not: somebody else may have had it for those seconds.
        state.granted(at(10), 20_000, at(25));
        assert_eq!(state.held(at(25)).unwrap(), (Duration::from_secs(4), first + 1));
    }

    #[test]
    fn an_answer_that_comes_too_late_grants_nothing() {
        let mut state = State::default();
        state.granted(at(0), 20_000, at(19));
        assert_eq!((state.held(at(19)), state.number), (None, 0));
        state.granted(at(5), 0, at(6));
        assert_eq!(state.held(at(6)), None);
    }

    #[test]
    fn what_an_earlier_session_asked_for_is_not_granted_to_the_next() {
        let lease = Lease::default();
        let before = BootTime::now();
        std::thread::sleep(Duration::from_millis(1));
        lease.begin(SessionId(2));
        lease.granted(before, 60_000);
        assert_eq!(lease.claim(), (2, false));
        lease.granted(BootTime::now(), 60_000);
        assert_eq!(lease.claim(), (2, true));
    }
}
