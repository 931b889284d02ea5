//! Appending: writing at the end of the file as of the commit.
//!
//! An append is one command, so its bytes are contiguous. The kernel sends at most 1 MiB and at most 256 pages per
//! request. So a write(2) of up to 1 MiB whose buffer does not begin on a page boundary (or which has several buffers)
//! may arrive in two parts. The kernel holds the inode's lock meanwhile, so the second part is this mount's next append
//! to the file, directly after the answer to the first.
//!
//! The kernel shows the length of a write(2) while the call waits for an answer, but not that of other calls.
//!
//! Rule: an append that may be a first part ([`may_continue`]) is answered and held; if the next append fits into the
//! same command, one command has both. If it is a write of its own, that does no harm. Held bytes are dirty bytes: they
//! are committed before everything written after them, by the next commit or read of the file or by age, and a failure
//! is recorded for the file's handles.
//!
//! Rule: a second part is joined to the first as soon as it arrives, before it waits for anything, the commit lock
//! included. So a commit may wait for it while holding the lock, and what the second part itself waits for (queued
//! closes, possibly of the same file) commits both parts together.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use quorumfs_proto::chunk::Extent;
use quorumfs_proto::command::{Privileges, Target};
use quorumfs_proto::limits::{CHUNK_BYTES_MAX, INLINE_BYTES_MAX};
use quorumfs_proto::{Command, FsError, Operation, OperationResult};

use super::{Cluster, Filesystem, FreshContent, OpenInode};
use crate::commit_lock::lock_commits;
use crate::handles::{AppendStage, HeldAppend, LastByte, Scope, SharedInode};
use crate::interrupt::interruptible;

/// Most attempts at one append whose chunk the cluster declares dead.
const APPEND_CHUNK_ATTEMPTS_MAX: usize = 3;

/// Most bytes that the first part of a write of 1 MiB may lack: less than two pages of 4 KiB for each of up to eight
/// buffers. With pages of 64 KiB it is more for several buffers, and the same for one.
const SECOND_PART_BYTES_MAX: usize = 64 << 10;

/// Most bytes per command.
const APPEND_BYTES_MAX: usize = CHUNK_BYTES_MAX as usize;

/// Whether an append of `bytes` may be the first part of a write of at most [`APPEND_BYTES_MAX`]. `more_bytes` is the
/// length of the rest, if known.
fn may_continue(bytes: usize, more_bytes: Option<u64>) -> bool {
    may_be_first_part(bytes)
        && more_bytes.is_none_or(|more| more > 0 && bytes as u64 + more <= APPEND_BYTES_MAX as u64)
}

/// Whether the kernel may have split a write so that the first part has this length.
pub fn may_be_first_part(bytes: usize) -> bool {
    (APPEND_BYTES_MAX - SECOND_PART_BYTES_MAX..APPEND_BYTES_MAX).contains(&bytes)
}

impl<C: Cluster> Filesystem<C> {
    /// Appends `data` in commands of at most [`APPEND_BYTES_MAX`].
    pub(super) async fn append(
        self: &Arc<Self>,
        node: &OpenInode<C>,
        mut data: Bytes,
        privileges: Privileges,
        more_bytes: Option<u64>,
    ) -> Result<(), FsError> {
        if self.join_held_append(node, &data, privileges) {
            self.drain_close_queue().await;
            // Not interruptible: the first part may be acknowledged to another caller.
            let _lock = node.commit_lock.lock().await;
            return match held_stage(node) {
                Some(AppendStage::Closed) => self.commit_held_append(node).await,
                // Another caller has committed it. A failure is recorded for the handles.
                Some(AppendStage::Open) | None => Ok(()),
            };
        }
        self.drain_close_queue().await;
        let may_continue = may_continue(data.len(), more_bytes);
        if may_continue {
            interruptible(self.dirty.wait_for_room(|| self.write_back_all()).map(Ok)).await?;
        }
        let _lock = lock_commits(node).await?;
        // Earlier writes may determine the end of the file. A failure is recorded for the handles.
        let _recorded = self.commit_locked(node, Scope::Everything).await;
        if may_continue {
            let mut state = node.state.lock();
            state.held_append = Some(HeldAppend {
                first: data,
                second: Bytes::new(),
                privileges,
                since: Instant::now(),
                stage: AppendStage::Open,
                expects_more: more_bytes.is_some(),
            });
            state.dirty_since.get_or_insert_with(Instant::now);
            self.dirty.update(node, &mut state);
            return Ok(());
        }
        while !data.is_empty() {
            let part = data.split_to(data.len().min(APPEND_BYTES_MAX));
            interruptible(self.append_once(node, part, privileges)).await?;
        }
        Ok(())
    }

