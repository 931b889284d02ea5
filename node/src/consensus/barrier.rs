//! The read barrier: ReadIndex (Raft dissertation, section 6.4), one round at a time for all callers that came before
//! the round began.
//!
//! A round notes the commit index, asks a quorum whether this node still leads, then waits until that index has been
//! applied. Callers that come during a round wait for the next one: something acknowledged before their call may be
//! newer than the round.
//!
//! The question is an append without entries that belongs to this round alone, and only its own answer counts.
//! openraft's clock of acknowledgements is not suitable: it takes the answer to an append for the answer to all appends
//! with the same last entry. An answer that was given long before (and arrived late, because this node had been
//! stopped) could then count for a request that has no answer yet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use openraft::ServerState;
use openraft::network::{RPCOption, RaftNetworkFactory as _, RaftNetworkV2 as _};
use openraft::raft::{AppendEntriesRequest, StreamAppendError};
use parking_lot::Mutex;
use quorumfs_proto::Addresses;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::network::{NetworkFactory, PeerNetwork};
use super::types::{TypeConfig, Vote, VoterId};
use super::voters::VoterSets;
use super::{BarrierError, Consensus};

/// Most time that applying may lag behind the commit index; beyond it waiting is useless.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which a new leader checks whether its first entry is committed.
const FIRST_COMMIT_INTERVAL: Duration = Duration::from_millis(5);
/// Pause before a voter that could not be reached is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

type Waiter = oneshot::Sender<Result<(), BarrierError>>;

/// The callers that wait. Their number is bounded by the edges.
pub struct Barrier {
    /// `None` after the node has begun to shut down.
    waiting: Mutex<Option<Vec<Waiter>>>,
    wake: Notify,
    rounds: AtomicU64,
}

impl Default for Barrier {
    fn default() -> Barrier {
        Barrier {
            waiting: Mutex::new(Some(Vec::new())),
            wake: Notify::new(),
            rounds: AtomicU64::new(0),
        }
    }
}

impl Barrier {
    /// Waits for a round that begins after this call.
    ///
    /// # Errors
    /// [`BarrierError`] if the round fails or the node shuts down.
    pub async fn wait(&self) -> Result<(), BarrierError> {
        let (sender, answer) = oneshot::channel();
        if let Some(waiting) = self.waiting.lock().as_mut() {
            waiting.push(sender);
        }
        self.wake.notify_one();
        answer.await.unwrap_or_else(|_| {
            Err(BarrierError::Unavailable {
                reason: "the node is shutting down".to_string(),
            })
        })
    }

    /// Returns the number of rounds since the start.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Fails all waiting and later callers, because the node shuts down.
    pub fn close(&self) {
        self.waiting.lock().take();
    }
}

/// The role of this node at one moment of a round.
struct Standing {
    state: ServerState,
    vote: Vote,
    /// If this node leads: an index that covers everything ever acknowledged.
    committed: Option<u64>,
    /// The term of that entry.
    committed_term: Option<u64>,
    voter_sets: VoterSets,
    nodes: BTreeMap<VoterId, Addresses>,
}

/// The answer of one voter.
enum VoterAnswer {
    /// The voter has promised nothing to a newer leader.
    StillLeads,
    /// The voter has promised something to a newer leader.
    Superseded,
}

/// The question whether the leader of `vote` leads, and the channel for the answers. Each voter answers once.
#[derive(Clone)]
struct Question {
    vote: Vote,
    answers: mpsc::UnboundedSender<(VoterId, VoterAnswer)>,
}

/// One task for each peer, which asks the newest question when it has finished the previous one.
struct Askers {
    network: NetworkFactory,
    question: watch::Sender<Option<Question>>,
    tasks: BTreeMap<VoterId, (Addresses, AbortOnDropHandle<()>)>,
}

impl Askers {
    fn new(network: NetworkFactory) -> Askers {
        Askers {
            network,
            question: watch::Sender::new(None),
            tasks: BTreeMap::new(),
        }
    }

    /// Asks `peers` whether the leader of `vote` leads.
    async fn ask(
        &mut self,
        vote: Vote,
        peers: BTreeMap<VoterId, Addresses>,
        timeout: Duration,
    ) -> mpsc::UnboundedReceiver<(VoterId, VoterAnswer)> {
        self.tasks
            .retain(|peer, (address, _)| peers.get(peer) == Some(address));
        for (peer, addresses) in peers {
            if !self.tasks.contains_key(&peer) {
                let network = self.network.new_client(peer, &addresses).await;
                let task = tokio::spawn(answer_for(peer, network, self.question.subscribe(), timeout));
                self.tasks.insert(peer, (addresses, AbortOnDropHandle::new(task)));
            }
        }
        let (answers, said) = mpsc::unbounded_channel();
        self.question.send_replace(Some(Question { vote, answers }));
        said
    }
}

/// Asks `peer` each question that is the newest when the task is free.
async fn answer_for(
    peer: VoterId,
    mut network: PeerNetwork,
    mut questions: watch::Receiver<Option<Question>>,
    timeout: Duration,
) {
    while questions.changed().await.is_ok() {
        let Some(question) = questions.borrow_and_update().clone() else {
            continue;
        };
        let mut is_newest = true;
        while is_newest && !question.answers.is_closed() {
            let asked = ask(peer, &mut network, &question);
            if let Ok(Some(())) = tokio::time::timeout(timeout, asked).await {
                break;
            }
            tokio::time::sleep(ASK_AGAIN).await;
            is_newest = questions.has_changed().is_ok_and(|changed| !changed);
        }
    }
}

