//! Inodes without a name below feature level 3, and the freeing of unreachable data. (From level 3 on `unlinked` keeps
//! track of the sessions that keep an inode.)
//!
//! An unlinked inode stays as long as a session may have it open. Every session that is alive when the last name is
//! removed is asked, and each sends [`quorumfs_proto::Operation::ReleaseUnlinked`] or ends. Then the inode's content is
//! freed: at once if that is little work, else in steps that the leader proposes.
//!
//! `orphans` and `pins` are one relation, stored in both directions. `reclaimable` has all orphans that no session
//! holds and all files with cuts (and sometimes an inode that is no longer either, until the next step looks at it).

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
    /// Applies [`super::LogBody::ReclaimUnlinked`].
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

    /// Makes an orphan of the inode, which has lost its last name.
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

    /// Ends the orphan state of an inode that never had a name and gets one.
    ///
    /// # Errors
    /// [`FsError::NotFound`] if the inode's last name was removed, or if another session made it: for link(2) such an
    /// inode does not exist.
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

    /// Frees what can be freed of the inode, as far as `extents_left` allows.
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

    /// Removes ended sessions from the orphan, and returns whether another session may hold it.
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

    /// Frees everything that belongs to an orphan, and the inode last.
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
        // Queries are answered for unlinked inodes until the end, so the count must be right in between.
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

    /// Frees extents of an orphan; returns whether none are left. Each step begins where the last one ended: a scan
    /// passes removed rows one by one until they are flushed from memory.
    fn free_all_extents(&mut self, inode: InodeNumber) -> Result<bool, Failure> {
        if !self.bounded_work() {
            return Ok(self.free_extents(inode, 0)?.is_none());
        }
        let record = self.inode(inode)?;
        // If there are cuts, the cursor counts extents that were looked at, not extents that were freed.
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
        // A write has added extents below the cursor since.
        self.inode_mut(inode)?.trim_cursor = 0;
        Ok(false)
    }

    /// Frees cut-off extents from where the last step ended. After the last extent it removes the cuts.
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

    /// Writes the relation in both directions.
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
