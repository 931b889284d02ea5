//! What a client says of its own work: a mount shows it to its users and sends it with its keep-alives.

use quorumfs_measure::Latency;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::wire;

/// Most verbs that are taken from a client.
const VERBS_MAX: usize = 64;
/// Most bytes of a verb's name.
const VERB_BYTES_MAX: usize = 32;

/// What a client has done since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClientStatistics {
    /// For how long it has run, in seconds.
    pub uptime_s: u64,
    /// Each kind of request that it had so far.
    pub verbs: Vec<VerbStatistics>,
    /// Its cache of chunks.
    pub cache: CacheStatistics,
    /// Bytes that programs wrote and the cluster does not have yet.
    pub dirty_bytes: u64,
}

/// One kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerbStatistics {
    /// Which: `read`, `write`, `lookup`, …
    pub verb: String,
    /// How many.
    pub count: u64,
    /// How many of them were answered with an error. A name that is not there is one.
    pub failures: u64,
    /// Bytes of content that they moved.
    pub bytes: u64,
    /// How long the program waited.
    pub latency: Latency,
}

/// A cache of chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CacheStatistics {
    /// Looks that found what they wanted.
    pub hits: u64,
    /// Looks that did not.
    pub misses: u64,
    /// Bytes held now.
    pub bytes: u64,
}

impl From<&ClientStatistics> for wire::ClientStatistics {
    fn from(statistics: &ClientStatistics) -> wire::ClientStatistics {
        wire::ClientStatistics {
            uptime_s: statistics.uptime_s,
            verbs: statistics
                .verbs
                .iter()
                .map(|row| wire::VerbStatistics {
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
        }
    }
}

impl From<wire::ClientStatistics> for ClientStatistics {
    /// What is out of bounds is left out: it is only shown.
    fn from(told: wire::ClientStatistics) -> ClientStatistics {
        let fits = |row: &wire::VerbStatistics| row.verb.len() <= VERB_BYTES_MAX;
        ClientStatistics {
            uptime_s: told.uptime_s,
            verbs: told
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
                hits: told.cache_hits,
                misses: told.cache_misses,
                bytes: told.cache_bytes,
            },
            dirty_bytes: told.dirty_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_arrive_as_they_were_sent_within_bounds() {
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
        };
        let wire = wire::ClientStatistics::from(&statistics);
        assert_eq!(ClientStatistics::from(wire.clone()), statistics);
        let mut hostile = wire;
        hostile.verbs = vec![hostile.verbs[0].clone(); 10_000];
        hostile.verbs[0].verb = "x".repeat(100_000);
        let taken = ClientStatistics::from(hostile);
        assert_eq!(taken.verbs.len(), VERBS_MAX);
        assert!(taken.verbs.iter().all(|row| row.verb == "read"));
    }
}
