//! Reads the log and state of a node that is down, and makes the node the only voter by hand if a majority is lost for
//! good.

use std::collections::BTreeSet;

use openraft::storage::{RaftLogReader as _, RaftLogStorage as _, RaftLogStorageExt as _};
use openraft::vote::RaftLeaderIdExt as _;
use openraft::{EntryPayload, Membership};
use quorumfs_proto::{Member, NodeId};

use super::error::ConsensusError;
use super::fatal::FatalSignal;
use super::fit::fit_log;
use super::log::LogStore;
use super::options::ConsensusOptions;
use super::position::decode_position;
use super::types::{Entry, LogId, TypeConfig, Vote, VoterId, member};
use quorumfs_metadata::MetadataStore;

/// The log and state of a node that is down.
pub struct Remains {
    log: LogStore,
    /// Term and index of the last entry; `None` if there is none.
    pub last: Option<(u64, u64)>,
    /// The last entry in the durable state.
    pub applied: u64,
    /// The last known members, voters and learners.
    pub members: Vec<Member>,
    /// The voters: one set, or two if they were being changed.
    pub voters: Vec<BTreeSet<NodeId>>,
}

impl Remains {
    /// Opens log and state. An error that costs the incarnation means that this node has lost entries or promises: the
    /// cluster must not be continued from it.
    pub async fn open(
        options: &ConsensusOptions,
        metadata: &MetadataStore,
    ) -> Result<Remains, ConsensusError> {
        let (directory, wal) = (options.directory.clone(), options.wal.clone());
        let opened =
            tokio::task::spawn_blocking(move || LogStore::open(&directory, &wal, FatalSignal::default()));
        let log = opened.await.map_err(std::io::Error::other)??;
        let state = metadata.durable_position();
        if log.is_empty() {
            return Err(match state.log_id {
                Some(_) => ConsensusError::LogLost { index: state.index },
                None => ConsensusError::AllLost,
            });
        }
        fit_log(&log, &state).await?;
        let (_, stored) = decode_position(&state)?;
        let mut membership = stored.membership().clone();
        let held = log.range();
        for index in held.start.max(state.index)..held.end {
            let (log, entry) = (log.clone(), index);
            let read = tokio::task::spawn_blocking(move || log.read_entry(entry));
            if let Some(Entry {
                payload: EntryPayload::Membership(newer),
                ..
            }) = read.await.map_err(std::io::Error::other)??
            {
                membership = newer;
            }
        }
        let sets = membership.get_joint_config().iter();
        Ok(Remains {
            last: log.last_log_id().map(|id| (id.leader_id.term, id.index)),
            applied: state.index,
            members: membership.nodes().map(|(id, node)| member(*id, node)).collect(),
            voters: sets.map(|set| set.iter().map(|id| id.0).collect()).collect(),
            log,
        })
    }

    /// Makes `own` the only member, by an entry after all others in the log, which counts as committed from then on.
    /// Durable when it returns.
    pub async fn make_only_voter(mut self, own: &Member) -> Result<(), ConsensusError> {
        type LeaderId = openraft::alias::LeaderIdOf<TypeConfig>;
        let id = VoterId(own.id);
        let voted = self.log.read_vote().await?.map_or(0, |vote| vote.leader_id.term);
        let (last_term, next) = self.last.map_or((0, 0), |(term, index)| (term, index + 1));
        let term = voted.max(last_term) + 1;
        let log_id = LogId::new(LeaderId::new_committed(term, id), next);
        let alone = Membership::new(
            vec![BTreeSet::from([id])],
            std::collections::BTreeMap::from([(id, own.addresses.clone())]),
        );
        let alone = alone.map_err(|error| ConsensusError::Fit(std::io::Error::other(error)))?;
        let entry = Entry {
            log_id,
            payload: EntryPayload::Membership(alone),
        };
        let appended = self.log.blocking_append([entry]).await;
        appended.map_err(|error| ConsensusError::Fit(std::io::Error::other(error)))?;
        self.log.save_committed(Some(log_id)).await?;
        // This writes the vote, and with it the changes above.
        self.log.save_vote(&Vote::new_committed(term, id)).await?;
        let log = self.log.clone();
        let closed = tokio::task::spawn_blocking(move || log.close()).await;
        Ok(closed.map_err(std::io::Error::other)?)
    }
}
