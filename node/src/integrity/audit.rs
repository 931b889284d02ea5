//! Audits: all nodes compare their metadata, and a node that differs from a majority rebuilds its own.
//!
//! Applying the same log must give the same state on every node. An error of memory, of a disk beneath its checksums,
//! or of a program would make a node answer wrong for ever. From time to time the leader logs an entry at which every
//! node keeps a view. Each node computes the digest of that view in the background, asks the other voters for theirs,
//! and decides for itself whether it agrees with the majority.
//!
//! A node that a majority contradicts sets log and metadata aside and takes part as a new incarnation, which gets its
//! state from the others as a snapshot and keeps its content. If it leads, another node takes over first. If no
//! majority agrees, the nodes only report it.
//!
//! Audits happen at an interval, and soon after events that may have given a node with other metadata influence: a
//! start, a new leader, rows that contradict each other. [`schedule`] decides.
//!
//! This module does not know how a node is rebuilt.

mod schedule;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use parking_lot::Mutex;
use quorumfs_proto::{Member, NodeId, Sha256};
use quorumfs_wire as wire;
use serde::Serialize;
use tokio::sync::watch;
use tracing::{debug, error, warn};

use self::schedule::{Schedule, Standing, Step};
use crate::consensus::{Consensus, ProposeError};
use crate::observe::clock::StampClock;
use crate::transport::{Purpose, Transport};
use crate::wall_clock::unix_ms;
use quorumfs_metadata::{LogBody, LogCommand, MetadataStore, StorageFault, View};
use quorumfs_tasks::Tasks;

/// Interval at which the auditor looks for a view to digest.
const LOOK_INTERVAL_MS: u64 = 200;
/// Number of digests kept for questions of other nodes.
const DIGESTS_KEPT: usize = 4;
/// Interval at which the other voters are asked until they answer.
const ASK_INTERVAL_MS: u64 = 500;
/// Longest time for which they are asked: they may be slower, or away.
const ASK_MS_MAX: u64 = 600_000;
/// Most time for an answer, which comes from memory.
const ANSWER_TIMEOUT_MS: u64 = 2_000;
/// The feature level at which audits begin.
const FEATURE_LEVEL_MIN: u32 = 2;

/// The result of an audit for this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AuditOutcome {
    /// A majority of the voters has the same metadata.
    Agreed,
    /// A majority has the same, but other metadata: this node rebuilds its own.
    Contradicted,
    /// No majority has the same metadata: too few answered, or the nodes differ among themselves.
    Undecided,
}

/// An audit as seen by this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct AuditReport {
    /// The log entry at which the nodes were compared.
    pub index: u64,
    /// SHA-256 of this node's metadata at that entry, in hexadecimal.
    pub sha256: String,
    /// The result; null while other voters are being asked.
    pub outcome: Option<AuditOutcome>,
    /// Slots of voters with the same metadata.
    pub same: Vec<u16>,
    /// Slots of voters with other metadata.
    pub different: Vec<u16>,
    /// Time of the audit, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Time to compute the digest, in milliseconds.
    pub digest_ms: u64,
}

/// The auditor of a node; see the module documentation.
pub struct Auditor {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    transport: Arc<Transport>,
    stamps: Arc<StampClock>,
    interval: Duration,
    digests: Mutex<VecDeque<(u64, Sha256)>>,
    last: Mutex<Option<AuditReport>>,
    /// Whether an audit is in progress on this node.
    is_comparing: AtomicBool,
    contradicted: watch::Sender<Option<u64>>,
    note: Arc<NoteContradicted>,
}

/// Makes it durable that a majority contradicts this node at an entry. Blocking.
type NoteContradicted = dyn Fn(u64) + Send + Sync;

