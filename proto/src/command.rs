//! What changes metadata: one [`Command`] is one Raft log entry, all of it or nothing.

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
    /// Content that the operations name for the first time.
    pub chunks: Vec<NewChunk>,
    /// 1 to [`limits::COMMAND_OPERATIONS_MAX`].
    pub operations: Vec<Operation>,
}

impl Command {
    /// A command of one operation that brings no content.
    pub fn single(operation: Operation) -> Command {
        Command {
            chunks: Vec::new(),
            operations: vec![operation],
        }
    }

    /// Checks every bound that can be checked without state; `session` is who sends it.
    pub fn validate(&self, session: SessionId) -> Result<(), FsError> {
        if self.operations.is_empty()
            || self.operations.len() > limits::COMMAND_OPERATIONS_MAX
            || self.chunks.len() > limits::COMMAND_CHUNKS_MAX
        {
            return Err(FsError::InvalidArgument);
        }
        let mut pieces = 0;
        for operation in &self.operations {
            operation.validate()?;
            pieces += operation.pieces().len();
        }
        if pieces > limits::COMMAND_PIECES_MAX {
            return Err(FsError::InvalidArgument);
        }
        for chunk in &self.chunks {
            chunk.validate()?;
            if chunk.id.session != session {
                return Err(FsError::InvalidArgument);
            }
        }
        let covers = |chunk: &NewChunk, piece: &Extent| {
            chunk.id == piece.chunk
                && u64::from(piece.chunk_offset) + u64::from(piece.length) <= u64::from(chunk.length)
        };
        // A piece may only lie in a chunk that this very command brings: nothing else can vouch for it.
        for piece in self.operations.iter().flat_map(|operation| operation.pieces()) {
            if !self.chunks.iter().any(|chunk| covers(chunk, piece)) {
                return Err(FsError::InvalidArgument);
            }
        }
        for chunk in &self.chunks {
            let named = self
                .operations
                .iter()
                .flat_map(|o| o.pieces())
                .any(|piece| piece.chunk == chunk.id);
            if !named {
                return Err(FsError::InvalidArgument);
            }
        }
        Ok(())
    }

    /// Checks the bounds of what travels: an entry of the log must fit a message to the followers. Asked where a command
    /// comes in and not, as [`Command::validate`], by who applies it: what is in the log was taken.
    pub fn validate_bytes(&self) -> Result<(), FsError> {
        if self.inline_bytes() > limits::INLINE_BYTES_MAX as usize
            || codec::encoded_bytes(self) > limits::COMMAND_BYTES_MAX
        {
            return Err(FsError::TooBig);
        }
        Ok(())
    }

    /// Whether it only says what a session does not have open: it changes nothing that anybody can see.
    pub fn releases_only(&self) -> bool {
        self.operations
            .iter()
            .all(|operation| matches!(operation, Operation::ReleaseUnlinked { .. }))
    }

    /// Bytes of content that ride inside.
    pub fn inline_bytes(&self) -> usize {
        let inline = |chunk: &NewChunk| match &chunk.body {
            ChunkBody::Inline(bytes) => bytes.len(),
            ChunkBody::Stored => 0,
        };
        self.chunks.iter().map(inline).sum()
    }

    /// Whether it leaves no more used than before: such a command is taken even when the disks are full.
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

/// Which inode an operation is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// One that exists.
    Inode(InodeNumber),
    /// The one that the operation of this index in the same command created (or found).
    Created(u16),
}

/// One change. The order of the variants is part of the encoding: append, never reorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Makes an inode and names it. Answers [`crate::outcome::OperationResult::Entry`].
    Create {
        /// The directory.
        parent: Target,
        /// The entry's name.
        name: Name,
        /// What is made.
        inode: NewInode,
        /// What if the name exists.
        existing: IfExists,
    },
    /// Makes a regular file without a name, held open by this session until it ends or releases it (O_TMPFILE, and
    /// REST uploads under way). Answers `Entry`.
    CreateUnlinked {
        /// What is made; its kind must be [`NewKind::File`].
        inode: NewInode,
    },
    /// Names an inode once more (link(2)). A `CreateUnlinked` inode gets its first name so. Answers `Entry`.
    Link {
        /// What is named; not a directory.
        inode: Target,
        /// The directory.
        parent: Target,
        /// The new name.
        name: Name,
        /// What if the name exists: [`IfExists::Open`] here means that a file of that name is replaced, as by rename(2).
        existing: IfExists,
    },
    /// Removes a name of a file (unlink(2)). Answers `Removed`.
    Unlink {
        /// The directory.
        parent: Target,
        /// The name.
        name: Name,
        /// Whether the sending session has the inode open and so wants it kept.
        held: Held,
    },
    /// Removes an empty directory (rmdir(2)). Answers `Removed`.
    RemoveDirectory {
        /// The directory it lies in.
        parent: Target,
        /// Its name.
        name: Name,
    },
    /// renameat2(2). Answers `Renamed`.
    Rename {
        /// Where it is.
        from_parent: Target,
        /// What it is called.
        from_name: Name,
        /// Where it goes.
        to_parent: Target,
        /// What it will be called.
        to_name: Name,
        /// What if that name exists.
        mode: RenameMode,
        /// Whether the sending session has the inode open that is replaced.
        held: Held,
    },
    /// Changes attributes and size. Answers `Entry`.
    SetAttributes {
        /// Whose.
        inode: Target,
        /// Which.
        changes: AttributeChanges,
    },
    /// Puts pieces of this command's chunks into a file; size becomes max(size, end of the last piece). Answers `Entry`.
    Write {
        /// The file.
        inode: Target,
        /// Where what lies. Later pieces lie over earlier ones.
        pieces: Vec<Extent>,
        /// When the program wrote: becomes mtime; `None` leaves it as it is (a `utimens` came after the write).
        mtime: Option<Timestamp>,
        /// Whether set-user-id, set-group-id and `security.capability` are dropped, as by a write of an
        /// unprivileged program.
        privileges: Privileges,
    },
    /// Adds pieces at the end of a file, wherever that is by then; their `file_offset`s count from that end.
    /// Answers `Appended`.
    Append {
        /// The file.
        inode: Target,
        /// What is added.
        pieces: Vec<Extent>,
        /// As for `Write`.
        privileges: Privileges,
    },
    /// setxattr(2). Answers `Entry`.
    SetXattr {
        /// Whose.
        inode: Target,
        /// Which.
        name: XattrName,
        /// At most [`limits::XATTR_VALUE_BYTES_MAX`] bytes.
        value: Bytes,
        /// What if it exists, or does not.
        mode: XattrMode,
    },
    /// removexattr(2). Answers `Entry`.
    RemoveXattr {
        /// Whose.
        inode: Target,
        /// Which.
        name: XattrName,
    },
    /// This session does not have these unlinked inodes open (any more). Answers `Done`.
    ReleaseUnlinked {
        /// Numbers that are not known (any more) are passed over.
        inodes: Vec<InodeNumber>,
    },
}

