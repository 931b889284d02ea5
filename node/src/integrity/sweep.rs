//! The sweeper: content that no file refers to is freed, never on the path of a commit.
//!
//! When an apply removes a chunk's last reference, the chunk is dead for ever, and [`Sweeper::dead`] is called. Other
//! dead chunks are found by passes. A chunk is dead if no file refers to it and its session has ended or has moved its
//! low-water mark past it. This is judged by a node that has seen everything acknowledged before it looked (otherwise a
//! session it has not heard of would seem dead). No clock decides, so a chunk that a slow writer has put and not yet
//! named stays, however slow the writer is.
//!
//! A pass only examines chunks that sessions have moved past since the last one ([`marks`]): chunks that a client put
//! and never named. All held chunks are examined if something may have been missed (the node has just started, a
//! snapshot was installed, the queue of effects or the one here was full, content could not be freed), and once an
//! hour, for copies that arrived after everything that could have freed them. Chunks are examined in pages, with
//! pauses, and never on a runtime thread.
//!
//! Segments of small records with few live ones are rewritten at a bounded rate: their dead records share pages with
//! live ones, so holes alone free little. All held records are moved, named or not.

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
use quorumfs_content::{ContentError, ContentStore, Rewritten};
use quorumfs_metadata::{Failure, MetadataStore, SessionRecord, View};
use quorumfs_tasks::Tasks;

/// Time for which dead chunks are collected, so that they are punched together.
const GATHER_MS: u64 = 1_000;
/// Most dead chunks in the queue; more are left for a pass.
const QUEUE_CHUNKS_MAX: usize = 1 << 20;
/// Chunks freed in one step: punching 1 MiB takes half a millisecond, and reads continue in between.
const BATCH_CHUNKS: usize = 256;
/// Interval at which sparse segments are looked for.
const REWRITE_INTERVAL_MS: u64 = 10_000;
/// Bytes of records moved in one step, during which dead content waits; a segment is moved as a whole.
const REWRITE_SLICE_BYTES: u64 = 8 << 20;
/// Bytes of records moved per second: a disk that is nearly full of small dead files is usable again within an hour.
const REWRITE_BYTES_PER_S: u64 = 16 << 20;
/// Chunks examined between two barriers.
const PAGE_CHUNKS: usize = 4096;
/// Pause after a page, as a multiple of the time it took: a pass uses at most a quarter of one thread.
const PAUSE_PER_PAGE: u32 = 3;
/// Interval at which everything is examined although nothing is known to have been missed.
const COMPLETE_INTERVAL: Duration = Duration::from_secs(3600);
/// Most dead chunks that are freed again after the next pass; beyond it a copy that arrived late waits for a complete
/// pass.
const FREED_REMEMBERED_MAX: usize = 64 << 10;

/// Why content was not deleted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeleteError {
    /// This node has no copy.
    #[error("the chunk is not held here")]
    NotHeld,
    /// Files refer to the chunk.
    #[error("files refer to this chunk, so its content is kept")]
    Referenced,
    /// The client that put the chunk is alive and may still name it.
    #[error("no file refers to this chunk yet, but the client that put it still may")]
    MayBeNamed,
    /// It cannot be decided, or the disk failed.
    #[error("{0}")]
    Unavailable(String),
}

/// The sweeper of a node; see the module documentation.
pub struct Sweeper {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    repair: Arc<Repair>,
    /// Time from the start to the first pass, and between passes.
    interval: Duration,
    queue: Mutex<Vec<ChunkId>>,
    added: Notify,
    freed: Mutex<Freed>,
    /// How often dead chunks were left to a complete pass.
    missed: AtomicU64,
}

/// Dead chunks that were freed; copies on their way here when the chunks died may have arrived since.
#[derive(Default)]
struct Freed {
    since_last_pass: Vec<ChunkId>,
    before_it: Vec<ChunkId>,
}

/// Counts of events that may leave dead content without a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Misses {
    effects_dropped: u64,
    snapshots_installed: u64,
    left_here: u64,
}

/// The progress of the passes.
#[derive(Default)]
struct Passes {
    progress: Progress,
    /// Start of the last complete pass, and the counts of misses at that time.
    complete: Option<(Instant, Misses)>,
}

impl Sweeper {
    /// Makes a sweeper; it does nothing before [`Sweeper::start`].
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

    /// Called when these chunks lost their last reference.
    pub fn dead(&self, ids: &[ChunkId]) {
        let mut queue = self.queue.lock();
        let room = QUEUE_CHUNKS_MAX - queue.len();
        if ids.len() > room {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
        queue.extend_from_slice(&ids[..ids.len().min(room)]);
        self.added.notify_one();
    }

    /// Starts the tasks that free dead content.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("sweep-passes", self.clone(), Self::run_passes);
        tasks.supervise("sweep-rewriting", self.clone(), Self::run_rewriting);
        tasks.supervise("sweep-discards", self.clone(), Self::run_discards);
    }

    /// Discards the chunks that applied commands left dead.
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

    /// Discards this node's copy of a chunk if the chunk is dead; returns the bytes of disk that were freed.
    ///
    /// # Errors
    /// [`DeleteError`].
    pub async fn delete(&self, id: ChunkId) -> Result<u64, DeleteError> {
        let unavailable = |reason: String| DeleteError::Unavailable(reason);
        // Checked before the barrier: the opening of the session that put the chunk is then in the view that judges it.
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
                    debug!(bytes, "dead content was freed");
                    continue;
                }
                Ok(Err(error)) => warn!(%error, "cannot free dead content; the next pass tries again"),
                Err(panic) => warn!(%panic, "cannot free dead content; the next pass tries again"),
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
                // Rewriting needs space for a moment, so a full disk must be emptied in another way.
                Ok(Err(ContentError::NoSpace)) => Rewritten::default(),
                Ok(Err(error)) => {
                    warn!(%error, "cannot rewrite sparse segments");
                    Rewritten::default()
                }
                Err(panic) => {
                    warn!(%panic, "cannot rewrite sparse segments");
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
                info!(
                    segments,
                    moved_bytes, freed_bytes, "sparse segments were rewritten"
                );
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
                    debug!(reason, "the sweep cannot run now; the next pass tries again");
                    came_late
                }
            };
            if freed > 0 {
                info!(chunks = freed, "chunks that no file refers to were freed");
            }
        }
    }

    /// Frees copies of dead chunks that arrived after these had been freed; returns their number.
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
        // The next complete pass finds chunks that a panic leaves.
        let came_late = held.await.unwrap_or_default();
        let count = came_late.len() as u64;
        self.discard(came_late).await;
        count
    }

    /// Examines the chunks that sessions have moved past or, if something may have been missed, everything held;
    /// returns the number of chunks freed.
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
            // Misses from now on are counted beyond these.
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

    /// Frees the dead chunks among the held ones in `stretch`; returns their number.
    async fn look_over(&self, stretch: Stretch) -> Result<u64, String> {
        let mut after = stretch.after;
        let mut freed = 0;
        loop {
            // Listed before the barrier: the openings of the sessions that put these chunks are then in the view that
            // judges them.
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
