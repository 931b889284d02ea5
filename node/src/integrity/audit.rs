//! Audits: all nodes compare their metadata, and one that differs from a majority makes its own anew.
//!
//! Applying the same log must give the same state everywhere; a fault of memory, of a disk behind its checksums, or of a
//! program would make a node answer wrong for ever. From time to time the leader logs an entry at which every node keeps a
//! view; each digests it at its leisure, asks the other voters for their digests, and knows by itself where it stands.
//!
//! A node that a majority contradicts sets log and metadata aside and takes part as a new incarnation, which gets its
//! state from the others by a snapshot and keeps its content. If it leads, another leads first. Where no majority agrees
//! nobody does anything but say so.
//!
//! When: at an interval, and soon after what may have brought a node with other metadata to where it is believed: a start,
//! a new leader, rows that contradict each other. [`schedule`] decides.
//!
//! Knows nothing of how a node is made anew.

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
use crate::tasks::Tasks;
use crate::transport::{Purpose, Transport};
use crate::wall_clock::unix_ms;
use quorumfs_metadata::{LogBody, LogCommand, MetadataStore, StorageFault, View};

/// How often it is looked whether there is something to digest.
const LOOK_INTERVAL_MS: u64 = 200;
/// Digests that others may still ask for.
const DIGESTS_KEPT: usize = 4;
/// How often the others are asked, as long as they have not answered.
const ASK_INTERVAL_MS: u64 = 500;
/// How long they are asked: they may be slower, or away.
const ASK_MS_MAX: u64 = 600_000;
/// How long one may take to answer: from memory.
const ANSWER_TIMEOUT_MS: u64 = 2_000;
/// The feature level at which audits begin.
const FEATURE_LEVEL_MIN: u32 = 2;

/// How an audit ended for this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AuditOutcome {
    /// A majority of the voters has the same metadata.
    Agreed,
    /// A majority has other metadata, all alike: this node makes its own anew.
    Contradicted,
    /// No majority has the same: too few answered, or the nodes differ among themselves.
    Undecided,
}

/// One audit, as this node saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct AuditReport {
    /// The log entry at which all were compared.
    pub index: u64,
    /// The SHA-256 of this node's metadata there, in hexadecimal.
    pub sha256: String,
    /// How it ended; null while the others are asked.
    pub outcome: Option<AuditOutcome>,
    /// Slots of voters with the same metadata.
    pub same: Vec<u16>,
    /// Slots of voters with other metadata.
    pub different: Vec<u16>,
    /// When this was, in milliseconds since 1970.
    pub unix_ms: u64,
    /// How long digesting took, in milliseconds.
    pub digest_ms: u64,
}

/// See the module.
pub struct Auditor {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    transport: Arc<Transport>,
    stamps: Arc<StampClock>,
    interval: Duration,
    digests: Mutex<VecDeque<(u64, Sha256)>>,
    last: Mutex<Option<AuditReport>>,
    /// Whether an audit is under way here.
    is_comparing: AtomicBool,
    contradicted: watch::Sender<Option<u64>>,
    note: Arc<NoteContradicted>,
}

/// Makes it durable that a majority contradicts this node at an entry. Blocks.
type NoteContradicted = dyn Fn(u64) + Send + Sync;

impl Auditor {
    /// The leader has everyone compared every `interval`. Nothing is done before [`Auditor::start`]. `note` is told, before
    /// anybody else, at which entry a majority contradicts this node: when it starts again it must know that.
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

    /// The digest of this node's metadata at entry `index`, if it is known.
    pub fn digest_at(&self, index: u64) -> Option<Sha256> {
        let digests = self.digests.lock();
        digests
            .iter()
            .find(|(at, _)| *at == index)
            .map(|(_, digest)| *digest)
    }

    /// The last audit.
    pub fn report(&self) -> Option<AuditReport> {
        self.last.lock().clone()
    }

    /// Has all nodes compared now; for the leader.
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

    /// Ends once a majority has contradicted this node; says at which entry.
    pub async fn contradicted(&self) -> u64 {
        let mut heard = self.contradicted.subscribe();
        let found = heard.wait_for(Option::is_some).await.map(|index| *index);
        match found {
            Ok(Some(index)) => index,
            // The sender lives as long as this does.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Begins audits where this node leads, and takes part in all, for ever.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("audit-comparing", self.clone(), Self::run_comparing);
        tasks.supervise("audit-schedule", self.clone(), Self::run_schedule);
    }

    async fn run_schedule(self: Arc<Self>) {
        let mut schedule = Schedule::new(self.interval, Instant::now());
        loop {
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            if self.consensus.take_suspicion() {
                warn!("this node's metadata contradicts itself: all nodes are to compare theirs");
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
                debug!(%error, "no audit this time");
            }
        }
    }

    /// Has the leader have all nodes compared.
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
                    error!(%fault, "the metadata cannot be compared");
                    self.consensus.unreadable(&fault);
                    continue;
                }
                Err(panic) => {
                    error!(%panic, "the metadata cannot be compared");
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

    /// Asks the other voters until it is clear where this node stands.
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
            // Whoever left counts no more; a learner compares itself and does not count for others.
            answers.retain(|node, _| voters.contains(node) || *node == self.consensus.id());
            let outcome = judge(&answers, own, voters.len());
            let all_answered = voters.iter().all(|voter| answers.contains_key(voter));
            // What the others have yet to say does not make this node's metadata right.
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
                    // A panic is in the log; the verdict stands all the same.
                    let _ = tokio::task::spawn_blocking(move || note(index)).await;
                    let agreed = majority(&answers, voters.len());
                    self.consensus.step_aside(|node| agreed.contains(&node)).await;
                    self.contradicted.send_replace(Some(index));
                }
                return;
            }
            tokio::time::sleep(Duration::from_millis(ASK_INTERVAL_MS)).await;
            // A newer audit is worth more.
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

/// Says how it ended.
fn conclude(index: u64, outcome: AuditOutcome, different: &[u16]) {
    match outcome {
        AuditOutcome::Agreed if different.is_empty() => debug!(index, "all metadata is alike"),
        AuditOutcome::Agreed => warn!(index, ?different, "nodes have other metadata than the majority"),
        AuditOutcome::Undecided => {
            warn!(
                index,
                ?different,
                "it is not known whether all metadata is alike: no majority agrees"
            );
        }
        AuditOutcome::Contradicted => {
            error!(
                index,
                ?different,
                "this node's metadata differs from that of a majority: it is set aside and made anew"
            );
        }
    }
}

/// Those with the digest that more than half of `voters` have, if any.
fn majority(answers: &BTreeMap<NodeId, Sha256>, voters: usize) -> BTreeSet<NodeId> {
    let alike = |digest: Sha256| -> BTreeSet<NodeId> {
        let same = answers.iter().filter(|(_, other)| **other == digest);
        same.map(|(node, _)| *node).collect()
    };
    let mut sets = answers.values().map(|digest| alike(*digest));
    sets.find(|set| set.len() > voters / 2).unwrap_or_default()
}

/// Where a node whose digest is `own` stands among `voters` voters.
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

/// Half of the time is left to others.
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
