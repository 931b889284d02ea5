//! What this node does, counted: operations by kind and origin, HTTP requests, replication, commits; and what is made
//! of it: a report ([`report`]), Prometheus' text ([`exposition`]), an analysis ([`tradeoffs`]), a line in the log
//! ([`summary`]).
//!
//! Recording is a few relaxed atomic additions (see [`quorumfs_measure`]): no lock but, for calls, a shared one that
//! tells whose session it is; no allocation. What is "now" comes from samples taken once a second ([`window`]), so it
//! costs the paths nothing. Counts begin with the process and are never reset.
//!
//! The leader counts what clients asked of the cluster, and reads that came to it; the other nodes only what came
//! to them. Nothing here decides anything.

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

/// Sessions whose origin is remembered; beyond it all are forgotten and asked for again.
const ORIGINS_MAX: usize = 16 << 10;
/// How often the counters are sampled.
const SAMPLE_INTERVAL_MS: u64 = 1_000;

/// All counters of a node. Some 600 KiB.
pub struct Metrics {
    began: Instant,
    /// By origin, then kind.
    operations: Vec<CallCounter>,
    refusals: [AtomicU64; RefusalKind::ALL.len()],
    http: Vec<HttpTally>,
    /// Commands decided through this node's log.
    pub commits: CallCounter,
    /// How chunks reach their nodes.
    pub replication: Arc<Replication>,
    /// What mounts say of themselves.
    pub mounts: Mounts,
    origins: RwLock<HashMap<SessionId, Origin>>,
    window: Mutex<Window<Vec<window::Totals>>>,
    /// Of [`Metrics::commits`].
    commit_window: Mutex<Window<Snapshot>>,
}

/// HTTP requests of one endpoint.
#[derive(Debug, Default)]
struct HttpTally {
    tally: CallCounter,
    /// 1xx and 2xx, 3xx, 4xx, 5xx.
    classes: [AtomicU64; 4],
}

/// What HTTP answered, by its hundreds.
pub const STATUS_CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

impl Metrics {
    /// Nothing counted.
    pub fn new() -> Metrics {
        let operations = Origin::ALL.len() * OperationKind::ALL.len();
        Metrics {
            began: Instant::now(),
            operations: (0..operations).map(|_| CallCounter::default()).collect(),
            refusals: Default::default(),
            http: Endpoint::ALL.iter().map(|_| HttpTally::default()).collect(),
            commits: CallCounter::default(),
            replication: Arc::default(),
            mounts: Mounts::default(),
            origins: RwLock::default(),
            window: Mutex::default(),
            commit_window: Mutex::default(),
        }
    }

    /// How long this has been counting.
    pub fn uptime(&self) -> Duration {
        self.began.elapsed()
    }

    /// The counters of one kind.
    pub fn operation(&self, origin: Origin, kind: OperationKind) -> &CallCounter {
        &self.operations[origin as usize * OperationKind::ALL.len() + kind as usize]
    }

    /// A command was answered. Its operations count if it was decided; a refusal counts as one.
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

    /// A query was answered.
    pub fn query(&self, origin: Origin, kind: OperationKind, reply: &ClientResponse, duration: Duration) {
        match reply {
            ClientResponse::Answer(answer) => {
                self.operation(origin, kind)
                    .record(Ending::of(answer), 0, duration);
            }
            _ => self.refused(reply),
        }
    }

    /// A session was opened, kept or closed.
    pub fn session(&self, origin: Origin, reply: &ClientResponse, duration: Duration) {
        match reply {
            ClientResponse::Session(_) => {
                self.operation(origin, OperationKind::Session)
                    .record(Ending::Done, 0, duration);
            }
            _ => self.refused(reply),
        }
    }

