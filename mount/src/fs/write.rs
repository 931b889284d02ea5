//! Writing: into the buffer, or, for O_APPEND, straight to the end of the file.
//!
//! Which of the two is the word of each write: fcntl(2) sets and clears O_APPEND of a file that is open. What is fixed
//! at open is whether the kernel passes its pages by. Where a handle that was not opened so appends, the kernel has put
//! the bytes where it thinks the end is. If that was somewhere else, its size is wrong too, and it drops the pages when
//! it is told the right one.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use quorumfs_proto::chunk::Piece;
use quorumfs_proto::command::{Privileges, Target};
use quorumfs_proto::limits::{CHUNK_BYTES_MAX, FILE_BYTES_MAX, INLINE_BYTES_MAX};
use quorumfs_proto::{Command, FsError, Operation, OperationResult, Timestamp};

use super::{Cluster, Filesystem, FreshContent, Handle, Node, Put};
use crate::handles::{OpenFile, Scope};
use crate::write_buffer::Due;

/// How often the chunk of one append is drawn anew after the cluster called it dead.
const APPEND_RENEWALS_MAX: usize = 3;

/// Where a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// There.
    At(u64),
    /// To the end of the file, wherever that is by then. (The kernel thinks there.)
    End(u64),
}

impl<C: Cluster> Filesystem<C> {
    /// Writes `data` and answers its length. What goes to the end of the file goes there in one piece (each MiB of it)
    /// and is committed when this returns.
    pub async fn write(
        self: &Arc<Self>,
        handle: Handle,
        place: Place,
        data: Bytes,
        privileges: Privileges,
    ) -> Result<u32, FsError> {
        self.writable()?;
        let file = self.used(handle)?;
        if !file.flags.write {
            return Err(FsError::NotPermitted);
        }
        let length = u32::try_from(data.len()).map_err(|_| FsError::InvalidArgument)?;
        let (Place::At(offset) | Place::End(offset)) = place;
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
            Place::End(_) => self.append(&file.node, data, privileges).await?,
            Place::At(_) => {
                if !file.flags.append {
                    let mut state = file.node.state.lock();
                    let size = state.size();
                    state.tail.written(size, offset, offset + u64::from(length));
                }
                self.take(&file.node, offset, data, privileges).await;
            }
        }
        self.before_longer(&file, place, offset + u64::from(length)).await;
        if place == Place::At(offset) && file.flags.append {
            // These bytes did not go through the caches above, where another handle may just have read what was there.
            self.pages.forget(file.node.inode);
        }
        Ok(length)
    }

    /// A write up to `end` is about to be answered: the kernel takes the file for so long then.
    async fn before_longer(&self, file: &OpenFile<Put<C>>, place: Place, end: u64) {
        if file.flags.append {
            // It went by the pages, so nothing above waits for its answer with a page locked.
            return self.before_telling(&file.node, end).await;
        }
        let mut state = file.node.state.lock();
        if let Place::End(offset) = place {
            // The pages have it where the kernel thinks the end is.
            state.tail.read_short(offset);
        }
        let told = state.tail.told();
        state.tail.tell_at_once(end.max(told));
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
        let file = self.used(handle)?;
        let length = u32::try_from(data.len()).map_err(|_| FsError::InvalidArgument)?;
        let size = file
            .node
            .state
            .lock()
            .attributes()
            .map_or(0, |attributes| attributes.size);
        data.truncate(usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX));
        if !data.is_empty() {
            self.take(&file.node, offset, data, Privileges::Keep).await;
        }
        Ok(length)
    }

    /// Puts `data` into the file's buffer, when there is room.
    async fn take(self: &Arc<Self>, node: &Node<C>, offset: u64, data: Bytes, privileges: Privileges) {
        self.dirty.room(|| self.relieve()).await;
        let due = {
            let mut state = node.state.lock();
            let full = state.buffer.write(offset, data);
            state.mtime = Some(Timestamp::from(SystemTime::now()));
            state.dirty_since.get_or_insert_with(Instant::now);
            if privileges == Privileges::Drop {
                state.privileges = Privileges::Drop;
            }
            self.start_puts(&mut state, &full);
            self.dirty.account(node, &mut state);
            state.buffer.due()
        };
        match due {
            Due::Nothing => {}
            Due::Sealed => self.commit_in_background(node, Scope::Sealed),
            Due::Everything => self.commit_in_background(node, Scope::Everything),
        }
    }

    /// There are too many dirty bytes: everything goes.
    fn relieve(self: &Arc<Self>) {
        for node in self.dirty.nodes() {
            self.commit_in_background(&node, Scope::Everything);
        }
    }

    async fn append(&self, node: &Node<C>, mut data: Bytes, privileges: Privileges) -> Result<(), FsError> {
        self.settle_handed_over().await;
        let _turn = node.turn.lock().await;
        // What other handles wrote before may be what moves the end; if it fails, they are told.
        let _kept = self.commit_in_turn(node, Scope::Everything).await;
        while !data.is_empty() {
            let part = data.split_to(data.len().min(CHUNK_BYTES_MAX as usize));
            self.append_part(node, part, privileges).await?;
        }
        Ok(())
    }

    /// One command; the caller holds the file's turn.
    async fn append_part(&self, node: &Node<C>, part: Bytes, privileges: Privileges) -> Result<(), FsError> {
        let length = part.len() as u32;
        for _ in 0..APPEND_RENEWALS_MAX {
            let chunk = self.cluster.new_chunk(part.clone());
            let (named, stored) = if length <= INLINE_BYTES_MAX {
                (chunk.inline(), Vec::new())
            } else {
                match self.cluster.put_chunk(&chunk).await {
                    Err(FsError::ChunkDead) => continue,
                    put => put?,
                }
                (chunk.stored(), vec![chunk.clone()])
            };
            let piece = Piece {
                file_offset: 0,
                length,
                chunk: chunk.id(),
                chunk_offset: 0,
            };
            let command = Command {
                chunks: vec![named],
                operations: vec![Operation::Append {
                    inode: Target::Inode(node.inode),
                    pieces: vec![piece],
                    privileges,
                }],
            };
            let outcome = match self.cluster.mutate(command, &stored).await {
                Err(FsError::ChunkDead) => continue,
                other => other?,
            };
            if let Some(OperationResult::Appended { offset }) = outcome.results.first()
                && let Some(attributes) = outcome.attributes_of(node.inode)
            {
                let piece = Piece {
                    file_offset: *offset,
                    ..piece
                };
                node.state
                    .lock()
                    .extents
                    .patch(attributes.content_version, &[piece]);
            }
            self.learn(&outcome.touched);
            // The offset that caches above us assumed may be another.
            self.pages.forget(node.inode);
            return Ok(());
        }
        Err(FsError::Io)
    }
}
