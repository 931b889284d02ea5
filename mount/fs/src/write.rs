//! Writing: into the buffer, or, with O_APPEND, to the end of the file (`append`).
//!
//! Each write states which, because fcntl(2) sets and clears O_APPEND of an open file. Fixed at open is only whether
//! writes bypass the kernel's page cache. If a handle that was opened without O_APPEND appends, the kernel has put the
//! bytes into its pages where it believes the end to be. If that is wrong, its size is wrong too, and it drops the
//! pages when it learns the right one.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::FutureExt as _;
use quorumfs_proto::FsError;
use quorumfs_proto::command::Privileges;
use quorumfs_proto::limits::FILE_BYTES_MAX;

use super::{Cluster, Filesystem, Handle, OpenInode, Order, Put};
use crate::caches::page_tail::PageWrite;
use crate::handles::{OpenFile, Scope};
use crate::interrupt::interruptible;
use crate::write_buffer::Due;

/// The position of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WritePosition {
    /// At this offset.
    At(u64),
    /// At the end of the file as of the commit.
    End {
        /// The end of the file as the kernel believes it to be.
        offset: u64,
        /// Bytes of the same write(2) that are still to come, if known.
        more_bytes: Option<u64>,
    },
}

impl<C: Cluster> Filesystem<C> {
    /// Writes `data` and returns its length. An append is committed when this returns, each MiB in one command, unless
    /// it may be the first part of a longer one.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`]; [`FsError::Stale`] if there is no such handle; [`FsError::NotPermitted`] if it is not
    /// open for writing; [`FsError::FileTooLarge`].
    pub async fn write(
        self: &Arc<Self>,
        handle: Handle,
        position: WritePosition,
        data: Bytes,
        privileges: Privileges,
        order: Order,
    ) -> Result<u32, FsError> {
        self.writable()?;
        let file = self.file_of_request(handle)?;
        if !file.flags.write {
            return Err(FsError::NotPermitted);
        }
        let length = u32::try_from(data.len()).map_err(|_| FsError::InvalidArgument)?;
        let (WritePosition::At(offset) | WritePosition::End { offset, .. }) = position;
        if offset
            .checked_add(u64::from(length))
            .is_none_or(|end| end > FILE_BYTES_MAX)
        {
            return Err(FsError::FileTooLarge);
        }
        if length == 0 {
            return Ok(0);
        }
        match position {
            WritePosition::End { more_bytes, .. } => {
                self.append(&file.node, data, privileges, more_bytes).await?;
            }
            WritePosition::At(_) => {
                let page_write = (!file.flags.append).then_some(PageWrite {
                    order,
                    arrived_at: Instant::now(),
                });
                self.buffer(&file.node, offset, data, privileges, page_write)
                    .await?;
            }
        }
        if position == WritePosition::At(offset) && file.flags.append {
            // These bytes bypassed the kernel's page cache, where another handle may just have cached the old ones.
            self.page_versions.forget(file.node.inode);
            self.drop_pages(&file.node, offset).await;
        }
        self.prepare_answer(&file, position, offset + u64::from(length), order)
            .await;
        if matches!(position, WritePosition::End { .. }) {
            self.restart_second_part_wait(&file.node);
        }
        Ok(length)
    }

    /// Called before the answer to a write up to `end`, from which the kernel concludes that the file has this length.
    async fn prepare_answer(&self, file: &OpenFile<Put<C>>, position: WritePosition, end: u64, order: Order) {
        if file.flags.append {
            // The write bypassed the page cache, so the kernel holds no page lock until the answer.
            return self.prepare_size(&file.node, end).await;
        }
        match position {
            WritePosition::At(_) => self.prepare_write_answer(&file.node, end).await,
            WritePosition::End { offset, .. } => {
                let mut state = file.node.state.lock();
                // The kernel's pages have the bytes at `offset`.
                state.tail.record_short_read(offset, order);
                state.tail.report_write(end);
            }
        }
    }

    /// Takes pages that programs modified through a shared mapping. The kernel writes them back with any handle of the
    /// file, even one with O_APPEND, and after any close. Never extends the file: bytes beyond its end were truncated
    /// meanwhile.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`]; [`FsError::Stale`] if there is no such handle.
    pub async fn write_back(
        self: &Arc<Self>,
        handle: Handle,
        offset: u64,
        mut data: Bytes,
    ) -> Result<u32, FsError> {
        self.writable()?;
        let file = self.file_of_request(handle)?;
        let length = u32::try_from(data.len()).map_err(|_| FsError::InvalidArgument)?;
        let size = file
            .node
            .state
            .lock()
            .attributes()
            .map_or(0, |attributes| attributes.size);
        data.truncate(usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX));
        if !data.is_empty() {
            self.buffer(&file.node, offset, data, Privileges::Keep, None)
                .await?;
        }
        Ok(length)
    }

    /// Adds `data` to the file's buffer, once the mount has room for it. `page_write` describes a write that went
    /// through the kernel's pages.
    async fn buffer(
        self: &Arc<Self>,
        node: &OpenInode<C>,
        offset: u64,
        data: Bytes,
        privileges: Privileges,
        page_write: Option<PageWrite>,
    ) -> Result<(), FsError> {
        interruptible(self.dirty.wait_for_room(|| self.write_back_all()).map(Ok)).await?;
        let due = {
            let mut state = node.state.lock();
            if let Some(sent) = page_write {
                let size = state.size();
                let end = offset + data.len() as u64;
                state.tail.record_write(size, offset, end, sent);
            }
            let full = state.buffer.write(offset, data);
            state.mtime = Some(self.cluster.now());
            state.dirty_since.get_or_insert_with(Instant::now);
            if privileges == Privileges::Drop {
                state.privileges = Privileges::Drop;
            }
            self.start_puts(&mut state, &full);
            self.dirty.update(node, &mut state);
            state.buffer.due()
        };
        match due {
            Due::Nothing => {}
            Due::Sealed => self.commit_in_background(node, Scope::Sealed),
            Due::Everything => self.commit_in_background(node, Scope::Everything),
        }
        Ok(())
    }

    /// Starts commits of all dirty files, to make room.
    pub(super) fn write_back_all(self: &Arc<Self>) {
        for node in self.dirty.nodes() {
            self.commit_in_background(&node, Scope::Everything);
        }
    }
}
