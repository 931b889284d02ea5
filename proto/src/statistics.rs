//! A client's report on its own work: a mount shows it to its users and sends it with its keep-alives.

use quorumfs_measure::Latency;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The work of a client since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClientStatistics {
    /// Time since the start, in seconds.
    pub uptime_s: u64,
    /// The kinds of requests that the client has had.
    pub verbs: Vec<VerbStatistics>,
    /// The client's cache of chunks.
    pub cache: CacheStatistics,
    /// Bytes that programs wrote and the cluster does not have yet.
    pub dirty_bytes: u64,
    /// The background tasks that failed at least once.
    #[serde(default)]
    pub failed_tasks: Vec<FailedTask>,
}

/// A background task of a client that failed; it is started again after each failure.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FailedTask {
    /// Name of the task.
    pub name: String,
    /// Number of failures.
    pub failures: u64,
    /// The reason of the last failure.
    pub last_error: String,
}

/// One kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerbStatistics {
    /// The kind: `read`, `write`, `lookup`, …
    pub verb: String,
    /// Number of requests.
    pub count: u64,
    /// Number of requests answered with an error. A look-up of a name that does not exist counts as one.
    pub failures: u64,
    /// Bytes of content moved by the requests.
    pub bytes: u64,
    /// Durations of the requests, as programs see them.
    pub latency: Latency,
}

/// A cache of chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CacheStatistics {
    /// Look-ups that found the chunk.
    pub hits: u64,
    /// Look-ups that did not.
    pub misses: u64,
    /// Bytes held now.
    pub bytes: u64,
}
