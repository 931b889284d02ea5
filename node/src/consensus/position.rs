//! The consensus layer's part of the position of a metadata state: the log id and the membership.

use std::collections::BTreeSet;

use quorumfs_metadata::Position;
use quorumfs_proto::{NodeId, codec};

use super::types::{LogId, StoredMembership};

/// Decodes what the consensus layer wrote into a position.
pub fn decode_position(position: &Position) -> Result<(Option<LogId>, StoredMembership), codec::DecodeError> {
    let log_id = position.log_id.as_deref().map(codec::decode).transpose()?;
    let membership = position.membership.as_deref().map(codec::decode).transpose()?;
    Ok((log_id, membership.unwrap_or_default()))
}

/// Returns the voters of the membership in a position (one set, or two during a change), and the index since which they
/// apply.
pub fn voters_at(position: &Position) -> Result<(u64, Vec<BTreeSet<NodeId>>), codec::DecodeError> {
    let (_, stored) = decode_position(position)?;
    let since = stored.log_id().as_ref().map_or(0, |log_id| log_id.index);
    let sets = stored.membership().get_joint_config().iter();
    let sets = sets.map(|set| set.iter().map(|id| id.0).collect());
    Ok((since, sets.collect()))
}
