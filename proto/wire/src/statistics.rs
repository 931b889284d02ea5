//! Conversions of the statistics of a client to and from messages.

use quorumfs_measure::Latency;
use quorumfs_proto::statistics::{CacheStatistics, ClientStatistics, FailedTask, VerbStatistics};

use crate::messages;

/// Most verbs accepted from a client.
const VERBS_MAX: usize = 64;
/// Most bytes of the name of a verb.
const VERB_BYTES_MAX: usize = 32;
/// Most failed tasks accepted from a client.
const TASKS_MAX: usize = 16;
/// Most bytes of the name of a task, and of the reason of its failure, which is cut.
const TASK_BYTES_MAX: usize = 1 << 10;

impl From<&ClientStatistics> for messages::ClientStatistics {
    fn from(statistics: &ClientStatistics) -> messages::ClientStatistics {
        messages::ClientStatistics {
            uptime_s: statistics.uptime_s,
            verbs: statistics
                .verbs
                .iter()
                .map(|row| messages::VerbStatistics {
                    verb: row.verb.clone(),
                    count: row.count,
                    failures: row.failures,
                    bytes: row.bytes,
                    mean_us: row.latency.mean_us,
                    p50_us: row.latency.p50_us,
                    p90_us: row.latency.p90_us,
                    p99_us: row.latency.p99_us,
                    max_us: row.latency.max_us,
                })
                .collect(),
            cache_hits: statistics.cache.hits,
            cache_misses: statistics.cache.misses,
            cache_bytes: statistics.cache.bytes,
            dirty_bytes: statistics.dirty_bytes,
            failed_tasks: statistics
                .failed_tasks
                .iter()
                .map(|task| messages::FailedTask {
                    name: task.name.clone(),
                    failures: task.failures,
                    last_error: cut(&task.last_error),
                })
                .collect(),
        }
    }
}

/// Returns the first [`TASK_BYTES_MAX`] bytes of `text`, or less so that no character is cut in two.
fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(TASK_BYTES_MAX)].to_string()
}

impl From<messages::ClientStatistics> for ClientStatistics {
    /// Drops rows that are out of bounds, because statistics are only displayed.
    fn from(statistics: messages::ClientStatistics) -> ClientStatistics {
        let fits = |row: &messages::VerbStatistics| row.verb.len() <= VERB_BYTES_MAX;
        let task_fits = |task: &messages::FailedTask| task.name.len() <= TASK_BYTES_MAX;
        ClientStatistics {
            uptime_s: statistics.uptime_s,
            verbs: statistics
                .verbs
                .into_iter()
                .filter(fits)
                .take(VERBS_MAX)
                .map(|row| VerbStatistics {
                    verb: row.verb,
                    count: row.count,
                    failures: row.failures,
                    bytes: row.bytes,
                    latency: Latency {
                        mean_us: row.mean_us,
                        p50_us: row.p50_us,
                        p90_us: row.p90_us,
                        p99_us: row.p99_us,
                        max_us: row.max_us,
                    },
                })
                .collect(),
            cache: CacheStatistics {
                hits: statistics.cache_hits,
                misses: statistics.cache_misses,
                bytes: statistics.cache_bytes,
            },
            dirty_bytes: statistics.dirty_bytes,
            failed_tasks: statistics
                .failed_tasks
                .into_iter()
                .filter(task_fits)
                .take(TASKS_MAX)
                .map(|task| FailedTask {
                    name: task.name,
                    failures: task.failures,
                    last_error: cut(&task.last_error),
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_converted_within_bounds() {
        let row = |verb: &str| VerbStatistics {
            verb: verb.to_string(),
            count: 5,
            failures: 1,
            bytes: 4096,
            latency: Latency {
                mean_us: 3,
                p50_us: 2,
                p90_us: 4,
                p99_us: 8,
                max_us: 9,
            },
        };
        let statistics = ClientStatistics {
            uptime_s: 60,
            verbs: vec![row("read"), row("write")],
            cache: CacheStatistics {
                hits: 10,
                misses: 2,
                bytes: 1 << 20,
            },
            dirty_bytes: 77,
            failed_tasks: vec![FailedTask {
                name: "write-back".to_string(),
                failures: 2,
                last_error: "it ended".to_string(),
            }],
        };
        let wire = messages::ClientStatistics::from(&statistics);
        assert_eq!(ClientStatistics::from(wire.clone()), statistics);
        let mut hostile = wire;
        hostile.verbs = vec![hostile.verbs[0].clone(); 10_000];
        hostile.verbs[0].verb = "x".repeat(100_000);
        hostile.failed_tasks = vec![hostile.failed_tasks[0].clone(); 10_000];
        hostile.failed_tasks[0].name = "x".repeat(100_000);
        hostile.failed_tasks[1].last_error = "é".repeat(100_000);
        let taken = ClientStatistics::from(hostile);
        assert_eq!(taken.verbs.len(), VERBS_MAX);
        assert!(taken.verbs.iter().all(|row| row.verb == "read"));
        assert_eq!(taken.failed_tasks.len(), TASKS_MAX);
        assert_eq!(taken.failed_tasks[0].last_error, "é".repeat(TASK_BYTES_MAX / 2));
        assert_eq!(taken.failed_tasks[1].last_error, "it ended");
    }
}