/// Asks `peer` once; returns `None` if it did not answer.
async fn ask(peer: VoterId, network: &mut PeerNetwork, question: &Question) -> Option<()> {
    let request = AppendEntriesRequest::<TypeConfig> {
        vote: question.vote,
        prev_log_id: None,
        entries: Vec::new(),
        leader_commit: None,
    };
    let requests = futures::stream::iter([request]);
    let opened = network.stream_append(requests, RPCOption::new(Duration::ZERO));
    let mut answers = opened.await.ok()?;
    let said = match answers.next().await? {
        Ok(Ok(_)) => VoterAnswer::StillLeads,
        Ok(Err(StreamAppendError::HigherVote(_))) => VoterAnswer::Superseded,
        // openraft sees the cause in the answers to its own requests.
        Ok(Err(StreamAppendError::Conflict(_))) | Err(_) => return None,
    };
    // If the receiver is gone, the round is over.
    let _ = question.answers.send((peer, said));
    // Read to the end: a stream that is dropped earlier must be reset.
    while answers.next().await.is_some() {}
    Some(())
}

impl Consensus {
    pub(super) async fn run_barrier(self, network: NetworkFactory) {
        let barrier = &self.0.barrier;
        let mut askers = Askers::new(network);
        loop {
            barrier.wake.notified().await;
            let waiting = barrier.waiting.lock().as_mut().map(std::mem::take);
            let Some(waiting) = waiting.filter(|waiting| !waiting.is_empty()) else {
                continue;
            };
            barrier.rounds.fetch_add(1, Ordering::Relaxed);
            let result = self.barrier_round(&mut askers).await;
            for waiter in waiting {
                // A caller that has gone does not receive the result.
                let _ = waiter.send(result.clone());
            }
        }
    }

    /// Each voter of the confirming quorum had, when it answered, promised nothing to a leader newer than this node. So
    /// no newer leader had been elected when the round began, and the commit index here covered everything acknowledged
    /// until then.
    async fn barrier_round(&self, askers: &mut Askers) -> Result<(), BarrierError> {
        let unavailable = |reason: &str| BarrierError::Unavailable {
            reason: reason.to_string(),
        };
        self.recovered()
            .map_err(|reason| BarrierError::Unavailable { reason })?;
        let timeout = Duration::from_millis(self.0.options.timings.election_ms_max);
        let deadline = Instant::now() + timeout;
        let Standing {
            vote,
            committed,
            voter_sets,
            mut nodes,
            ..
        } = self.standing_as_leader(deadline).await?;
        // This node has promised nothing to a newer leader, because it leads.
        let mut confirmed = BTreeSet::from([self.0.id]);
        let are_quorum =
            |nodes: &BTreeSet<VoterId>| voter_sets.is_quorum(|voter| nodes.contains(&VoterId(*voter)));
        if !are_quorum(&confirmed) {
            nodes.retain(|id, _| *id != self.0.id && voter_sets.contains(&id.0));
            let mut said = askers.ask(vote, nodes, timeout).await;
            while !are_quorum(&confirmed) {
                match tokio::time::timeout_at(deadline, said.recv()).await {
                    Ok(Some((peer, VoterAnswer::StillLeads))) => confirmed.insert(peer),
                    Ok(Some((_, VoterAnswer::Superseded))) => {
                        return Err(unavailable("another node stands for election or leads"));
                    }
                    Ok(None) | Err(_) => return Err(unavailable("no quorum of the voters answers")),
                };
            }
        }
        if committed <= Some(self.0.metadata.position().index) {
            return Ok(());
        }
        let wait = self.0.raft.wait(Some(APPLY_TIMEOUT));
        match wait.applied_index_at_least(committed, "read barrier").await {
            Ok(_) => Ok(()),
            Err(error) => Err(BarrierError::Unavailable {
                reason: format!("applying is behind: {error}"),
            }),
        }
    }

    /// Returns the role of this node once it leads and has committed an entry of its term. Before that it does not know
    /// what earlier leaders acknowledged.
    async fn standing_as_leader(&self, deadline: Instant) -> Result<Standing, BarrierError> {
        loop {
            let standing = self.0.raft.with_raft_state(|state| {
                let committed = state.local_committed();
                let membership = state.membership_state.effective().membership();
                Standing {
                    state: state.server_state,
                    vote: *state.vote_ref(),
                    committed: committed.map(|id| id.index),
                    committed_term: committed.map(|id| id.committed_leader_id().term),
                    voter_sets: VoterSets::of(membership),
                    nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
                }
            });
            let standing = standing.await.map_err(|fatal| BarrierError::Unavailable {
                reason: fatal.to_string(),
            })?;
            if standing.state != ServerState::Leader || !standing.vote.is_committed() {
                return Err(BarrierError::NotLeader {
                    leader: self.leader(),
                });
            }
            if standing.committed_term == Some(standing.vote.leader_id().term) {
                return Ok(standing);
            }
            if Instant::now() >= deadline {
                return Err(BarrierError::Unavailable {
                    reason: "this node leads and has committed nothing yet".to_string(),
                });
            }
            tokio::time::sleep(FIRST_COMMIT_INTERVAL).await;
        }
    }
}
