//! Checks that the log and the metadata that the last process left belong together, before anything is applied.
//!
//! The log must begin at the end of the metadata, or before. If entries between them are missing, for example because
//! the metadata are gone and the log was purged, the next entries would be applied to a wrong state: the node then
//! needs a new incarnation. If a snapshot was installed and the node was killed before its log was cut, the log is cut
//! now.
//!
//! If the metadata are lost and the log is not, new ones stand in for them, so that the node can vote with its log.

use openraft::storage::RaftLogStorage as _;
use quorumfs_proto::codec;

use super::error::ConsensusError;
use super::fatal::FatalSignal;
use super::log::LogStore;
use super::position::decode_position;
use quorumfs_metadata::{MetadataStore, Position};

/// Makes `log` fit the state at position `state`, if possible.
pub async fn fit_log(log: &LogStore, state: &Position) -> Result<(), ConsensusError> {
    let (applied, _) = decode_position(state)?;
    let held = log.range();
    let next = applied.map_or(0, |applied| applied.index + 1);
    if held.start > next {
        return Err(ConsensusError::Hole {
            next,
            first: held.start,
        });
    }
    let Some(applied) = applied else {
        return Ok(());
    };
    let contradiction = |logged| ConsensusError::Contradiction {
        logged,
        applied: applied.to_string(),
    };
    match log.log_id(applied.index) {
        Some(logged) if logged < applied => {
            // Another leader committed the applied entry in its place: the log's entry and all after it never were
            // committed.
            tracing::warn!(%logged, %applied, "the log was not cut behind the last snapshot; it is cut now");
            let mut log = log.clone();
            let before = applied.index.checked_sub(1).and_then(|index| log.log_id(index));
            let cut = async {
                log.truncate_after(before).await?;
                log.purge(applied).await
            };
            cut.await.map_err(ConsensusError::Fit)
        }
        Some(logged) if logged > applied => Err(contradiction(logged.to_string())),
        Some(_) => Ok(()),
        // The log ends before it: the missing entries were applied, and the log continues after them.
        None => match log.last_log_id() {
            Some(last) if last.index < applied.index && last > applied => {
                Err(contradiction(last.to_string()))
            }
            _ => Ok(()),
        },
    }
}

/// Makes the empty `metadata` stand in for lost ones at position `known`, or at the log's purge mark if that is higher:
/// only applied entries are purged. Blocks for a flush.
pub fn stand_in(metadata: &MetadataStore, log: &LogStore, known: &Position) -> Result<(), ConsensusError> {
    let (applied, _) = decode_position(known)?;
    let position = match log.purged() {
        Some(purged) if applied.is_none_or(|applied| applied < purged) => Position {
            index: purged.index,
            log_id: Some(codec::encode(&purged)),
            membership: None,
        },
        _ => known.clone(),
    };
    if position.log_id.is_some() {
        metadata.begin().publish(position);
        metadata.freeze();
        let stood_in = metadata.flush();
        stood_in.map_err(|fault| {
            ConsensusError::Metadata(
                FatalSignal::default().raise("create metadata that stand in for the lost ones", fault),
            )
        })?;
    }
    Ok(())
}