impl Operation {
    /// The pieces of content it names.
    pub fn pieces(&self) -> &[Extent] {
        match self {
            Operation::Write { pieces, .. } | Operation::Append { pieces, .. } => pieces,
            _ => &[],
        }
    }

    fn validate(&self) -> Result<(), FsError> {
        for piece in self.pieces() {
            piece.validate()?;
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

/// An inode to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewInode {
    /// What it is.
    pub kind: NewKind,
    /// The low twelve bits, the caller's umask already taken away.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group, unless the directory's set-group-id bit passes on its own.
    pub gid: u32,
}

/// What kind of inode is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewKind {
    /// An empty regular file.
    File,
    /// An empty directory.
    Directory,
    /// A symbolic link (its mode is always 0777).
    Symlink(SymlinkTarget),
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
    /// A character device with this device number.
    CharacterDevice(u32),
    /// A block device with this device number.
    BlockDevice(u32),
}

/// What a create does when the name exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IfExists {
    /// [`FsError::Exists`] (O_EXCL, mkdir, mknod, symlink, link).
    Refuse,
    /// Takes the existing inode instead, as open(O_CREAT) does: `Entry` with `created: false`.
    Open,
}

/// Whether the sending session holds an inode open that loses its last name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Held {
    /// It does, and will release it.
    Open,
    /// It does not, and refuses cached opens of it from now on.
    NotOpen,
}

/// renameat2(2)'s flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenameMode {
    /// Replaces what has the new name, if it may be.
    Replace,
    /// [`FsError::Exists`] if something has the new name (RENAME_NOREPLACE).
    NoReplace,
    /// The two change places (RENAME_EXCHANGE).
    Exchange,
}

/// setxattr(2)'s flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum XattrMode {
    /// Makes or replaces.
    Set,
    /// [`FsError::Exists`] if it exists (XATTR_CREATE).
    Create,
    /// [`FsError::NoAttribute`] if it does not (XATTR_REPLACE).
    Replace,
}

/// What becomes of set-user-id, set-group-id and file capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Privileges {
    /// They stay.
    Keep,
    /// They are dropped (FUSE_HANDLE_KILLPRIV_V2).
    Drop,
}

/// Where a timestamp comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetTime {
    /// The command's own stamp (UTIME_NOW).
    Now,
    /// This one.
    At(Timestamp),
}

/// Which attributes change; `None` leaves one as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttributeChanges {
    /// The low twelve bits.
    pub mode: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// truncate(2) or ftruncate(2): what lies beyond is cut, what is new is a hole.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of content.
    pub mtime: Option<SetTime>,
    /// Whether privileges are dropped: by chown always, by truncation when the caller is not privileged.
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

    fn piece(chunk: &NewChunk, at: u64, length: u32) -> Extent {
        Extent {
            file_offset: limits::FILE_BYTES_MAX - at - u64::from(length),
            length,
            chunk: chunk.id,
            chunk_offset: 0,
        }
    }

    fn write(pieces: Vec<Extent>) -> Operation {
        Operation::Write {
            inode: Target::Inode(InodeNumber(u64::MAX)),
            pieces,
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
        // What a mount flushes with one command, and the operation that goes along.
        let inline = ChunkBody::Inline(vec![7; limits::INLINE_BYTES_MAX as usize].into());
        let mut chunks = vec![chunk(u64::MAX, inline, limits::INLINE_BYTES_MAX)];
        for counter in 1..limits::COMMAND_CHUNKS_MAX as u64 {
            chunks.push(chunk(
                u64::MAX - counter,
                ChunkBody::Stored,
                limits::CHUNK_BYTES_MAX,
            ));
        }
        let pieces = (0..limits::COMMAND_PIECES_MAX).map(|n| {
            let chunk = &chunks[n % chunks.len()];
            piece(chunk, n as u64, limits::INLINE_BYTES_MAX)
        });
        let largest = Command {
            operations: vec![write(pieces.collect()), set_xattr(limits::XATTR_VALUE_BYTES_MAX)],
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
        let pieces = halves.iter().map(|chunk| piece(chunk, 0, length)).collect();
        let mut inline = Command {
            chunks: halves.to_vec(),
            operations: vec![write(pieces)],
        };
        assert_eq!(inline.validate_bytes(), Err(FsError::TooBig));
        inline.chunks.pop();
        assert_eq!(inline.validate_bytes(), Ok(()));
    }
}
