//! Inodes without a name, and the sessions that keep them (from feature level 3 on).
//!
//! An unlinked inode stays as long as a session has it open. An unlink writes two rows, however many sessions there
//! are: `unlinked`, with the log index at which the last name was removed, and an entry in the queue of inodes about
//! which sessions are asked. Each session has a mark: the log index up to which it has answered. It answers for a range
//! of the queue with one [`UnlinkedAnswer`], which lists the inodes it holds, and its mark advances. So a session that
//! holds many inodes delays no other. The mark of a new session is the index of its opening, so it is not asked about
//! inodes unlinked before.
//!
//! Queue entries up to the lowest mark leave the queue with the next [`super::LogBody::Reclaim`]. Their inodes are
//! freed if no session holds them, or else when the last hold is dropped.
//!
//! Sessions of clients that do not answer in order have no mark. For them each unlink adds a hold at once.
//!
//! Invariants: `holds` of an `unlinked` row is the number of its rows in `Holds`. An inode without a name that is
//! neither queued nor held is in `Reclaimable`.

use quorumfs_proto::command::Held;
use quorumfs_proto::{FsError, InodeNumber, SessionId, Timestamp};

use super::super::command::{Effects, UnlinkedAnswer};
use super::super::fault::{Failure, StorageFault};
use super::super::overlay::KeyRange;
use super::super::tables::{
    Departed, Holds, Marks, Reclaimable, Rows as _, Silences, Unlinked, UnlinkedQueue, UnlinkedRecord,
};
use super::sessions::Left;
use super::transaction::Transaction;
use super::writer::RowWriter;

