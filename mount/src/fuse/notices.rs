//! What the kernel is told and asked without a request of its own.
//!
//! - Whether it knows an inode. It is told that the inode's attributes are not right any more, which does no harm, and says
//!   that there is no such inode where it has none. fuser's own notifier keeps that answer to itself, so the messages are
//!   written here.
//! - That a name does not lead any more where it led.
//! - That pages of a file are not right any more, and where the file ends. The kernel waits for the lock of these pages,
//!   and so for reads under way: never to be called from a thread that serves requests.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use fuser::INodeNo;
use quorumfs_proto::InodeNumber;

use super::inode_map::InodeMap;
use super::readers;
use quorumfs_fs::{PagesAbove, Reader};

/// FUSE_NOTIFY_INVAL_INODE, FUSE_NOTIFY_INVAL_ENTRY and FUSE_NOTIFY_STORE of linux/fuse.h.
const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_INVAL_ENTRY: i32 = 3;
const NOTIFY_STORE: i32 = 4;
/// `fuse_out_header`.
const HEADER_BYTES: usize = 16;
/// Attributes alone, no pages.
const ATTRIBUTES_ONLY: i64 = -1;
/// However long the file is.
const TO_THE_END: i64 = 0;

/// A way to the kernel beside fuser's.
pub(super) struct Notices {
    device: File,
    inodes: InodeMap,
}

impl Notices {
    /// # Errors
    /// Without a file descriptor to spare.
    pub(super) fn new(device: BorrowedFd<'_>, inodes: InodeMap) -> io::Result<Notices> {
        let device = File::from(device.as_fd().try_clone_to_owned()?);
        Ok(Notices { device, inodes })
    }

    /// Whether the kernel knows `inode`, or cannot be asked. Waits while it is getting rid of it.
    pub(super) fn may_know(&self, inode: INodeNo) -> bool {
        !is_unknown(self.send(&invalidation(inode, ATTRIBUTES_ONLY, TO_THE_END)))
    }

    /// What the kernel knows by `name` in `parent` it is to look up again; where nobody uses it, it forgets it. Waits for
    /// changes of that directory that are under way.
    pub(super) fn forget_name(&self, parent: INodeNo, name: &[u8]) {
        if name.is_empty() {
            return;
        }
        let mut body = Vec::with_capacity(17 + name.len());
        body.extend(parent.0.to_ne_bytes());
        // Its length, and no flags.
        body.extend([name.len() as u32, 0].map(u32::to_ne_bytes).concat());
        body.extend(name);
        body.push(0);
        // Where it does not know the name there is nothing to forget; else it is kept, as if it were in use.
        if let Err(error) = self.send(&message(NOTIFY_INVAL_ENTRY, &body)) {
            tracing::debug!(%parent, %error, "the kernel does not forget a name");
        }
    }

    fn send(&self, message: &[u8]) -> io::Result<usize> {
        (&self.device).write(message)
    }

    fn tell(&self, what: &'static str, inode: InodeNumber, message: &[u8]) {
        match self.send(message) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%inode, %error, "the kernel does not take that {what}");
            }
            _ => {}
        }
    }
}

impl PagesAbove for Notices {
    fn drop_from(&self, inode: InodeNumber, from: u64) {
        let from = i64::try_from(from).unwrap_or(i64::MAX);
        let message = invalidation(self.inodes.to_kernel(inode), from, TO_THE_END);
        self.tell("pages are to be dropped", inode, &message);
    }

    fn drop_page_of(&self, inode: InodeNumber, at: u64) {
        let at = i64::try_from(at).unwrap_or(i64::MAX);
        let message = invalidation(self.inodes.to_kernel(inode), at, 1);
        self.tell("a page is to be dropped", inode, &message);
    }

    fn until_taken(&self, readers: &[Reader]) {
        readers::until_taken(readers);
    }

    fn end_with(&self, inode: InodeNumber, at: u64, byte: u8) {
        let mut body = Vec::with_capacity(25);
        body.extend(self.inodes.to_kernel(inode).0.to_ne_bytes());
        body.extend(at.to_ne_bytes());
        // One byte, and padding.
        body.extend([1u32, 0].map(u32::to_ne_bytes).concat());
        body.push(byte);
        self.tell("a file has become longer", inode, &message(NOTIFY_STORE, &body));
    }
}

fn is_unknown(sent: io::Result<usize>) -> bool {
    matches!(sent, Err(error) if error.raw_os_error() == Some(libc::ENOENT))
}

/// `fuse_notify_inval_inode_out`.
fn invalidation(inode: INodeNo, from: i64, length: i64) -> Vec<u8> {
    let body = [inode.0.to_ne_bytes(), from.to_ne_bytes(), length.to_ne_bytes()].concat();
    message(NOTIFY_INVAL_INODE, &body)
}

fn message(code: i32, body: &[u8]) -> Vec<u8> {
    let length = HEADER_BYTES + body.len();
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(code.to_ne_bytes());
    // The header names the request that is answered: none.
    message.extend(0u64.to_ne_bytes());
    message.extend(body);
    message
}
