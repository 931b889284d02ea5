//! A node whose metadata are lost when it starts, or known to be wrong, and whose log is in order: it votes with the log
//! until it is let go.
//!
//! Two of three whose metadata are damaged, if they only waited, would wait for ever: the third cannot lead alone, and
//! nobody else lets them go. What they had acknowledged may be in their logs alone. Nothing is applied, and nothing is
//! served but messages of the consensus.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use tracing::{info, warn};

use super::StartAgain;
use crate::consensus::{Consensus, ConsensusError, ConsensusOptions};
use crate::membership::renounce::Renounced;
use crate::node::Node;
use crate::transport::Transport;
use quorumfs_content::ContentStore;
use quorumfs_metadata::{MetadataOptions, MetadataStore, Position};

/// Metadata that stand in for lost ones, in the data folder.
const STAND_IN_FILE: &str = "stand-in.redb";

/// What such a node has.
pub struct LogOnly<'a> {
    pub node: &'a Node,
    pub transport: &'a Arc<Transport>,
    pub content: &'a Arc<ContentStore>,
    /// How it would take part if it had its state.
    pub options: ConsensusOptions,
}

impl LogOnly<'_> {
    /// Begins to vote, if the log allows it. The state, which is lost for the reason `why`, went up to `known` as far as
    /// that is known. Answers how the node starts again once it may.
    pub async fn begin(self, why: Renounced, known: Position) -> StartAgain {
        match self.start(known).await {
            Ok(()) => info!("this node votes with its log, without its metadata"),
            Err(Failed::Start(error)) if error.costs_incarnation() => {
                return StartAgain::AsNew(Renounced::Log(error));
            }
            Err(failed) => warn!(%failed, "this node cannot vote without its metadata"),
        }
        StartAgain::AsNew(why)
    }

    async fn start(self, known: Position) -> Result<(), Failed> {
        let path = self.node.folder().path().join(STAND_IN_FILE);
        let metadata = tokio::task::spawn_blocking(move || {
            remove(&path)?;
            MetadataStore::open(&path, MetadataOptions::default()).context("make metadata that stand in")
        });
        let metadata = metadata
            .await
            .map_err(|panicked| Failed::StandIn(panicked.into()));
        let metadata = metadata?.map_err(Failed::StandIn)?;
        let cluster = self.options.cluster;
        let options = ConsensusOptions {
            log_only: Some(known),
            ..self.options
        };
        // Nothing is applied, so nobody is told of it.
        let (nobody, _) = tokio::sync::mpsc::channel(1);
        let (metadata, content, transport) =
            (Arc::new(metadata), self.content.clone(), self.transport.clone());
        let consensus = Consensus::start(options, metadata, content, transport, nobody).await;
        self.node
            .begin_with_log_only(cluster, consensus.map_err(Failed::Start)?);
        Ok(())
    }
}

/// Why such a node cannot vote.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{0:#}")]
    StandIn(anyhow::Error),
    #[error(transparent)]
    Start(ConsensusError),
}

/// Removes what an earlier process left.
pub fn tidy(data: &Path) -> anyhow::Result<()> {
    remove(&data.join(STAND_IN_FILE))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
