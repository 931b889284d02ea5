//! What a client says of its own work: a mount shows it to its users and sends it with its keep-alives.

use quorumfs_measure::Latency;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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
