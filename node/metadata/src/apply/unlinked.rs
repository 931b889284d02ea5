//! Inodes without a name, and which sessions keep them (from feature level 3 on).
//!
//! An unlinked inode stays as long as a session has it open. An unlink writes two rows, however many sessions there are:
//! `unlinked`, with the log index at which the last name went, and a place in the queue of those about which sessions are
//! asked. Each session has a mark: up to which index it has answered. It answers for a range of the queue with one
//! [`UnlinkedAnswer`], names what it holds, and its mark moves on: a session that holds much keeps nobody waiting. A
//! session that opens later begins with its mark at its opening, so it is not asked about what was unlinked before.
//!
//! What lies in the queue up to the lowest mark leaves it with the next [`super::LogBody::Reclaim`]: freed if nobody holds
//! it, or else when the last hold goes.
//!
//! Sessions of clients that do not answer in order have no mark. For them each unlink makes a hold at once.
//!
//! What must hold: `holds` of an `unlinked` row is the number of its rows in `Holds`; an inode that is neither queued nor
//! held is in `Reclaimable`, or gone.

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
    /// The inode has lost its last name. Sessions are asked whether they have it open; the sender too, whatever it said:
    /// it answers with the others.
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

    /// `maker` has made the inode without a name: nobody else can have it open.
    pub(super) fn make_nameless(&mut self, inode: InodeNumber, maker: SessionId) {
        let record = UnlinkedRecord {
            since: self.writer.index,
            maker: Some(maker),
            holds: 1,
        };
        self.writer.put::<Unlinked>(&inode, &record);
        self.writer.put::<Holds>(&(maker, inode), &());
    }

    /// An inode that never had a name gets one, from its maker; see [`Transaction::end_orphanhood`].
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

    /// The session of this mutation does not hold the inode any more; says whether it did.
    pub(super) fn release_hold(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        let session = self.session()?;
        if self.writer.layers.contains::<Holds>(&(session, inode))?
            && self.writer.drop_hold(session, inode)? == Holding::Nobody
        {
            self.reclaim(inode)?;
        }
        Ok(())
    }

    /// Whether sessions are asked about the inode, or hold it.
    pub(super) fn is_kept(&self, inode: InodeNumber, record: &UnlinkedRecord) -> Result<bool, StorageFault> {
        Ok(record.holds > 0
            || self
                .writer
                .layers
                .contains::<UnlinkedQueue>(&(record.since, inode))?)
    }

    /// The whole of [`super::LogBody::Reclaim`].
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

    /// Frees what is known to be reclaimable.
    fn reclaim_ready(&mut self) -> Result<(), Failure> {
        let max = self.extents_left as usize;
        let range = self.writer.summary.reclaimable();
        let ready = self.writer.collect::<Reclaimable>(range, max)?;
        // Below the first there is none; where one was looked for and there is none at all, none up to the newest inode.
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

    /// Takes from the queue what all sessions have answered for, and frees what nobody holds.
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
            // They are taken out in order, and come in behind all others.
            self.writer.summary.queue_from = (since, inode);
            let record = self.writer.unlinked(inode)?;
            if record.holds == 0 {
                // Until it is gone; then it is taken out again.
                self.writer.put_reclaimable(inode);
                self.reclaim(inode)?;
            }
            self.extents_left = self.extents_left.saturating_sub(1);
        }
        Ok(())
    }
}

/// Whether a session holds an inode after another has let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holding {
    /// One does, or may: sessions are still asked.
    Somebody,
    Nobody,
}

impl RowWriter {
    pub(super) fn unlinked(&self, inode: InodeNumber) -> Result<UnlinkedRecord, StorageFault> {
        let record = self.get::<Unlinked>(&inode)?;
        record.ok_or_else(|| StorageFault::inconsistent(format!("held inode {inode} has a name")))
    }

    /// Drops a hold that is there.
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

    /// As far as `max` goes.
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

    /// Goes on dropping what ended sessions held; answers how much work is left to be done.
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

    /// The whole of [`super::LogBody::AnswerUnlinked`].
    pub(super) fn answer_unlinked(&mut self, answers: &[UnlinkedAnswer]) -> Result<(), StorageFault> {
        for answer in answers {
            let session = answer.session;
            if !self.summary.living.contains_key(&session) {
                continue;
            }
            // Any other has arrived before.
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

    /// The session holds the inode, if that lost its last name within the range it answers for.
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

    /// The whole of [`super::LogBody::NoteSilences`].
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

    /// The session is heard, or over.
    pub(super) fn forget_silence(&mut self, session: SessionId) {
        if self.summary.silences.remove(&session).is_some() {
            self.remove::<Silences>(&session);
        }
    }
}
