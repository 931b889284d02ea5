//! Conversions between the kernel's types and those of the filesystem. Pure.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fuser::{FileAttr, FileType, INodeNo, RenameFlags, TimeOrNow, WriteFlags};
use quorumfs_proto::command::{AttributeChanges, NewKind, Privileges, RenameMode, SetTime, XattrMode};
use quorumfs_proto::{Attributes, FileKind, FsError, Timestamp, XattrName};

use quorumfs_fs::{DirectoryItem, WritePosition};

/// The preferred size of reads and writes. The C library sizes its buffers by it, and each of its writes is a request,
/// so larger is faster; it costs every open stream that much memory.
const PREFERRED_IO_BYTES: u32 = 128 << 10;

/// The unit of `st_blocks`, whatever the block size.
const STAT_BLOCK_BYTES: u64 = 512;

/// Returns `attributes` in the kernel's form, with the number that the kernel knows.
pub fn file_attr(attributes: &Attributes, inode: INodeNo) -> FileAttr {
    FileAttr {
        ino: inode,
        size: attributes.size,
        blocks: attributes.allocated_bytes.div_ceil(STAT_BLOCK_BYTES),
        atime: attributes.atime.into(),
        mtime: attributes.mtime.into(),
        ctime: attributes.ctime.into(),
        crtime: attributes.birth_time.into(),
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
        blksize: PREFERRED_IO_BYTES,
        flags: 0,
    }
}

/// Returns attributes of an inode of which only the kind is known.
pub fn bare_attr(inode: INodeNo, kind: FileKind) -> FileAttr {
    FileAttr {
        ino: inode,
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PREFERRED_IO_BYTES,
        flags: 0,
    }
}

/// Returns, for a listing from `start`, the offset at which the kernel continues after each item.
///
/// That is the item's cookie. If several items share a cookie, only the last one has it: if the kernel's buffer ends
/// between them, they are listed again rather than skipped.
pub fn resume_offsets(start: u64, items: &[DirectoryItem]) -> impl Iterator<Item = u64> {
    let mut before = start;
    (0..items.len()).map(move |at| {
        let cookie = items[at].cookie;
        if items.get(at + 1).is_none_or(|next| next.cookie != cookie) {
            before = cookie;
        }
        before
    })
}

/// Returns fuser's type for `kind`.
pub fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharacterDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// Returns the kind of inode that mknod(2) creates.
///
/// # Errors
/// [`FsError::InvalidArgument`] for kinds that mknod does not create, [`FsError::NotPermitted`] for a directory, as
/// POSIX requires.
pub fn node_kind(mode: u32, rdev: u32) -> Result<NewKind, FsError> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Ok(NewKind::File),
        libc::S_IFIFO => Ok(NewKind::Fifo),
        libc::S_IFSOCK => Ok(NewKind::Socket),
        libc::S_IFCHR => Ok(NewKind::CharacterDevice(rdev)),
        libc::S_IFBLK => Ok(NewKind::BlockDevice(rdev)),
        libc::S_IFDIR => Err(FsError::NotPermitted),
        _ => Err(FsError::InvalidArgument),
    }
}

/// Returns the low twelve bits. The umask is already applied: without FUSE_DONT_MASK the kernel does that.
pub fn permissions(mode: u32) -> u16 {
    (mode & 0o7777) as u16
}

/// Reverses fuser's conversion of a time before 1970: the kernel sends whole seconds rounded down and nanoseconds
/// counted forward from there; fuser subtracts both from the epoch.
pub fn timestamp_from_fuser(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timestamp {
            seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nanoseconds: after.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            Timestamp {
                seconds: 0i64.saturating_sub_unsigned(before.as_secs()),
                nanoseconds: before.subsec_nanos(),
            }
        }
    }
}

fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(timestamp_from_fuser(time)),
    }
}

/// The fields of a SETATTR that are used.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttrFields {
    /// New mode (chmod(2)).
    pub mode: Option<u32>,
    /// New owner (chown(2)).
    pub uid: Option<u32>,
    /// New group (chown(2)).
    pub gid: Option<u32>,
    /// New size (truncate(2)).
    pub size: Option<u64>,
    /// New time of the last access (utimensat(2)).
    pub atime: Option<TimeOrNow>,
    /// New time of the last change of content (utimensat(2)).
    pub mtime: Option<TimeOrNow>,
}

/// Returns the changes that a SETATTR of `caller_uid` makes.
///
/// With FUSE_HANDLE_KILLPRIV_V2 the mount must drop privileges: a request without any field asks for just that, chown
/// always does, truncation does unless root truncates (fuser hides the kernel's own flag for the last).
pub fn attribute_changes(fields: SetAttrFields, caller_uid: u32) -> AttributeChanges {
    let chown = fields.uid.is_some() || fields.gid.is_some();
    let truncate = fields.size.is_some();
    let nothing =
        !chown && !truncate && fields.mode.is_none() && fields.atime.is_none() && fields.mtime.is_none();
    let drop = nothing || chown || (truncate && privileges_of(caller_uid) == Privileges::Drop);
    AttributeChanges {
        mode: fields.mode.map(permissions),
        uid: fields.uid,
        gid: fields.gid,
        size: fields.size,
        atime: fields.atime.map(set_time),
        mtime: fields.mtime.map(set_time),
        privileges: drop.then_some(Privileges::Drop),
    }
}

