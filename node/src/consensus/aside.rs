//! How a node that must give its state up makes way, and how a leader knows that the others can do without it.

use std::time::{Duration, Instant};

use openraft::async_runtime::Instant as _;
use quorumfs_proto::NodeId;

use super::{Consensus, Ordering};

/// How often it is looked whether another leads, or who has answered.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How long leadership may take to go to another.
const STEP_ASIDE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the others may take to answer the leader: many heartbeats.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1_500);

impl Consensus {
    /// Serves nothing more, does not stand for election, and hands leadership to a voter that `may_lead`. Returns when this
    /// node does not lead, or after [`STEP_ASIDE_TIMEOUT`].
    pub async fn step_aside(&self, may_lead: impl Fn(NodeId) -> bool) {
        self.0.stood_down.store(true, Ordering::Release);
        self.0.raft.runtime_config().elect(false);
        let began = Instant::now();
        while self.is_leader() && began.elapsed() < STEP_ASIDE_TIMEOUT {
            if let Some(to) = self.most_up_to_date_voter(|voter| may_lead(voter.0)) {
                tracing::warn!(%to, "this node's state is about to be set aside: handing leadership on");
                // An error means that openraft has stopped, and then this node does not lead.
                let _ = self.0.raft.trigger().transfer_leader(to).await;
            }
            tokio::time::sleep(4 * LOOK_INTERVAL).await;
        }
        // Those that wait for entries that will not be applied here ask the new leader.
        self.0.barrier.close();
    }

    /// Whether this node leads a quorum in which `node` does not count, as it would have to if `node` were gone. Voters
    /// count that answer what is sent to them from now on. A node that stopped before it asked counts for nobody.
    pub async fn quorum_without(&self, node: NodeId) -> Result<(), String> {
        if let Some(fatal) = self.0.fatal.raised() {
            return Err(format!("the leader must stop itself: {fatal}"));
        }
        let asked = Instant::now();
        let _ = self.0.raft.trigger().heartbeat().await;
        loop {
            if !self.is_leader() {
                return Err("the leader that was asked does not lead any more".to_string());
            }
            let metrics = self.metrics();
            let acknowledged = metrics.heartbeat.unwrap_or_default();
            let answers = |id: &NodeId| {
                let at = acknowledged.iter().find(|(voter, _)| voter.0 == *id);
                let at = at.and_then(|(_, at)| at.as_ref());
                *id == self.id() || at.is_some_and(|at| at.elapsed() < asked.elapsed())
            };
            let short = self.voter_sets().into_iter().find_map(|voters| {
                let living = voters.iter().filter(|id| **id != node && answers(id)).count();
                (living <= voters.len() / 2).then_some((living, voters.len()))
            });
            let Some((living, of)) = short else {
                return Ok(());
            };
            if asked.elapsed() > ANSWER_TIMEOUT {
                return Err(format!(
                    "of {of} voters {living} live without this node, and a majority must"
                ));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}
