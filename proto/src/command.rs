//! Changes of metadata: one [`Command`] is one Raft log entry and takes effect as a whole or not at all.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::attributes::Timestamp;
use crate::chunk::{ChunkBody, Extent, NewChunk};
use crate::codec;
use crate::error::FsError;
use crate::ids::{InodeNumber, SessionId};
use crate::limits;
use crate::name::{Name, SymlinkTarget, XattrName};

/// A short list of operations that take effect together, in order; if one is refused, none takes effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Chunks that the operations name for the first time.
    pub chunks: Vec<NewChunk>,
    /// 1 to [`limits::COMMAND_OPERATIONS_MAX`] operations.
    pub operations: Vec<Operation>,
}

impl Command {
    /// Makes a command of one operation without content.
    pub fn single(operation: Operation) -> Command {
        Command {
            chunks: Vec::new(),
            operations: vec![operation],
        }
    }

    /// Checks every bound that can be checked without the filesystem's state. `session` is the sender.
    ///
    /// # Errors
    /// The [`FsError`] with which the command is refused.
    pub fn validate(&self, session: SessionId) -> Result<(), FsError> {
        if self.operations.is_empty()
            || self.operations.len() > limits::COMMAND_OPERATIONS_MAX
            || self.chunks.len() > limits::COMMAND_CHUNKS_MAX
        {
            return Err(FsError::InvalidArgument);
        }
        let mut extents = 0;
        for operation in &self.operations {
            operation.validate()?;
            extents += operation.extents().len();
        }
        if extents > limits::COMMAND_EXTENTS_MAX {
            return Err(FsError::InvalidArgument);
        }
        for chunk in &self.chunks {
            chunk.validate()?;
            if chunk.id.session != session {
                return Err(FsError::InvalidArgument);
            }
        }
        let covers = |chunk: &NewChunk, extent: &Extent| {
            chunk.id == extent.chunk
                && u64::from(extent.chunk_offset) + u64::from(extent.length) <= u64::from(chunk.length)
        };
        // An extent may only refer to a chunk that the same command brings: its bounds are checked against nothing else.
        for extent in self.operations.iter().flat_map(|operation| operation.extents()) {
            if !self.chunks.iter().any(|chunk| covers(chunk, extent)) {
                return Err(FsError::InvalidArgument);
            }
        }
        for chunk in &self.chunks {
            let named = self
                .operations
                .iter()
                .flat_map(|o| o.extents())
                .any(|extent| extent.chunk == chunk.id);
            if !named {
                return Err(FsError::InvalidArgument);
            }
        }
        Ok(())
    }

    /// Checks that the entry of the log fits a message to the followers. Edges call it when a command arrives; `apply`,
    /// which calls [`Command::validate`], does not: a command that is in the log was accepted.
    ///
    /// # Errors
    /// The [`FsError`] with which the command is refused.
    pub fn validate_bytes(&self) -> Result<(), FsError> {
        if self.inline_bytes() > limits::INLINE_BYTES_MAX as usize
            || codec::encoded_bytes(self) > limits::COMMAND_BYTES_MAX
        {
            return Err(FsError::TooBig);
        }
        Ok(())
    }

    /// Whether the command only states which inodes a session does not have open: no client can see a change.
    pub fn releases_only(&self) -> bool {
        self.operations
            .iter()
            .all(|operation| matches!(operation, Operation::ReleaseUnlinked { .. }))
    }

    /// Returns the number of bytes of content inside the command.
    pub fn inline_bytes(&self) -> usize {
        let inline = |chunk: &NewChunk| match &chunk.body {
            ChunkBody::Inline(bytes) => bytes.len(),
            ChunkBody::Stored => 0,
        };
        self.chunks.iter().map(inline).sum()
    }

