//! Combinations of logs and states that a stopped node may leave.

use openraft::storage::{RaftLogReader as _, RaftLogStorage as _};
use quorumfs_proto::codec;

use super::{append, entry, log_id, vote};
use crate::consensus::error::ConsensusError;
use crate::consensus::fatal::FatalSignal;
use crate::consensus::fit::fit_log;
use crate::consensus::log::LogStore;
use crate::consensus::types::LogId;
use crate::consensus::wal::WalOptions;
use quorumfs_metadata::Position;

fn state(applied: LogId) -> Position {
    Position {
        index: applied.index,
        log_id: Some(codec::encode(&applied)),
        membership: None,
    }
}

async fn log_of(folder: &tempfile::TempDir, last: u64) -> LogStore {
    let log = LogStore::open(folder.path(), &WalOptions::default(), FatalSignal::default()).unwrap();
    log.clone().save_vote(&vote(3, 2)).await.unwrap();
    append(&log, (0..=last).map(|index| entry(3, index, "x")).collect()).await;
    log
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_before_a_purged_log_is_not_applied_to() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = log_of(&folder, 9).await;
    log.purge(log_id(3, 4)).await.unwrap();
    // The metadata are gone, or older.
    for state in [Position::default(), state(log_id(3, 3))] {
        let refused = fit_log(&log, &state).await.unwrap_err();
        assert!(
            matches!(refused, ConsensusError::Hole { first: 5, .. }),
            "{refused}"
        );
        assert!(refused.costs_incarnation());
    }
    for applied in [4, 7, 9, 20] {
        fit_log(&log, &state(log_id(3, applied))).await.unwrap();
    }
    assert_eq!(log.range(), 5..10);
    // The result is the same after all entries are purged.
    log.purge(log_id(3, 9)).await.unwrap();
    assert!(fit_log(&log, &Position::default()).await.is_err());
    fit_log(&log, &state(log_id(3, 9))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_purged_is_not_answered_by_what_follows() {
    use futures::StreamExt as _;
    let folder = tempfile::tempdir().unwrap();
    let mut log = log_of(&folder, 9).await;
    log.purge(log_id(3, 4)).await.unwrap();
    assert!(log.limited_get_log_entries(3, 8).await.unwrap().is_empty());
    assert!(log.limited_get_log_entries(0, 3).await.unwrap().is_empty());
    assert_eq!(log.limited_get_log_entries(5, 8).await.unwrap().len(), 3);
    let read = log.clone().entries_stream(0..8).await.collect::<Vec<_>>().await;
    assert!(read.len() == 1 && read[0].is_err(), "{read:?}");
    let read = log.entries_stream(5..8).await.collect::<Vec<_>>().await;
    assert!(read.len() == 3 && read.iter().all(Result::is_ok), "{read:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_not_cut_behind_a_snapshot_is_cut() {
    // A deposed leader has uncommitted entries where the snapshot has others.
    for applied in [log_id(5, 9), log_id(5, 7), log_id(5, 0)] {
        let folder = tempfile::tempdir().unwrap();
        let mut log = log_of(&folder, 9).await;
        fit_log(&log, &state(applied)).await.unwrap();
        let found = log.get_log_state().await.unwrap();
        assert_eq!(
            (found.last_purged_log_id, found.last_log_id),
            (Some(applied), Some(applied))
        );
        log.wait_all_flushed();
        drop(log);
        let mut again =
            LogStore::open(folder.path(), &WalOptions::default(), FatalSignal::default()).unwrap();
        let found = again.get_log_state().await.unwrap();
        assert_eq!(found.last_log_id, Some(applied));
        assert_eq!(again.read_vote().await.unwrap(), Some(vote(3, 2)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_knows_better_than_the_state_costs_the_incarnation() {
    let folder = tempfile::tempdir().unwrap();
    let log = log_of(&folder, 9).await;
    for applied in [log_id(2, 5), log_id(2, 12)] {
        let refused = fit_log(&log, &state(applied)).await.unwrap_err();
        assert!(
            matches!(refused, ConsensusError::Contradiction { .. }),
            "{refused}"
        );
        assert!(refused.costs_incarnation());
    }
}
