//! The feature level: the leader raises it in the log when every member reports that its program knows the next level;
//! a node whose program knows less than the level is not accepted.
//!
//! So programs can be replaced node by node: until the last one is new, nothing is applied that an old one would not
//! understand. The level cannot be lowered.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use quorumfs_proto::Member;
use quorumfs_wire as wire;
use tracing::{info, warn};

use crate::consensus::Consensus;
use crate::observe::clock::StampClock;
use crate::transport::{Purpose, Transport};
use quorumfs_metadata::{FEATURE_LEVEL, LogBody, LogCommand, MetadataStore};

/// Interval at which the leader checks, while its program knows more than the level.
const LOOK_INTERVAL_MS: u64 = 1_000;
/// Most time for a member's answer.
const ANSWER_TIMEOUT_MS: u64 = 1_000;

/// Raises the level when possible; never returns.
pub async fn run(
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    transport: Arc<Transport>,
    stamps: Arc<StampClock>,
) {
    loop {
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
        if !consensus.is_leader() {
            continue;
        }
        let now = match metadata.view() {
            Ok(view) => view.feature_level(),
            Err(error) => {
                warn!(%error, "cannot read the feature level");
                continue;
            }
        };
        if now >= FEATURE_LEVEL {
            continue;
        }
        let members = consensus.members();
        let known = join_all(members.iter().map(|member| level_of(&transport, member))).await;
        let Some(level) = known
            .into_iter()
            .min()
            .flatten()
            .map(|level| level.min(FEATURE_LEVEL))
        else {
            continue;
        };
        if level <= now {
            continue;
        }
        let command = LogCommand {
            stamp: stamps.stamp().await,
            body: LogBody::RaiseFeatureLevel { level },
        };
        match consensus.propose(command).await {
            Ok(_) => info!(level, "the feature level was raised: all members know it"),
            Err(error) => warn!(%error, level, "cannot raise the feature level; it is tried again"),
        }
    }
}

/// Returns the level that `member`'s program knows; `None` if it does not answer.
async fn level_of(transport: &Transport, member: &Member) -> Option<u32> {
    let mut peer = transport.peer(&member.addresses, Purpose::Control).ok()?;
    let asked = peer.node_status(wire::NodeStatusRequest {});
    let answer = tokio::time::timeout(Duration::from_millis(ANSWER_TIMEOUT_MS), asked).await;
    Some(answer.ok()?.ok()?.into_inner().feature_level)
}
