//! Up to where the living sessions have answered for unlinked inodes, in memory: what is read again from
//! [`super::tables::Marks`] when the database is opened.
//!
//! Cheap to clone, as the state's summary is with each command; the lowest mark is found in O(log n).

use imbl::{OrdMap, OrdSet};
use quorumfs_proto::SessionId;

/// See the module.
#[derive(Clone, Default)]
pub(super) struct MarkTable {
    by_session: OrdMap<SessionId, u64>,
    in_order: OrdSet<(u64, SessionId)>,
    unmarked: OrdSet<SessionId>,
}

impl MarkTable {
    /// A session lives.
    pub(super) fn opened(&mut self, session: SessionId, mark: Option<u64>) {
        match mark {
            Some(mark) => self.set(session, mark),
            None => {
                self.unmarked.insert(session);
            }
        }
    }

    /// The session has answered up to `mark`.
    pub(super) fn set(&mut self, session: SessionId, mark: u64) {
        self.unmarked.remove(&session);
        if let Some(before) = self.by_session.insert(session, mark) {
            self.in_order.remove(&(before, session));
        }
        self.in_order.insert((mark, session));
    }

    /// The session lives no more.
    pub(super) fn ended(&mut self, session: SessionId) {
        self.unmarked.remove(&session);
        if let Some(mark) = self.by_session.remove(&session) {
            self.in_order.remove(&(mark, session));
        }
    }

    /// Up to where the session has answered; `None`: it is asked about each inode by itself.
    pub(super) fn of(&self, session: SessionId) -> Option<u64> {
        self.by_session.get(&session).copied()
    }

    /// Up to where all have answered.
    pub(super) fn lowest(&self) -> u64 {
        self.in_order.get_min().map_or(u64::MAX, |(mark, _)| *mark)
    }

    /// Sessions that are asked about each inode by itself.
    pub(super) fn unmarked(&self) -> OrdSet<SessionId> {
        self.unmarked.clone()
    }

    /// Sessions that have not answered up to `index`, with their marks.
    pub(super) fn below(&self, index: u64) -> impl Iterator<Item = (SessionId, u64)> + '_ {
        let behind = self.in_order.iter().take_while(move |(mark, _)| *mark < index);
        behind.map(|(mark, session)| (*session, *mark))
    }
}
