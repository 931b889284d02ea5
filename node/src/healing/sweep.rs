//! The sweeper: content that no file names is freed, never on a commit's path.
//!
//! When an apply takes a chunk's last reference away the chunk is dead for ever, and [`Sweeper::dead`] hears of it. What
//! was missed (the node died in between, a client never named what it put) a slow pass finds: a chunk is dead if
//! the metadata does not name it and its session has ended or has moved its low-water mark past it. No clock decides.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::ChunkId;
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use crate::consensus::Consensus;
use crate::content::ContentStore;
use crate::metadata::{Failure, MetadataStore, View};

/// How long dead chunks are gathered, so that they are punched together.
const GATHER_MS: u64 = 1_000;
/// Dead chunks that wait; beyond it they are left for the pass.
const QUEUE_CHUNKS_MAX: usize = 1 << 20;
/// Chunks freed in one go: punching 1 MiB takes half a millisecond, and reads go on in between.
const BATCH_CHUNKS: usize = 256;
/// How long after start, and then how often, everything held is looked over.
const PASS_INTERVAL_MS: u64 = 60_000;
/// Chunks looked over between two barriers.
const PAGE_CHUNKS: usize = 4096;

/// See the module.
pub struct Sweeper {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    queue: Mutex<Vec<ChunkId>>,
    added: Notify,
}

impl Sweeper {
    /// Nothing is done before [`Sweeper::run`].
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
    ) -> Arc<Sweeper> {
        Arc::new(Sweeper {
            consensus,
            metadata,
            content,
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
        loop {
            self.added.notified().await;
            tokio::time::sleep(Duration::from_millis(GATHER_MS)).await;
            let dead = std::mem::take(&mut *self.queue.lock());
            self.discard(dead).await;
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

    async fn run_passes(self: Arc<Self>) {
        loop {
            tokio::time::sleep(Duration::from_millis(PASS_INTERVAL_MS)).await;
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
            self.consensus
                .barrier()
                .await
                .map_err(|error| error.to_string())?;
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
