//! The edge to the kernel: each request is decoded, given to [`quorumfs_fs::Filesystem`], and its answer is encoded.
//! Nothing else.
//!
//! - Decoding is cheap and happens on fuser's threads. The work is a future that is polled once on that thread, because
//!   answers from the caches are ready at once and a change of threads would cost more than the work; work that must
//!   wait continues on tokio. So a fuser thread never waits for the cluster, and a thousand requests may wait at once;
//!   the kernel bounds their number.
//! - Every request is answered exactly once. A panic in a handler answers EIO (fuser's replies do so when they are
//!   dropped) and does not end a thread.
//! - The kernel caches names and attributes as long as the mount option allows (by default not at all), and a file's
//!   pages only if it is told at open that they are still valid. It drops them when it is told another size. Look-ups
//!   are not counted and FORGET does nothing: for inodes without a name the kernel is asked (`notices`).

mod answer;
mod convert;
mod edge;
mod inode_map;
mod notices;
mod payloads;
mod places;
mod readers;
mod session;
#[cfg(test)]
pub(crate) mod tests;
mod write_call;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use fuser::{
    BsdFileFlags, Errno, FileHandle, FopenFlags, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner,
    PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use quorumfs_proto::command::NewKind;
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::query::EntryDetail;
use quorumfs_proto::{Attributes, SymlinkTarget};

use crate::statistics::{ATTRIBUTE, Verb};
use answer::{
    GENERATION, answer_attr, answer_entries, answer_entry, answer_moved, answer_names, answer_ok,
    answer_space, answer_xattr, open_flags,
};
use convert::SetAttrFields;
use edge::{close, close_directory, name_bytes, new_file, opening};
use places::Place;
use quorumfs_fs::{Cluster, Opened, Order, Reader};

pub use edge::FuseEdge;
pub use session::serve_kernel;

/// Most requests that the kernel sends without a waiting program (read-ahead, write-back, release): two for each MiB of
/// a long read-ahead of several files at once. fuser's default of 16 keeps a single reader's pipeline half empty.
const BACKGROUND_REQUESTS_MAX: u16 = 128;

/// Bytes of a listing read at once. fuser does not reveal how much space the kernel offers: as much as the C library,
/// 32 KiB, or a page with an older kernel.
const LISTING_BYTES: usize = 32 << 10;

impl<C: Cluster> fuser::Filesystem for FuseEdge<C> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_EXPORT_SUPPORT
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP; // O_APPEND handles may be mapped.
        // An old kernel lacks some: the mount is slower there, but correct.
        if let Err(missing) = config.add_capabilities(wanted) {
            tracing::info!(?missing, "the kernel's FUSE is old");
            let _ = config.add_capabilities(wanted & !missing);
        }
        let background = config.set_max_background(BACKGROUND_REQUESTS_MAX);
        // A write has at most one chunk, and an append up to this size is atomic.
        let write = config.set_max_write(CHUNK_BYTES_MAX);
        if background.is_err() || write.is_err() {
            return Err(io::Error::other("fuser refuses the bounds of requests"));
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (caller, name) = (request.pid(), name_bytes(name));
        let (place, parent) = (Place::of(parent, &name), self.cluster_inode(parent));
        self.serve(
            (Verb::Lookup, caller, reply),
            move |fs| async move { fs.lookup_for(caller, parent?, &name).await },
            answer_entry(self.view.clone(), place),
        );
    }

    fn getattr(&self, request: &Request, inode: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        let inode = self.cluster_inode(inode);
        self.serve(
            (Verb::GetAttributes, request.pid(), reply),
            move |fs| async move { fs.attributes(inode?, handle.map(u64::from)).await },
            answer_attr(self.view.clone()),
        );
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let fields = SetAttrFields {
            mode,
            uid,
            gid,
            size,
            atime,
            mtime,
        };
        let changes = convert::attribute_changes(fields, request.uid());
        let inode = self.cluster_inode(inode);
        self.serve(
            (Verb::SetAttributes, request.pid(), reply),
            move |fs| async move { fs.set_attributes(inode?, handle.map(u64::from), changes).await },
            answer_attr(self.view.clone()),
        );
    }

