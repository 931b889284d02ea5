//! How leadership goes to another node, how a node that must give its state up makes way, and how a leader knows that the
//! others can do without it.
//!
//! A leader that hands leadership on takes no commands and sends no heartbeats from then on: openraft knows no way back.
//! If the node that was meant does not stand for election, another must; where the only others are nodes that may not
//! lead, none does. So a node is asked before whether it could lead, and a leader that nobody succeeds starts again
//! ([`Consensus::end_futile_hand_on`]).

use std::time::{Duration, Instant};

use openraft::async_runtime::Instant as _;
use quorumfs_proto::NodeId;

use super::fatal::StartAnew;
use super::types::{VoterId, member};
use super::{Consensus, ConsensusError, Ordering};

/// How often it is looked whether another leads, or who has answered.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How long leadership may take to go to another.
const STEP_ASIDE_TIMEOUT: Duration = Duration::from_secs(3);
/// Who has handed leadership on and still leads after this time starts again: several elections would have taken place.
const SUCCESSION_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the others may take to answer the leader: many heartbeats.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1_500);

/// What became of a node that was to make way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SteppedAside {
    /// It does not lead.
    Follows,
    /// Another was asked to lead, and does not.
    InVain,
    /// No voter that can lead has all entries. This one goes on to hand them out: nobody else can.
    NobodyCanLead,
}

impl Consensus {
    /// Asks `to`, a voter, to take over; it does if it can lead and its log is as long.
    pub async fn transfer_leadership(&self, to: NodeId) -> Result<(), ConsensusError> {
        self.hand_on([to]).await.map(drop)
    }

    /// Asks the first of `candidates`, all voters, that can lead to take over, and says who that is.
    pub async fn hand_on(
        &self,
        candidates: impl IntoIterator<Item = NodeId>,
    ) -> Result<NodeId, ConsensusError> {
        let mut refusals = Vec::new();
        for candidate in candidates {
            let id = VoterId(candidate);
            let membership = self.metrics().membership_config;
            let asked = match membership.get_node(&id) {
                Some(node) => self.0.network.ask_whether_it_can_lead(&member(id, node)).await,
                None => Err("it is no member".to_string()),
            };
            match asked {
                Ok(()) => {
                    *self.0.handed_on.lock() = Some((self.term(), Instant::now()));
                    let transferred = self.0.raft.trigger().transfer_leader(id).await;
                    return match transferred {
                        Ok(()) => Ok(candidate),
                        Err(fatal) => Err(ConsensusError::Raft(Box::new(fatal))),
                    };
                }
                Err(refusal) => refusals.push(format!("node {candidate}: {refusal}")),
            }
        }
        Err(ConsensusError::HandOn(match refusals.is_empty() {
            true => "no other voter has all entries".to_string(),
            false => refusals.join("; "),
        }))
    }

    /// Who handed leadership on, and found nobody to take it, leads only in name: it starts again as one of the voters.
    pub(super) fn end_futile_hand_on(&self) {
        let Some((term, at)) = *self.0.handed_on.lock() else {
            return;
        };
        if at.elapsed() > SUCCESSION_TIMEOUT && self.term() == term && self.claims_to_lead() {
            let nobody = StartAnew("nobody has taken leadership over".to_string());
            self.0.fatal.raise("hand leadership on", nobody);
        }
    }

    /// Voters other than this node that have flushed everything committed, the one that is farthest first.
    pub(super) fn voters_up_to_date(&self) -> Vec<NodeId> {
        let metrics = self.metrics();
        let committed = metrics.cluster_committed;
        let is_voter = |id: &VoterId| metrics.membership_config.voter_ids().any(|voter| voter == *id);
        let mut others: Vec<_> = metrics
            .replication
            .iter()
            .flatten()
            .filter(|(id, matched)| is_voter(id) && **id != self.0.id && **matched >= committed)
            .map(|(id, matched)| (*matched, id.0))
            .collect();
        others.sort_unstable_by(|one, other| other.cmp(one));
        others.into_iter().map(|(_, id)| id).collect()
    }

