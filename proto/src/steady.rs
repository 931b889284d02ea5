//! Time that never runs backwards, whatever the clock behind it does.
//!
//! Owes: what it answers is never before what it answered earlier, and follows its source whenever that is ahead. While
//! the source is behind (it was set back, or another machine's took its place) it goes on at a fraction of the speed until
//! the source has caught up, so that what happens meanwhile is still told apart.
//!
//! Pure: the source's time and the moment of a clock that only runs forward are arguments.

use std::time::Duration;

use crate::attributes::Timestamp;

/// While the source is behind, time goes on at a quarter of the speed: who was an hour ahead is caught up with after 80
/// minutes.
const SLOWED_DIVISOR: u32 = 4;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct SteadyTime {
    last: Option<(Timestamp, Duration)>,
}

impl SteadyTime {
    /// What the time is at `moment`, when the source says `source`; what comes later is not before it.
    pub fn advance(&mut self, moment: Duration, source: Timestamp) -> Timestamp {
        let now = self.at(moment, source);
        self.last = Some((now, moment));
        now
    }

    /// As [`SteadyTime::advance`], but nobody relies on it: the next may be before it.
    pub fn at(&self, moment: Duration, source: Timestamp) -> Timestamp {
        match self.last {
            None => source,
            Some((last, at)) => source.max(last.plus(moment.saturating_sub(at) / SLOWED_DIVISOR)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp {
            seconds,
            nanoseconds: 0,
        }
    }

    fn moment(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_source_that_is_set_back_is_waited_for_in_small_steps() {
        let mut time = SteadyTime::default();
        assert_eq!(time.advance(moment(0), at(5000)), at(5000));
        assert_eq!(time.advance(moment(10), at(5010)), at(5010));
        // An hour back.
        assert_eq!(time.advance(moment(14), at(1414)), at(5011));
        assert_eq!(time.at(moment(18), at(1418)), at(5012));
        assert_eq!(time.advance(moment(4810), at(6210)), at(6210), "caught up");
        assert_eq!(
            time.advance(moment(4811), at(9000)),
            at(9000),
            "a leap is followed"
        );
    }

    #[test]
    fn a_moment_that_runs_backwards_does_no_harm() {
        let mut time = SteadyTime::default();
        time.advance(moment(9), at(100));
        assert_eq!(time.advance(moment(8), at(50)), at(100));
    }
}