    /// Whether the command uses no more space than is used before it. Such a command is accepted even if the disks are
    /// full.
    pub fn frees_space(&self) -> bool {
        self.chunks.is_empty()
            && self.operations.iter().all(|operation| {
                matches!(
                    operation,
                    Operation::Unlink { .. }
                        | Operation::RemoveDirectory { .. }
                        | Operation::RemoveXattr { .. }
                        | Operation::ReleaseUnlinked { .. }
                        | Operation::SetAttributes { .. }
                        | Operation::Rename { .. }
                )
            })
    }
}

/// The inode that an operation refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// An inode that exists.
    Inode(InodeNumber),
    /// The inode that the operation with this index in the same command created (or found).
    Created(u16),
}

/// One change. The order of the variants is part of the encoding: append, never reorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Creates an inode and names it. Answers [`crate::outcome::OperationResult::Entry`].
    Create {
        /// The directory that has the name.
        parent: Target,
        /// The entry's name.
        name: Name,
        /// The new inode.
        inode: NewInode,
        /// What happens if the name exists.
        existing: IfExists,
    },
    /// Creates a regular file without a name. The session holds it open until it ends or releases it (O_TMPFILE, and
    /// REST uploads in progress). Answers `Entry`.
    CreateUnlinked {
        /// The new inode; its kind must be [`NewKind::File`].
        inode: NewInode,
    },
    /// Adds a name to an inode (link(2)). The first name of a `CreateUnlinked` inode is given this way. Answers
    /// `Entry`.
    Link {
        /// The inode; not a directory.
        inode: Target,
        /// The directory that has the name.
        parent: Target,
        /// The new name.
        name: Name,
        /// What happens if the name exists: here [`IfExists::Open`] means that a file of that name is replaced, as by
        /// rename(2).
        existing: IfExists,
    },
    /// Removes a name of a file (unlink(2)). Answers `Removed`.
    Unlink {
        /// The directory that has the name.
        parent: Target,
        /// Name of the entry.
        name: Name,
        /// Whether the sending session has the inode open, so that it must be kept.
        held: Held,
    },
    /// Removes an empty directory (rmdir(2)). Answers `Removed`.
    RemoveDirectory {
        /// The parent directory.
        parent: Target,
        /// The directory's name.
        name: Name,
    },
    /// Renames or exchanges, as renameat2(2). Answers `Renamed`.
    Rename {
        /// The present directory.
        from_parent: Target,
        /// The present name.
        from_name: Name,
        /// The new directory.
        to_parent: Target,
        /// The new name.
        to_name: Name,
        /// What happens if the new name exists.
        mode: RenameMode,
        /// Whether the sending session has the replaced inode open.
        held: Held,
    },
    /// Changes attributes and size. Answers `Entry`.
    SetAttributes {
        /// The inode to change.
        inode: Target,
        /// The attributes to change.
        changes: AttributeChanges,
    },
    /// Writes extents of this command's chunks to a file. The size becomes max(size, end of the last extent). Answers
    /// `Entry`.
    Write {
        /// The file to change.
        inode: Target,
        /// The extents. Where they overlap, the later one counts.
        extents: Vec<Extent>,
        /// Time of the program's write, which becomes mtime; `None` leaves mtime as it is (a `utimens` came after the
        /// write).
        mtime: Option<Timestamp>,
        /// Whether set-user-id, set-group-id and `security.capability` are dropped, as by a write of an unprivileged
        /// program.
        privileges: Privileges,
    },
    /// Adds extents at the end that the file has when the command is applied; their `file_offset`s count from that end.
    /// Answers `Appended`.
    Append {
        /// The file to change.
        inode: Target,
        /// The extents to add.
        extents: Vec<Extent>,
        /// What happens to privileges, as for `Write`.
        privileges: Privileges,
    },
    /// Sets an extended attribute (setxattr(2)). Answers `Entry`.
    SetXattr {
        /// The inode to change.
        inode: Target,
        /// The attribute's name.
        name: XattrName,
        /// The value: at most [`limits::XATTR_VALUE_BYTES_MAX`] bytes.
        value: Bytes,
        /// What happens if the attribute exists, or does not.
        mode: XattrMode,
    },
    /// Removes an extended attribute (removexattr(2)). Answers `Entry`.
    RemoveXattr {
        /// The inode to change.
        inode: Target,
        /// The attribute's name.
        name: XattrName,
    },
    /// States that this session does not, or no longer, have these unlinked inodes open. Answers `Done`.
    ReleaseUnlinked {
        /// The inodes. Unknown numbers are ignored.
        inodes: Vec<InodeNumber>,
    },
}