impl Auditor {
    /// Makes an auditor; as leader, it has all nodes compared every `interval`. It does nothing before
    /// [`Auditor::start`]. `note` is called before anything else with the entry at which a majority contradicts this
    /// node: after a restart the node must know that.
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        transport: Arc<Transport>,
        stamps: Arc<StampClock>,
        interval: Duration,
        note: impl Fn(u64) + Send + Sync + 'static,
    ) -> Arc<Auditor> {
        Arc::new(Auditor {
            consensus,
            metadata,
            transport,
            stamps,
            interval,
            digests: Mutex::default(),
            last: Mutex::default(),
            is_comparing: AtomicBool::new(false),
            contradicted: watch::Sender::new(None),
            note: Arc::new(note),
        })
    }

    /// Returns the digest of this node's metadata at entry `index`, if it is known.
    pub fn digest_at(&self, index: u64) -> Option<Sha256> {
        let digests = self.digests.lock();
        digests
            .iter()
            .find(|(at, _)| *at == index)
            .map(|(_, digest)| *digest)
    }

    /// Returns the last audit.
    pub fn report(&self) -> Option<AuditReport> {
        self.last.lock().clone()
    }

    /// Has all nodes compared now. For the leader.
    ///
    /// # Errors
    /// [`ProposeError`] if the entry is not decided, or not all members know audits.
    pub async fn begin(&self) -> Result<(), ProposeError> {
        let unavailable = |reason: String| ProposeError::Unavailable { reason };
        let view = self.metadata.view();
        let level = view
            .map_err(|fault| unavailable(fault.to_string()))?
            .feature_level();
        if level < FEATURE_LEVEL_MIN {
            return Err(unavailable(
                "not all members are known to take part in audits yet".to_string(),
            ));
        }
        let command = LogCommand {
            stamp: self.stamps.stamp().await,
            body: LogBody::Audit,
        };
        self.consensus.propose(command).await.map(drop)
    }

    /// Resolves with the entry when a majority has contradicted this node.
    pub async fn contradicted(&self) -> u64 {
        let mut heard = self.contradicted.subscribe();
        let found = heard.wait_for(Option::is_some).await.map(|index| *index);
        match found {
            Ok(Some(index)) => index,
            // Cannot happen: the sender lives as long as `self`.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Starts the tasks that begin audits while this node leads, and take part in all audits.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("audit-comparing", self.clone(), Self::run_comparing);
        tasks.supervise("audit-schedule", self.clone(), Self::run_schedule);
    }

    async fn run_schedule(self: Arc<Self>) {
        let mut schedule = Schedule::new(self.interval, Instant::now());
        loop {
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            if self.consensus.take_suspicion() {
                warn!(
                    "rows of this node's metadata contradict each other: all nodes will compare their metadata"
                );
                schedule.suspect();
            }
            let last = self
                .last
                .lock()
                .as_ref()
                .map(|report| (report.index, report.digest_ms));
            let standing = Standing {
                leads_in: self.consensus.is_leader().then(|| self.consensus.term()),
                last,
                is_comparing: self.is_comparing.load(Ordering::Relaxed),
            };
            let begun = match schedule.next(standing, Instant::now()) {
                None => continue,
                Some(Step::Begin) => self.begin().await.map_err(|error| error.to_string()),
                Some(Step::AskLeader) => self.ask_leader().await,
            };
            if let Err(error) = begun {
                debug!(%error, "cannot begin an audit; it is tried again later");
            }
        }
    }

    /// Asks the leader to have all nodes compared.
    async fn ask_leader(&self) -> Result<(), String> {
        let leader = self.consensus.leader().ok_or("no leader is known")?;
        let peer = self.transport.peer(&leader.addresses, Purpose::Control);
        let mut peer = peer.map_err(|error| error.to_string())?;
        let asked = peer.begin_audit(wire::BeginAuditRequest {});
        match tokio::time::timeout(Duration::from_millis(ANSWER_TIMEOUT_MS), asked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(status.message().to_string()),
            Err(_) => Err("the leader does not answer".to_string()),
        }
    }

    async fn run_comparing(self: Arc<Self>) {
        loop {
            self.is_comparing.store(false, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            let Some(view) = self.consensus.take_audited() else {
                continue;
            };
            self.is_comparing.store(true, Ordering::Relaxed);
            let (index, began) = (view.index(), Instant::now());
            let digest = match tokio::task::spawn_blocking(move || digest(&view)).await {
                Ok(Ok(digest)) => digest,
                Ok(Err(fault)) => {
                    error!(%fault, "cannot compute the digest of the metadata for an audit");
                    self.consensus.unreadable(&fault);
                    continue;
                }
                Err(panic) => {
                    error!(%panic, "cannot compute the digest of the metadata for an audit");
                    continue;
                }
            };
            {
                let mut digests = self.digests.lock();
                digests.push_back((index, digest));
                if digests.len() > DIGESTS_KEPT {
                    digests.pop_front();
                }
            }
            *self.last.lock() = Some(AuditReport {
                index,
                sha256: digest.to_string(),
                outcome: None,
                same: Vec::new(),
                different: Vec::new(),
                unix_ms: unix_ms(),
                digest_ms: began.elapsed().as_millis() as u64,
            });
            self.compare(index, digest).await;
        }
    }

    /// Asks the other voters until the result is clear.
    async fn compare(&self, index: u64, own: Sha256) {
        let began = Instant::now();
        let mut answers = BTreeMap::from([(self.consensus.id(), own)]);
        loop {
            let voters = self.consensus.voters();
            let mut open = self.consensus.members();
            open.retain(|member| voters.contains(&member.id) && !answers.contains_key(&member.id));
            let asked = open.iter().map(|member| self.ask(member, index));
            for (member, answer) in open.iter().zip(join_all(asked).await) {
                answers.extend(answer.map(|digest| (member.id, digest)));
            }
            // Nodes that have left do not count; a learner compares itself and does not count for others.
            answers.retain(|node, _| voters.contains(node) || *node == self.consensus.id());
            let outcome = judge(&answers, own, voters.len());
            let all_answered = voters.iter().all(|voter| answers.contains_key(voter));
            // Outstanding answers cannot make this node's metadata right.
            let is_over = all_answered
                || outcome == AuditOutcome::Contradicted
                || began.elapsed() >= Duration::from_millis(ASK_MS_MAX);
            let slots = |same: bool| -> Vec<u16> {
                let alike = answers.iter().filter(|(_, digest)| (**digest == own) == same);
                alike.map(|(node, _)| node.slot).collect()
            };
            if let Some(report) = self.last.lock().as_mut() {
                (report.same, report.different) = (slots(true), slots(false));
                report.outcome = (is_over || outcome == AuditOutcome::Agreed).then_some(outcome);
            }
            if is_over {
                conclude(index, outcome, &slots(false));
                if outcome == AuditOutcome::Contradicted {
                    self.consensus.stand_down();
                    let note = self.note.clone();
                    // A panic has been logged; the result stands in any case.
                    let _ = tokio::task::spawn_blocking(move || note(index)).await;
                    let agreed = majority(&answers, voters.len());
                    self.consensus.step_aside(|node| agreed.contains(&node)).await;
                    self.contradicted.send_replace(Some(index));
                }
                return;
            }
            tokio::time::sleep(Duration::from_millis(ASK_INTERVAL_MS)).await;
            // A newer audit replaces this one.
            if self.consensus.has_audited() {
                return;
            }
        }
    }

    async fn ask(&self, member: &Member, index: u64) -> Option<Sha256> {
        let mut peer = self.transport.peer(&member.addresses, Purpose::Control).ok()?;
        let asked = peer.state_digest(wire::StateDigestRequest { index });
        let answer = tokio::time::timeout(Duration::from_millis(ANSWER_TIMEOUT_MS), asked).await;
        let digest = answer.ok()?.ok()?.into_inner().sha256;
        digest.as_ref().try_into().ok().map(Sha256)
    }
}

/// Logs the result.
fn conclude(index: u64, outcome: AuditOutcome, different: &[u16]) {
    match outcome {
        AuditOutcome::Agreed if different.is_empty() => debug!(index, "all nodes have the same metadata"),
        AuditOutcome::Agreed => warn!(
            index,
            ?different,
            "some nodes have other metadata than the majority; they rebuild theirs"
        ),
        AuditOutcome::Undecided => {
            warn!(
                index,
                ?different,
                "the audit is undecided: no majority of the voters has the same metadata"
            );
        }
        AuditOutcome::Contradicted => {
            error!(
                index,
                ?different,
                "this node's metadata differs from that of a majority: it will be set aside and rebuilt from the other nodes"
            );
        }
    }
}

/// Returns the nodes with the digest that more than half of `voters` have, if any.
fn majority(answers: &BTreeMap<NodeId, Sha256>, voters: usize) -> BTreeSet<NodeId> {
    let alike = |digest: Sha256| -> BTreeSet<NodeId> {
        let same = answers.iter().filter(|(_, other)| **other == digest);
        same.map(|(node, _)| *node).collect()
    };
    let mut sets = answers.values().map(|digest| alike(*digest));
    sets.find(|set| set.len() > voters / 2).unwrap_or_default()
}

/// Returns the result for a node whose digest is `own`, among `voters` voters.
fn judge(answers: &BTreeMap<NodeId, Sha256>, own: Sha256, voters: usize) -> AuditOutcome {
    let majority = majority(answers, voters);
    let is_of_it = answers
        .iter()
        .any(|(node, digest)| *digest == own && majority.contains(node));
    match (majority.is_empty(), is_of_it) {
        (true, _) => AuditOutcome::Undecided,
        (false, true) => AuditOutcome::Agreed,
        (false, false) => AuditOutcome::Contradicted,
    }
}

/// Computes the digest; half of the time is left to other work.
fn digest(view: &View) -> Result<Sha256, StorageFault> {
    let mut since = Instant::now();
    view.digest(|| {
        std::thread::sleep(since.elapsed());
        since = Instant::now();
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_majority_decides_and_nothing_less() {
        let digest = |of: &str| Sha256::of(of.as_bytes());
        let said = |digests: &[&str]| -> BTreeMap<NodeId, Sha256> {
            let nodes = digests.iter().zip(1u16..).map(|(of, slot)| {
                let node = NodeId { slot, incarnation: 1 };
                (node, digest(of))
            });
            nodes.collect()
        };
        let judge = |digests: &[&str], voters| judge(&said(digests), digest(digests[0]), voters);
        assert_eq!(judge(&["a", "a", "a"], 3), AuditOutcome::Agreed);
        assert_eq!(judge(&["a", "a", "b"], 3), AuditOutcome::Agreed);
        assert_eq!(judge(&["a", "b", "b"], 3), AuditOutcome::Contradicted);
        assert_eq!(judge(&["a", "b", "c"], 3), AuditOutcome::Undecided);
        assert_eq!(judge(&["a", "b"], 3), AuditOutcome::Undecided);
        assert_eq!(judge(&["a", "b", "b"], 5), AuditOutcome::Undecided);
        assert_eq!(judge(&["a"], 1), AuditOutcome::Agreed);
    }
}
