//! What all members know: the leader raises the feature level in the log once every member says
//! that its program knows the next; a node whose program knows less than the level is not taken in.
//!
//! So programs can be replaced node by node: until the last one is new, nothing is applied that an old one would not
//! understand. There is no way down.

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

/// How often the leader looks, as long as its program knows more than the level.
const LOOK_INTERVAL_MS: u64 = 1_000;
/// How long a member may take to answer.
const ANSWER_TIMEOUT_MS: u64 = 1_000;

/// Raises the level when it can be, for ever.
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
                warn!(%error, "cannot look up the feature level");
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
            Ok(_) => info!(level, "all members know the next feature level: raised"),
            Err(error) => warn!(%error, level, "the feature level could not be raised"),
        }
    }
}

/// What `member`'s program knows; `None` where it does not say.
async fn level_of(transport: &Transport, member: &Member) -> Option<u32> {
    let mut peer = transport.peer(&member.addresses, Purpose::Control).ok()?;
    let asked = peer.node_status(wire::NodeStatusRequest {});
    let answer = tokio::time::timeout(Duration::from_millis(ANSWER_TIMEOUT_MS), asked).await;
    Some(answer.ok()?.ok()?.into_inner().feature_level)
}
