//! Notifications and questions to the kernel that are not answers to its requests.
//!
//! - Whether it knows an inode: it is told that the inode's attributes are invalid, which does no harm, and returns an
//!   error if it has no such inode. fuser's own notifier hides that error, so the messages are written here.
//! - That a name is no longer valid.
//! - That pages of a file are invalid, and where the file ends. The kernel waits for the lock of these pages, and so
//!   for reads in progress: this must never be called by a thread that serves requests.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use fuser::INodeNo;
use quorumfs_proto::InodeNumber;

use super::inode_map::InodeMap;
use super::readers;
use quorumfs_fs::{PageCache, Reader};

/// FUSE_NOTIFY_INVAL_INODE, FUSE_NOTIFY_INVAL_ENTRY and FUSE_NOTIFY_STORE of linux/fuse.h.
const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_INVAL_ENTRY: i32 = 3;
const NOTIFY_STORE: i32 = 4;
/// `fuse_out_header`.
const HEADER_BYTES: usize = 16;
/// Invalidates only attributes, no pages.
const ATTRIBUTES_ONLY: i64 = -1;
/// Invalidates up to the end of the file.
const TO_THE_END: i64 = 0;

/// A writer of messages to the kernel, besides fuser's.
pub(super) struct Notices {
    device: File,
    inodes: InodeMap,
}

impl Notices {
    /// Makes a writer of messages to `device`.
    ///
    /// # Errors
    /// If no file descriptor is available.
    pub(super) fn new(device: BorrowedFd<'_>, inodes: InodeMap) -> io::Result<Notices> {
        let device = File::from(device.as_fd().try_clone_to_owned()?);
        Ok(Notices { device, inodes })
    }

    /// Whether the kernel may know `inode`; also true if it cannot be asked. Waits while the kernel is dropping the
    /// inode.
    pub(super) fn may_know(&self, inode: INodeNo) -> bool {
        !is_unknown(self.send(&invalidation(inode, ATTRIBUTES_ONLY, TO_THE_END)))
    }

    /// Makes the kernel look up `name` in `parent` again; if no program uses it, the kernel forgets it. Waits for
    /// changes of that directory that are in progress.
    pub(super) fn forget_name(&self, parent: INodeNo, name: &[u8]) {
        if name.is_empty() {
            return;
        }
        let mut body = Vec::with_capacity(17 + name.len());
        body.extend(parent.0.to_ne_bytes());
        // The name's length, and no flags.
        body.extend([name.len() as u32, 0].map(u32::to_ne_bytes).concat());
        body.extend(name);
        body.push(0);
        // An error means that the kernel does not know the name; otherwise the name is kept as if it were in use.
        if let Err(error) = self.send(&message(NOTIFY_INVAL_ENTRY, &body)) {
            tracing::debug!(%parent, %error, "the kernel did not invalidate a name");
        }
    }

    fn send(&self, message: &[u8]) -> io::Result<usize> {
        (&self.device).write(message)
    }

    fn notify(&self, what: &'static str, inode: InodeNumber, message: &[u8]) {
        match self.send(message) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%inode, %error, "the kernel refused the notification that {what}");
            }
            _ => {}
        }
    }
}

impl PageCache for Notices {
    fn drop_from(&self, inode: InodeNumber, from: u64) {
        let from = i64::try_from(from).unwrap_or(i64::MAX);
        let message = invalidation(self.inodes.to_kernel(inode), from, TO_THE_END);
        self.notify("pages are invalid", inode, &message);
    }

    fn drop_page_at(&self, inode: InodeNumber, at: u64) {
        let at = i64::try_from(at).unwrap_or(i64::MAX);
        let message = invalidation(self.inodes.to_kernel(inode), at, 1);
        self.notify("a page is invalid", inode, &message);
    }

    fn wait_for_readers(&self, readers: &[Reader]) {
        readers::wait_for_readers(readers);
    }

    fn store_last_byte(&self, inode: InodeNumber, at: u64, byte: u8) {
        let mut body = Vec::with_capacity(25);
        body.extend(self.inodes.to_kernel(inode).0.to_ne_bytes());
        body.extend(at.to_ne_bytes());
        // One byte, and padding.
        body.extend([1u32, 0].map(u32::to_ne_bytes).concat());
        body.push(byte);
        self.notify("a file has become longer", inode, &message(NOTIFY_STORE, &body));
    }
}

fn is_unknown(sent: io::Result<usize>) -> bool {
    matches!(sent, Err(error) if error.raw_os_error() == Some(libc::ENOENT))
}

/// Encodes `fuse_notify_inval_inode_out`.
fn invalidation(inode: INodeNo, from: i64, length: i64) -> Vec<u8> {
    let body = [inode.0.to_ne_bytes(), from.to_ne_bytes(), length.to_ne_bytes()].concat();
    message(NOTIFY_INVAL_INODE, &body)
}

fn message(code: i32, body: &[u8]) -> Vec<u8> {
    let length = HEADER_BYTES + body.len();
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(code.to_ne_bytes());
    // The header has the number of the request that is answered: 0 for none.
    message.extend(0u64.to_ne_bytes());
    message.extend(body);
    message
}