impl Transaction<'_> {
    /// Records that the inode has lost its last name. All sessions are asked whether they have it open; the sender too,
    /// whatever it stated: it answers like the others.
    pub(super) fn make_unlinked(&mut self, inode: InodeNumber, held: Held) -> Result<(), Failure> {
        let sender = self.session()?;
        let since = self.writer.index;
        let mut record = UnlinkedRecord {
            since,
            maker: None,
            holds: 0,
        };
        for session in self.writer.summary.marks.unmarked() {
            if held == Held::Open || session != sender {
                self.writer.put::<Holds>(&(session, inode), &());
                record.holds += 1;
            }
        }
        self.writer.put::<Unlinked>(&inode, &record);
        self.writer.put::<UnlinkedQueue>(&(since, inode), &());
        Ok(())
    }

    /// Records an inode that `maker` created without a name: no other session can have it open.
    pub(super) fn make_nameless(&mut self, inode: InodeNumber, maker: SessionId) {
        let record = UnlinkedRecord {
            since: self.writer.index,
            maker: Some(maker),
            holds: 1,
        };
        self.writer.put::<Unlinked>(&inode, &record);
        self.writer.put::<Holds>(&(maker, inode), &());
    }

    /// Gives a name to an inode that never had one, if its maker asks; see [`Transaction::end_orphanhood`].
    pub(super) fn end_namelessness(
        &mut self,
        inode: InodeNumber,
        record: &UnlinkedRecord,
    ) -> Result<(), Failure> {
        let maker = self.session()?;
        if record.maker != Some(maker) {
            return Err(FsError::NotFound.into());
        }
        if self.writer.layers.contains::<Holds>(&(maker, inode))? {
            self.writer.remove::<Holds>(&(maker, inode));
        }
        self.writer.remove::<Unlinked>(&inode);
        if self.inode(inode)?.cuts.is_empty() {
            self.writer.remove::<Reclaimable>(&inode);
        }
        Ok(())
    }

    /// Drops the hold of this mutation's session on the inode, if there is one.
    pub(super) fn release_hold(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        let session = self.session()?;
        if self.writer.layers.contains::<Holds>(&(session, inode))?
            && self.writer.drop_hold(session, inode)? == Holding::Nobody
        {
            self.reclaim(inode)?;
        }
        Ok(())
    }

    /// Whether sessions are still asked about the inode, or hold it.
    pub(super) fn is_kept(&self, inode: InodeNumber, record: &UnlinkedRecord) -> Result<bool, StorageFault> {
        Ok(record.holds > 0
            || self
                .writer
                .layers
                .contains::<UnlinkedQueue>(&(record.since, inode))?)
    }

    /// Applies [`super::LogBody::Reclaim`].
    pub(super) fn reclaim_some(
        writer: &mut RowWriter,
        index: u64,
        now: Timestamp,
        work_max: u32,
    ) -> Result<Effects, StorageFault> {
        let work_left = writer.drop_departed(work_max.max(1))?;
        let mut step = Transaction::of_the_cluster(writer, now, work_left);
        let done = step
            .reclaim_ready()
            .and_then(|()| step.reclaim_answered())
            .and_then(|()| step.finish(index));
        match Failure::split(done)? {
            Ok((_, effects)) => Ok(effects),
            Err(verdict) => Err(StorageFault::inconsistent(format!("reclaiming: {verdict}"))),
        }
    }

    /// Frees inodes in `Reclaimable`.
    fn reclaim_ready(&mut self) -> Result<(), Failure> {
        let max = self.extents_left as usize;
        let range = self.writer.summary.reclaimable();
        let ready = self.writer.collect::<Reclaimable>(range, max)?;
        // Rows exist only from the first one on. If the search found none at all, none exist up to the newest inode.
        if max > 0 {
            let first = ready.first().map(|(inode, ())| *inode);
            let newest = InodeNumber(self.writer.summary.next_inode);
            self.writer.summary.reclaimable_from = first.unwrap_or(newest);
        }
        for (inode, ()) in ready {
            if self.extents_left == 0 {
                break;
            }
            self.reclaim(inode)?;
            self.extents_left = self.extents_left.saturating_sub(1);
        }
        Ok(())
    }

    /// Removes from the queue the inodes for which all sessions have answered, and frees those that no session holds.
    fn reclaim_answered(&mut self) -> Result<(), Failure> {
        let lowest = self.writer.summary.marks.lowest();
        let mut answered = self.writer.summary.queued();
        if let Some(next) = lowest.checked_add(1) {
            answered = answered.before(&UnlinkedQueue::key(&(next, InodeNumber(0))));
        }
        let max = self.extents_left as usize;
        for ((since, inode), ()) in self.writer.collect::<UnlinkedQueue>(answered, max)? {
            if self.extents_left == 0 {
                break;
            }
            self.writer.remove::<UnlinkedQueue>(&(since, inode));
            // Entries leave the queue in order, and new ones are added at its end.
            self.writer.summary.queue_from = (since, inode);
            let record = self.writer.unlinked(inode)?;
            if record.holds == 0 {
                // The row is removed again when the inode has been freed.
                self.writer.put_reclaimable(inode);
                self.reclaim(inode)?;
            }
            self.extents_left = self.extents_left.saturating_sub(1);
        }
        Ok(())
    }
}

/// Whether a session holds an inode after another has dropped its hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holding {
    /// A session holds it, or may: sessions are still asked.
    Somebody,
    Nobody,
}

impl RowWriter {
    pub(super) fn unlinked(&self, inode: InodeNumber) -> Result<UnlinkedRecord, StorageFault> {
        let record = self.get::<Unlinked>(&inode)?;
        record.ok_or_else(|| StorageFault::inconsistent(format!("held inode {inode} has a name")))
    }

    /// Drops a hold that exists.
    fn drop_hold(&mut self, session: SessionId, inode: InodeNumber) -> Result<Holding, StorageFault> {
        self.remove::<Holds>(&(session, inode));
        let mut record = self.unlinked(inode)?;
        record.holds = record
            .holds
            .checked_sub(1)
            .ok_or_else(|| StorageFault::inconsistent(format!("inode {inode} has a hold too many")))?;
        self.put::<Unlinked>(&inode, &record);
        if record.holds > 0 || self.layers.contains::<UnlinkedQueue>(&(record.since, inode))? {
            return Ok(Holding::Somebody);
        }
        self.put_reclaimable(inode);
        Ok(Holding::Nobody)
    }