    fn readlink(&self, request: &Request, inode: INodeNo, reply: ReplyData) {
        let inode = self.cluster_inode(inode);
        self.serve(
            (Verb::ReadLink, request.pid(), reply),
            move |fs| async move { fs.read_link(inode?).await },
            |reply, target: SymlinkTarget| reply.data(target.as_bytes()),
        );
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        self.make(
            request,
            parent,
            name,
            convert::node_kind(mode, rdev),
            mode,
            (Verb::Mknod, reply),
        );
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        self.make(
            request,
            parent,
            name,
            Ok(NewKind::Directory),
            mode,
            (Verb::Mkdir, reply),
        );
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = SymlinkTarget::new(Bytes::copy_from_slice(target.as_os_str().as_bytes()));
        self.make(
            request,
            parent,
            name,
            target.map(NewKind::Symlink),
            0o777,
            (Verb::Symlink, reply),
        );
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (parent, name) = (self.cluster_inode(parent), name_bytes(name));
        self.serve(
            (Verb::Unlink, request.pid(), reply),
            move |fs| async move { fs.unlink(parent?, &name).await },
            answer_ok,
        );
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (parent, name) = (self.cluster_inode(parent), name_bytes(name));
        self.serve(
            (Verb::Rmdir, request.pid(), reply),
            move |fs| async move { fs.remove_directory(parent?, &name).await },
            answer_ok,
        );
    }

    fn rename(
        &self,
        request: &Request,
        from_parent: INodeNo,
        from_name: &OsStr,
        to_parent: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let answer = answer_moved(self.view.clone(), from_parent, to_parent);
        let (from_parent, from_name) = (self.cluster_inode(from_parent), name_bytes(from_name));
        let (to_parent, to_name) = (self.cluster_inode(to_parent), name_bytes(to_name));
        self.serve(
            (Verb::Rename, request.pid(), reply),
            move |fs| async move {
                let mode = convert::rename_mode(flags)?;
                fs.rename(from_parent?, &from_name, to_parent?, &to_name, mode)
                    .await
            },
            answer,
        );
    }

    fn link(&self, request: &Request, inode: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (inode, parent, name) = (
            self.cluster_inode(inode),
            self.cluster_inode(parent),
            name_bytes(name),
        );
        self.serve(
            (Verb::Link, request.pid(), reply),
            move |fs| async move { fs.link(inode?, parent?, &name).await },
            answer_entry(self.view.clone(), Place::Anywhere),
        );
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: fuser::OpenFlags, reply: ReplyOpen) {
        let (caller, inode) = (request.pid(), self.cluster_inode(inode));
        let flags = opening(flags.0, request.uid());
        self.serve_opening(
            (Verb::Open, caller, reply),
            move |fs| async move { fs.open_for(caller, inode?, flags).await },
            |reply, opened: Opened| reply.opened(FileHandle(opened.handle), open_flags(&opened)),
            close,
        );
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (parent, name) = (self.cluster_inode(parent), name_bytes(name));
        let (caller, new) = (request.pid(), new_file(mode, request));
        let (view, flags) = (self.view.clone(), opening(flags, request.uid()));
        self.serve_opening(
            (Verb::Create, caller, reply),
            move |fs| async move { fs.create_for(caller, parent?, &name, new, flags).await },
            move |reply, (attributes, opened): (Attributes, Opened)| {
                let handle = FileHandle(opened.handle);
                let attr = view.attr(&attributes);
                reply.created(&view.keep(&attr), &attr, GENERATION, handle, open_flags(&opened));
            },
            |fs, (_, opened)| close(fs, opened),
        );
    }

    fn read(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (order, reader) = (Order(request.unique().0), Reader(request.pid()));
        self.serve_moving(
            (Verb::Read, request.pid(), reply),
            |bytes: &Bytes| bytes.len() as u64,
            move |fs| async move { fs.read(handle.0, offset, size, order, reader).await },
            |reply, bytes: Bytes| reply.data(&bytes),
        );
    }

