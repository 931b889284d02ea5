//! An estimate of the leader's clock, so that the file system has one clock.
//!
//! An answer carries the leader's time, which the leader read between the sending of the request and the arrival of
//! the answer. The offset of its clock from this machine's uptime is therefore between two bounds. The estimate is the
//! lower bound of the first answer; a later answer moves it to the nearest value within the bounds of that answer.
//!
//! Invariants: after an answer has arrived, the time is not before the time that the answer carried, and thus not
//! before the stamp of any acknowledged change; the time never decreases ([`SteadyTime`]); the wall clock of this
//! machine is not used after the leader has sent its time.

use std::time::SystemTime;

use parking_lot::Mutex;
use quorumfs_proto::{SteadyTime, Timestamp};

use crate::lease::BootTime;

/// The estimate of the leader's clock. The lock is held only for a comparison.
#[derive(Debug, Default)]
pub(crate) struct LeaderClock {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Offset of the leader's clock (nanoseconds since 1970) from this machine's uptime.
    ahead_ns: Option<i64>,
    time: SteadyTime,
}

impl State {
    fn update(&mut self, sent_at: BootTime, received_at: BootTime, clock_ns: i64) {
        let least = clock_ns.saturating_sub(received_at.uptime_ns());
        let most = clock_ns.saturating_sub(sent_at.uptime_ns()).max(least);
        self.ahead_ns = Some(self.ahead_ns.map_or(least, |ahead| ahead.clamp(least, most)));
    }

    fn now(&mut self, at: BootTime) -> Option<Timestamp> {
        let clock_ns = at.uptime_ns().saturating_add(self.ahead_ns?);
        Some(self.time.advance(at.uptime(), Timestamp::from_unix_ns(clock_ns)))
    }
}

impl LeaderClock {
    /// Takes the time that the answer to a request sent at `sent_at` carried; 0 means none.
    pub(crate) fn update(&self, sent_at: BootTime, clock_ns: i64) {
        if clock_ns != 0 {
            // The clock is read under the lock, so that answers are processed in the order of these readings.
            let mut state = self.state.lock();
            state.update(sent_at, BootTime::now(), clock_ns);
        }
    }

    /// Returns the time; before a leader has sent its time (older programs do not), that of this machine.
    pub(crate) fn now(&self) -> Timestamp {
        let mut state = self.state.lock();
        let now = state.now(BootTime::now());
        now.unwrap_or_else(|| Timestamp::from(SystemTime::now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn uptime(ms: u64) -> BootTime {
        BootTime::after(Duration::from_millis(ms))
    }

    fn ms(clock_ms: i64) -> i64 {
        clock_ms * 1_000_000
    }

    /// Milliseconds; the leader's clock shows one hour when this machine starts.
    fn now(state: &mut State, at_ms: u64) -> i64 {
        state.now(uptime(at_ms)).unwrap().unix_ns() / 1_000_000 - 3_600_000
    }

    #[test]
    fn the_time_is_not_before_what_an_answer_carried_and_not_ahead_of_the_leader() {
        let mut state = State::default();
        assert_eq!(state.now(uptime(5)), None);
        // The leader read its clock at 40 ms, just before the answer arrived.
        state.update(uptime(0), uptime(40), ms(3_600_040));
        assert_eq!(now(&mut state, 40), 40);
        // The leader read its clock at once and the answer was slow: the earlier estimate is kept.
        state.update(uptime(100), uptime(200), ms(3_600_101));
        assert_eq!(now(&mut state, 200), 200);
        // The leader's clock runs fast.
        state.update(uptime(1000), uptime(1002), ms(3_601_050));
        assert_eq!(now(&mut state, 1002), 1050);
    }

    #[test]
    fn the_time_slows_down_if_the_leaders_clock_is_behind() {
        let mut state = State::default();
        state.update(uptime(0), uptime(0), ms(3_600_000));
        assert_eq!(now(&mut state, 1000), 1000);
        state.update(uptime(1000), uptime(1000), ms(3_600_900));
        assert_eq!(now(&mut state, 1040), 1010, "slowly");
        assert_eq!(now(&mut state, 2000), 1900, "caught up");
    }
}