    /// Joins `data` to the held append, if both fit into one command and nothing was written behind the first part
    /// meanwhile. Otherwise closes the held append. Returns whether `data` was joined.
    fn join_held_append(&self, node: &OpenInode<C>, data: &Bytes, privileges: Privileges) -> bool {
        let mut state = node.state.lock();
        let committed = state.committed.as_ref().map_or(0, |committed| committed.size);
        let buffer_end = state.buffer.end();
        let Some(held) = &mut state.held_append else {
            return false;
        };
        if held.stage == AppendStage::Closed {
            return false;
        }
        held.stage = AppendStage::Closed;
        let fits = held.bytes() + data.len() <= APPEND_BYTES_MAX;
        if !fits || buffer_end > committed + held.bytes() as u64 {
            return false;
        }
        held.second = data.clone();
        if privileges == Privileges::Drop {
            held.privileges = privileges;
        }
        self.dirty.update(node, &mut state);
        true
    }

    /// Restarts the wait for the second part; called just before the answer to the first.
    pub(super) fn restart_second_part_wait(&self, node: &OpenInode<C>) {
        let mut state = node.state.lock();
        if let Some(held) = &mut state.held_append {
            held.since = Instant::now();
        }
    }

    /// Commits the held append, if any; the caller holds the commit lock.
    pub(super) async fn commit_held_append(&self, node: &OpenInode<C>) -> Result<(), FsError> {
        let held = {
            let mut state = node.state.lock();
            let Some(held) = &mut state.held_append else {
                return Ok(());
            };
            // The copy below is what is committed, so nothing may be joined any more.
            held.stage = AppendStage::Closed;
            held.clone()
        };
        let bytes = held.bytes();
        let data = match held.second.is_empty() {
            true => held.first,
            false => joined(&held.first, &held.second),
        };
        let appended = self.append_once(node, data, held.privileges).await;
        if let Err(error) = appended {
            tracing::warn!(inode = %node.inode, bytes, %error, "cannot commit appended bytes; they are lost");
            let mut state = node.state.lock();
            state.failures.record(error);
            state.held_append = None;
            self.dirty.update(node, &mut state);
        }
        appended
    }

    /// Appends `data` in one command and ends the held append. The caller holds the commit lock.
    async fn append_once(
        &self,
        node: &OpenInode<C>,
        data: Bytes,
        privileges: Privileges,
    ) -> Result<(), FsError> {
        let length = data.len() as u32;
        for _ in 0..APPEND_CHUNK_ATTEMPTS_MAX {
            let chunk = self.cluster.new_chunk(data.clone());
            let (named, stored) = if length <= INLINE_BYTES_MAX {
                (chunk.inline(), Vec::new())
            } else {
                match self.cluster.put_chunk(&chunk).await {
                    Err(FsError::ChunkDead) => continue,
                    put => put?,
                }
                (chunk.stored(), vec![chunk.clone()])
            };
            let extent = Extent {
                file_offset: 0,
                length,
                chunk: chunk.id(),
                chunk_offset: 0,
            };
            let command = Command {
                chunks: vec![named],
                operations: vec![Operation::Append {
                    inode: Target::Inode(node.inode),
                    extents: vec![extent],
                    privileges,
                }],
            };
            let outcome = match self.cluster.mutate(command, &stored).await {
                Err(FsError::ChunkDead) => continue,
                other => other?,
            };
            {
                let mut state = node.state.lock();
                if let Some(OperationResult::Appended { offset }) = outcome.results.first()
                    && let Some(attributes) = outcome.attributes_of(node.inode)
                {
                    let extent = Extent {
                        file_offset: *offset,
                        ..extent
                    };
                    state.extents.patch(attributes.content_version, &[extent]);
                    // In the same step as the held bytes are removed, which would otherwise count twice.
                    state.update_attributes(attributes);
                    state.last_appended = data.last().map(|byte| LastByte {
                        version: attributes.content_version,
                        at: *offset + u64::from(length) - 1,
                        byte: *byte,
                    });
                }
                if state.held_append.take().is_some() {
                    self.dirty.update(node, &mut state);
                }
            }
            self.update_open_files(&outcome.touched);
            // The kernel may have cached the bytes at another offset.
            self.page_versions.forget(node.inode);
            return Ok(());
        }
        Err(FsError::Io)
    }
}

fn held_stage<Put>(node: &SharedInode<Put>) -> Option<AppendStage> {
    node.state.lock().held_append.as_ref().map(|held| held.stage)
}

fn joined(first: &Bytes, second: &Bytes) -> Bytes {
    let mut joined = BytesMut::with_capacity(first.len() + second.len());
    joined.extend_from_slice(first);
    joined.extend_from_slice(second);
    joined.freeze()
}
