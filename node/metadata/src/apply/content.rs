//! The content of files: write, append, truncate.
//!
//! Invariants: the extents of an inode never overlap. Extents that no cut hides are below the inode's size.
//! `allocated_bytes` is the sum of all extents, and each extent counts once in its chunk's references.

use quorumfs_proto::chunk::Extent;
use quorumfs_proto::command::{Privileges, Target};
use quorumfs_proto::limits::FILE_BYTES_MAX;
use quorumfs_proto::{FileKind, FsError, InodeNumber, OperationResult, Timestamp};

use super::super::command::Crowded;
use super::super::fault::Failure;
use super::super::limits::CUTS_MAX;
use super::super::overlay::{Direction, KeyRange};
use super::super::tables::{Cut, ExtentRecord, Extents, Rows as _};
use super::attributes::valid_time;
use super::transaction::Transaction;

impl Transaction<'_> {
    pub(super) fn write(
        &mut self,
        target: Target,
        extents: &[Extent],
        mtime: Option<Timestamp>,
        privileges: Privileges,
    ) -> Result<OperationResult, Failure> {
        let inode = self.resolve(target)?;
        self.require_file(inode)?;
        self.put_extents(inode, extents, 0)?;
        if let Some(mtime) = mtime {
            // The client estimates the leader's clock. A change must not seem earlier than one that happened before it.
            const FEATURE_LEVEL_MIN: u32 = 3;
            let latest = match self.writer.summary.feature_level {
                FEATURE_LEVEL_MIN.. => self.now,
                _ => mtime,
            };
            self.change(inode)?.mtime = valid_time(mtime.min(latest))?;
        }
        self.lose_privileges(inode, privileges)?;
        Ok(OperationResult::Entry {
            inode,
            created: false,
        })
    }

    pub(super) fn append(
        &mut self,
        target: Target,
        extents: &[Extent],
        privileges: Privileges,
    ) -> Result<OperationResult, Failure> {
        let inode = self.resolve(target)?;
        self.require_file(inode)?;
        let offset = self.inode(inode)?.attributes.size;
        self.put_extents(inode, extents, offset)?;
        let now = self.now;
        self.change(inode)?.mtime = now;
        self.lose_privileges(inode, privileges)?;
        Ok(OperationResult::Appended { offset })
    }

    /// Truncates a file (truncate(2)): content beyond `size` is cut off, a new part is a hole. The work is bounded,
    /// whatever the size of the file.
    pub(super) fn truncate(&mut self, inode: InodeNumber, size: u64) -> Result<(), Failure> {
        self.require_file(inode)?;
        let attributes = &mut self.inode_mut(inode)?.attributes;
        let old_size = std::mem::replace(&mut attributes.size, size);
        if size == old_size {
            return Ok(());
        }
        attributes.content_version += 1;
        let version = attributes.content_version;
        if size > old_size {
            return Ok(());
        }
        let cuts = self.inode(inode)?.cuts.len();
        if cuts >= CUTS_MAX && self.bounded_work() {
            return Err(self.crowded(Crowded {
                inode,
                from: size,
                to: size,
            }));
        }
        let attributes = &self.inode(inode)?.attributes;
        if attributes.allocated_bytes > 0 {
            self.cut_extent_across(inode, size, u64::MAX)?;
        }
        let all_freed = self.free_extents(inode, size)?.is_none();
        let record = self.inode_mut(inode)?;
        // Older cuts that hid only what this one hides too are dropped.
        record.cuts.retain(|cut| cut.from < size);
        if !all_freed {
            record.trim_cursor = match record.cuts.is_empty() {
                true => size,
                false => record.trim_cursor.min(size),
            };
            record.cuts.push(Cut { from: size, version });
            self.writer.put_reclaimable(inode);
        }
        Ok(())
    }

    /// Removes the extents that begin at or above `from`, as many as this command may. Returns the offset of the next
    /// one.
    pub(super) fn free_extents(&mut self, inode: InodeNumber, from: u64) -> Result<Option<u64>, Failure> {
        let record = self.inode(inode)?;
        // A small or empty file, the common case, needs no scan.
        if record.attributes.allocated_bytes == 0 {
            return Ok(None);
        }
        let beyond = KeyRange::prefix(&inode.0.to_be_bytes()).starting_at(&Extents::key(&(inode, from)));
        let max = self.extents_left as usize;
        let mut rows = self.writer.collect::<Extents>(beyond, max + 1)?;
        let next = rows.get(max).map(|((_, offset), _)| *offset);
        rows.truncate(max);
        self.extents_left -= rows.len() as u32;
        for ((inode, offset), extent) in rows {
            self.remove_extent(inode, offset, &extent)?;
        }
        Ok(next)
    }

    fn require_file(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        match self.inode(inode)?.attributes.kind {
            FileKind::File => Ok(()),
            FileKind::Directory => Err(FsError::IsDirectory.into()),
            _ => Err(FsError::InvalidArgument.into()),
        }
    }

    /// Puts `extents` over the existing content; their offsets count from `base`. The file grows if they reach beyond
    /// its end.
    fn put_extents(&mut self, inode: InodeNumber, extents: &[Extent], base: u64) -> Result<(), Failure> {
        if extents.is_empty() {
            return Ok(());
        }
        let attributes = self.change(inode)?;
        attributes.content_version += 1;
        let version = attributes.content_version;
        for extent in extents {
            let from = base
                .checked_add(extent.file_offset)
                .ok_or(FsError::FileTooLarge)?;
            let to = from
                .checked_add(u64::from(extent.length))
                .filter(|end| *end <= FILE_BYTES_MAX)
                .ok_or(FsError::FileTooLarge)?;
            self.clear_range(inode, from, to)?;
            let record = ExtentRecord {
                length: extent.length,
                chunk: extent.chunk,
                chunk_offset: extent.chunk_offset,
                version,
            };
            self.add_extent(inode, from, &record)?;
            let attributes = &mut self.inode_mut(inode)?.attributes;
            attributes.size = attributes.size.max(to);
        }
        self.note_fragments(inode, extents, version);
        Ok(())
    }

    /// Removes the range `from..to` from all extents.
    fn clear_range(&mut self, inode: InodeNumber, from: u64, to: u64) -> Result<(), Failure> {
        let record = self.inode(inode)?;
        // Most writes append: beyond the size there are only extents that cuts hide.
        if record.attributes.allocated_bytes == 0
            || (from >= record.attributes.size && record.cuts.is_empty())
        {
            return Ok(());
        }
        self.cut_extent_across(inode, from, to)?;
        let within = KeyRange::prefix(&inode.0.to_be_bytes())
            .starting_at(&Extents::key(&(inode, from)))
            .before(&Extents::key(&(inode, to)));
        let rows = self
            .writer
            .collect::<Extents>(within, self.replaced_left.saturating_add(1))?;
        if rows.len() > self.replaced_left {
            return Err(self.crowded(Crowded { inode, from, to }));
        }
        self.replaced_left -= rows.len();
        for ((inode, offset), extent) in rows {
            self.remove_extent(inode, offset, &extent)?;
            self.add_remainder(inode, offset, &extent, to)?;
        }
        Ok(())
    }

    /// Cuts the extent that begins below `from` and reaches beyond it, if there is one: the parts below `from` and
    /// above `to` stay.
    fn cut_extent_across(&mut self, inode: InodeNumber, from: u64, to: u64) -> Result<(), Failure> {
        let below = KeyRange::prefix(&inode.0.to_be_bytes()).before(&Extents::key(&(inode, from)));
        let nearest = self
            .writer
            .layers
            .scan::<Extents>(below, Direction::Down)?
            .next()
            .transpose()?;
        let Some(((_, offset), extent)) = nearest else {
            return Ok(());
        };
        if offset + u64::from(extent.length) <= from {
            return Ok(());
        }
        self.remove_extent(inode, offset, &extent)?;
        let kept = ExtentRecord {
            length: (from - offset) as u32,
            ..extent.clone()
        };
        self.add_extent(inode, offset, &kept)?;
        self.add_remainder(inode, offset, &extent, to)
    }

    /// Adds the part beyond `to` of an extent at `offset` that was just removed.
    fn add_remainder(
        &mut self,
        inode: InodeNumber,
        offset: u64,
        extent: &ExtentRecord,
        to: u64,
    ) -> Result<(), Failure> {
        let end = offset + u64::from(extent.length);
        if end <= to {
            return Ok(());
        }
        // `offset < to < end`, so the difference is below the extent's length.
        let skipped = (to - offset) as u32;
        let remainder = ExtentRecord {
            length: extent.length - skipped,
            chunk_offset: extent.chunk_offset + skipped,
            ..extent.clone()
        };
        self.add_extent(inode, to, &remainder)
    }

    pub(super) fn add_extent(
        &mut self,
        inode: InodeNumber,
        offset: u64,
        extent: &ExtentRecord,
    ) -> Result<(), Failure> {
        self.writer.put::<Extents>(&(inode, offset), extent);
        self.refer(extent.chunk);
        self.inode_mut(inode)?.attributes.allocated_bytes += u64::from(extent.length);
        Ok(())
    }

    pub(super) fn remove_extent(
        &mut self,
        inode: InodeNumber,
        offset: u64,
        extent: &ExtentRecord,
    ) -> Result<(), Failure> {
        self.writer.remove::<Extents>(&(inode, offset));
        self.unrefer(extent.chunk);
        self.inode_mut(inode)?.attributes.allocated_bytes -= u64::from(extent.length);
        Ok(())
    }
}