    pub(super) fn put_reclaimable(&mut self, inode: InodeNumber) {
        self.put::<Reclaimable>(&inode, &());
        let from = &mut self.summary.reclaimable_from;
        *from = inode.min(*from);
    }

    /// Drops at most `max` holds.
    pub(super) fn drop_holds(&mut self, session: SessionId, max: u32) -> Result<(Left, u32), StorageFault> {
        let prefix = KeyRange::prefix(&session.0.to_be_bytes());
        let holds = self.collect::<Holds>(prefix, max as usize)?;
        let dropped = holds.len() as u32;
        for ((session, inode), ()) in holds {
            self.drop_hold(session, inode)?;
        }
        let left = match dropped == max {
            true => Left::Some,
            false => Left::None,
        };
        Ok((left, dropped))
    }

    /// Continues to drop the holds of ended sessions; returns the remaining budget of work.
    fn drop_departed(&mut self, mut work_left: u32) -> Result<u32, StorageFault> {
        while work_left > 0 {
            let Some((session, ())) = self
                .collect::<Departed>(KeyRange::prefix(&[]), 1)?
                .into_iter()
                .next()
            else {
                break;
            };
            let (pins, dropped) = self.drop_pins(session, work_left)?;
            work_left -= dropped;
            if pins == Left::Some {
                break;
            }
            let (holds, dropped) = self.drop_holds(session, work_left)?;
            work_left -= dropped;
            if holds == Left::Some {
                break;
            }
            self.remove::<Departed>(&session);
        }
        Ok(work_left)
    }

    /// Applies [`super::LogBody::AnswerUnlinked`].
    pub(super) fn answer_unlinked(&mut self, answers: &[UnlinkedAnswer]) -> Result<(), StorageFault> {
        for answer in answers {
            let session = answer.session;
            if !self.summary.living.contains_key(&session) {
                continue;
            }
            // An answer with another start has been applied before.
            let is_due = self.summary.marks.of(session) == Some(answer.from);
            if is_due && answer.through > answer.from {
                for inode in &answer.held {
                    self.hold(session, *inode, answer.from, answer.through)?;
                }
                self.put_mark(session, answer.through);
            }
        }
        Ok(())
    }

    /// Adds a hold of the session, if the inode lost its last name within the range of the answer.
    fn hold(
        &mut self,
        session: SessionId,
        inode: InodeNumber,
        from: u64,
        through: u64,
    ) -> Result<(), StorageFault> {
        let Some(mut record) = self.get::<Unlinked>(&inode)? else {
            return Ok(());
        };
        let is_asked = record.since > from
            && record.since <= through
            && self.layers.contains::<UnlinkedQueue>(&(record.since, inode))?;
        if is_asked && !self.layers.contains::<Holds>(&(session, inode))? {
            record.holds += 1;
            self.put::<Unlinked>(&inode, &record);
            self.put::<Holds>(&(session, inode), &());
        }
        Ok(())
    }

    pub(super) fn put_mark(&mut self, session: SessionId, mark: u64) {
        self.put::<Marks>(&session, &mark);
        self.summary.marks.set(session, mark);
    }

    /// Applies [`super::LogBody::NoteSilences`].
    pub(super) fn note_silences(&mut self, silences: &[(SessionId, u64)]) {
        for &(session, silent_ms) in silences {
            if !self.summary.living.contains_key(&session) {
                continue;
            }
            match silent_ms {
                0 => self.forget_silence(session),
                _ => {
                    self.put::<Silences>(&session, &silent_ms);
                    self.summary.silences.insert(session, silent_ms);
                }
            }
        }
    }

    /// Forgets the silence of a session that was heard or has ended.
    pub(super) fn forget_silence(&mut self, session: SessionId) {
        if self.summary.silences.remove(&session).is_some() {
            self.remove::<Silences>(&session);
        }
    }
}
