//! The sweeper: content that no file names is freed, never on a commit's path.
//!
//! When an apply takes a chunk's last reference away the chunk is dead for ever, and [`Sweeper::dead`] hears of it. What
//! nobody tells of, a pass finds: a chunk is dead if the metadata does not name it and its session has ended or has
//! moved its low-water mark past it, as far as a node knows
//! that has seen everything acknowledged before it looked (else a session it has not heard of would be a dead one). No clock decides,
//! so what a slow writer has put and not yet named stays, however slow it is.
//!
//! A pass looks only at what sessions have moved past since the last one ([`marks`]): what a client put and never named.
//! Everything held is looked over where something may have been missed (the node has just begun, a snapshot came, the
//! queue of effects or the one here was full, content could not be freed), and once an hour for copies that came when
//! all that should have freed them was over. Looking is done in pages, with pauses, and never on a runtime thread.
//!
//! Segments of small records of which little lives are rewritten, at a bounded rate: their dead share pages with the
//! living, so holes alone give little back. What is moved is whatever is held, named or not.

mod marks;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::ChunkId;
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use self::marks::{ENDED, Marks, Progress, Stretch};
use super::repair::Repair;
use crate::consensus::Consensus;
use crate::tasks::Tasks;
use quorumfs_content::{ContentError, ContentStore, Rewritten};
use quorumfs_metadata::{Failure, MetadataStore, SessionRecord, View};

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
/// After a page, this many times as long as it took: whatever is held, a quarter of one thread looks it over.
const PAUSE_PER_PAGE: u32 = 3;
/// How often everything is looked over though nothing is known to have been missed.
const COMPLETE_INTERVAL: Duration = Duration::from_secs(3600);
/// Dead chunks that are freed once more after the next pass; beyond it a copy that came late waits for a complete pass.
const FREED_REMEMBERED_MAX: usize = 64 << 10;

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
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    repair: Arc<Repair>,
    /// How long after start, and then how often, a pass is made.
    interval: Duration,
    queue: Mutex<Vec<ChunkId>>,
    added: Notify,
    freed: Mutex<Freed>,
    /// How often dead chunks were left to a complete pass.
    missed: AtomicU64,
}

/// Dead chunks that were freed: what was on its way here when they died may have come since.
#[derive(Default)]
struct Freed {
    since_last_pass: Vec<ChunkId>,
    before_it: Vec<ChunkId>,
}

/// Counts what may leave dead content of which nobody tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Misses {
    effects_dropped: u64,
    snapshots_installed: u64,
    left_here: u64,
}

/// How far the passes are.
#[derive(Default)]
struct Passes {
    progress: Progress,
    /// When the last complete one began, and what had been missed by then.
    complete: Option<(Instant, Misses)>,
}

