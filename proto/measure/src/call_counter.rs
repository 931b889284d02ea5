//! Calls of one kind.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::distribution::{Distribution, Snapshot};

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It did what was asked.
    Done,
    /// It was answered with an error.
    Failed,
}

impl Ending {
    /// `Ok` is [`Ending::Done`].
    pub fn of<T, E>(result: &Result<T, E>) -> Ending {
        match result {
            Ok(_) => Ending::Done,
            Err(_) => Ending::Failed,
        }
    }
}

/// Calls of one kind: how many, how many failed, how many bytes they moved, how long they took.
#[derive(Debug, Default)]
pub struct CallCounter {
    failures: AtomicU64,
    bytes: AtomicU64,
    durations: Distribution,
}

impl CallCounter {
    /// A call ended. `bytes` of content that it moved count only if it did what was asked.
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

    /// Calls, failed ones too.
    pub fn count(&self) -> u64 {
        self.durations.count()
    }

    /// Calls that failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Bytes moved.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// All of it, as it is now.
    pub fn snapshot(&self) -> TallySnapshot {
        TallySnapshot {
            failures: self.failures(),
            bytes: self.bytes(),
            durations: self.durations.snapshot(),
        }
    }
}

/// A tally at one moment.
#[derive(Clone, Debug)]
pub struct TallySnapshot {
    /// Calls that failed.
    pub failures: u64,
    /// Bytes moved by those that did not.
    pub bytes: u64,
    /// Of all calls, in nanoseconds.
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
