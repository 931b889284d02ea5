//! Inodes without a name below feature level 3, and the freeing of what nobody can reach. (From level 3 on `unlinked`
//! says who keeps an inode.)
//!
//! An unlinked inode stays as long as a session may have it open: every session that lives when the last name goes is
//! asked, and each says [`quorumfs_proto::Operation::ReleaseUnlinked`] or ends. Then its content is freed, at once
//! where that is little work, else in steps that the leader proposes.
//!
//! `orphans` and `pins` are one relation, kept both ways. `reclaimable` has all orphans that nobody holds and all
//! files with cuts (and at times one that no longer is either, until the next step looks at it).

use quorumfs_proto::command::{Held, NewInode, NewKind};
use quorumfs_proto::{FsError, InodeNumber, OperationResult, SessionId, Timestamp};

use super::super::command::Effects;
use super::super::fault::{Failure, StorageFault};
use super::super::overlay::KeyRange;
use super::super::tables::{
    Extents, InodeRecord, OrphanRecord, Orphans, Pins, Reclaimable, Rows as _, Symlinks, Unlinked, Xattrs,
};
use super::transaction::Transaction;
use super::writer::RowWriter;

impl Transaction<'_> {
    /// The whole of [`super::LogBody::ReclaimUnlinked`].
    pub(super) fn reclaim_step(
        writer: &mut RowWriter,
        index: u64,
        now: Timestamp,
        inode: InodeNumber,
        extents_max: u32,
    ) -> Result<Effects, StorageFault> {
        let mut step = Transaction::of_the_cluster(writer, now, extents_max.max(1));
        let done = step.reclaim(inode).and_then(|()| step.finish(index));
        match Failure::split(done)? {
            Ok((_, effects)) => Ok(effects),
            Err(verdict) => Err(StorageFault::inconsistent(format!(
                "reclaiming {inode}: {verdict}"
            ))),
        }
    }

    pub(super) fn create_unlinked(&mut self, new: &NewInode) -> Result<OperationResult, Failure> {
        if new.kind != NewKind::File {
            return Err(FsError::InvalidArgument.into());
        }
        let maker = self.session()?;
        let inode = self.make_inode(new, None)?;
        self.inode_mut(inode)?.attributes.links = 0;
        if self.writer.summary.feature_level >= 3 {
            self.make_nameless(inode, maker);
            return Ok(OperationResult::Entry { inode, created: true });
        }
        self.put_orphan(
            inode,
            &OrphanRecord {
                waiting_for: vec![maker],
                maker: Some(maker),
            },
        );
        Ok(OperationResult::Entry { inode, created: true })
    }

    /// The inode has lost its last name.
    pub(super) fn make_orphan(&mut self, inode: InodeNumber, held: Held) -> Result<(), Failure> {
        if self.writer.summary.feature_level >= 3 {
            return self.make_unlinked(inode, held);
        }
        let sender = self.session()?;
        let may_hold = |session: &SessionId| held == Held::Open || *session != sender;
        let waiting_for = self
            .writer
            .summary
            .living
            .keys()
            .copied()
            .filter(may_hold)
            .collect();
        self.put_orphan(
            inode,
            &OrphanRecord {
                waiting_for,
                maker: None,
            },
        );
        Ok(())
    }

    /// An inode that never had a name gets one. [`FsError::NotFound`] where its last name was taken away, or another
    /// session made it: to link(2) such an inode does not exist.
    pub(super) fn end_orphanhood(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        if let Some(record) = self.writer.get::<Unlinked>(&inode)? {
            return self.end_namelessness(inode, &record);
        }
        let orphan = self.writer.get::<Orphans>(&inode)?.ok_or_else(|| {
            StorageFault::inconsistent(format!("inode {inode} has no name and is no orphan"))
        })?;
        if orphan.maker != Some(self.session()?) {
            return Err(FsError::NotFound.into());
        }
        for session in orphan.waiting_for {
            self.writer.remove::<Pins>(&(session, inode));
        }
        self.writer.remove::<Orphans>(&inode);
        if self.inode(inode)?.cuts.is_empty() {
            self.writer.remove::<Reclaimable>(&inode);
        }
        Ok(())
    }

    pub(super) fn release_unlinked(&mut self, inodes: &[InodeNumber]) -> Result<OperationResult, Failure> {
        let session = self.session()?;
        for &inode in inodes {
            let Some(mut orphan) = self.writer.get::<Orphans>(&inode)? else {
                self.release_hold(inode)?;
                continue;
            };
            if !orphan.waiting_for.contains(&session) {
                continue;
            }
            orphan.waiting_for.retain(|waiting| *waiting != session);
            self.writer.remove::<Pins>(&(session, inode));
            self.writer.put::<Orphans>(&inode, &orphan);
            if orphan.waiting_for.is_empty() {
                self.writer.put_reclaimable(inode);
                self.reclaim(inode)?;
            }
        }
        Ok(OperationResult::Done)
    }

    /// Frees what can be freed of the inode, as far as `extents_left` goes.
    pub(super) fn reclaim(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        if self.peek(inode)?.is_none() {
            self.writer.remove::<Reclaimable>(&inode);
            return Ok(());
        }
        let held = match self.writer.get::<Orphans>(&inode)? {
            Some(orphan) => self.still_held(inode, orphan)?,
            None => match self.writer.get::<Unlinked>(&inode)? {
                Some(record) => self.is_kept(inode, &record)?,
                None => true,
            },
        };
        match held {
            true => self.trim(inode),
            false => self.dissolve(inode),
        }
    }

    /// Forgets sessions that have ended, and says whether any other may hold the orphan.
    fn still_held(&mut self, inode: InodeNumber, mut orphan: OrphanRecord) -> Result<bool, StorageFault> {
        let living = self.writer.summary.living.clone();
        let (held_by, ended): (Vec<SessionId>, Vec<SessionId>) = orphan
            .waiting_for
            .iter()
            .partition(|session| living.contains_key(*session));
        if !ended.is_empty() {
            for session in ended {
                self.writer.remove::<Pins>(&(session, inode));
            }
            orphan.waiting_for = held_by;
            self.put_orphan(inode, &orphan);
        }
        Ok(!orphan.waiting_for.is_empty())
    }

    /// Frees all that belongs to an orphan, and the inode last.
    fn dissolve(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        if !self.free_all_extents(inode)? {
            return Ok(());
        }
        let range = KeyRange::prefix(&inode.0.to_be_bytes());
        let xattrs = self
            .writer
            .collect_keys::<Xattrs>(range, self.extents_left as usize)?;
        let freed = xattrs.len() as u32;
        for key in xattrs {
            self.writer.remove::<Xattrs>(&key);
        }
        self.extents_left -= freed;
        let attributes = &mut self.inode_mut(inode)?.attributes;
        // Unlinked inodes are answered until the end, so the count stays true in between.
        attributes.xattr_count -= freed.min(attributes.xattr_count);
        if attributes.xattr_count > 0 || self.extents_left == 0 {
            return Ok(());
        }
        self.writer.remove::<Symlinks>(&inode);
        match self.writer.layers.contains::<Unlinked>(&inode)? {
            true => self.writer.remove::<Unlinked>(&inode),
            false => self.writer.remove::<Orphans>(&inode),
        }
        self.writer.remove::<Reclaimable>(&inode);
        self.drop_inode(inode)
    }

    /// Frees extents of an orphan; says whether none are left. Each step begins where the last one ended: what it
    /// removed is passed over row by row until it has left memory.
    fn free_all_extents(&mut self, inode: InodeNumber) -> Result<bool, Failure> {
        if !self.bounded_work() {
            return Ok(self.free_extents(inode, 0)?.is_none());
        }
        let record = self.inode(inode)?;
        // With cuts the cursor counts what was looked at, not what was freed.
        let from = match record.cuts.is_empty() {
            true => record.trim_cursor,
            false => 0,
        };
        if let Some(next) = self.free_extents(inode, from)? {
            let record = self.inode_mut(inode)?;
            record.cuts.clear();
            record.trim_cursor = next;
            return Ok(false);
        }
        if self.inode(inode)?.attributes.allocated_bytes == 0 {
            return Ok(true);
        }
        // Somebody has written below the cursor since.
        self.inode_mut(inode)?.trim_cursor = 0;
        Ok(false)
    }

    /// Looks for cut-off extents from where the last step ended. When it has seen all, there are no cuts any more.
    fn trim(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        let record = self.inode(inode)?.clone();
        if record.cuts.is_empty() {
            self.writer.remove::<Reclaimable>(&inode);
            return Ok(());
        }
        let max = self.extents_left as usize;
        let from = Extents::key(&(inode, record.trim_cursor));
        let rest = KeyRange::prefix(&inode.0.to_be_bytes()).starting_at(&from);
        let rows = self.writer.collect::<Extents>(rest, max)?;
        self.extents_left -= rows.len() as u32;
        let seen_all = rows.len() < max;
        let mut freed_bytes = 0;
        let mut cursor = record.trim_cursor;
        for ((inode, offset), extent) in rows {
            cursor = offset + 1;
            if record.is_cut_off(offset, &extent) {
                self.writer.remove::<Extents>(&(inode, offset));
                self.unrefer(extent.chunk);
                freed_bytes += u64::from(extent.length);
            }
        }
        let record: &mut InodeRecord = self.inode_mut(inode)?;
        record.attributes.allocated_bytes -= freed_bytes;
        record.trim_cursor = cursor;
        if seen_all {
            record.cuts.clear();
            record.trim_cursor = 0;
            self.writer.remove::<Reclaimable>(&inode);
        }
        Ok(())
    }

    /// Writes the relation both ways.
    fn put_orphan(&mut self, inode: InodeNumber, orphan: &OrphanRecord) {
        for session in &orphan.waiting_for {
            self.writer.put::<Pins>(&(*session, inode), &());
        }
        if orphan.waiting_for.is_empty() {
            self.writer.put_reclaimable(inode);
        }
        self.writer.put::<Orphans>(&inode, orphan);
    }
}
