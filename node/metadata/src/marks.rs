//! The marks of the living sessions, in memory: the log index up to which each has answered for unlinked inodes. They
//! are read from [`super::tables::Marks`] when the database is opened.
//!
//! The table is cheap to clone, because the state's summary is cloned with each command; the lowest mark is found in
//! O(log n).

use imbl::{OrdMap, OrdSet};
use quorumfs_proto::SessionId;

/// The marks by session; see the module documentation.
#[derive(Clone, Default)]
pub(super) struct MarkTable {
    by_session: OrdMap<SessionId, u64>,
    in_order: OrdSet<(u64, SessionId)>,
    unmarked: OrdSet<SessionId>,
}

impl MarkTable {
    /// Adds a living session.
    pub(super) fn opened(&mut self, session: SessionId, mark: Option<u64>) {
        match mark {
            Some(mark) => self.set(session, mark),
            None => {
                self.unmarked.insert(session);
            }
        }
    }

    /// Records that the session has answered up to `mark`.
    pub(super) fn set(&mut self, session: SessionId, mark: u64) {
        self.unmarked.remove(&session);
        if let Some(before) = self.by_session.insert(session, mark) {
            self.in_order.remove(&(before, session));
        }
        self.in_order.insert((mark, session));
    }

    /// Removes a session that has ended.
    pub(super) fn ended(&mut self, session: SessionId) {
        self.unmarked.remove(&session);
        if let Some(mark) = self.by_session.remove(&session) {
            self.in_order.remove(&(mark, session));
        }
    }

    /// Returns the index up to which the session has answered; `None` if it is asked about each inode separately.
    pub(super) fn of(&self, session: SessionId) -> Option<u64> {
        self.by_session.get(&session).copied()
    }

    /// Returns the index up to which all sessions have answered.
    pub(super) fn lowest(&self) -> u64 {
        self.in_order.get_min().map_or(u64::MAX, |(mark, _)| *mark)
    }

    /// Returns the sessions that are asked about each inode separately.
    pub(super) fn unmarked(&self) -> OrdSet<SessionId> {
        self.unmarked.clone()
    }

    /// Returns the sessions that have not answered up to `index`, with their marks.
    pub(super) fn below(&self, index: u64) -> impl Iterator<Item = (SessionId, u64)> + '_ {
        let behind = self.in_order.iter().take_while(move |(mark, _)| *mark < index);
        behind.map(|(mark, session)| (*session, *mark))
    }
}
