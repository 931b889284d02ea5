//! Whether the log and the metadata, as the last stop left them, belong together; looked at before anything is applied.
//!
//! The log begins where the metadata end, or before. Where entries between them are missing, as when the metadata are
//! gone and the log was purged, what follows would be applied to a state that it was not made for: that costs the
//! incarnation. Where a snapshot was put in place and the node was killed before its log was cut, the log is cut now.
//!
//! Where the metadata are lost and the log is not, new ones stand in for them, so that the node can vote with its log.

use openraft::storage::RaftLogStorage as _;
use quorumfs_proto::codec;

use super::error::ConsensusError;
use super::fatal::FatalSignal;
use super::log::LogStore;
use super::position::decode_position;
use quorumfs_metadata::{MetadataStore, Position};

/// Makes `log` fit a state that goes up to `state`, if it can be.
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
            // Another leader had what was applied committed in its place: it and all after it never were.
            tracing::warn!(%logged, %applied, "the log was not cut behind a snapshot: cut now");
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
        // It ends before: what is missing was applied, and the log goes on behind it.
        None => match log.last_log_id() {
            Some(last) if last.index < applied.index && last > applied => {
                Err(contradiction(last.to_string()))
            }
            _ => Ok(()),
        },
    }
}

/// Has `metadata`, which are empty, stand in for lost ones that went up to `known`, or to what `log` has purged where that
/// is more: nothing is purged that was not applied. Blocks for a flush.
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
            ConsensusError::Metadata(FatalSignal::default().raise("make metadata that stand in", fault))
        })?;
    }
    Ok(())
}