    /// A reply, if it is a refusal.
    pub fn refused(&self, reply: &ClientResponse) {
        if let Some(kind) = RefusalKind::of_reply(reply) {
            self.refusals[kind as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often calls were refused so.
    pub fn refusals(&self, kind: RefusalKind) -> u64 {
        self.refusals[kind as usize].load(Ordering::Relaxed)
    }

    /// An HTTP request was answered with `status`, and `bytes` of content came or went.
    pub fn http(&self, endpoint: Endpoint, status: u16, bytes: u64, duration: Duration) {
        let ending = match status {
            0..400 => Ending::Done,
            _ => Ending::Failed,
        };
        let tally = &self.http[endpoint as usize];
        tally.tally.record(ending, bytes, duration);
        let class = match status {
            0..300 => 0,
            300..400 => 1,
            400..500 => 2,
            _ => 3,
        };
        tally.classes[class].fetch_add(1, Ordering::Relaxed);
    }

    /// The requests of one endpoint, and how many were answered with each of [`STATUS_CLASSES`].
    pub fn http_requests(&self, endpoint: Endpoint) -> (&CallCounter, [u64; 4]) {
        let tally = &self.http[endpoint as usize];
        let classes = tally
            .classes
            .each_ref()
            .map(|class| class.load(Ordering::Relaxed));
        (&tally.tally, classes)
    }

    /// Where a session's calls come from; `describe` is asked once for each session.
    pub fn origin(&self, session: SessionId, describe: impl FnOnce() -> Option<String>) -> Origin {
        if let Some(known) = self.origins.read().get(&session) {
            return *known;
        }
        // What is not known yet (it is just being opened) is asked for again.
        let Some(description) = describe() else {
            return Origin::Mount;
        };
        self.opened(session, &description)
    }

    /// A session says what it is.
    pub fn opened(&self, session: SessionId, description: &str) -> Origin {
        let origin = Origin::of_description(description);
        let mut origins = self.origins.write();
        if origins.len() >= ORIGINS_MAX {
            origins.clear();
        }
        origins.insert(session, origin);
        origin
    }

    /// Samples once a second, for ever, and logs a summary every `summary_interval` in which something happened.
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

    /// Counts, failures and bytes of each kind of operation, then of each endpoint.
    fn totals(&self) -> Vec<window::Totals> {
        let http = self.http.iter().map(|tally| &tally.tally);
        self.operations
            .iter()
            .chain(http)
            .map(window::Totals::of)
            .collect()
    }

    /// How long the commands of the last seconds took.
    fn commits_lately(&self) -> Snapshot {
        self.commit_window
            .lock()
            .lately(&self.commits.snapshot().durations)
    }

    /// What each kind of operation, then each endpoint, did per second lately, and over how long that was taken.
    fn rates(&self) -> (Duration, Vec<window::Rate>) {
        let totals = self.totals();
        self.window.lock().rates(self.began, Instant::now(), &totals)
    }
}

/// What of a command counts, kept while the command itself goes its way.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountedCommand {
    /// Operations of each kind; a command has at most 256.
    counts: [u16; OperationKind::ALL.len()],
    written_bytes: u64,
    appended_bytes: u64,
}

impl CountedCommand {
    /// Of `command`.
    pub fn of(command: &Command) -> CountedCommand {
        let mut counted = CountedCommand::default();
        for operation in &command.operations {
            let kind = OperationKind::of_operation(operation);
            let bytes: u64 = operation
                .pieces()
                .iter()
                .map(|piece| u64::from(piece.length))
                .sum();
            counted.counts[kind as usize] = counted.counts[kind as usize].saturating_add(1);
            match kind {
                OperationKind::Append => counted.appended_bytes += bytes,
                _ => counted.written_bytes += bytes,
            }
        }
        counted
    }

    /// Kinds that occur, how often, and their bytes.
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
        let (tally, classes) = metrics.http_requests(Endpoint::Download);
        assert_eq!((tally.count(), tally.failures(), tally.bytes()), (6, 3, 30));
        assert_eq!(classes, [2, 1, 2, 1]);
    }
}