impl Sweeper {
    /// Nothing is done before [`Sweeper::start`].
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
        repair: Arc<Repair>,
        interval: Duration,
    ) -> Arc<Sweeper> {
        Arc::new(Sweeper {
            consensus,
            metadata,
            content,
            repair,
            interval,
            queue: Mutex::default(),
            added: Notify::new(),
            freed: Mutex::default(),
            missed: AtomicU64::new(0),
        })
    }

    /// These chunks lost their last reference.
    pub fn dead(&self, ids: &[ChunkId]) {
        let mut queue = self.queue.lock();
        let room = QUEUE_CHUNKS_MAX - queue.len();
        if ids.len() > room {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
        queue.extend_from_slice(&ids[..ids.len().min(room)]);
        self.added.notify_one();
    }

    /// Frees what is dead, for ever.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("sweep-passes", self.clone(), Self::run_passes);
        tasks.supervise("sweep-rewriting", self.clone(), Self::run_rewriting);
        tasks.supervise("sweep-discards", self.clone(), Self::run_discards);
    }

    /// Discards what applied commands left dead.
    async fn run_discards(self: Arc<Self>) {
        loop {
            self.added.notified().await;
            tokio::time::sleep(Duration::from_millis(GATHER_MS)).await;
            let dead = std::mem::take(&mut *self.queue.lock());
            {
                let known = &mut self.freed.lock().since_last_pass;
                let room = FREED_REMEMBERED_MAX - known.len();
                known.extend_from_slice(&dead[..dead.len().min(room)]);
            }
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
                Ok(Ok(bytes)) => {
                    debug!(bytes, "dead content freed");
                    continue;
                }
                Ok(Err(error)) => warn!(%error, "dead content could not be freed; the next pass tries again"),
                Err(panic) => warn!(%panic, "dead content could not be freed; the next pass tries again"),
            }
            self.missed.fetch_add(1, Ordering::Relaxed);
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
        let mut passes = Passes::default();
        loop {
            tokio::time::sleep(self.interval).await;
            let came_late = self.free_what_came_late().await;
            let freed = match self.pass(&mut passes).await {
                Ok(freed) => came_late + freed,
                Err(reason) => {
                    debug!(reason, "sweeping waits");
                    came_late
                }
            };
            if freed > 0 {
                info!(chunks = freed, "chunks that no file names were freed");
            }
        }
    }

    /// Frees copies of dead chunks that came after these had been freed; answers how many there were.
    async fn free_what_came_late(&self) -> u64 {
        let mut ids = {
            let mut freed = self.freed.lock();
            let since = std::mem::take(&mut freed.since_last_pass);
            std::mem::replace(&mut freed.before_it, since)
        };
        let content = self.content.clone();
        let held = tokio::task::spawn_blocking(move || {
            ids.retain(|id| content.contains(*id));
            ids
        });
        // The next complete pass finds what a panic leaves.
        let came_late = held.await.unwrap_or_default();
        let count = came_late.len() as u64;
        self.discard(came_late).await;
        count
    }

    /// Looks over what sessions have moved past or, where something may have been missed, everything held; answers how
    /// many chunks were freed.
    async fn pass(&self, passes: &mut Passes) -> Result<u64, String> {
        let began = Instant::now();
        let (marks, misses) = self.marks_and_misses().await?;
        let complete = passes
            .complete
            .is_none_or(|(began, missed_then)| missed_then != misses || began.elapsed() >= COMPLETE_INTERVAL);
        let mut freed = 0;
        if complete {
            freed += self.look_over(Stretch::ALL).await?;
            passes.progress.all_looked(marks);
            // What is missed meanwhile is counted beyond these.
            passes.complete = Some((began, misses));
        } else {
            for stretch in passes.progress.stretches(&marks) {
                freed += self.look_over(stretch).await?;
            }
            passes.progress.looked(marks);
        }
        Ok(freed)
    }

    async fn marks_and_misses(&self) -> Result<(Marks, Misses), String> {
        let effects_dropped = self.consensus.effects_sent_and_dropped().1;
        let left_here = self.missed.load(Ordering::Relaxed);
        let metadata = self.metadata.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let view = metadata.view()?;
            let misses = Misses {
                effects_dropped,
                snapshots_installed: view.named_change().generation,
                left_here,
            };
            let mark = |(session, record): (_, SessionRecord)| match record.ended {
                Some(_) => (session, ENDED),
                None => (session, record.chunk_low_water),
            };
            Ok::<_, Failure>((view.sessions()?.into_iter().map(mark).collect(), misses))
        });
        in_words(looked.await)
    }

    /// Frees what is dead of what is held of `stretch`; answers how many chunks.
    async fn look_over(&self, stretch: Stretch) -> Result<u64, String> {
        let mut after = stretch.after;
        let mut freed = 0;
        loop {
            // Listed before the barrier: whatever session put these, its opening is in the view that judges them.
            let mut page = self.content.ids_after(after, PAGE_CHUNKS);
            page.retain(|id| stretch.reaches(*id));
            let Some(last) = page.last() else { return Ok(freed) };
            after = Some(*last);
            self.repair.come_up_to_date().await?;
            let (metadata, began) = (self.metadata.clone(), Instant::now());
            let judged = tokio::task::spawn_blocking(move || {
                let view = metadata.view()?;
                let mut dead = Vec::new();
                for id in page {
                    if is_dead(&view, id)? {
                        dead.push(id);
                    }
                }
                Ok::<_, Failure>(dead)
            });
            let dead = in_words(judged.await)?;
            let pause = began.elapsed() * PAUSE_PER_PAGE;
            freed += dead.len() as u64;
            self.discard(dead).await;
            tokio::time::sleep(pause).await;
        }
    }
}

fn in_words<T>(looked: Result<Result<T, Failure>, tokio::task::JoinError>) -> Result<T, String> {
    match looked {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(fault)) => Err(fault.to_string()),
        Err(panic) => Err(panic.to_string()),
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
