//! Statistics of a mount: the kernel's requests by verb.
//!
//! They are recorded by the edge to the kernel, and reported to users (the extended attribute [`ATTRIBUTE`] of the
//! mount's root) and to the cluster (with the keep-alives). Recording is a few atomic additions, see
//! [`quorumfs_measure`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_measure::{CallCounter, Ending};
use quorumfs_proto::statistics::{CacheStatistics, ClientStatistics, FailedTask, VerbStatistics};
use quorumfs_tasks::Tasks;

/// The extended attribute of a mount's root that contains its statistics as JSON. It is not listed, so that copies of
/// the tree do not include it.
pub const ATTRIBUTE: &str = "user.quorumfs.statistics";

/// The attribute's value is padded with spaces to a multiple of this: programs first ask for its length, and it must
/// not grow before they ask for the value.
const PADDED_TO_BYTES: usize = 8 << 10;

macro_rules! verbs {
    ($($verb:ident $name:literal,)*) => {
        /// The kinds of requests of the kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Verb {
            $(#[doc = $name] $verb,)*
        }

        impl Verb {
            /// All verbs, by index.
            pub const ALL: [Verb; [$($name),*].len()] = [$(Verb::$verb),*];

            /// Returns the name in reports.
            pub fn name(self) -> &'static str {
                match self {
                    $(Verb::$verb => $name,)*
                }
            }
        }
    };
}

verbs! {
    Lookup "lookup",
    GetAttributes "getattr",
    SetAttributes "setattr",
    ReadLink "readlink",
    Mknod "mknod",
    Mkdir "mkdir",
    Symlink "symlink",
    Unlink "unlink",
    Rmdir "rmdir",
    Rename "rename",
    Link "link",
    Open "open",
    Create "create",
    Read "read",
    Write "write",
    Flush "flush",
    Fsync "fsync",
    Release "release",
    OpenDirectory "opendir",
    ReadDirectory "readdir",
    ReleaseDirectory "releasedir",
    FsyncDirectory "fsyncdir",
    Space "statfs",
    SetXattr "setxattr",
    GetXattr "getxattr",
    ListXattrs "listxattr",
    RemoveXattr "removexattr",
}

/// The counters of a mount. Takes about 250 KiB.
#[derive(Debug)]
pub struct Statistics {
    began: Instant,
    verbs: Vec<CallCounter>,
    tasks: Arc<Tasks>,
}

impl Default for Statistics {
    fn default() -> Statistics {
        Statistics::new(Arc::default())
    }
}

impl Statistics {
    /// Makes counters at zero; the report includes what of `tasks` failed.
    pub fn new(tasks: Arc<Tasks>) -> Statistics {
        Statistics {
            began: Instant::now(),
            verbs: Verb::ALL.iter().map(|_| CallCounter::default()).collect(),
            tasks,
        }
    }

    /// Records that a request was answered, and moved `bytes` of content.
    pub fn record(&self, verb: Verb, ending: Ending, bytes: u64, duration: Duration) {
        self.verbs[verb as usize].record(ending, bytes, duration);
    }

    fn failed_tasks(&self) -> Vec<FailedTask> {
        let failed = self.tasks.report().into_iter().filter(|task| task.failures > 0);
        failed
            .map(|task| FailedTask {
                name: task.name.to_string(),
                failures: task.failures,
                last_error: task.last_error.unwrap_or_default(),
            })
            .collect()
    }

    /// Returns the present statistics; verbs without a request are left out.
    pub fn report(&self, cache: CacheStatistics, dirty_bytes: u64) -> ClientStatistics {
        let row = |verb: &Verb| {
            let counter = &self.verbs[*verb as usize];
            (counter.count() > 0).then(|| {
                let snapshot = counter.snapshot();
                VerbStatistics {
                    verb: verb.name().to_string(),
                    count: snapshot.durations.count(),
                    failures: snapshot.failures,
                    bytes: snapshot.bytes,
                    latency: snapshot.durations.latency(),
                }
            })
        };
        ClientStatistics {
            uptime_s: self.began.elapsed().as_secs(),
            verbs: Verb::ALL.iter().filter_map(row).collect(),
            cache,
            dirty_bytes,
            failed_tasks: self.failed_tasks(),
        }
    }
}

/// Returns the value of [`ATTRIBUTE`]: JSON, spaces, a line feed.
pub fn attribute_value(statistics: &ClientStatistics) -> Vec<u8> {
    // Cannot fail: there are no maps with keys other than strings.
    let mut value = serde_json::to_vec(statistics).unwrap_or_default();
    let padded = (value.len() + 1).next_multiple_of(PADDED_TO_BYTES);
    value.resize(padded - 1, b' ');
    value.push(b'\n');
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attribute_is_json_of_the_counters() {
        let statistics = Statistics::default();
        for (index, verb) in Verb::ALL.into_iter().enumerate() {
            assert_eq!(verb as usize, index);
            statistics.record(verb, Ending::Done, 0, Duration::from_secs(1000));
        }
        statistics.record(Verb::Read, Ending::Done, 4096, Duration::from_micros(3));
        statistics.record(Verb::Read, Ending::Failed, 0, Duration::from_micros(3));
        let report = statistics.report(CacheStatistics::default(), 12);
        let value = attribute_value(&report);
        assert_eq!(value.len(), PADDED_TO_BYTES, "with every verb it still fits");
        let parsed: ClientStatistics = serde_json::from_slice(&value).unwrap();
        assert_eq!(parsed, report);
        let read = parsed.verbs.iter().find(|row| row.verb == "read").unwrap();
        assert_eq!((read.count, read.failures, read.bytes), (3, 1, 4096));
        assert_eq!(parsed.dirty_bytes, 12);
    }
}
