//! Committing dirty bytes.
//!
//! Invariants: commands that change the content of a file are sent under its commit lock, one after another, so that
//! they take effect in the order of the writes; packs stay readable in the buffer until the command that names them is
//! answered; a chunk is named only after its put was acknowledged (P2).
//!
//! A failed commit is not retried: its bytes are lost (as after a failed write-back in a kernel), the failure is
//! recorded, and each handle reports it once (`Failures`).

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::FutureExt as _;
use quorumfs_proto::chunk::Extent;
use quorumfs_proto::command::{Privileges, Target};
use quorumfs_proto::{Command, FsError, NewChunk, Operation, Outcome, SessionId, Timestamp};

use super::{Cluster, Filesystem, FreshContent, OpenInode, Put};
use crate::commit_lock::{lock_after_append, lock_in_background};
use crate::handles::{InodeState, Scope};
use crate::interrupt::{check_interrupted, interruptible};
use crate::write_buffer::Pack;

/// Most times that the chunks of one command are replaced after the cluster declared them dead although their session
/// is alive. Chunks of an ended session do not count: a session ends after a minute without contact, and a commit
/// outlasts that (P6).
const CHUNK_RETRIES_MAX: usize = 3;

/// Appends operations to a command; they can refer to the results of earlier ones by index.
pub(super) type AddOperations<'a> = &'a (dyn Fn(&mut Vec<Operation>) + Send + Sync);

/// Counts how often the chunks of one command were replaced.
#[derive(Default)]
pub(super) struct ChunkRetries {
    session: Option<SessionId>,
    in_session: usize,
}

impl ChunkRetries {
    /// Records that chunks of `session` are dead.
    ///
    /// # Errors
    /// [`FsError::Io`] if too many of this session were.
    pub(super) fn record(&mut self, session: SessionId) -> Result<(), FsError> {
        if self.session.replace(session) != Some(session) {
            self.in_session = 0;
        }
        self.in_session += 1;
        match self.in_session {
            0..=CHUNK_RETRIES_MAX => Ok(()),
            _ => Err(FsError::Io),
        }
    }
}

impl<C: Cluster> Filesystem<C> {
    /// Commits the bytes written before the call.
    pub(super) async fn commit(&self, node: &OpenInode<C>, scope: Scope) -> Result<(), FsError> {
        self.drain_close_queue().await;
        let result = {
            // If the caller is interrupted here, the bytes wait for the next commit.
            let _lock = lock_after_append(node).await?;
            self.commit_locked(node, scope).await
        };
        self.open.remove_if_idle(node);
        result
    }

    /// Commits in a background task, at most one per file at a time.
    pub(super) fn commit_in_background(self: &Arc<Self>, node: &OpenInode<C>, scope: Scope) {
        {
            let mut state = node.state.lock();
            let queued = state.queued_commit;
            state.queued_commit = queued.max(Some(scope));
            if queued.is_some() {
                return;
            }
        }
        let (filesystem, node) = (Arc::clone(self), Arc::clone(node));
        tokio::spawn(async move {
            filesystem.drain_close_queue().await;
            {
                let _lock = lock_in_background(&node).await;
                let scope = node.state.lock().queued_commit.take().unwrap_or(scope);
                // A failure is recorded for the handles.
                let _recorded = filesystem.commit_locked(&node, scope).await;
            }
            filesystem.open.remove_if_idle(&node);
        });
    }

    /// Like `commit`; the caller holds the commit lock.
    pub(super) async fn commit_locked(&self, node: &OpenInode<C>, scope: Scope) -> Result<(), FsError> {
        let last = self.seal(node, scope);
        self.commit_up_to(node, last).await
    }

    /// Commits the packs up to the sequence `last`; the caller holds the commit lock.
    pub(super) async fn commit_up_to(&self, node: &OpenInode<C>, last: u64) -> Result<(), FsError> {
        let mut result = self.commit_held_append(node).await;
        loop {
            let packs = node.state.lock().buffer.next_batch(last);
            if packs.is_empty() {
                return result;
            }
            if let Err(error) = self.send_or_discard(node, &packs).await {
                result = result.and(Err(error));
            }
        }
    }

