//! The client's view of its lease: whether it has exclusive use of the filesystem and may answer from its caches.
//!
//! The lease is counted from the sending of the request whose answer granted it, by a clock that also advances while
//! the machine sleeps. What was read under a lease is valid while the lease has not lapsed; a lease that begins after
//! a lapse has a new number.
//!
//! Invariant: between two moments at which [`Lease::held`] returns the same number, the lease did not lapse.

use std::ops::Add;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use quorumfs_proto::SessionId;

/// A lease is shortened by one twentieth, which bounds the difference in the rates of two machines' clocks.
const DRIFT_DIVISOR: u32 = 20;

/// A time of CLOCK_BOOTTIME (clock_gettime(2)): since the start of the machine, including suspension.
/// `std::time::Instant` stops during suspension, so a lease measured with it would outlast the leader's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    pub(crate) fn now() -> BootTime {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME);
        BootTime(Duration::from(now.expect("Linux has this clock since 2.6.39")))
    }

    /// Returns the time since the start of the machine.
    pub(crate) fn uptime(self) -> Duration {
        self.0
    }

    /// Like [`BootTime::uptime`], in nanoseconds.
    pub(crate) fn uptime_ns(self) -> i64 {
        i64::try_from(self.0.as_nanos()).unwrap_or(i64::MAX)
    }

    /// Returns the given time after the start.
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

/// The lease of a client. The lock is held only for a comparison.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    session: u64,
    /// When the session began; answers to earlier requests grant it nothing.
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
            // The lease was held throughout, so no other client had it in between. It is not enough that it was held
            // when the request was sent: it may have lapsed before the answer.
            Some(held) if held > now => self.until = Some(held.max(until)),
            _ if until > now => {
                self.number += 1;
                self.until = Some(until);
            }
            // The answer was so late that the lease has already lapsed.
            _ => {}
        }
    }

    fn held(&self, now: BootTime) -> Option<(Duration, u64)> {
        let left = now.until(self.until?);
        (!left.is_zero()).then_some((left, self.number))
    }
}

impl Lease {
    /// Starts a new session, without a lease.
    pub(crate) fn begin(&self, session: SessionId) {
        let mut state = self.state.lock();
        state.session = session.0;
        state.began = Some(BootTime::now());
        state.until = None;
    }

    /// Takes the lease of `lease_ms` that the answer to a request sent at `sent_at` granted; 0 means none.
    pub(crate) fn granted(&self, sent_at: BootTime, lease_ms: u32) {
        // The clock is read under the lock, so no other grant comes between the two.
        let mut state = self.state.lock();
        state.granted(sent_at, lease_ms, BootTime::now());
    }

    /// Returns the session, and whether it holds the lease now.
    pub(crate) fn session_and_held(&self) -> (u64, bool) {
        let state = self.state.lock();
        (state.session, state.held(BootTime::now()).is_some())
    }

    /// Returns the remaining time of the lease and its number; `None` if it is not held.
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
    fn a_lapsed_lease_gets_a_new_number() {
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
        // The request was sent while the lease was held and answered after it had lapsed: another client may have had
        // it in between.
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
        assert_eq!(lease.session_and_held(), (2, false));
        lease.granted(BootTime::now(), 60_000);
        assert_eq!(lease.session_and_held(), (2, true));
    }
}
