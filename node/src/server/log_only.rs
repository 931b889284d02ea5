//! A node whose metadata are lost or known to be wrong when it starts, and whose log is intact: it votes with the log
//! until it may give up its state.
//!
//! If two of three nodes with damaged metadata only waited, they would wait for ever: the third cannot lead alone, and
//! no other node could permit them to leave. Entries that they acknowledged may exist only in their logs. Such a node
//! applies nothing, and serves only messages of the consensus.

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

/// Name in the data folder of the metadata that stand in for lost ones.
const STAND_IN_FILE: &str = "stand-in.redb";

/// A node with only its log.
pub struct LogOnly<'a> {
    pub node: &'a Node,
    pub transport: &'a Arc<Transport>,
    pub content: &'a Arc<ContentStore>,
    /// The options with which it would take part if it had its state.
    pub options: ConsensusOptions,
}

impl LogOnly<'_> {
    /// Begins to vote, if the log allows it. The state, lost for the reason `why`, ended at `known` as far as is known.
    /// Returns how the node starts again once it may.
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
            MetadataStore::open(&path, MetadataOptions::default())
                .context("cannot create metadata that stand in for the lost ones")
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
        // Nothing is applied, so there are no effects.
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

/// Removes the stand-in metadata of an earlier process.
pub fn tidy(data: &Path) -> anyhow::Result<()> {
    remove(&data.join(STAND_IN_FILE))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
