//! Time that never runs backwards, even if its source does.
//!
//! Contract: an answer is never before an earlier one, and equals the source whenever the source is ahead. While the
//! source is behind (its clock was set back, or the source is now another machine), time continues at a fraction of its
//! speed until the source has caught up, so that events in the meantime still have different times.
//!
//! Pure: the time of the source and the moment of a monotonic clock are arguments.

use std::time::Duration;

use crate::attributes::Timestamp;

/// While the source is behind, time runs at a quarter of its speed: a source that was set back by one hour has caught
/// up after 80 minutes.
const SLOWED_DIVISOR: u32 = 4;

/// The state of a steady clock; see the module documentation.
#[derive(Clone, Debug, Default)]
pub struct SteadyTime {
    last: Option<(Timestamp, Duration)>,
}

impl SteadyTime {
    /// Returns the time at `moment`, when the source says `source`. Later answers are not before it.
    pub fn advance(&mut self, moment: Duration, source: Timestamp) -> Timestamp {
        let now = self.at(moment, source);
        self.last = Some((now, moment));
        now
    }

    /// Like [`SteadyTime::advance`], but does not record the answer: the next one may be before it.
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
        // The source is set back by one hour.
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
