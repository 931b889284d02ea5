//! The sweeper: content that no file names is freed, never on a commit's path.
//!
//! When an apply takes a chunk's last reference away the chunk is dead for ever, and [`Sweeper::dead`] hears of it. What
//! was missed (the node died in between, a client never named what it put) a slow pass finds: a chunk is dead if
//! the metadata does not name it and its session has ended or has moved its low-water mark past it, as far as a node knows
//! that has seen everything acknowledged before it looked (else a session it has not heard of would be a dead one). No clock decides,
//! so what a slow writer has put and not yet named stays, however slow it is.
//!
//! Segments of small records of which little lives are rewritten, at a bounded rate: their dead share pages with the
//! living, so holes alone give little back. What is moved is whatever is held, named or not.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::ChunkId;
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use super::repair::Repair;
use crate::content::{ContentError, ContentStore, Rewritten};
use crate::metadata::{Failure, MetadataStore, View};

/// How long dead chunks are gathered, so that they are punched together.
const GATHER_MS: u64 = 1_000;
/// Dead chunks that wait; beyond it they are left for the pass.
const QUEUE_CHUNKS_MAX: usize = 1 << 20;
/// Chunks freed in one go: punching 1 MiB takes half a millisecond, and reads go on in between.
const BATCH_CHUNKS: usize = 256;
/// How often it is looked whether segments are sparse.
const REWRITE_INTERVAL_MS: u64 = 10_000;
/// Bytes of records moved in one go, in which dead content waits; a segment is moved as a whole.
const REWRITE_SLICE_BYTES: u64 = 8 << 20;
/// Bytes of records moved per second: a disk that is nearly full of small dead files is back within the hour.
const REWRITE_BYTES_PER_S: u64 = 16 << 20;
/// Chunks looked over between two barriers.
const PAGE_CHUNKS: usize = 4096;

/// Why content was not deleted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeleteError {
    /// There is none.
    #[error("it is not held here")]
    NotHeld,
    /// Files name it.
    #[error("files name this chunk: its content stays")]
    Referenced,
    /// Whoever put it lives and may still name it.
    #[error("no file names this chunk yet, but the client that put it still may")]
    MayBeNamed,
    /// It cannot be known, or the disk says no.
    #[error("{0}")]
    Unavailable(String),
}

/// See the module.
pub struct Sweeper {
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    repair: Arc<Repair>,
    /// How long after start, and then how often, everything held is looked over.
    interval: Duration,
    queue: Mutex<Vec<ChunkId>>,
    added: Notify,
}

impl Sweeper {
    /// Nothing is done before [`Sweeper::run`].
    pub fn new(
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
        repair: Arc<Repair>,
        interval: Duration,
    ) -> Arc<Sweeper> {
        Arc::new(Sweeper {
            metadata,
            content,
            repair,
            interval,
            queue: Mutex::default(),
            added: Notify::new(),
        })
    }

    /// These chunks lost their last reference.
    pub fn dead(&self, ids: &[ChunkId]) {
        let mut queue = self.queue.lock();
        let room = QUEUE_CHUNKS_MAX - queue.len();
        queue.extend_from_slice(&ids[..ids.len().min(room)]);
        self.added.notify_one();
    }

    /// Frees what is dead, for ever.
    pub async fn run(self: Arc<Self>) {
        tokio::spawn(self.clone().run_passes());
        tokio::spawn(self.clone().run_rewriting());
        loop {
            self.added.notified().await;
            tokio::time::sleep(Duration::from_millis(GATHER_MS)).await;
            let dead = std::mem::take(&mut *self.queue.lock());
            self.discard(dead).await;
        }
    }

