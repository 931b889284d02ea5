//! How values of the filesystem become replies. Pure but for the reply itself.

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
use quorumfs_fs::{DirectoryItem, Moved, Opened};

/// The block size of statfs(2), in which it counts.
const STATFS_BLOCK_BYTES: u32 = 4096;

/// How statfs(2) tells of free inodes, of which there is no fixed number: as many as there is room for, with
/// so many bytes to each.
const BYTES_PER_INODE: u64 = 1024;

/// How this mount's kernel sees the cluster's inodes.
#[derive(Clone)]
pub struct View {
    /// Its numbers.
    pub inodes: InodeMap,
    /// Where it knows directories.
    pub places: Arc<Places>,
    /// How long the kernel may keep names and attributes, from now. Asked at each answer, because it runs out.
    pub cache: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl View {
    /// How long the kernel may keep what it is told of a file of `attr`. Not at all where a write can take set-user-id
    /// or set-group-id away: that happens here (FUSE_HANDLE_KILLPRIV_V2), and the kernel is not told.
    pub fn keep(&self, attr: &FileAttr) -> Duration {
        const PRIVILEGES: u16 = 0o6000;
        if attr.kind == FileType::RegularFile && attr.perm & PRIVILEGES != 0 {
            return Duration::ZERO;
        }
        (self.cache)()
    }

    /// `attributes` of what is named at `place`, and how long the kernel may keep them and the name. It takes the number in
    /// them for its own; where that is not the inode's, it has to ask for the attributes, which tell the right one.
    pub fn entry(&self, attributes: &Attributes, place: Place) -> (FileAttr, Duration, Duration) {
        let mut attr = self.attr(attributes);
        if attr.kind == FileType::Directory {
            attr.ino = self.places.number(attr.ino, place);
        }
        let keep = self.keep(&attr);
        let keep_attributes = if is_tagged(attr.ino) { Duration::ZERO } else { keep };
        (attr, keep_attributes, keep)
    }

    /// This mount moved directories: one to `to_parent`, and the one that was there, to `from_parent`.
    pub fn moved(&self, moved: &Moved, from_parent: INodeNo, to_parent: INodeNo) {
        for (directory, parent) in [(moved.there, to_parent), (moved.back, from_parent)] {
            if let Some(directory) = directory {
                self.places.moved(self.inodes.to_kernel(directory), parent);
            }
        }
    }

    /// `attributes` as the kernel is told.
    pub fn attr(&self, attributes: &Attributes) -> FileAttr {
        convert::file_attr(attributes, self.inodes.to_kernel(attributes.inode))
    }
}

/// Inode numbers are never used twice, so none has a second generation.
pub const GENERATION: Generation = Generation(0);

/// What open(2) and create(2) answer.
pub fn open_flags(opened: &Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_DIRECT_IO, opened.direct_io);
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
    flags
}

/// lookup, mkdir, link, …: an inode that the kernel may remember by name.
pub fn answer_entry(view: View, place: Place) -> impl FnOnce(ReplyEntry, Attributes) {
    move |reply, attributes| {
        let (attr, keep_attributes, keep) = view.entry(&attributes, place);
        reply.entry_with_ttls(&keep_attributes, &keep, &attr, GENERATION);
    }
}

/// rename.
pub fn answer_moved(view: View, from: INodeNo, to: INodeNo) -> impl FnOnce(ReplyEmpty, Moved) {
    move |reply, moved| {
        view.moved(&moved, from, to);
        reply.ok();
    }
}

/// stat, chmod, …
pub fn answer_attr(view: View) -> impl FnOnce(ReplyAttr, Attributes) {
    move |reply, attributes| {
        let attr = view.attr(&attributes);
        reply.attr(&view.keep(&attr), &attr);
    }
}

/// What has nothing to tell.
pub fn answer_ok(reply: ReplyEmpty, (): ()) {
    reply.ok();
}

/// getxattr and listxattr, for a program that has room for `room_bytes`.
pub fn answer_xattr(room_bytes: u32) -> impl FnOnce(ReplyXattr, Bytes) {
    move |reply, value| match convert::xattr_fit(value.len(), room_bytes) {
        Ok(XattrFit::Size(size)) => reply.size(size),
        Ok(XattrFit::Data) => reply.data(&value),
        Err(error) => reply.error(errno(error)),
    }
}

/// statfs(2).
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

/// READDIR from `start`: as many as fit.
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

/// READDIRPLUS of `directory` from `start`: as many as fit, each looked up as well.
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
                // "." and "..": of these the kernel takes nothing but number and kind.
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
