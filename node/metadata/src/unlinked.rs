//! The leader's questions to the state about unlinked inodes: which sessions must be asked about which inodes, and
//! whether anything can be freed. The rules are in `apply::unlinked`.

use quorumfs_proto::{InodeNumber, SessionId};

use super::fault::Failure;
use super::overlay::{Direction, KeyRange};
use super::summary::Summary;
use super::tables::{Departed, Holds, Orphans, Pins, Reclaimable, Rows, UnlinkedQueue};
use super::view::View;

/// Unlinked inodes about which a session has not answered, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnlinkedPage {
    /// The log index up to which the session has answered.
    pub from: u64,
    /// The log index up to which the list is complete.
    pub through: u64,
    /// Numbers of the inodes.
    pub inodes: Vec<InodeNumber>,
}

impl Summary {
    /// Returns the range of keys of the queue that can have rows.
    pub(super) fn queued(&self) -> KeyRange {
        KeyRange::prefix(&[]).starting_at(&UnlinkedQueue::key(&self.queue_from))
    }

    /// Returns the range of keys of `Reclaimable` that can have rows.
    pub(super) fn reclaimable(&self) -> KeyRange {
        KeyRange::prefix(&[]).starting_at(&Reclaimable::key(&self.reclaimable_from))
    }
}

impl View {
    /// Returns the next question for a living session: about `max` inodes, and those unlinked by the same command as
    /// the last. `None` if there is none, or if the session is asked about each inode separately.
    pub fn unlinked_page(&self, session: SessionId, max: usize) -> Result<Option<UnlinkedPage>, Failure> {
        let Some(mark) = self.summary.marks.of(session) else {
            return Ok(None);
        };
        let mut page = UnlinkedPage {
            from: mark,
            through: mark,
            inodes: Vec::new(),
        };
        let beyond = KeyRange::prefix(&[]).after(&UnlinkedQueue::key(&(mark, InodeNumber(u64::MAX))));
        for row in self.layers.scan::<UnlinkedQueue>(beyond, Direction::Up)? {
            let ((since, inode), ()) = row?;
            if page.inodes.len() >= max && since != page.through {
                break;
            }
            page.through = since;
            page.inodes.push(inode);
        }
        Ok((!page.inodes.is_empty()).then_some(page))
    }

    /// Returns the living sessions that have not answered about all inodes unlinked so far.
    pub fn sessions_to_ask(&self) -> Result<Vec<SessionId>, Failure> {
        let last = self
            .layers
            .scan::<UnlinkedQueue>(self.summary.queued(), Direction::Down)?
            .next()
            .transpose()?;
        let Some(((newest, _), ())) = last else {
            return Ok(Vec::new());
        };
        Ok(self
            .summary
            .marks
            .below(newest)
            .map(|(session, _)| session)
            .collect())
    }

    /// Returns unlinked inodes that the state keeps for this session, alone or among others, and about which it is
    /// asked repeatedly: those after `after`, in order.
    pub fn unlinked_held_by(
        &self,
        session: SessionId,
        after: InodeNumber,
        max: usize,
    ) -> Result<Vec<InodeNumber>, Failure> {
        let mut inodes = self.rows_of_session::<Pins>(session, after, max)?;
        inodes.extend(self.rows_of_session::<Holds>(session, after, max)?);
        inodes.sort_unstable();
        inodes.truncate(max);
        Ok(inodes)
    }

    fn rows_of_session<R: Rows<Key = (SessionId, InodeNumber), Value = ()>>(
        &self,
        session: SessionId,
        after: InodeNumber,
        max: usize,
    ) -> Result<Vec<InodeNumber>, Failure> {
        let range = KeyRange::prefix(&session.0.to_be_bytes()).after(&R::key(&(session, after)));
        let rows = self.layers.scan::<R>(range, Direction::Up)?;
        let inodes = rows.take(max).map(|row| row.map(|((_, inode), ())| inode));
        Ok(inodes.collect::<Result<Vec<_>, _>>()?)
    }

    /// Whether a [`super::LogBody::Reclaim`] has work to do.
    pub fn has_reclaimable(&self) -> Result<bool, Failure> {
        let answered_by_all = self.summary.marks.lowest();
        let queued = self.summary.queued();
        let oldest = self.layers.scan::<UnlinkedQueue>(queued, Direction::Up)?.next();
        Ok(oldest
            .transpose()?
            .is_some_and(|((since, _), ())| since <= answered_by_all)
            || self
                .layers
                .scan::<Reclaimable>(self.summary.reclaimable(), Direction::Up)?
                .next()
                .is_some()
            || self
                .layers
                .scan::<Departed>(KeyRange::prefix(&[]), Direction::Up)?
                .next()
                .is_some())
    }

    /// Whether there are inodes that were unlinked below feature level 3.
    pub fn has_orphans(&self) -> Result<bool, Failure> {
        let first = self
            .layers
            .scan::<Orphans>(KeyRange::prefix(&[]), Direction::Up)?
            .next();
        Ok(first.transpose()?.is_some())
    }

    /// Returns the living sessions.
    pub fn living_sessions(&self) -> impl Iterator<Item = SessionId> + '_ {
        self.summary.living.keys().copied()
    }

    /// Returns the number of living sessions.
    pub fn living_count(&self) -> usize {
        self.summary.living.len()
    }

    /// Returns how long a living session was silent when a leader last looked, in milliseconds; 0 if it was not.
    pub fn silence_ms(&self, session: SessionId) -> u64 {
        self.summary.silences.get(&session).copied().unwrap_or(0)
    }

    /// Returns the silences of all sessions, in milliseconds.
    pub fn silences(&self) -> imbl::OrdMap<SessionId, u64> {
        self.summary.silences.clone()
    }

    /// Returns the key of a session; `None` if its id alone identifies it.
    pub fn session_key(&self, session: SessionId) -> Result<Option<super::SessionKey>, Failure> {
        Ok(self.layers.get::<super::tables::SessionKeys>(&session)?)
    }
}
