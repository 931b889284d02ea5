//! Writing: into the buffer, or, for O_APPEND, to the end of the file (`append`).
//!
//! Which of the two is the word of each write: fcntl(2) sets and clears O_APPEND of a file that is open. What is fixed
//! at open is whether the kernel passes its pages by. Where a handle that was not opened so appends, the kernel has put
//! the bytes where it thinks the end is. If that was somewhere else, its size is wrong too, and it drops the pages when
//! it is told the right one.

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

/// Where a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WritePosition {
    /// There.
    At(u64),
    /// To the end of the file, wherever that is by then.
    End {
        /// Where the kernel thinks that it is.
        offset: u64,
        /// How many bytes of the same write(2) are still to come, if that is known.
        more_bytes: Option<u64>,
    },
}

impl<C: Cluster> Filesystem<C> {
    /// Writes `data` and answers its length. What goes to the end of the file goes there in one append (each MiB of it),
    /// and is committed when this returns unless more of the same extent may follow.
    pub async fn write(
        self: &Arc<Self>,
        handle: Handle,
        place: WritePosition,
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
        let (WritePosition::At(offset) | WritePosition::End { offset, .. }) = place;
        if offset
            .checked_add(u64::from(length))
            .is_none_or(|end| end > FILE_BYTES_MAX)
        {
            return Err(FsError::FileTooLarge);
        }
        if length == 0 {
            return Ok(0);
        }
        match place {
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
        if place == WritePosition::At(offset) && file.flags.append {
            // These bytes did not go through the caches above, where another handle may just have read what was there.
            self.page_versions.forget(file.node.inode);
            self.drop_pages(&file.node, offset).await;
        }
        self.prepare_answer(&file, place, offset + u64::from(length), order)
            .await;
        if matches!(place, WritePosition::End { .. }) {
            self.restart_second_part_wait(&file.node);
        }
        Ok(length)
    }

    /// A write up to `end` is about to be answered: the kernel takes the file for so long then.
    async fn prepare_answer(&self, file: &OpenFile<Put<C>>, place: WritePosition, end: u64, order: Order) {
        if file.flags.append {
            // It went by the pages, so nothing above waits for its answer with a page locked.
            return self.prepare_size(&file.node, end).await;
        }
        match place {
            WritePosition::At(_) => self.prepare_write_answer(&file.node, end).await,
            WritePosition::End { offset, .. } => {
                let mut state = file.node.state.lock();
                // The pages have it where the kernel thinks the end is.
                state.tail.record_short_read(offset, order);
                state.tail.report_write(end);
            }
        }
    }

    /// Takes what programs changed through a shared mapping, as the kernel writes it back: of whichever handle it
    /// finds, even one of O_APPEND, and later than any close. It never makes the file longer: what lies behind the end
    /// was cut off meanwhile.
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

    /// Puts `data` into the file's buffer, when there is room. `page_write`: programs above see it in the file's pages.
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

    /// There are too many dirty bytes: everything goes.
    pub(super) fn write_back_all(self: &Arc<Self>) {
        for node in self.dirty.nodes() {
            self.commit_in_background(&node, Scope::Everything);
        }
    }
}
