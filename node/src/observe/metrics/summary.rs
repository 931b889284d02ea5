//! A periodic line in the log, if something happened.

use std::time::{Duration, Instant};

use tracing::info;

use super::Metrics;
use super::kinds::{Endpoint, OperationKind, Origin};
use super::window::Totals;

/// The time and the totals of the last line.
#[derive(Debug)]
pub struct Summary {
    interval: Duration,
    last: Instant,
    before: Covered,
}

/// The totals of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Covered {
    operations: Totals,
    read_bytes: u64,
    written_bytes: u64,
    http: Totals,
    chunks: u64,
}

impl Covered {
    fn of(metrics: &Metrics) -> Covered {
        let mut covered = Covered {
            chunks: metrics.replication.to_quorum.count(),
            ..Covered::default()
        };
        for origin in Origin::ALL {
            for kind in OperationKind::ALL {
                let totals = Totals::of(metrics.operation(origin, kind));
                match kind {
                    // Keep-alives come even if nothing happens.
                    OperationKind::Session | OperationKind::PutChunk => continue,
                    OperationKind::Read => covered.read_bytes += totals.bytes,
                    OperationKind::Write | OperationKind::Append => covered.written_bytes += totals.bytes,
                    _ => {}
                }
                covered.operations.count += totals.count;
                covered.operations.failures += totals.failures;
                covered.operations.bytes += totals.bytes;
            }
        }
        // Requests for status do not count as activity.
        let about_files = [
            Endpoint::Upload,
            Endpoint::Download,
            Endpoint::Delete,
            Endpoint::List,
        ];
        for endpoint in about_files {
            let (counter, _) = metrics.http_requests(endpoint);
            covered.http.count += counter.count();
            covered.http.failures += counter.failures();
            covered.http.bytes += counter.bytes();
        }
        covered
    }
}

impl Summary {
    /// Makes a summary whose first line is due one `interval` from now.
    pub fn new(metrics: &Metrics, interval: Duration) -> Summary {
        Summary {
            interval,
            last: Instant::now(),
            before: Covered::of(metrics),
        }
    }

    /// Logs what happened since the last line, if a line is due and something happened. Returns whether it did.
    pub fn log_if_due(&mut self, metrics: &Metrics) -> bool {
        if self.last.elapsed() < self.interval {
            return false;
        }
        let now = Covered::of(metrics);
        let before = std::mem::replace(&mut self.before, now);
        self.last = Instant::now();
        if now == before {
            return false;
        }
        let quorum = metrics.replication.to_quorum.snapshot().durations.latency();
        let commit = metrics.commits.snapshot().durations.latency();
        info!(
            seconds = self.interval.as_secs(),
            operations = now.operations.count - before.operations.count,
            failures = now.operations.failures - before.operations.failures,
            read_bytes = now.read_bytes - before.read_bytes,
            written_bytes = now.written_bytes - before.written_bytes,
            http_requests = now.http.count - before.http.count,
            http_failures = now.http.failures - before.http.failures,
            chunks = now.chunks - before.chunks,
            quorum_p50_us = quorum.p50_us,
            quorum_p99_us = quorum.p99_us,
            commit_p50_us = commit.p50_us,
            commit_p99_us = commit.p99_us,
            "summary of operations since the last line; latencies are since the start"
        );
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_measure::Ending;

    #[test]
    fn it_speaks_only_when_something_happened() {
        let metrics = Metrics::new();
        let mut summary = Summary::new(&metrics, Duration::ZERO);
        assert!(!summary.log_if_due(&metrics));
        metrics
            .operation(Origin::Mount, OperationKind::Session)
            .record(Ending::Done, 0, Duration::ZERO);
        metrics.http(Endpoint::Metrics, 200, 10, Duration::ZERO);
        assert!(
            !summary.log_if_due(&metrics),
            "keep-alives and scrapers are nothing"
        );
        metrics
            .operation(Origin::Mount, OperationKind::Create)
            .record(Ending::Done, 0, Duration::ZERO);
        assert!(summary.log_if_due(&metrics));
        assert!(!summary.log_if_due(&metrics));
        let mut patient = Summary::new(&Metrics::new(), Duration::from_secs(3600));
        assert!(!patient.log_if_due(&metrics), "not yet");
    }
}
