//! The metrics of this node: operations by kind and origin, HTTP requests, replication, commits; and their uses: a
//! report ([`report`]), Prometheus' text ([`exposition`]), an analysis ([`tradeoffs`]), a line in the log
//! ([`summary`]).
//!
//! Recording is a few relaxed atomic additions (see [`quorumfs_measure`]), without allocation and without a lock,
//! except for a shared lock that finds the origin of a call's session. Present rates come from samples taken once a
//! second ([`window`]), so they add no cost to the calls. Counts begin with the process and are never reset.
//!
//! The leader counts the calls of clients to the cluster, and reads that reached it; the other nodes only count what
//! reached them. Nothing here decides anything.

pub mod exposition;
pub mod kinds;
pub mod mounts;
pub mod replication;
pub mod report;
pub mod summary;
pub mod tradeoffs;
mod window;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use quorumfs_measure::{CallCounter, Ending, Snapshot};
use quorumfs_proto::{ClientResponse, Command, SessionId};

use kinds::{Endpoint, OperationKind, Origin, RefusalKind};
use mounts::Mounts;
use replication::Replication;
use window::Window;

/// Most sessions whose origin is cached; beyond it all are dropped and looked up again.
const ORIGINS_MAX: usize = 16 << 10;
/// Interval of the samples.
const SAMPLE_INTERVAL_MS: u64 = 1_000;

/// All counters of a node. Takes about 600 KiB.
pub struct Metrics {
    began: Instant,
    /// By origin, then by kind.
    operations: Vec<CallCounter>,
    refusals: [AtomicU64; RefusalKind::ALL.len()],
    http: Vec<HttpCounter>,
    /// Commands decided through this node's log.
    pub commits: CallCounter,
    /// Counters of the replication of chunks.
    pub replication: Arc<Replication>,
    /// The reports of mounts.
    pub mounts: Mounts,
    origins: RwLock<HashMap<SessionId, Origin>>,
    window: Mutex<Window<Vec<window::Totals>>>,
    /// Samples of [`Metrics::commits`].
    commit_window: Mutex<Window<Snapshot>>,
}

/// HTTP requests of one endpoint.
#[derive(Debug, Default)]
struct HttpCounter {
    calls: CallCounter,
    /// Responses 1xx and 2xx, 3xx, 4xx, 5xx.
    classes: [AtomicU64; 4],
}

/// The classes of HTTP statuses.
pub const STATUS_CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

impl Metrics {
    /// Returns counters at zero.
    pub fn new() -> Metrics {
        let operations = Origin::ALL.len() * OperationKind::ALL.len();
        Metrics {
            began: Instant::now(),
            operations: (0..operations).map(|_| CallCounter::default()).collect(),
            refusals: Default::default(),
            http: Endpoint::ALL.iter().map(|_| HttpCounter::default()).collect(),
            commits: CallCounter::default(),
            replication: Arc::default(),
            mounts: Mounts::default(),
            origins: RwLock::default(),
            window: Mutex::default(),
            commit_window: Mutex::default(),
        }
    }

    /// Returns the time since the counters were created.
    pub fn uptime(&self) -> Duration {
        self.began.elapsed()
    }

    /// Returns the counters of one kind.
    pub fn operation(&self, origin: Origin, kind: OperationKind) -> &CallCounter {
        &self.operations[origin as usize * OperationKind::ALL.len() + kind as usize]
    }

    /// Records the reply to a command. Its operations count if it was decided; a refusal counts as one event.
    pub fn command(
        &self,
        origin: Origin,
        counted: CountedCommand,
        reply: &ClientResponse,
        duration: Duration,
    ) {
        let ending = match reply {
            ClientResponse::Outcome(outcome) => Ending::of(outcome),
            _ => return self.refused(reply),
        };
        for (kind, count, bytes) in counted.rows() {
            for nth in 0..count {
                let bytes = if nth == 0 { bytes } else { 0 };
                self.operation(origin, kind).record(ending, bytes, duration);
            }
        }
    }

