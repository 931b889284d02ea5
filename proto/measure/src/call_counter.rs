//! Counters for the calls of one kind.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::distribution::{Distribution, Snapshot};

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The call did what was asked.
    Done,
    /// The call was answered with an error.
    Failed,
}

impl Ending {
    /// Returns [`Ending::Done`] for `Ok`, [`Ending::Failed`] for `Err`.
    pub fn of<T, E>(result: &Result<T, E>) -> Ending {
        match result {
            Ok(_) => Ending::Done,
            Err(_) => Ending::Failed,
        }
    }
}

/// Counters for calls of one kind: calls, failures, bytes moved, durations.
#[derive(Debug, Default)]
pub struct CallCounter {
    failures: AtomicU64,
    bytes: AtomicU64,
    durations: Distribution,
}

impl CallCounter {
    /// Records that a call ended. `bytes` of content moved count only for [`Ending::Done`].
    pub fn record(&self, ending: Ending, bytes: u64, duration: Duration) {
        self.durations.record_duration(duration);
        match ending {
            Ending::Failed => {
                self.failures.fetch_add(1, Ordering::Relaxed);
            }
            Ending::Done if bytes > 0 => {
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            Ending::Done => {}
        }
    }

    /// Returns the number of calls, failed ones included.
    pub fn count(&self) -> u64 {
        self.durations.count()
    }

    /// Returns the number of calls that failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes moved.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns all counters at this moment.
    pub fn snapshot(&self) -> CallCounterSnapshot {
        CallCounterSnapshot {
            failures: self.failures(),
            bytes: self.bytes(),
            durations: self.durations.snapshot(),
        }
    }
}

/// The counters at one moment.
#[derive(Clone, Debug)]
pub struct CallCounterSnapshot {
    /// Number of calls that failed.
    pub failures: u64,
    /// Bytes moved by the calls that did not fail.
    pub bytes: u64,
    /// Durations of all calls, in nanoseconds.
    pub durations: Snapshot,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_count_as_calls_and_move_no_bytes() {
        let tally = CallCounter::default();
        tally.record(Ending::Done, 10, Duration::from_micros(5));
        tally.record(Ending::Failed, 99, Duration::from_micros(7));
        let snapshot = tally.snapshot();
        assert_eq!((tally.count(), snapshot.durations.count()), (2, 2));
        assert_eq!((snapshot.failures, snapshot.bytes), (1, 10));
        assert_eq!(snapshot.durations.sum(), 12_000);
        assert_eq!(Ending::of(&Err::<(), ()>(())), Ending::Failed);
    }
}
