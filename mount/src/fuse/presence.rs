//! Asks the kernel which inodes it knows.
//!
//! It is told that an inode's attributes are not right any more, which does no harm, and says that there is no such inode
//! where it has none. fuser's own notifier keeps that answer to itself, so the message is written here.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use fuser::INodeNo;

/// FUSE_NOTIFY_INVAL_INODE of linux/fuse.h.
const NOTIFY_INVAL_INODE: i32 = 2;
/// `fuse_out_header` and `fuse_notify_inval_inode_out`.
const MESSAGE_BYTES: usize = 16 + 24;
/// Attributes alone, no pages.
const ATTRIBUTES_ONLY: i64 = -1;

/// A way to the kernel beside fuser's.
pub(super) struct Presence {
    device: File,
}

impl Presence {
    /// # Errors
    /// Without a file descriptor to spare.
    pub(super) fn new(device: BorrowedFd<'_>) -> io::Result<Presence> {
        let device = File::from(device.as_fd().try_clone_to_owned()?);
        Ok(Presence { device })
    }

    /// Whether the kernel knows `inode`, or cannot be asked. Waits while it is getting rid of it.
    pub(super) fn may_know(&self, inode: INodeNo) -> bool {
        let written = (&self.device).write(&message(inode));
        !matches!(written, Err(error) if error.raw_os_error() == Some(libc::ENOENT))
    }
}

fn message(inode: INodeNo) -> [u8; MESSAGE_BYTES] {
    let mut message = [0; MESSAGE_BYTES];
    let (header, body) = message.split_at_mut(16);
    header[..4].copy_from_slice(&(MESSAGE_BYTES as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&NOTIFY_INVAL_INODE.to_ne_bytes());
    // The rest of the header names the request that is answered: none.
    body[..8].copy_from_slice(&inode.0.to_ne_bytes());
    body[8..16].copy_from_slice(&ATTRIBUTES_ONLY.to_ne_bytes());
    message
}