    /// Records the reply to a query.
    pub fn query(&self, origin: Origin, kind: OperationKind, reply: &ClientResponse, duration: Duration) {
        match reply {
            ClientResponse::Answer(answer) => {
                self.operation(origin, kind)
                    .record(Ending::of(answer), 0, duration);
            }
            _ => self.refused(reply),
        }
    }

    /// Records that a session was opened, kept alive or closed.
    pub fn session(&self, origin: Origin, reply: &ClientResponse, duration: Duration) {
        match reply {
            ClientResponse::Session(_) => {
                self.operation(origin, OperationKind::Session)
                    .record(Ending::Done, 0, duration);
            }
            _ => self.refused(reply),
        }
    }

    /// Counts the reply if it is a refusal.
    pub fn refused(&self, reply: &ClientResponse) {
        if let Some(kind) = RefusalKind::of_reply(reply) {
            self.refusals[kind as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the number of refusals of this kind.
    pub fn refusals(&self, kind: RefusalKind) -> u64 {
        self.refusals[kind as usize].load(Ordering::Relaxed)
    }

    /// Records an HTTP request that was answered with `status`, and the `bytes` of content that it moved.
    pub fn http(&self, endpoint: Endpoint, status: u16, bytes: u64, duration: Duration) {
        let ending = match status {
            0..400 => Ending::Done,
            _ => Ending::Failed,
        };
        let counter = &self.http[endpoint as usize];
        counter.calls.record(ending, bytes, duration);
        let class = match status {
            0..300 => 0,
            300..400 => 1,
            400..500 => 2,
            _ => 3,
        };
        counter.classes[class].fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the requests of one endpoint, and the number of responses in each of [`STATUS_CLASSES`].
    pub fn http_requests(&self, endpoint: Endpoint) -> (&CallCounter, [u64; 4]) {
        let counter = &self.http[endpoint as usize];
        let classes = counter
            .classes
            .each_ref()
            .map(|class| class.load(Ordering::Relaxed));
        (&counter.calls, classes)
    }

    /// Returns the origin of a session; `describe` is called once for each session.
    pub fn origin(&self, session: SessionId, describe: impl FnOnce() -> Option<String>) -> Origin {
        if let Some(known) = self.origins.read().get(&session) {
            return *known;
        }
        // An unknown description (the session is being opened) is looked up again.
        let Some(description) = describe() else {
            return Origin::Mount;
        };
        self.opened(session, &description)
    }

    /// Records the description of a session.
    pub fn opened(&self, session: SessionId, description: &str) -> Origin {
        let origin = Origin::of_description(description);
        let mut origins = self.origins.write();
        if origins.len() >= ORIGINS_MAX {
            origins.clear();
        }
        origins.insert(session, origin);
        origin
    }

    /// Samples once a second, and logs a summary every `summary_interval` if something happened; never returns.
    pub async fn run(self: Arc<Self>, summary_interval: Duration) {
        let mut summary = summary::Summary::new(&self, summary_interval);
        loop {
            tokio::time::sleep(Duration::from_millis(SAMPLE_INTERVAL_MS)).await;
            self.sample();
            summary.log_if_due(&self);
        }
    }

    fn sample(&self) {
        let now = Instant::now();
        self.window.lock().add(now, self.totals());
        self.commit_window
            .lock()
            .add(now, self.commits.snapshot().durations);
    }

    /// Returns counts, failures and bytes of each kind of operation, then of each endpoint.
    fn totals(&self) -> Vec<window::Totals> {
        let http = self.http.iter().map(|counter| &counter.calls);
        self.operations
            .iter()
            .chain(http)
            .map(window::Totals::of)
            .collect()
    }

    /// Returns the durations of the commands of the last seconds.
    fn commits_lately(&self) -> Snapshot {
        self.commit_window
            .lock()
            .lately(&self.commits.snapshot().durations)
    }

    /// Returns the present rates of each kind of operation, then of each endpoint, and the window they cover.
    fn rates(&self) -> (Duration, Vec<window::Rate>) {
        let totals = self.totals();
        self.window.lock().rates(self.began, Instant::now(), &totals)
    }
}

/// The countable parts of a command, kept while the command itself is processed.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountedCommand {
    /// Number of operations of each kind; a command has at most 256.
    counts: [u16; OperationKind::ALL.len()],
    written_bytes: u64,
    appended_bytes: u64,
}

impl CountedCommand {
    /// Counts the operations of `command`.
    pub fn of(command: &Command) -> CountedCommand {
        let mut counted = CountedCommand::default();
        for operation in &command.operations {
            let kind = OperationKind::of_operation(operation);
            let bytes: u64 = operation
                .extents()
                .iter()
                .map(|extent| u64::from(extent.length))
                .sum();
            counted.counts[kind as usize] = counted.counts[kind as usize].saturating_add(1);
            match kind {
                OperationKind::Append => counted.appended_bytes += bytes,
                _ => counted.written_bytes += bytes,
            }
        }
        counted
    }

    /// Returns the kinds that occur, with their number and bytes.
    fn rows(&self) -> impl Iterator<Item = (OperationKind, u16, u64)> {
        let row = |kind: OperationKind| {
            let bytes = match kind {
                OperationKind::Write => self.written_bytes,
                OperationKind::Append => self.appended_bytes,
                _ => 0,
            };
            (kind, self.counts[kind as usize], bytes)
        };
        OperationKind::ALL
            .into_iter()
            .map(row)
            .filter(|(_, count, _)| *count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_proto::command::{Held, Target};
    use quorumfs_proto::{FsError, InodeNumber, Name, Operation, Outcome, Refusal};

    fn unlink() -> Operation {
        Operation::Unlink {
            parent: Target::Inode(InodeNumber::ROOT),
            name: Name::new(&b"x"[..]).unwrap(),
            held: Held::NotOpen,
        }
    }

    #[test]
    fn every_operation_of_a_command_counts_and_refusals_count_apart() {
        let metrics = Metrics::new();
        let command = Command {
            chunks: Vec::new(),
            operations: vec![unlink(), unlink(), unlink()],
        };
        let counted = CountedCommand::of(&command);
        let took = Duration::from_micros(300);
        let done = ClientResponse::Outcome(Ok(Outcome::default()));
        metrics.command(Origin::Rest, counted, &done, took);
        metrics.command(
            Origin::Rest,
            counted,
            &ClientResponse::Outcome(Err(FsError::NotFound)),
            took,
        );
        let refused = ClientResponse::Refused(Refusal::NotLeader { leader: None });
        metrics.command(Origin::Rest, counted, &refused, took);
        let deletes = metrics.operation(Origin::Rest, OperationKind::Delete);
        assert_eq!((deletes.count(), deletes.failures()), (6, 3));
        assert_eq!(metrics.operation(Origin::Mount, OperationKind::Delete).count(), 0);
        assert_eq!(metrics.refusals(RefusalKind::NotLeader), 1);
    }

    #[test]
    fn a_session_is_described_once() {
        let metrics = Metrics::new();
        let session = SessionId(7);
        assert_eq!(metrics.origin(session, || None), Origin::Mount);
        let rest = || Some(String::from("REST of node 1 at h:1"));
        assert_eq!(metrics.origin(session, rest), Origin::Rest);
        assert_eq!(metrics.origin(session, || panic!("asked twice")), Origin::Rest);
    }

    #[test]
    fn http_requests_are_told_by_their_hundreds() {
        let metrics = Metrics::new();
        for status in [200, 206, 304, 404, 409, 503] {
            metrics.http(Endpoint::Download, status, 10, Duration::from_millis(1));
        }
        let (counter, classes) = metrics.http_requests(Endpoint::Download);
        assert_eq!((counter.count(), counter.failures(), counter.bytes()), (6, 3, 30));
        assert_eq!(classes, [2, 1, 2, 1]);
    }
}