    fn write(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            // Pages of a shared mapping; the process that changed them is unknown.
            return self.serve_write((request.pid(), reply), data, move |fs, data| async move {
                fs.write_back(handle.0, offset, data).await
            });
        }
        let (order, thread) = (Order(request.unique().0), request.pid());
        let (position, privileges) = convert::write_terms(offset, flags.0, write_flags);
        self.serve_write((thread, reply), data, move |fs, data| async move {
            let position = write_call::with_rest(position, thread, data.len()).await;
            fs.write(handle.0, position, data, privileges, order).await
        });
    }

    fn flush(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.serve(
            (Verb::Flush, request.pid(), reply),
            move |fs| async move { fs.flush(handle.0).await },
            answer_ok,
        );
    }

    fn fsync(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.serve(
            (Verb::Fsync, request.pid(), reply),
            move |fs| async move { fs.fsync(handle.0).await },
            answer_ok,
        );
    }

    fn release(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.serve(
            (Verb::Release, request.pid(), reply),
            move |fs| async move { fs.release(handle.0).await },
            answer_ok,
        );
    }

    fn opendir(&self, request: &Request, inode: INodeNo, _flags: fuser::OpenFlags, reply: ReplyOpen) {
        let inode = self.cluster_inode(inode);
        self.serve_opening(
            (Verb::OpenDirectory, request.pid(), reply),
            move |fs| async move { fs.open_directory(inode?).await },
            |reply, handle: u64| reply.opened(FileHandle(handle), FopenFlags::empty()),
            close_directory,
        );
    }

    fn readdir(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let view = self.view.clone();
        self.serve(
            (Verb::ReadDirectory, request.pid(), reply),
            move |fs| async move {
                fs.read_directory(handle.0, offset, EntryDetail::Name, LISTING_BYTES)
                    .await
            },
            answer_names(view, offset),
        );
    }

    fn readdirplus(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let view = self.view.clone();
        self.serve(
            (Verb::ReadDirectory, request.pid(), reply),
            move |fs| async move {
                fs.read_directory(handle.0, offset, EntryDetail::Attributes, LISTING_BYTES)
                    .await
            },
            answer_entries(view, inode, offset),
        );
    }

    fn releasedir(
        &self,
        request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: fuser::OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.serve(
            (Verb::ReleaseDirectory, request.pid(), reply),
            move |fs| async move { fs.release_directory(handle.0) },
            answer_ok,
        );
    }

    fn fsyncdir(
        &self,
        request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let inode = self.cluster_inode(inode);
        self.serve(
            (Verb::FsyncDirectory, request.pid(), reply),
            move |fs| async move { fs.fsync_directory(inode?).await },
            answer_ok,
        );
    }

    fn statfs(&self, request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        self.serve(
            (Verb::Space, request.pid(), reply),
            |fs| async move { fs.space().await },
            answer_space,
        );
    }

    fn setxattr(
        &self,
        request: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (inode, name) = (self.cluster_inode(inode), convert::xattr_name(name.as_bytes()));
        let value = Bytes::copy_from_slice(value);
        self.serve(
            (Verb::SetXattr, request.pid(), reply),
            move |fs| async move {
                let mode = convert::xattr_mode(flags)?;
                fs.set_xattr(inode?, name?.as_bytes(), value, mode).await
            },
            answer_ok,
        );
    }

    fn getxattr(&self, request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if inode == INodeNo::ROOT && name == ATTRIBUTE {
            return self.answer_statistics(size, reply);
        }
        let (inode, name) = (self.cluster_inode(inode), convert::xattr_name(name.as_bytes()));
        self.serve(
            (Verb::GetXattr, request.pid(), reply),
            move |fs| async move { fs.get_xattr(inode?, name?.as_bytes()).await },
            answer_xattr(size),
        );
    }

    fn listxattr(&self, request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let inode = self.cluster_inode(inode);
        self.serve(
            (Verb::ListXattrs, request.pid(), reply),
            move |fs| async move {
                let names = fs.list_xattrs(inode?).await?;
                Ok(Bytes::from(convert::joined_xattr_names(&names)))
            },
            answer_xattr(size),
        );
    }

    fn removexattr(&self, request: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (inode, name) = (self.cluster_inode(inode), convert::xattr_name(name.as_bytes()));
        self.serve(
            (Verb::RemoveXattr, request.pid(), reply),
            move |fs| async move { fs.remove_xattr(inode?, name?.as_bytes()).await },
            answer_ok,
        );
    }

    // The calls below are not supported. After ENOSYS the kernel does without them, and never asks again.

    fn lseek(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _inode_in: INodeNo,
        _handle_in: FileHandle,
        _offset_in: u64,
        _inode_out: INodeNo,
        _handle_out: FileHandle,
        _offset_out: u64,
        _length: u64,
        _flags: fuser::CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