/// Returns what happens to a file's privileges when a program of this user truncates it.
pub fn privileges_of(caller_uid: u32) -> Privileges {
    match caller_uid {
        0 => Privileges::Keep,
        _ => Privileges::Drop,
    }
}

/// Returns the position of a WRITE and what happens to the file's privileges. `open_flags` are the present flags of the
/// file, not those with which it was opened.
pub fn write_terms(offset: u64, open_flags: i32, write_flags: WriteFlags) -> (WritePosition, Privileges) {
    let position = if open_flags & libc::O_APPEND == 0 {
        WritePosition::At(offset)
    } else {
        WritePosition::End {
            offset,
            more_bytes: None,
        }
    };
    let privileges = if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
        Privileges::Drop
    } else {
        Privileges::Keep
    };
    (position, privileges)
}

/// Converts renameat2(2)'s flags.
///
/// # Errors
/// [`FsError::InvalidArgument`] for RENAME_WHITEOUT and unknown flags.
pub fn rename_mode(flags: RenameFlags) -> Result<RenameMode, FsError> {
    if flags.is_empty() {
        Ok(RenameMode::Replace)
    } else if flags == RenameFlags::RENAME_NOREPLACE {
        Ok(RenameMode::NoReplace)
    } else if flags == RenameFlags::RENAME_EXCHANGE {
        Ok(RenameMode::Exchange)
    } else {
        Err(FsError::InvalidArgument)
    }
}

/// Converts setxattr(2)'s flags.
///
/// # Errors
/// [`FsError::InvalidArgument`] for unknown flags, and for both flags at once.
pub fn xattr_mode(flags: i32) -> Result<XattrMode, FsError> {
    match flags {
        0 => Ok(XattrMode::Set),
        libc::XATTR_CREATE => Ok(XattrMode::Create),
        libc::XATTR_REPLACE => Ok(XattrMode::Replace),
        _ => Err(FsError::InvalidArgument),
    }
}

/// Checks the name of an extended attribute that a program uses.
///
/// # Errors
/// Those of [`XattrName::new`] and [`XattrName::require_known_namespace`].
pub fn xattr_name(name: &[u8]) -> Result<XattrName, FsError> {
    let name = XattrName::new(Bytes::copy_from_slice(name))?;
    name.require_known_namespace()?;
    Ok(name)
}

/// The kind of answer to getxattr(2) or listxattr(2).
#[derive(Debug, PartialEq, Eq)]
pub enum XattrFit {
    /// The program only asked for the size.
    Size(u32),
    /// The data fits.
    Data,
}

/// Decides how to answer with `length` bytes a program that offers `room_bytes`; 0 asks for the size.
///
/// # Errors
/// [`FsError::Range`] if the data does not fit.
pub fn xattr_fit(length: usize, room_bytes: u32) -> Result<XattrFit, FsError> {
    let length = u32::try_from(length).map_err(|_| FsError::TooBig)?;
    if room_bytes == 0 {
        Ok(XattrFit::Size(length))
    } else if length > room_bytes {
        Err(FsError::Range)
    } else {
        Ok(XattrFit::Data)
    }
}