impl Operation {
    /// Returns the extents of content in the operation.
    pub fn extents(&self) -> &[Extent] {
        match self {
            Operation::Write { extents, .. } | Operation::Append { extents, .. } => extents,
            _ => &[],
        }
    }

    fn validate(&self) -> Result<(), FsError> {
        for extent in self.extents() {
            extent.validate()?;
        }
        match self {
            Operation::SetXattr { value, .. } if value.len() > limits::XATTR_VALUE_BYTES_MAX => {
                Err(FsError::TooBig)
            }
            Operation::SetAttributes { changes, .. }
                if changes.size.is_some_and(|s| s > limits::FILE_BYTES_MAX) =>
            {
                Err(FsError::FileTooLarge)
            }
            Operation::Create { inode, .. } | Operation::CreateUnlinked { inode } if inode.mode > 0o7777 => {
                Err(FsError::InvalidArgument)
            }
            _ => Ok(()),
        }
    }
}

/// An inode to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewInode {
    /// Kind of the inode.
    pub kind: NewKind,
    /// The low twelve bits of the mode, with the caller's umask applied.
    pub mode: u16,
    /// User id of the owner.
    pub uid: u32,
    /// Group id, unless the directory's set-group-id bit passes on the directory's group.
    pub gid: u32,
}

/// The kind of inode to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewKind {
    /// An empty regular file.
    File,
    /// An empty directory.
    Directory,
    /// A symbolic link with this target (its mode is always 0777).
    Symlink(SymlinkTarget),
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device with this device number.
    CharacterDevice(u32),
    /// A block device with this device number.
    BlockDevice(u32),
}

/// What a create does if the name exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IfExists {
    /// It fails with [`FsError::Exists`] (O_EXCL, mkdir, mknod, symlink, link).
    Refuse,
    /// It takes the existing inode instead, as open(O_CREAT) does: `Entry` with `created: false`.
    Open,
}

/// Whether the sending session holds open an inode that loses its last name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Held {
    /// The session holds it open, and will release it.
    Open,
    /// The session does not hold it open, and refuses cached opens of it from now on.
    NotOpen,
}

/// The flags of renameat2(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenameMode {
    /// Replaces the inode that has the new name, if that is allowed.
    Replace,
    /// Fails with [`FsError::Exists`] if the new name exists (RENAME_NOREPLACE).
    NoReplace,
    /// Exchanges the two inodes (RENAME_EXCHANGE).
    Exchange,
}

/// The flags of setxattr(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum XattrMode {
    /// Creates or replaces the attribute.
    Set,
    /// Fails with [`FsError::Exists`] if the attribute exists (XATTR_CREATE).
    Create,
    /// Fails with [`FsError::NoAttribute`] if the attribute does not exist (XATTR_REPLACE).
    Replace,
}

/// What happens to set-user-id, set-group-id and file capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Privileges {
    /// They are kept.
    Keep,
    /// They are dropped (FUSE_HANDLE_KILLPRIV_V2).
    Drop,
}

/// The source of a timestamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetTime {
    /// The command's own time stamp (UTIME_NOW).
    Now,
    /// This point in time.
    At(Timestamp),
}

