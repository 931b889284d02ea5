//! Sessions: opened, ended, forgotten. What a session's mutations answered is kept by its lanes.

use imbl::OrdMap;
use quorumfs_proto::{SessionId, Timestamp};

use super::super::command::CallResult;
use super::super::fault::StorageFault;
use super::super::overlay::KeyRange;
use super::super::tables::{Lanes, Orphans, Pins, Reclaimable, SessionRecord, Sessions};
use super::{COMMAND_FREED_EXTENTS_MAX, Writer};

impl Writer {
    pub(super) fn open_session(
        &mut self,
        now: Timestamp,
        session: SessionId,
        description: &str,
    ) -> Result<CallResult, StorageFault> {
        match self.get::<Sessions>(&session)? {
            Some(record) if record.ended.is_some() => Ok(CallResult::UnknownSession),
            Some(_) => Ok(CallResult::Done),
            None => {
                let record = SessionRecord {
                    description: description.to_owned(),
                    opened: now,
                    ended: None,
                    chunk_low_water: 0,
                };
                self.put::<Sessions>(&session, &record);
                self.summary.living.insert(session, 0);
                Ok(CallResult::Done)
            }
        }
    }

    pub(super) fn end_session(
        &mut self,
        now: Timestamp,
        session: SessionId,
    ) -> Result<CallResult, StorageFault> {
        let Some(mut record) = self.get::<Sessions>(&session)? else {
            return Ok(CallResult::UnknownSession);
        };
        if record.ended.is_none() {
            record.ended = Some(now);
            self.put::<Sessions>(&session, &record);
            self.summary.living.remove(&session);
            // What is more than one step's work is found by `View::reclaimable`.
            self.drop_pins(session)?;
        }
        Ok(CallResult::Done)
    }

    pub(super) fn forget_session(&mut self, session: SessionId) -> Result<CallResult, StorageFault> {
        let Some(record) = self.get::<Sessions>(&session)? else {
            return Ok(CallResult::Done);
        };
        if record.ended.is_none() || self.drop_pins(session)? == Left::Some {
            return Ok(CallResult::Done);
        }
        let lanes = KeyRange::prefix(&session.0.to_be_bytes());
        // At most `LANES_MAX` of them.
        for (lane, _) in self.collect::<Lanes>(lanes, usize::MAX)? {
            self.remove::<Lanes>(&lane);
        }
        self.remove::<Sessions>(&session);
        Ok(CallResult::Done)
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

    /// Nothing waits for this session any more, as far as one step goes.
    fn drop_pins(&mut self, session: SessionId) -> Result<Left, StorageFault> {
        let max = COMMAND_FREED_EXTENTS_MAX as usize;
        let pins = self.collect::<Pins>(KeyRange::prefix(&session.0.to_be_bytes()), max)?;
        let left = match pins.len() == max {
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
                self.put::<Reclaimable>(&inode, &());
            }
            self.put::<Orphans>(&inode, &orphan);
        }
        Ok(left)
    }
}

/// Whether a step left something to do.
#[derive(PartialEq, Eq)]
enum Left {
    None,
    Some,
}
