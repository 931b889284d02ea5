//! Tests of the log's files and of the whole layer.

pub(super) mod cluster;
mod fit;
mod log_files;
mod log_model;
mod rescue;
mod storage_suite;

use openraft::storage::RaftLogStorageExt;
use openraft::vote::RaftLeaderIdExt;
use quorumfs_proto::{SessionId, Timestamp};

use super::log::LogStore;
use super::types::{Entry, LogId, TypeConfig, Vote};
use quorumfs_metadata::{LogBody, LogCommand};

/// A command whose effect can be seen in the state: it opens `session` with `description`.
fn open_session(session: u64, description: impl Into<String>) -> LogCommand {
    LogCommand {
        stamp: Timestamp::default(),
        body: LogBody::OpenSession {
            session: SessionId(session),
            description: description.into(),
        },
    }
}

fn log_id(term: u64, index: u64) -> LogId {
    type LeaderId = openraft::alias::LeaderIdOf<TypeConfig>;
    LogId::new(LeaderId::new_committed(term, 0.into()), index)
}

fn entry(term: u64, index: u64, description: impl Into<String>) -> Entry {
    Entry {
        log_id: log_id(term, index),
        payload: openraft::EntryPayload::Normal(open_session(index, description)),
    }
}

fn vote(term: u64, node: u64) -> Vote {
    Vote::new_committed(term, node.into())
}

/// Appends and waits until it is durable.
async fn append(log: &LogStore, entries: Vec<Entry>) {
    log.clone().blocking_append(entries).await.unwrap();
}

#[test]
fn who_comes_anew_can_delete_on_a_full_disk() {
    assert!(!super::takes_space(&open_session(1, "a mount")));
}
