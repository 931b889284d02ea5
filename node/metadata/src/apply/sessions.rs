//! Sessions are opened, ended and forgotten. Their lanes keep the results of their mutations.

use imbl::OrdMap;
use quorumfs_proto::{SessionId, Timestamp};

use super::super::command::{ApplyResult, SessionKey};
use super::super::fault::StorageFault;
use super::super::limits::COMMAND_FREED_EXTENTS_MAX;
use super::super::overlay::KeyRange;
use super::super::tables::{Departed, Lanes, Marks, Orphans, Pins, SessionKeys, SessionRecord, Sessions};
use super::writer::RowWriter;

impl RowWriter {
    pub(super) fn open_session(
        &mut self,
        now: Timestamp,
        session: SessionId,
        description: &str,
    ) -> Result<ApplyResult, StorageFault> {
        match self.get::<Sessions>(&session)? {
            Some(record) if record.ended.is_some() => Ok(ApplyResult::UnknownSession),
            Some(_) => Ok(ApplyResult::Done),
            None => {
                let record = SessionRecord {
                    description: description.to_owned(),
                    opened: now,
                    ended: None,
                    chunk_low_water: 0,
                };
                self.put::<Sessions>(&session, &record);
                self.summary.living.insert(session, 0);
                self.summary.marks.opened(session, None);
                Ok(ApplyResult::Done)
            }
        }
    }

    /// Like [`RowWriter::open_session`], but the session is not asked about inodes that were unlinked before.
    pub(super) fn open_session_with_key(
        &mut self,
        now: Timestamp,
        session: SessionId,
        description: &str,
        key: &SessionKey,
    ) -> Result<ApplyResult, StorageFault> {
        match self.get::<SessionKeys>(&session)? {
            Some(known) if known != *key => return Ok(ApplyResult::WrongKey),
            Some(_) => return self.open_session(now, session, description),
            None => {}
        }
        let opened = self.open_session(now, session, description)?;
        if opened != ApplyResult::Done {
            return Ok(opened);
        }
        self.put::<SessionKeys>(&session, key);
        self.put_mark(session, self.index);
        Ok(opened)
    }

    /// Like [`RowWriter::open_session_with_key`], for a session that never holds an unlinked inode: it is never asked.
    pub(super) fn open_content_session(
        &mut self,
        now: Timestamp,
        session: SessionId,
        description: &str,
        key: &SessionKey,
    ) -> Result<ApplyResult, StorageFault> {
        let opened = self.open_session_with_key(now, session, description, key)?;
        if opened == ApplyResult::Done {
            self.put_mark(session, u64::MAX);
        }
        Ok(opened)
    }

    pub(super) fn end_session(
        &mut self,
        now: Timestamp,
        session: SessionId,
    ) -> Result<ApplyResult, StorageFault> {
        let Some(mut record) = self.get::<Sessions>(&session)? else {
            return Ok(ApplyResult::UnknownSession);
        };
        if record.ended.is_none() {
            record.ended = Some(now);
            self.put::<Sessions>(&session, &record);
            self.summary.living.remove(&session);
            self.forget_silence(session);
            if self.summary.marks.of(session).is_some() {
                self.remove::<Marks>(&session);
            }
            self.summary.marks.ended(session);
            let (pins, _) = self.drop_pins(session, COMMAND_FREED_EXTENTS_MAX)?;
            let (holds, _) = self.drop_holds(session, COMMAND_FREED_EXTENTS_MAX)?;
            // Below level 3, pins that exceed one step are found by `View::reclaimable`.
            if (pins, holds) != (Left::None, Left::None) && self.summary.feature_level >= 3 {
                self.put::<Departed>(&session, &());
            }
        }
        Ok(ApplyResult::Done)
    }

    pub(super) fn forget_session(&mut self, session: SessionId) -> Result<ApplyResult, StorageFault> {
        let Some(record) = self.get::<Sessions>(&session)? else {
            return Ok(ApplyResult::Done);
        };
        if record.ended.is_none() {
            return Ok(ApplyResult::Done);
        }
        let (pins, _) = self.drop_pins(session, COMMAND_FREED_EXTENTS_MAX)?;
        let (holds, _) = self.drop_holds(session, COMMAND_FREED_EXTENTS_MAX)?;
        if (pins, holds) != (Left::None, Left::None) {
            return Ok(ApplyResult::Done);
        }
        if self.layers.contains::<Departed>(&session)? {
            self.remove::<Departed>(&session);
        }
        if self.layers.contains::<SessionKeys>(&session)? {
            self.remove::<SessionKeys>(&session);
        }
        let lanes = KeyRange::prefix(&session.0.to_be_bytes());
        // At most `LANES_MAX` rows.
        for (lane, _) in self.collect::<Lanes>(lanes, usize::MAX)? {
            self.remove::<Lanes>(&lane);
        }
        self.remove::<Sessions>(&session);
        Ok(ApplyResult::Done)
    }

    pub(super) fn raise_low_water(&mut self, session: SessionId, to: u64) -> Result<(), StorageFault> {
        let mut record = self
            .get::<Sessions>(&session)?
            .ok_or_else(|| StorageFault::inconsistent(format!("living session {session} has no row")))?;
        record.chunk_low_water = to;
        self.put::<Sessions>(&session, &record);
        OrdMap::insert(&mut self.summary.living, session, to);
        Ok(())
    }

    /// Drops at most `max` pins of this session. Returns whether some are left and how many were dropped.
    pub(super) fn drop_pins(&mut self, session: SessionId, max: u32) -> Result<(Left, u32), StorageFault> {
        let prefix = KeyRange::prefix(&session.0.to_be_bytes());
        let pins = self.collect::<Pins>(prefix, max as usize)?;
        let dropped = pins.len() as u32;
        let left = match dropped == max {
            true => Left::Some,
            false => Left::None,
        };
        for ((session, inode), ()) in pins {
            self.remove::<Pins>(&(session, inode));
            let Some(mut orphan) = self.get::<Orphans>(&inode)? else {
                return Err(StorageFault::inconsistent(format!(
                    "pinned inode {inode} is no orphan"
                )));
            };
            orphan.waiting_for.retain(|waiting| *waiting != session);
            if orphan.waiting_for.is_empty() {
                self.put_reclaimable(inode);
            }
            self.put::<Orphans>(&inode, &orphan);
        }
        Ok((left, dropped))
    }
}

/// Whether a step left work for a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    None,
    Some,
}
