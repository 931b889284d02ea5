//! The leader's clock as this client reckons it, so that one file system has one clock.
//!
//! An answer carries the leader's time. Between the sending of the request and the answer's arrival the leader's clock
//! showed it, so how far that clock is ahead of this machine's uptime lies between two bounds. What is reckoned stays
//! as it is while an answer's bounds allow it and else moves to the nearer one; it begins at the lower.
//!
//! Invariants: after an answer has arrived the time is not before the one that it carried, and so not before the stamp of
//! any change that was answered; it never runs backwards ([`SteadyTime`]); this machine's wall clock plays no part once a
//! leader has told its own.

use std::time::SystemTime;

use parking_lot::Mutex;
use quorumfs_proto::{SteadyTime, Timestamp};

use crate::lease::BootTime;

/// See the module. The lock is held for a comparison.
#[derive(Debug, Default)]
pub(crate) struct LeaderClock {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By how much the leader's clock (since 1970) is ahead of this machine's uptime.
    ahead_ns: Option<i64>,
    time: SteadyTime,
}

impl State {
    fn told(&mut self, sent_at: BootTime, received_at: BootTime, clock_ns: i64) {
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
    /// A request sent at `sent_at` was answered with this time; 0: with none.
    pub(crate) fn told(&self, sent_at: BootTime, clock_ns: i64) {
        if clock_ns != 0 {
            // The clock is read under the lock: answers are taken in the order of these readings.
            let mut state = self.state.lock();
            state.told(sent_at, BootTime::now(), clock_ns);
        }
    }

    /// The time. As long as no leader has told its own (it is of an older program): this machine's.
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

    /// In milliseconds, by a leader whose clock shows an hour at this machine's start.
    fn now(state: &mut State, at_ms: u64) -> i64 {
        state.now(uptime(at_ms)).unwrap().unix_ns() / 1_000_000 - 3_600_000
    }

    #[test]
    fn the_time_is_not_before_what_an_answer_carried_and_not_ahead_of_the_leader() {
        let mut state = State::default();
        assert_eq!(state.now(uptime(5)), None);
        // The leader looked at its clock at 40, just before the answer came.
        state.told(uptime(0), uptime(40), ms(3_600_040));
        assert_eq!(now(&mut state, 40), 40);
        // It looked at once, and the answer was long on its way: what is known is better.
        state.told(uptime(100), uptime(200), ms(3_600_101));
        assert_eq!(now(&mut state, 200), 200);
        // Its clock runs fast.
        state.told(uptime(1000), uptime(1002), ms(3_601_050));
        assert_eq!(now(&mut state, 1002), 1050);
    }

    #[test]
    fn a_leader_whose_clock_is_behind_is_waited_for() {
        let mut state = State::default();
        state.told(uptime(0), uptime(0), ms(3_600_000));
        assert_eq!(now(&mut state, 1000), 1000);
        state.told(uptime(1000), uptime(1000), ms(3_600_900));
        assert_eq!(now(&mut state, 1040), 1010, "slowly");
        assert_eq!(now(&mut state, 2000), 1900, "caught up");
    }
}