/// Returns names in the form of listxattr(2): concatenated, each ended by a NUL.
pub fn joined_xattr_names(names: &[XattrName]) -> Vec<u8> {
    let mut joined = Vec::with_capacity(names.iter().map(|name| name.as_bytes().len() + 1).sum());
    for name in names {
        joined.extend_from_slice(name.as_bytes());
        joined.push(0);
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Decodes a kernel's timespec as fuser 0.18 does.
    fn as_fuser_decodes(seconds: i64, nanoseconds: u32) -> SystemTime {
        if seconds >= 0 {
            UNIX_EPOCH + Duration::new(seconds as u64, nanoseconds)
        } else {
            UNIX_EPOCH - Duration::new(seconds.unsigned_abs(), nanoseconds)
        }
    }

    #[test]
    fn moments_before_1970_arrive_as_they_were_sent() {
        for (seconds, nanoseconds) in [
            (0, 0),
            (0, 1),
            (1_700_000_000, 999_999_999),
            (-1, 0),
            (-1, 999_999_999),
            (-2, 500_000_000),
            (-1_000_000_000, 123),
        ] {
            let sent = Timestamp { seconds, nanoseconds };
            assert_eq!(timestamp_from_fuser(as_fuser_decodes(seconds, nanoseconds)), sent);
        }
    }

    #[test]
    fn privileges_are_dropped_when_the_kernel_would() {
        let changed = |fields, uid| attribute_changes(fields, uid).privileges;
        let truncate = SetAttrFields {
            size: Some(0),
            ..SetAttrFields::default()
        };
        let chown = SetAttrFields {
            gid: Some(1),
            ..SetAttrFields::default()
        };
        let chmod = SetAttrFields {
            mode: Some(0o104755),
            ..SetAttrFields::default()
        };
        assert_eq!(
            changed(SetAttrFields::default(), 0),
            Some(Privileges::Drop),
            "the kill request"
        );
        assert_eq!(changed(truncate, 0), None);
        assert_eq!(changed(truncate, 1000), Some(Privileges::Drop));
        assert_eq!(changed(chown, 0), Some(Privileges::Drop));
        assert_eq!(changed(chmod, 1000), None);
        assert_eq!(
            attribute_changes(chmod, 0).mode,
            Some(0o4755),
            "the kind is not part of the mode"
        );
    }

    #[test]
    fn rename_flags_are_one_of_three() {
        assert_eq!(rename_mode(RenameFlags::empty()), Ok(RenameMode::Replace));
        assert_eq!(
            rename_mode(RenameFlags::RENAME_NOREPLACE),
            Ok(RenameMode::NoReplace)
        );
        assert_eq!(
            rename_mode(RenameFlags::RENAME_EXCHANGE),
            Ok(RenameMode::Exchange)
        );
        for bad in [
            RenameFlags::RENAME_WHITEOUT,
            RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE,
            RenameFlags::from_bits_retain(1 << 9),
        ] {
            assert_eq!(rename_mode(bad), Err(FsError::InvalidArgument));
        }
    }

    #[test]
    fn node_kinds_are_distinguished_by_the_type_bits() {
        assert_eq!(node_kind(libc::S_IFREG | 0o644, 0), Ok(NewKind::File));
        assert_eq!(node_kind(0o644, 0), Ok(NewKind::File));
        assert_eq!(node_kind(libc::S_IFBLK, 0x801), Ok(NewKind::BlockDevice(0x801)));
        assert_eq!(node_kind(libc::S_IFDIR, 0), Err(FsError::NotPermitted));
        assert_eq!(node_kind(libc::S_IFLNK, 0), Err(FsError::InvalidArgument));
    }

    #[test]
    fn xattrs_fit_or_do_not() {
        assert_eq!(xattr_fit(5, 0), Ok(XattrFit::Size(5)));
        assert_eq!(xattr_fit(5, 5), Ok(XattrFit::Data));
        assert_eq!(xattr_fit(5, 4), Err(FsError::Range));
        assert_eq!(xattr_fit(0, 4), Ok(XattrFit::Data));
        let names = [b"user.a", b"user.b"].map(|name| XattrName::new(&name[..]).unwrap());
        assert_eq!(joined_xattr_names(&names), b"user.a\0user.b\0");
        assert_eq!(joined_xattr_names(&[]), b"");
    }

    #[test]
    fn names_of_extended_attributes_are_those_that_local_filesystems_take() {
        for known in [
            &b"user.a"[..],
            b"user.system.x",
            b"trusted.overlay.opaque",
            b"security.capability",
        ] {
            assert!(xattr_name(known).is_ok(), "{}", known.escape_ascii());
        }
        // ACLs are not supported.
        for unknown in [
            &b"system.posix_acl_access"[..],
            b"system.x",
            b"a",
            b"user",
            b"users.a",
            b".a",
        ] {
            let refused = Err(FsError::NotSupported);
            assert_eq!(xattr_name(unknown), refused, "{}", unknown.escape_ascii());
        }
        for empty in [&b"user."[..], b"trusted.", b"security."] {
            let refused = Err(FsError::InvalidArgument);
            assert_eq!(xattr_name(empty), refused, "{}", empty.escape_ascii());
        }
        assert_eq!(xattr_name(b""), Err(FsError::Range));
        assert_eq!(xattr_mode(0), Ok(XattrMode::Set));
        assert_eq!(xattr_mode(3), Err(FsError::InvalidArgument));
    }

    #[test]
    fn a_listing_continues_after_all_items_of_a_cookie() {
        let item = |cookie| DirectoryItem {
            name: Bytes::new(),
            inode: quorumfs_proto::InodeNumber(9),
            kind: FileKind::File,
            cookie,
            attributes: None,
        };
        let items = [3, 5, 5, 5, 8].map(item);
        assert_eq!(
            resume_offsets(2, &items).collect::<Vec<_>>(),
            [3, 3, 3, 5, 8],
            "after the first 5 comes the first 5 again"
        );
        assert_eq!(resume_offsets(4, &items[1..4]).collect::<Vec<_>>(), [4, 4, 5]);
        assert_eq!(resume_offsets(0, &[]).count(), 0);
    }
}
