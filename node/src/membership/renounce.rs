//! Giving up an incarnation: the reasons, and when a node may.
//!
//! A node whose log or metadata is damaged is rebuilt from the others. It discards nothing before a leader has
//! confirmed that a majority is intact without it (`membership::renounce`). Until then it keeps its files in place and
//! reports what it waits for. If its log is intact, it continues to keep the log and to vote, without leading or
//! answering calls; so does a node that finds the damage when it starts (`server::log_only`).

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use quorumfs_proto::{ClusterId, Member};
use quorumfs_wire as wire;
use tracing::{error, warn};

use crate::config::Config;
use crate::consensus::{Consensus, ConsensusError, SteppedAside};
use crate::transport::{Purpose, Transport};

/// Interval at which the leader is asked.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// Most time for an answer: the leader waits for its followers meanwhile.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// Time for which the last question is repeated: an election may be in progress.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(6);
/// Most time for the consensus to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Least time between two log messages when the reason to wait changes.
const SAY_INTERVAL: Duration = Duration::from_secs(60);
/// Most nodes asked in one round.
const ASKED_MAX: usize = 16;

/// Why the node gives up its incarnation.
#[derive(Debug, thiserror::Error)]
pub enum Renounced {
    /// The log is damaged or gone.
    #[error("{0}; what is left was set aside, and the node takes part as a new one")]
    Log(ConsensusError),
    /// The metadata is damaged.
    #[error("{reason}; the metadata was set aside, and the node takes part as a new one")]
    Metadata {
        /// What is damaged.
        reason: String,
        /// The entry that cannot be applied to the metadata, if other nodes could apply it.
        entry: Option<u64>,
    },
    /// A majority has other metadata.
    #[error(
        "the metadata at entry {index} differs from that of a majority; it was set aside, and the node takes part as a \
         new one"
    )]
    State {
        /// The entry at which they were compared.
        index: u64,
    },
}

impl Renounced {
    /// Describes the damage before the node has acted on it.
    pub fn trouble(&self) -> String {
        match self {
            Renounced::Log(error) => error.to_string(),
            Renounced::Metadata { reason, .. } => reason.clone(),
            Renounced::State { index } => {
                format!("the metadata at entry {index} differs from that of a majority")
            }
        }
    }
}

/// The result of the question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leave {
    /// A majority is intact without this node, which has stopped taking part.
    Granted,
    /// After this node had stopped, the others could not do without it any more: it starts again unchanged.
    Withdrawn(String),
}

/// A node that asks to give up its state.
pub struct Renouncing<'a> {
    /// The node's settings.
    pub config: &'a Config,
    /// The node itself.
    pub own: &'a Member,
    /// The node's cluster.
    pub cluster: ClusterId,
    /// The connections to other nodes.
    pub transport: &'a Transport,
    /// The node's consensus, unless the log is lost or was not opened.
    pub consensus: Option<Consensus>,
    /// Why it gives up its state.
    pub why: &'a Renounced,
}

impl Renouncing<'_> {
    /// Waits until the node may give up its state. `tell` is called with the reason for waiting.
    pub async fn wait(&self, tell: impl Fn(String)) -> Leave {
        let trouble = self.why.trouble();
        error!("{trouble}; this node asks the others for permission to rebuild it");
        tell(format!(
            "{trouble}; this node asks the others for permission to rebuild it"
        ));
        let mut part = self.consensus.as_ref();
        let mut told: Option<(String, tokio::time::Instant)> = None;
        loop {
            // However it became the leader: a leader that answers nothing blocks all others. If the node that should
            // take over does not, the others elect one without this node.
            if let Some(consensus) = part
                && consensus.step_aside(|_| true).await == SteppedAside::InVain
            {
                stop(consensus).await;
                part = None;
            }
            match (self.ask().await, part) {
                (Ok(()), None) => return Leave::Granted,
                (Ok(()), Some(consensus)) => return self.stop_and_confirm(consensus).await,
                (Err(refusal), _) => {
                    let waits = format!(
                        "{trouble}; this node keeps its state until a majority is intact without it: {refusal}. If a \
                         majority is lost for good, see `quorumfs-node recover --help`"
                    );
                    let is_new = told
                        .as_ref()
                        .is_none_or(|(before, at)| *before != refusal && at.elapsed() > SAY_INTERVAL);
                    if is_new {
                        warn!("{waits}");
                        told = Some((refusal, tokio::time::Instant::now()));
                    }
                    tell(waits);
                }
            }
            tokio::time::sleep(ASK_INTERVAL).await;
        }
    }

    async fn stop_and_confirm(&self, consensus: &Consensus) -> Leave {
        stop(consensus).await;
        let began = tokio::time::Instant::now();
        loop {
            match self.ask().await {
                Ok(()) => return Leave::Granted,
                Err(refusal) if began.elapsed() > CONFIRM_TIMEOUT => return Leave::Withdrawn(refusal),
                Err(_) => tokio::time::sleep(ASK_INTERVAL).await,
            }
        }
    }

    /// Asks the leader, which one of the others should know.
    async fn ask(&self) -> Result<(), String> {
        let mut to_ask: VecDeque<String> = self.config.members.iter().cloned().collect();
        if let Some(consensus) = &self.consensus {
            to_ask.extend(
                consensus
                    .members()
                    .into_iter()
                    .map(|member| member.addresses.grpc),
            );
        }
        let mut asked = BTreeSet::from([self.config.grpc.clone()]);
        let mut refusals = Vec::new();
        while let Some(address) = to_ask.pop_front() {
            if asked.len() > ASKED_MAX || !asked.insert(address.clone()) {
                continue;
            }
            match self.ask_one(&address).await {
                Ok(None) => return Ok(()),
                Ok(Some(leader)) => to_ask.push_front(leader),
                Err(refusal) => refusals.push(format!("{address}: {refusal}")),
            }
        }
        match refusals.is_empty() {
            true => Err("no other node leads".to_string()),
            false => Err(refusals.join("; ")),
        }
    }

    /// Asks the node at `address`. Returns the address of the leader if that node does not lead.
    async fn ask_one(&self, address: &str) -> Result<Option<String>, String> {
        let ask = async {
            let mut peer = self
                .transport
                .peer_at(address, Purpose::Control)
                .map_err(|error| error.to_string())?;
            let request = wire::MayRenounceRequest {
                node: Some(self.own.clone().into()),
                cluster_id: bytes::Bytes::copy_from_slice(&self.cluster.0),
                entry: match self.why {
                    Renounced::Metadata { entry, .. } => entry.unwrap_or(0),
                    _ => 0,
                },
            };
            let answer = peer.may_renounce(request).await;
            let answer = answer
                .map_err(|status| status.message().to_string())?
                .into_inner();
            match answer.not_leader {
                false => Ok(None),
                true if answer.leader.is_empty() => Err("it knows no leader".to_string()),
                true => Ok(Some(answer.leader)),
            }
        };
        tokio::time::timeout(ANSWER_TIMEOUT, ask)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())))
    }
}

/// Stops taking part.
async fn stop(consensus: &Consensus) {
    // If applying blocks for ever, this does too; messages are no longer answered in any case.
    let _ = tokio::time::timeout(STOP_TIMEOUT, consensus.shutdown()).await;
}
