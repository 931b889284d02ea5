//! Appending: to the end of the file, wherever that is by then.
//!
//! An append is one command, so nobody else's bytes come between its own. The kernel sends at most 1 MiB and at most
//! 256 pages at once. So a write(2) of up to 1 MiB whose buffer does not begin on a page (or of several buffers) may
//! come in two parts. It holds the file's lock meanwhile: the second part is this mount's next append to the file, right
//! after the answer to the first.
//!
//! How long a write(2) is the kernel shows while it waits for an answer; of other calls it is not known.
//!
//! Rule: a part that may be a first one ([`may_continue`]) is answered and held back; if the next append fits into one
//! extent with it, both are one command. It may be a write of its own, which does no harm. A held part is a dirty byte
//! like any other: it goes before all that was written after it, with the next commit or read of the file or with age,
//! and its failure is told to the file's handles.
//!
//! Rule: a second part is put to the first as soon as it arrives, before it waits for anything, the file's turn included.
//! So whoever commits may wait for it with the turn taken, and what the second part itself has to wait for (what was
//! handed over before it, the first part's own file among that) commits both together.

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

/// How often the chunk of one append is drawn anew after the cluster called it dead.
const APPEND_CHUNK_ATTEMPTS_MAX: usize = 3;

/// What a write of 1 MiB may lack in its first part: less than two pages of 4 KiB for each of up to eight buffers. Pages
/// of 64 KiB make it more for several buffers, and the same for one.
const SECOND_PART_BYTES_MAX: usize = 64 << 10;

/// The most that one command appends.
const APPEND_BYTES_MAX: usize = CHUNK_BYTES_MAX as usize;

/// Whether an append of so many bytes may be the first part of a write of [`APPEND_BYTES_MAX`] or less. `more_bytes`: how much
/// of it is to come, if that is known.
fn may_continue(bytes: usize, more_bytes: Option<u64>) -> bool {
    may_be_first_part(bytes)
        && more_bytes.is_none_or(|more| more > 0 && bytes as u64 + more <= APPEND_BYTES_MAX as u64)
}

/// Whether the kernel may have split a write so that its first part is so long.
pub fn may_be_first_part(bytes: usize) -> bool {
    (APPEND_BYTES_MAX - SECOND_PART_BYTES_MAX..APPEND_BYTES_MAX).contains(&bytes)
}

impl<C: Cluster> Filesystem<C> {
    /// Appends `data`, in appends of at most [`APPEND_BYTES_MAX`].
    pub(super) async fn append(
        self: &Arc<Self>,
        node: &OpenInode<C>,
        mut data: Bytes,
        privileges: Privileges,
        more_bytes: Option<u64>,
    ) -> Result<(), FsError> {
        if self.join_held_append(node, &data, privileges) {
            self.drain_close_queue().await;
            // Not given up with this caller: the first part was acknowledged to another, perhaps.
            let _lock = node.commit_lock.lock().await;
            return match held_stage(node) {
                Some(AppendStage::Closed) => self.commit_held_append(node).await,
                // Somebody else has committed it. If that failed, the file's handles are told.
                Some(AppendStage::Open) | None => Ok(()),
            };
        }
        self.drain_close_queue().await;
        let may_continue = may_continue(data.len(), more_bytes);
        if may_continue {
            interruptible(self.dirty.wait_for_room(|| self.write_back_all()).map(Ok)).await?;
        }
        let _lock = lock_commits(node).await?;
        // What other handles wrote before may be what moves the end; if it fails, they are told.
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

    /// Takes `data` for the second part of what `node` holds back, if it can be that: both fit into one append, and nothing
    /// was written behind the first meanwhile. Else there is none.
    fn join_held_append(&self, node: &OpenInode<C>, data: &Bytes, privileges: Privileges) -> bool {
        let mut state = node.state.lock();
        let committed = state.view.as_ref().map_or(0, |view| view.size);
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

    /// An append to `node` is about to be answered: from now on its second part is waited for.
    pub(super) fn restart_second_part_wait(&self, node: &OpenInode<C>) {
        let mut state = node.state.lock();
        if let Some(held) = &mut state.held_append {
            held.since = Instant::now();
        }
    }

    /// Commits the append that is held back, if there is one; the caller holds the file's turn.
    pub(super) async fn commit_held_append(&self, node: &OpenInode<C>) -> Result<(), FsError> {
        let held = {
            let mut state = node.state.lock();
            let Some(held) = &mut state.held_append else {
                return Ok(());
            };
            // What would be put to it now would be lost with it.
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
            tracing::warn!(inode = %node.inode, bytes, %error, "appended bytes could not be committed and are given up");
            let mut state = node.state.lock();
            state.failures.record(error);
            state.held_append = None;
            self.dirty.update(node, &mut state);
        }
        appended
    }

    /// One command; the caller holds the file's turn. Afterwards nothing is held back.
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
                    // With the new size known, the held bytes must not be counted once more.
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
            // The offset that caches above us assumed may be another.
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