    /// Sends `operation`, which concerns `node`, together with the commit of the bytes written before the call: in the
    /// same command, unless the cluster refuses that.
    pub(super) async fn commit_with(
        &self,
        node: &OpenInode<C>,
        operation: Operation,
    ) -> Result<Outcome, FsError> {
        self.drain_close_queue().await;
        let outcome = {
            let _lock = lock_after_append(node).await?;
            self.commit_with_locked(node, operation).await
        };
        self.open.remove_if_idle(node);
        outcome
    }

    async fn commit_with_locked(
        &self,
        node: &OpenInode<C>,
        operation: Operation,
    ) -> Result<Outcome, FsError> {
        let add = |operations: &mut Vec<Operation>| operations.push(operation.clone());
        let last = self.seal(node, Scope::Everything);
        // A failure is recorded for the handles.
        let _recorded = self.commit_held_append(node).await;
        loop {
            let packs = node.state.lock().buffer.next_batch(last);
            let is_last = packs.last().is_none_or(|youngest| youngest.sequence == last);
            if !is_last {
                // A failure is recorded for the handles; it does not concern the operation.
                let _recorded = self.send_or_discard(node, &packs).await;
                continue;
            }
            if let Err(gone) = check_interrupted().await {
                let _recorded = self.send_or_discard(node, &packs).await;
                return Err(gone);
            }
            let sending = self.send(node, &packs, &add);
            // Written bytes are not dropped when the caller of the operation is interrupted.
            let sent = match packs.is_empty() {
                true => interruptible(sending).await,
                false => sending.await,
            };
            match sent {
                Err(error) if !packs.is_empty() && is_refusal(error) => {
                    // Sent separately, to find out which of the two was refused.
                    let _recorded = self.send_or_discard(node, &packs).await;
                    return self.send(node, &[], &add).await;
                }
                Err(error) => {
                    self.discard_failed(node, &packs, error);
                    return Err(error);
                }
                Ok(outcome) => return Ok(outcome),
            }
        }
    }

    /// Seals the bytes of `scope`; returns the sequence of the last pack to commit.
    pub(super) fn seal(&self, node: &OpenInode<C>, scope: Scope) -> u64 {
        let mut state = node.state.lock();
        if scope == Scope::Everything {
            let packs = state.buffer.seal_all();
            state.dirty_since = None;
            self.start_puts(&mut state, &packs);
            self.dirty.update(node, &mut state);
        }
        state.buffer.last_sequence()
    }

    /// Starts the puts of these packs. Small packs are sent inside the command instead.
    pub(super) fn start_puts(&self, state: &mut InodeState<Put<C>>, packs: &[Arc<Pack>]) {
        for pack in packs.iter().filter(|pack| !pack.is_inline()) {
            let (cluster, payload) = (Arc::clone(&self.cluster), pack.payload.clone());
            let put: Put<C> = async move {
                let chunk = cluster.new_chunk(payload);
                cluster.put_chunk(&chunk).await?;
                Ok(chunk)
            }
            .boxed()
            .shared();
            tokio::spawn(put.clone());
            state.puts.insert(pack.sequence, put);
        }
    }

    pub(super) async fn send_or_discard(
        &self,
        node: &OpenInode<C>,
        packs: &[Arc<Pack>],
    ) -> Result<(), FsError> {
        match self.send(node, packs, &|_| {}).await {
            Ok(_) => Ok(()),
            Err(error) => {
                self.discard_failed(node, packs, error);
                Err(error)
            }
        }
    }

