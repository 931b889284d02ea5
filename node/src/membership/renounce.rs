//! Giving an incarnation up: why, and when a node may.
//!
//! A node whose log or metadata is damaged is made anew from the others. It gives nothing up before a leader has said that
//! a majority lives without it (`membership::renounce`). Until then it keeps what it has where it is, says what it waits
//! for, and where its log is in order goes on to keep the log and to vote, without leading or answering anything; one that
//! finds the damage when it starts too (`server::log_only`).

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use quorumfs_proto::{ClusterId, Member};
use quorumfs_wire as wire;
use tracing::{error, warn};

use crate::config::Config;
use crate::consensus::{Consensus, ConsensusError, SteppedAside};
use crate::transport::{Purpose, Transport};

/// How often the leader is asked.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// How long a node may take to answer: the leader waits for its followers meanwhile.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// How long the last question is repeated: an election may come between.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(6);
/// How long the consensus may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// A reason to wait that has changed is logged no sooner after the one before.
const SAY_INTERVAL: Duration = Duration::from_secs(60);
/// Nodes asked in one round.
const ASKED_MAX: usize = 16;

/// Why the node gives its incarnation up.
#[derive(Debug, thiserror::Error)]
pub enum Renounced {
    /// The log is damaged or gone.
    #[error("{0}; what is left was set aside, and the node takes part as a new one")]
    Log(ConsensusError),
    /// The metadata is damaged.
    #[error("{reason}; the metadata was set aside, and the node takes part as a new one")]
    Metadata {
        /// How.
        reason: String,
        /// The entry that cannot be applied to it, if it is one that others could.
        entry: Option<u64>,
    },
    /// A majority has other metadata.
    #[error(
        "the metadata at entry {index} differs from that of a majority; it was set aside, and the node takes part as a \
         new one"
    )]
    State {
        /// Where they were compared.
        index: u64,
    },
}

impl Renounced {
    /// What is wrong, while nothing has been done about it yet.
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

/// What became of the question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leave {
    /// A majority lives without this node, which takes part no more.
    Granted,
    /// When it had stopped, the others could not do without it any more: it starts again as it was.
    Withdrawn(String),
}

/// A node that would give its state up.
pub struct Renouncing<'a> {
    /// Its settings.
    pub config: &'a Config,
    /// Who it is.
    pub own: &'a Member,
    /// Its cluster.
    pub cluster: ClusterId,
    /// The way to the others.
    pub transport: &'a Transport,
    /// The part it takes, unless the log is lost or was not opened.
    pub consensus: Option<Consensus>,
    /// Why.
    pub why: &'a Renounced,
}

impl Renouncing<'_> {
    /// Waits until the node may. `tell` hears what it waits for.
    pub async fn wait(&self, tell: impl Fn(String)) -> Leave {
        let trouble = self.why.trouble();
        error!("{trouble}; this node asks the others to let it be made anew");
        tell(format!(
            "{trouble}; this node asks the others to let it be made anew"
        ));
        let mut part = self.consensus.as_ref();
        let mut told: Option<(String, tokio::time::Instant)> = None;
        loop {
            // Whatever made it the leader: who leads and answers nothing holds all others up. Where one that can take over
            // does not, the others elect one without this node.
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
                        "{trouble}; this node keeps what it has until a majority lives without it: {refusal}. If a \
                         majority is lost for good, see `quorumfs-node recover --help`"
                    );
                    let is_news = told
                        .as_ref()
                        .is_none_or(|(before, at)| *before != refusal && at.elapsed() > SAY_INTERVAL);
                    if is_news {
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

    /// Asks the leader, whom one of the others should know.
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

    /// `Some`: the node at `address` does not lead, this one may.
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

/// Takes no part any more.
async fn stop(consensus: &Consensus) {
    // Where applying waits for ever this does too; messages are answered no more all the same.
    let _ = tokio::time::timeout(STOP_TIMEOUT, consensus.shutdown()).await;
}
