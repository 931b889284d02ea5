//! Rename and exchange, as renameat2(2).

use quorumfs_proto::command::{Held, RenameMode, Target};
use quorumfs_proto::{FileKind, FsError, InodeNumber, Name, OperationResult};

use super::super::fault::{Failure, StorageFault};
use super::super::tables::DirentRecord;
use super::transaction::Transaction;

impl Transaction<'_> {
    pub(super) fn rename(
        &mut self,
        (from_parent, from_name): (Target, &Name),
        (to_parent, to_name): (Target, &Name),
        mode: RenameMode,
        held: Held,
    ) -> Result<OperationResult, Failure> {
        let from_parent = self.directory(from_parent)?;
        let to_parent = self.directory(to_parent)?;
        let moved = self.entry(from_parent, from_name)?.ok_or(FsError::NotFound)?;
        let other = self.entry(to_parent, to_name)?;
        match (mode, &other) {
            (RenameMode::NoReplace, Some(_)) => return Err(FsError::Exists.into()),
            (RenameMode::Exchange, None) => return Err(FsError::NotFound.into()),
            _ => {}
        }
        let moves = from_parent != to_parent || !self.bounded_work();
        if moves {
            self.require_no_cycle(&moved, to_parent)?;
        }
        let result = OperationResult::Renamed {
            inode: moved.inode,
            other: other.as_ref().map(|other| other.inode),
        };
        if other.as_ref().is_some_and(|other| other.inode == moved.inode) {
            // Both are names of one file: POSIX keeps both.
            self.inode(moved.inode)?;
            return Ok(result);
        }
        match (mode, other) {
            (RenameMode::Exchange, Some(other)) => {
                if moves {
                    self.require_no_cycle(&other, from_parent)?;
                }
                self.remove_entry(to_parent, to_name, &other)?;
                self.move_entry((from_parent, from_name), (to_parent, to_name), moved)?;
                self.add_entry(from_parent, from_name, other.clone())?;
                self.settle(&other, from_parent)?;
            }
            (_, Some(other)) => {
                self.require_replaceable(&moved, &other)?;
                self.remove_entry(to_parent, to_name, &other)?;
                self.move_entry((from_parent, from_name), (to_parent, to_name), moved)?;
                let held = match other.kind {
                    FileKind::Directory => Held::Open,
                    _ => held,
                };
                self.drop_link(&other, held)?;
            }
            (_, None) => self.move_entry((from_parent, from_name), (to_parent, to_name), moved)?,
        }
        Ok(result)
    }

    /// Moves an entry to a name that does not exist.
    fn move_entry(
        &mut self,
        (from_parent, from_name): (InodeNumber, &Name),
        (to_parent, to_name): (InodeNumber, &Name),
        moved: DirentRecord,
    ) -> Result<(), Failure> {
        self.remove_entry(from_parent, from_name, &moved)?;
        self.settle(&moved, to_parent)?;
        self.add_entry(to_parent, to_name, moved)
    }

    /// Updates the inode of an entry that has moved to another directory.
    fn settle(&mut self, entry: &DirentRecord, parent: InodeNumber) -> Result<(), Failure> {
        let attributes = self.change(entry.inode)?;
        if entry.kind == FileKind::Directory {
            attributes.parent = parent;
        }
        Ok(())
    }

    fn require_replaceable(&mut self, moved: &DirentRecord, other: &DirentRecord) -> Result<(), Failure> {
        match (moved.kind, other.kind) {
            (FileKind::Directory, FileKind::Directory) => self.require_empty(other.inode),
            (FileKind::Directory, _) => Err(FsError::NotDirectory.into()),
            (_, FileKind::Directory) => Err(FsError::IsDirectory.into()),
            _ => Ok(()),
        }
    }

    /// Checks that no directory moves into itself or below itself.
    ///
    /// # Errors
    /// [`FsError::InvalidArgument`] if it would, [`FsError::NameTooLong`] if the path to the root is longer than one
    /// command may walk.
    fn require_no_cycle(&mut self, moved: &DirentRecord, into: InodeNumber) -> Result<(), Failure> {
        if moved.kind != FileKind::Directory {
            return Ok(());
        }
        let mut ancestor = into;
        // No path is longer than the number of inodes.
        for _ in 0..=self.writer.summary.inode_count {
            if ancestor == moved.inode {
                return Err(FsError::InvalidArgument.into());
            }
            if ancestor == InodeNumber::ROOT {
                return Ok(());
            }
            self.ancestors_left = self.ancestors_left.checked_sub(1).ok_or(FsError::NameTooLong)?;
            ancestor = self
                .peek(ancestor)?
                .ok_or_else(|| StorageFault::inconsistent(format!("directory {ancestor} is missing")))?
                .attributes
                .parent;
        }
        Err(StorageFault::inconsistent(format!("directory {into} does not lead to the root")).into())
    }
}