    /// Drops this node's copy of a chunk, if it is dead; answers how many bytes of disk came back.
    pub async fn delete(&self, id: ChunkId) -> Result<u64, DeleteError> {
        let unavailable = |reason: String| DeleteError::Unavailable(reason);
        // Looked at before the barrier: whatever session put it, its opening is in the view that judges it.
        if !self.content.contains(id) {
            return Err(DeleteError::NotHeld);
        }
        self.repair.come_up_to_date().await.map_err(unavailable)?;
        let view = self
            .metadata
            .view()
            .map_err(|fault| unavailable(fault.to_string()))?;
        match (view.chunk(id), is_dead(&view, id)) {
            (Ok(Some(_)), _) => return Err(DeleteError::Referenced),
            (Ok(None), Ok(false)) => return Err(DeleteError::MayBeNamed),
            (Ok(None), Ok(true)) => {}
            (Err(fault), _) | (_, Err(fault)) => return Err(unavailable(fault.to_string())),
        }
        let content = self.content.clone();
        let discarded = tokio::task::spawn_blocking(move || content.discard(&[id])).await;
        match discarded {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) => Err(unavailable(error.to_string())),
            Err(panic) => Err(unavailable(panic.to_string())),
        }
    }

    async fn discard(&self, dead: Vec<ChunkId>) {
        for batch in dead.chunks(BATCH_CHUNKS) {
            let (content, batch) = (self.content.clone(), batch.to_vec());
            match tokio::task::spawn_blocking(move || content.discard(&batch)).await {
                Ok(Ok(bytes)) => debug!(bytes, "dead content freed"),
                Ok(Err(error)) => warn!(%error, "dead content could not be freed; the next pass tries again"),
                Err(panic) => warn!(%panic, "dead content could not be freed; the next pass tries again"),
            }
        }
    }

    async fn run_rewriting(self: Arc<Self>) {
        loop {
            let (content, repair) = (self.content.clone(), self.repair.clone());
            let rewritten = tokio::task::spawn_blocking(move || {
                let rewritten = content.rewrite_sparse(REWRITE_SLICE_BYTES)?;
                repair.dropped(&rewritten.damaged);
                Ok::<_, ContentError>(rewritten)
            });
            let moved = match rewritten.await {
                Ok(Ok(rewritten)) => rewritten,
                // It needs room for a moment, so a full disk has to be emptied otherwise.
                Ok(Err(ContentError::NoSpace)) => Rewritten::default(),
                Ok(Err(error)) => {
                    warn!(%error, "sparse content cannot be rewritten");
                    Rewritten::default()
                }
                Err(panic) => {
                    warn!(%panic, "sparse content cannot be rewritten");
                    Rewritten::default()
                }
            };
            let pause_ms = match moved.segments {
                0 => REWRITE_INTERVAL_MS,
                _ => moved.moved_bytes * 1000 / REWRITE_BYTES_PER_S,
            };
            if moved.segments > 0 {
                let Rewritten {
                    segments,
                    moved_bytes,
                    freed_bytes,
                    ..
                } = moved;
                info!(segments, moved_bytes, freed_bytes, "sparse content was rewritten");
            }
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        }
    }

    async fn run_passes(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.interval).await;
            match self.pass().await {
                Ok(0) => {}
                Ok(found) => info!(chunks = found, "chunks that no file names were freed"),
                Err(reason) => debug!(reason, "sweeping waits"),
            }
        }
    }

    /// Looks over everything held once; answers how many chunks were freed.
    async fn pass(&self) -> Result<u64, String> {
        let mut after = None;
        let mut freed = 0;
        loop {
            // Listed before the barrier: whatever session put these, its opening is in the view that judges them.
            let page = self.content.ids_after(after, PAGE_CHUNKS);
            let Some(last) = page.last() else { return Ok(freed) };
            after = Some(*last);
            self.repair.come_up_to_date().await?;
            let view = self.metadata.view().map_err(|fault| fault.to_string())?;
            let mut dead = Vec::new();
            for id in page {
                if is_dead(&view, id).map_err(|fault| fault.to_string())? {
                    dead.push(id);
                }
            }
            freed += dead.len() as u64;
            self.discard(dead).await;
        }
    }
}

fn is_dead(view: &View, id: ChunkId) -> Result<bool, Failure> {
    if view.chunk(id)?.is_some() {
        return Ok(false);
    }
    Ok(match view.session(id.session)? {
        Some(session) => session.ended.is_some() || id.counter < session.chunk_low_water,
        None => true,
    })
}
