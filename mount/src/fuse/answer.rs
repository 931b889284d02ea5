//! Converts results of the filesystem to replies. Pure except for the reply itself.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fuser::{
    FileAttr, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyStatfs, ReplyXattr,
};
use quorumfs_proto::Attributes;
use quorumfs_proto::limits::NAME_BYTES_MAX;
use quorumfs_proto::query::Space;

use super::convert::{self, XattrFit};
use super::inode_map::InodeMap;
use super::places::{Place, Places, is_tagged};
use crate::errno::errno;
use quorumfs_fs::{DirectoryItem, MovedDirectories, Opened};

/// The block size of statfs(2), in which it counts.
const STATFS_BLOCK_BYTES: u32 = 4096;

/// Bytes per free inode for statfs(2): there is no fixed number of inodes, so the number reported is the free space
/// divided by this.
const BYTES_PER_INODE: u64 = 1024;

/// The kernel's view of the cluster's inodes.
#[derive(Clone)]
pub struct View {
    /// The mapping of inode numbers.
    pub inodes: InodeMap,
    /// The directories that the kernel knows.
    pub places: Arc<Places>,
    /// How long the kernel may keep names and attributes from now on. Called for each answer, because the time runs
    /// out.
    pub cache: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl View {
    /// Returns how long the kernel may keep attributes of a file with `attr`. Not at all if a write can drop
    /// set-user-id or set-group-id: the mount drops them (FUSE_HANDLE_KILLPRIV_V2) without the kernel's knowledge.
    pub fn keep(&self, attr: &FileAttr) -> Duration {
        const PRIVILEGES: u16 = 0o6000;
        if attr.kind == FileType::RegularFile && attr.perm & PRIVILEGES != 0 {
            return Duration::ZERO;
        }
        (self.cache)()
    }

    /// Returns `attributes` of the inode named at `place`, and how long the kernel may keep them and the name. The
    /// kernel uses the number in them as the inode's; if that differs from the real number, the kernel must ask for the
    /// attributes, which contain the real one.
    pub fn entry(&self, attributes: &Attributes, place: Place) -> (FileAttr, Duration, Duration) {
        let mut attr = self.attr(attributes);
        if attr.kind == FileType::Directory {
            attr.ino = self.places.number(attr.ino, place);
        }
        let keep = self.keep(&attr);
        let keep_attributes = if is_tagged(attr.ino) { Duration::ZERO } else { keep };
        (attr, keep_attributes, keep)
    }

    /// Records that this mount moved directories: one to `to_parent`, and the exchanged one, if any, to `from_parent`.
    pub fn moved(&self, moved: &MovedDirectories, from_parent: INodeNo, to_parent: INodeNo) {
        for (directory, parent) in [(moved.renamed, to_parent), (moved.exchanged, from_parent)] {
            if let Some(directory) = directory {
                self.places.moved(self.inodes.to_kernel(directory), parent);
            }
        }
    }

    /// Returns `attributes` in the kernel's form.
    pub fn attr(&self, attributes: &Attributes) -> FileAttr {
        convert::file_attr(attributes, self.inodes.to_kernel(attributes.inode))
    }
}

/// Inode numbers are never reused, so there is one generation.
pub const GENERATION: Generation = Generation(0);

/// Returns the flags of the answer to open(2) and create(2).
pub fn open_flags(opened: &Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_DIRECT_IO, opened.direct_io);
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
    flags
}

/// Answers lookup, mkdir, link, …: an inode that the kernel may cache by name.
pub fn answer_entry(view: View, place: Place) -> impl FnOnce(ReplyEntry, Attributes) {
    move |reply, attributes| {
        let (attr, keep_attributes, keep) = view.entry(&attributes, place);
        reply.entry_with_ttls(&keep_attributes, &keep, &attr, GENERATION);
    }
}

/// Answers rename.
pub fn answer_moved(view: View, from: INodeNo, to: INodeNo) -> impl FnOnce(ReplyEmpty, MovedDirectories) {
    move |reply, moved| {
        view.moved(&moved, from, to);
        reply.ok();
    }
}

/// Answers stat, chmod, …
pub fn answer_attr(view: View) -> impl FnOnce(ReplyAttr, Attributes) {
    move |reply, attributes| {
        let attr = view.attr(&attributes);
        reply.attr(&view.keep(&attr), &attr);
    }
}

/// Answers calls without a result.
pub fn answer_ok(reply: ReplyEmpty, (): ()) {
    reply.ok();
}

/// Answers getxattr and listxattr, for a program that offers `room_bytes`.
pub fn answer_xattr(room_bytes: u32) -> impl FnOnce(ReplyXattr, Bytes) {
    move |reply, value| match convert::xattr_fit(value.len(), room_bytes) {
        Ok(XattrFit::Size(size)) => reply.size(size),
        Ok(XattrFit::Data) => reply.data(&value),
        Err(error) => reply.error(errno(error)),
    }
}

/// Answers statfs(2).
pub fn answer_space(reply: ReplyStatfs, space: Space) {
    let blocks = |bytes: u64| bytes / u64::from(STATFS_BLOCK_BYTES);
    let free_inodes = space.available_bytes / BYTES_PER_INODE;
    reply.statfs(
        blocks(space.capacity_bytes),
        blocks(space.available_bytes),
        blocks(space.available_bytes),
        space.inodes + free_inodes,
        free_inodes,
        STATFS_BLOCK_BYTES,
        NAME_BYTES_MAX as u32,
        STATFS_BLOCK_BYTES,
    );
}

/// Answers READDIR from `start`: as many entries as fit.
pub fn answer_names(view: View, start: u64) -> impl FnOnce(ReplyDirectory, Vec<DirectoryItem>) {
    move |mut reply, items| {
        for (item, offset) in items.iter().zip(convert::resume_offsets(start, &items)) {
            let inode = view.inodes.to_kernel(item.inode);
            let kind = convert::file_type(item.kind);
            if reply.add(inode, offset, kind, OsStr::from_bytes(&item.name)) {
                break;
            }
        }
        reply.ok();
    }
}

/// Answers READDIRPLUS of `directory` from `start`: as many entries as fit, with attributes.
pub fn answer_entries(
    view: View,
    directory: INodeNo,
    start: u64,
) -> impl FnOnce(ReplyDirectoryPlus, Vec<DirectoryItem>) {
    move |mut reply, items| {
        for (item, offset) in items.iter().zip(convert::resume_offsets(start, &items)) {
            let name = OsStr::from_bytes(&item.name);
            let (attr, keep) = match &item.attributes {
                Some(attributes) => {
                    let (attr, keep, _) = view.entry(attributes, Place::of(directory, &item.name));
                    (attr, keep)
                }
                // "." and "..": the kernel uses only their number and kind.
                None => {
                    let number = view.inodes.to_kernel(item.inode);
                    (convert::bare_attr(number, item.kind), Duration::ZERO)
                }
            };
            if reply.add(attr.ino, offset, name, &keep, &attr, GENERATION) {
                break;
            }
        }
        reply.ok();
    }
}