    /// Sends one command: the packs, then the operations of `add`.
    pub(super) async fn send(
        &self,
        node: &OpenInode<C>,
        packs: &[Arc<Pack>],
        add: AddOperations<'_>,
    ) -> Result<Outcome, FsError> {
        let chunks = self.put_chunks(node, packs).await?;
        // Moved into this command, so that later writes set them for the next one.
        let (mtime, privileges) = {
            let mut state = node.state.lock();
            let privileges = match packs {
                [] => Privileges::Keep,
                _ => std::mem::replace(&mut state.privileges, Privileges::Keep),
            };
            state.privileges_sent = privileges;
            (state.mtime, privileges)
        };
        let sent = self
            .send_write(node, packs, chunks, (mtime, privileges), add)
            .await;
        let mut state = node.state.lock();
        state.privileges_sent = Privileges::Keep;
        if sent.is_err() && privileges == Privileges::Drop {
            state.privileges = Privileges::Drop;
        }
        drop(state);
        sent
    }

    async fn send_write(
        &self,
        node: &OpenInode<C>,
        packs: &[Arc<Pack>],
        mut chunks: Vec<C::Chunk>,
        (mtime, privileges): (Option<Timestamp>, Privileges),
        add: AddOperations<'_>,
    ) -> Result<Outcome, FsError> {
        let mut retries = ChunkRetries::default();
        loop {
            let extents: Vec<Extent> = packs
                .iter()
                .zip(&chunks)
                .flat_map(|(pack, chunk)| pack.extents(chunk.id()))
                .collect();
            let write = (!packs.is_empty()).then(|| Operation::Write {
                inode: Target::Inode(node.inode),
                extents: extents.clone(),
                mtime,
                privileges,
            });
            let mut operations = Vec::from_iter(write);
            add(&mut operations);
            let resizes = operations.iter().any(|operation| {
                matches!(operation, Operation::SetAttributes { changes, .. } if changes.size.is_some())
            });
            let (named, stored) = name_chunks::<C>(packs, &chunks);
            let command = Command {
                chunks: named,
                operations,
            };
            match self.cluster.mutate(command, &stored).await {
                Ok(outcome) => {
                    self.record_committed(node, packs, &extents, &outcome, resizes);
                    return Ok(outcome);
                }
                Err(FsError::ChunkDead) if !chunks.is_empty() => {
                    chunks = self.replace_chunks(packs, &chunks, &mut retries).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns the chunks of these packs, after their puts.
    async fn put_chunks(&self, node: &OpenInode<C>, packs: &[Arc<Pack>]) -> Result<Vec<C::Chunk>, FsError> {
        let mut chunks = Vec::with_capacity(packs.len());
        for pack in packs {
            let put = node.state.lock().puts.get(&pack.sequence).cloned();
            let chunk = match put {
                Some(put) => put.await,
                None => Ok(self.cluster.new_chunk(pack.payload.clone())),
            };
            match chunk {
                // The session of the chunk has ended; the bytes are still here.
                Err(FsError::ChunkDead) => {
                    chunks.push(self.put_new_chunk(pack, &mut ChunkRetries::default()).await?)
                }
                chunk => chunks.push(chunk?),
            }
        }
        Ok(chunks)
    }

    /// Puts the packs as new chunks in place of `dead` ones.
    async fn replace_chunks(
        &self,
        packs: &[Arc<Pack>],
        dead: &[C::Chunk],
        retries: &mut ChunkRetries,
    ) -> Result<Vec<C::Chunk>, FsError> {
        if let Some(dead) = dead.first() {
            retries.record(dead.id().session)?;
        }
        let mut chunks = Vec::with_capacity(packs.len());
        for pack in packs {
            chunks.push(self.put_new_chunk(pack, retries).await?);
        }
        Ok(chunks)
    }

    /// Puts the bytes of `pack` as a new chunk. Sessions may end meanwhile.
    pub(super) async fn put_new_chunk(
        &self,
        pack: &Pack,
        retries: &mut ChunkRetries,
    ) -> Result<C::Chunk, FsError> {
        loop {
            let chunk = self.cluster.new_chunk(pack.payload.clone());
            if pack.is_inline() {
                return Ok(chunk);
            }
            match self.cluster.put_chunk(&chunk).await {
                Err(FsError::ChunkDead) => retries.record(chunk.id().session)?,
                put => return put.map(|()| chunk),
            }
        }
    }

    /// Records the committed packs: removes them from the buffer and updates what is cached of the file.
    fn record_committed(
        &self,
        node: &OpenInode<C>,
        packs: &[Arc<Pack>],
        extents: &[Extent],
        outcome: &Outcome,
        resizes: bool,
    ) {
        {
            let mut state = node.state.lock();
            self.remove_packs(node, &mut state, packs);
            let known = state
                .committed
                .as_ref()
                .map(|committed| committed.content_version);
            if let Some(attributes) = outcome.attributes_of(node.inode) {
                state.update_attributes(attributes);
                let after = attributes.content_version;
                if resizes {
                    state.extents.clear();
                } else if !packs.is_empty() {
                    state.extents.patch(after, extents);
                }
                // A command with extents made this version itself, even if another answer has reported it before.
                if !packs.is_empty() || known.is_some_and(|known| known + 1 == after) {
                    self.page_versions.changed_here(node.inode, after - 1, after);
                }
            }
        }
        self.open.bound_extents(node);
        self.update_open_files(&outcome.touched);
    }

    /// Drops packs whose commit failed and records the failure for every handle of the file.
    fn discard_failed(&self, node: &OpenInode<C>, packs: &[Arc<Pack>], error: FsError) {
        if packs.is_empty() {
            return;
        }
        let bytes: usize = packs.iter().map(|pack| pack.payload.len()).sum();
        tracing::warn!(inode = %node.inode, bytes, %error, "cannot commit written bytes; they are lost");
        let mut state = node.state.lock();
        state.failures.record(error);
        self.remove_packs(node, &mut state, packs);
        drop(state);
        self.page_versions.forget(node.inode);
    }

    fn remove_packs(&self, node: &OpenInode<C>, state: &mut InodeState<Put<C>>, packs: &[Arc<Pack>]) {
        if let Some(youngest) = packs.last() {
            self.remove_packs_to(node, state, youngest.sequence);
        }
    }

    /// Removes the packs up to `last` from the buffer; the caller holds the commit lock.
    pub(super) fn remove_packs_to(&self, node: &OpenInode<C>, state: &mut InodeState<Put<C>>, last: u64) {
        state.buffer.remove_through(last);
        let later: BTreeMap<u64, Put<C>> = state.puts.split_off(&(last + 1));
        state.puts = later;
        self.dirty.update(node, state);
    }
}

/// Returns the descriptions of `chunks` for a command, and the chunks whose content is not inside it.
pub(super) fn name_chunks<C: Cluster>(
    packs: &[Arc<Pack>],
    chunks: &[C::Chunk],
) -> (Vec<NewChunk>, Vec<C::Chunk>) {
    let mut stored = Vec::new();
    let named = packs
        .iter()
        .zip(chunks)
        .map(|(pack, chunk)| {
            if pack.is_inline() {
                chunk.inline()
            } else {
                stored.push(chunk.clone());
                chunk.stored()
            }
        })
        .collect();
    (named, stored)
}

/// Whether the cluster refused the command because of what it requests.
fn is_refusal(error: FsError) -> bool {
    !matches!(error, FsError::Io | FsError::TimedOut | FsError::ChunkDead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_replaced_for_every_ended_session_and_a_few_times_in_one() {
        let mut retries = ChunkRetries::default();
        for session in 1..20 {
            assert_eq!(retries.record(SessionId(session)), Ok(()));
        }
        let results: Vec<_> = (0..CHUNK_RETRIES_MAX)
            .map(|_| retries.record(SessionId(19)))
            .collect();
        let (last, before) = results.split_last().unwrap();
        assert!(before.iter().all(Result::is_ok));
        assert_eq!(*last, Err(FsError::Io));
    }
}