/// The attributes to change; `None` leaves one as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttributeChanges {
    /// The low twelve bits of the mode.
    pub mode: Option<u16>,
    /// User id of the owner.
    pub uid: Option<u32>,
    /// Id of the group.
    pub gid: Option<u32>,
    /// The new size (truncate(2), ftruncate(2)): content beyond it is cut off, a new part is a hole.
    pub size: Option<u64>,
    /// Time of the last access.
    pub atime: Option<SetTime>,
    /// Time of the last change of content.
    pub mtime: Option<SetTime>,
    /// Whether privileges are dropped: always by chown, by truncation if the caller is not privileged.
    pub privileges: Option<Privileges>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Sha256;
    use crate::ids::ChunkId;

    fn chunk(counter: u64, body: ChunkBody, length: u32) -> NewChunk {
        NewChunk {
            id: ChunkId {
                session: SessionId(u64::MAX),
                counter,
            },
            length,
            sha256: Sha256([u8::MAX; 32]),
            body,
        }
    }

    fn extent(chunk: &NewChunk, at: u64, length: u32) -> Extent {
        Extent {
            file_offset: limits::FILE_BYTES_MAX - at - u64::from(length),
            length,
            chunk: chunk.id,
            chunk_offset: 0,
        }
    }

    fn write(extents: Vec<Extent>) -> Operation {
        Operation::Write {
            inode: Target::Inode(InodeNumber(u64::MAX)),
            extents,
            mtime: Some(Timestamp::default()),
            privileges: Privileges::Drop,
        }
    }

    fn set_xattr(bytes: usize) -> Operation {
        Operation::SetXattr {
            inode: Target::Inode(InodeNumber(1)),
            name: XattrName::new(Bytes::from(vec![b'x'; limits::XATTR_NAME_BYTES_MAX])).unwrap(),
            value: Bytes::from(vec![7; bytes]),
            mode: XattrMode::Set,
        }
    }

    #[test]
    fn the_largest_command_of_a_client_has_a_quarter_of_the_bytes() {
        // The largest flush of a mount in one command, with the operation that goes along.
        let inline = ChunkBody::Inline(vec![7; limits::INLINE_BYTES_MAX as usize].into());
        let mut chunks = vec![chunk(u64::MAX, inline, limits::INLINE_BYTES_MAX)];
        for counter in 1..limits::COMMAND_CHUNKS_MAX as u64 {
            chunks.push(chunk(
                u64::MAX - counter,
                ChunkBody::Stored,
                limits::CHUNK_BYTES_MAX,
            ));
        }
        let extents = (0..limits::COMMAND_EXTENTS_MAX).map(|n| {
            let chunk = &chunks[n % chunks.len()];
            extent(chunk, n as u64, limits::INLINE_BYTES_MAX)
        });
        let largest = Command {
            operations: vec![write(extents.collect()), set_xattr(limits::XATTR_VALUE_BYTES_MAX)],
            chunks,
        };
        assert_eq!(largest.validate(SessionId(u64::MAX)), Ok(()));
        assert_eq!(largest.validate_bytes(), Ok(()));
        let bytes = codec::encoded_bytes(&largest);
        assert!(bytes <= limits::COMMAND_BYTES_MAX / 4, "{bytes} bytes");
    }

    #[test]
    fn what_would_not_fit_a_message_is_refused() {
        let many = Command {
            chunks: Vec::new(),
            operations: (0..20)
                .map(|_| set_xattr(limits::XATTR_VALUE_BYTES_MAX))
                .collect(),
        };
        assert_eq!(many.validate(SessionId(1)), Ok(()), "each is in bounds");
        assert_eq!(many.validate_bytes(), Err(FsError::TooBig));

        let length = limits::INLINE_BYTES_MAX / 2 + 1;
        let halves = [1, 2].map(|counter| {
            chunk(
                counter,
                ChunkBody::Inline(vec![7; length as usize].into()),
                length,
            )
        });
        let extents = halves.iter().map(|chunk| extent(chunk, 0, length)).collect();
        let mut inline = Command {
            chunks: halves.to_vec(),
            operations: vec![write(extents)],
        };
        assert_eq!(inline.validate_bytes(), Err(FsError::TooBig));
        inline.chunks.pop();
        assert_eq!(inline.validate_bytes(), Ok(()));
    }
}