    /// From now on this node serves nothing and does not stand for election.
    pub fn stand_down(&self) {
        self.0.stood_down.store(true, Ordering::Release);
        self.0.raft.runtime_config().elect(false);
    }

    /// Stands down, and hands leadership to a voter that `may_lead`. Returns when this node does not lead, or after
    /// [`STEP_ASIDE_TIMEOUT`].
    pub async fn step_aside(&self, may_lead: impl Fn(NodeId) -> bool) -> SteppedAside {
        self.stand_down();
        let began = Instant::now();
        let has_handed_on = self
            .0
            .handed_on
            .lock()
            .is_some_and(|(term, _)| term == self.term());
        let mut stepped = match has_handed_on {
            true => SteppedAside::InVain,
            false => SteppedAside::NobodyCanLead,
        };
        while self.claims_to_lead() && began.elapsed() < STEP_ASIDE_TIMEOUT {
            let mut candidates = self.voters_up_to_date();
            candidates.retain(|voter| may_lead(*voter));
            // An error means that nobody can now; others may have caught up at the next look.
            if let Ok(to) = self.hand_on(candidates).await {
                tracing::warn!(%to, "this node's state is about to be set aside: handing leadership on");
                stepped = SteppedAside::InVain;
            }
            tokio::time::sleep(4 * LOOK_INTERVAL).await;
        }
        // Those that wait for entries that will not be applied here ask the new leader.
        self.0.barrier.close();
        match self.claims_to_lead() {
            true => stepped,
            false => SteppedAside::Follows,
        }
    }

    /// Whether this node leads a quorum in which `node` does not count, as it would have to if `node` were gone. Voters
    /// count that answer what is sent to them from now on and hold, flushed, all that is committed now, and with it all
    /// that was acknowledged before: an answer to a heartbeat alone says only that a voter lives, however far behind it is.
    ///
    /// A voter whose metadata is damaged counts with its log, as it does in every other vote; one whose log is damaged has
    /// stopped and does not answer.
    pub async fn quorum_without(&self, node: NodeId) -> Result<(), String> {
        if let Some(trouble) = self.trouble() {
            return Err(format!("the leader cannot tell: {trouble}"));
        }
        let asked = Instant::now();
        let _ = self.0.raft.trigger().heartbeat().await;
        let mut must_hold = None;
        loop {
            if !self.is_leader() {
                return Err("the leader that was asked does not lead any more".to_string());
            }
            let metrics = self.metrics();
            // What earlier leaders acknowledged is committed with the first entry of this one.
            let committed = metrics.cluster_committed;
            if must_hold.is_none()
                && committed.is_some_and(|id| id.committed_leader_id().term == metrics.current_term)
            {
                must_hold = committed;
            }
            let acknowledged = metrics.heartbeat.unwrap_or_default();
            let replicated = metrics.replication.unwrap_or_default();
            let answers = |id: &NodeId| {
                let at = acknowledged.get(&VoterId(*id)).and_then(|at| at.as_ref());
                *id == self.id() || at.is_some_and(|at| at.elapsed() < asked.elapsed())
            };
            let holds = |id: &NodeId| {
                let matched = replicated.get(&VoterId(*id)).copied().flatten();
                must_hold.is_some() && matched >= must_hold
            };
            let lives = |id: &NodeId| *id != node && answers(id);
            let is_whole = |id: &NodeId| lives(id) && holds(id);
            let voter_sets = self.voter_sets();
            let Some(voters) = voter_sets.lacking(is_whole) else {
                return Ok(());
            };
            if asked.elapsed() > ANSWER_TIMEOUT {
                let living = voters.iter().filter(|id| lives(id)).count();
                let whole = voters.iter().filter(|id| is_whole(id)).count();
                let of = voters.len();
                return Err(format!(
                    "of {of} voters {living} live without this node, {whole} of them hold all that was acknowledged, and \
                     a majority must"
                ));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}
