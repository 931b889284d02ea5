//! Handing leadership to another node: how a leader does it, how a node that must give up its state makes way, and how
//! a leader checks that the other voters suffice without a node.
//!
//! A leader that hands on leadership takes no commands and sends no heartbeats from then on; openraft cannot undo this.
//! If the chosen node does not stand for election, another must; if all others are nodes that may not lead, none does.
//! So a node is asked first whether it could lead, and a leader without a successor starts again
//! ([`Consensus::end_futile_hand_on`]).

use std::time::{Duration, Instant};

use openraft::async_runtime::Instant as _;
use quorumfs_proto::NodeId;

use super::fatal::StartAnew;
use super::types::{VoterId, member};
use super::{Consensus, ConsensusError, Ordering};

/// Interval at which a change of leader, or new answers, are looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Most time for leadership to move to another node.
const STEP_ASIDE_TIMEOUT: Duration = Duration::from_secs(3);
/// A node that has handed on leadership and still leads after this time starts again: several elections would have
/// taken place.
const SUCCESSION_TIMEOUT: Duration = Duration::from_secs(10);
/// Most time for the others to answer the leader: many heartbeats.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1_500);

/// The result of [`Consensus::step_aside`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SteppedAside {
    /// The node does not lead.
    Follows,
    /// Another node was asked to lead, and does not.
    InVain,
    /// No voter that can lead has all entries. This node continues to send them: no other node can.
    NobodyCanLead,
}

impl Consensus {
    /// Asks the voter `to` to take over. It does so if it can lead and its log is as long.
    ///
    /// # Errors
    /// [`ConsensusError::HandOn`] if it cannot lead.
    pub async fn transfer_leadership(&self, to: NodeId) -> Result<(), ConsensusError> {
        self.hand_on([to]).await.map(drop)
    }

    /// Asks the first of `candidates`, all voters, that can lead to take over, and returns its id.
    ///
    /// # Errors
    /// [`ConsensusError::HandOn`] with the refusals if none can lead.
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

    /// A node that handed on leadership without a successor leads only in name: it starts again as one of the voters.
    pub(super) fn end_futile_hand_on(&self) {
        let Some((term, at)) = *self.0.handed_on.lock() else {
            return;
        };
        if at.elapsed() > SUCCESSION_TIMEOUT && self.term() == term && self.claims_to_lead() {
            let nobody = StartAnew("leadership was handed on, and no node has taken over".to_string());
            self.0.fatal.raise("hand leadership on", nobody);
        }
    }

    /// Returns the voters other than this node that have flushed all committed entries, the one with the most entries
    /// first.
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

    /// Stands down, and hands leadership to a voter for which `may_lead` returns true. Returns when this node does not
    /// lead, or after [`STEP_ASIDE_TIMEOUT`].
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
            // An error means that no voter can lead now; others may have caught up at the next attempt.
            if let Ok(to) = self.hand_on(candidates).await {
                tracing::warn!(%to, "this node's state is about to be set aside: handing leadership on");
                stepped = SteppedAside::InVain;
            }
            tokio::time::sleep(4 * LOOK_INTERVAL).await;
        }
        // Callers that wait for entries that will not be applied here must ask the new leader.
        self.0.barrier.close();
        match self.claims_to_lead() {
            true => stepped,
            false => SteppedAside::Follows,
        }
    }

    /// Checks that this node leads a quorum that does not include `node`, as it would have to if `node` were gone. A
    /// voter counts if it answers a request sent from now on and has flushed all entries that are committed now, which
    /// include everything acknowledged before. An answer to a heartbeat alone only shows that a voter is alive, however
    /// far behind it is.
    ///
    /// A voter whose metadata is damaged counts with its log, as in every other vote; a voter whose log is damaged has
    /// stopped and does not answer.
    ///
    /// # Errors
    /// The reason why there is no such quorum.
    pub async fn quorum_without(&self, node: NodeId) -> Result<(), String> {
        if let Some(trouble) = self.trouble() {
            return Err(format!("the leader cannot check this: {trouble}"));
        }
        let asked = Instant::now();
        let _ = self.0.raft.trigger().heartbeat().await;
        let mut must_hold = None;
        loop {
            if !self.is_leader() {
                return Err("the leader that was asked does not lead any more".to_string());
            }
            let metrics = self.metrics();
            // Everything that earlier leaders acknowledged is committed together with the first entry of this leader.
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
