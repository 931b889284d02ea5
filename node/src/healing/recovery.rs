//! Recovery: what the metadata names and this node lacks is fetched from the others.
//!
//! Chunks are asked for one by one ([`Recovery::wanted`]: an apply named one that has not arrived, a read found one
//! missing or bad), and a full pass compares everything held with everything named. Both feed one bounded queue;
//! what does not fit waits for the next pass.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::ChunkId;
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::consensus::Consensus;
use crate::content::{ContentError, ContentStore, PeerChunks};
use crate::metadata::{ChunkRecord, Failure, MetadataStore};

/// A chunk named by an apply is mostly on its way from the leader; it is fetched only if it has not come by then.
const ARRIVAL_GRACE_MS: u64 = 1_500;
/// How often everything held is compared with everything named.
const FULL_PASS_INTERVAL_MS: u64 = 30_000;
/// Chunks that wait to be fetched; a full pass finds the rest again.
const QUEUE_CHUNKS_MAX: usize = 256 << 10;
/// Chunks fetched at once: 4 MiB under way.
const FETCHES_MAX: usize = 4;
/// Chunks compared between two looks at the time, so that a pass never holds a thread for long.
const PAGE_CHUNKS: usize = 4096;
/// After a fetch that failed everywhere.
const RETRY_INTERVAL_MS: u64 = 2_000;

/// See the module.
pub struct Recovery {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    peers: Arc<PeerChunks>,
    queue: Mutex<Queue>,
    added: Notify,
    pass_wanted: Notify,
    running: AtomicBool,
    named_chunks: AtomicU64,
    missing_chunks: AtomicU64,
    missing_bytes: AtomicU64,
    fetched_chunks: AtomicU64,
}

#[derive(Default)]
struct Queue {
    members: BTreeSet<ChunkId>,
    /// Each with the time before which it is left alone.
    waiting: VecDeque<(Instant, ChunkId)>,
}

/// How far the healing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub struct RecoveryStatus {
    /// Whether chunks are being fetched or compared now.
    pub running: bool,
    /// Chunks the metadata named at the last full pass.
    pub named_chunks: u64,
    /// Chunks on this node's disk now.
    pub held_chunks: u64,
    /// Bytes of them.
    pub held_bytes: u64,
    /// Chunks named but not held: those of the last full pass and those found since, less those fetched.
    pub missing_chunks: u64,
    /// Bytes of those of the last full pass.
    pub missing_bytes: u64,
    /// Chunks fetched since the node started.
    pub fetched_chunks: u64,
}

impl Recovery {
    /// Nothing is done before [`Recovery::run`].
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
        peers: Arc<PeerChunks>,
    ) -> Arc<Recovery> {
        Arc::new(Recovery {
            consensus,
            metadata,
            content,
            peers,
            queue: Mutex::default(),
            added: Notify::new(),
            pass_wanted: Notify::new(),
            running: AtomicBool::new(false),
            named_chunks: AtomicU64::new(0),
            missing_chunks: AtomicU64::new(0),
            missing_bytes: AtomicU64::new(0),
            fetched_chunks: AtomicU64::new(0),
        })
    }

    /// This chunk should be here and is not: fetch it now.
    pub fn wanted(&self, id: ChunkId) {
        self.enqueue(id, Instant::now());
    }

    /// These chunks were named by a command: fetch what has not arrived a little later.
    pub fn named(&self, ids: &[ChunkId]) {
        let due = Instant::now() + Duration::from_millis(ARRIVAL_GRACE_MS);
        for id in ids.iter().filter(|id| !self.content.holds(**id)) {
            self.enqueue(*id, due);
        }
    }

    /// The metadata was replaced as a whole: make a full pass now.
    pub fn compare_soon(&self) {
        self.pass_wanted.notify_one();
    }

    fn enqueue(&self, id: ChunkId, due: Instant) {
        let mut queue = self.queue.lock();
        if queue.members.len() < QUEUE_CHUNKS_MAX && queue.members.insert(id) {
            if due <= Instant::now() {
                queue.waiting.push_front((due, id));
            } else {
                queue.waiting.push_back((due, id));
            }
            self.added.notify_one();
        }
    }

    /// How far it is.
    pub fn status(&self) -> RecoveryStatus {
        let (held_chunks, held_bytes) = self.content.counts();
        let queued = self
            .queue
            .lock()
            .members
            .iter()
            .filter(|id| !self.content.holds(**id))
            .count() as u64;
        RecoveryStatus {
            running: self.running.load(Ordering::Relaxed),
            named_chunks: self.named_chunks.load(Ordering::Relaxed),
            held_chunks,
            held_bytes,
            missing_chunks: self.missing_chunks.load(Ordering::Relaxed).max(queued),
            missing_bytes: self.missing_bytes.load(Ordering::Relaxed),
            fetched_chunks: self.fetched_chunks.load(Ordering::Relaxed),
        }
    }

    /// Compares everything named with everything held, now, and asks for what is missing. Answers the numbers of
    /// chunks named and missing. Blocking; reads the whole `chunks` table in pages.
    pub fn compare(&self) -> Result<(u64, u64), Failure> {
        let view = self.metadata.view()?;
        let (mut named, mut missing, mut bytes) = (0, 0, 0);
        let mut after = None;
        loop {
            let page = view.chunks_after(after, PAGE_CHUNKS)?;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            for (id, record) in &page {
                named += 1;
                if !self.content.holds(*id) {
                    missing += 1;
                    bytes += u64::from(record.length);
                    self.enqueue(*id, Instant::now() + Duration::from_millis(ARRIVAL_GRACE_MS));
                }
            }
        }
        self.named_chunks.store(named, Ordering::Relaxed);
        self.missing_chunks.store(missing, Ordering::Relaxed);
        self.missing_bytes.store(bytes, Ordering::Relaxed);
        Ok((named, missing))
    }

    /// Fetches and compares, for ever.
    pub async fn run(self: Arc<Self>) {
        tokio::spawn(self.clone().run_passes());
        let places = Arc::new(tokio::sync::Semaphore::new(FETCHES_MAX));
        loop {
            let Some(id) = self.next().await else { continue };
            // The semaphore is never closed.
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let recovery = self.clone();
            tokio::spawn(async move {
                recovery.running.store(true, Ordering::Relaxed);
                let retry = recovery.recover(id).await;
                let idle = {
                    let mut queue = recovery.queue.lock();
                    queue.members.remove(&id);
                    queue.members.is_empty()
                };
                if retry {
                    recovery.enqueue(id, Instant::now() + Duration::from_millis(RETRY_INTERVAL_MS));
                } else if idle {
                    recovery.running.store(false, Ordering::Relaxed);
                }
                drop(place);
            });
        }
    }

    async fn run_passes(self: Arc<Self>) {
        loop {
            let recovery = self.clone();
            match tokio::task::spawn_blocking(move || recovery.compare()).await {
                Ok(Ok((_, 0))) => {}
                Ok(Ok((named, missing))) => {
                    info!(named, missing, "content is missing on this node; fetching it")
                }
                Ok(Err(fault)) => warn!(%fault, "content could not be compared with metadata"),
                Err(panic) => warn!(%panic, "content could not be compared with metadata"),
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(FULL_PASS_INTERVAL_MS)) => {}
                () = self.pass_wanted.notified() => {}
            }
        }
    }

    /// The next chunk that is due; `None` if none became due in a while.
    async fn next(&self) -> Option<ChunkId> {
        let wait = {
            let mut queue = self.queue.lock();
            match queue.waiting.front() {
                Some((due, _)) if *due <= Instant::now() => {
                    return queue.waiting.pop_front().map(|(_, id)| id);
                }
                Some((due, _)) => due.saturating_duration_since(Instant::now()),
                None => Duration::from_secs(3600),
            }
        };
        tokio::select! {
            () = self.added.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
        None
    }

    /// Fetches one chunk if it is still named and missing. Answers whether to try again.
    async fn recover(&self, id: ChunkId) -> bool {
        if self.content.holds(id) {
            self.no_longer_missing();
            return false;
        }
        let record = match self.record(id) {
            Ok(Some(record)) => record,
            // Dead since.
            Ok(None) => return false,
            Err(fault) => {
                warn!(chunk = %id, %fault, "cannot look up a missing chunk");
                return true;
            }
        };
        let own = self.consensus.id();
        let mut reasons = Vec::new();
        for member in self
            .consensus
            .members()
            .into_iter()
            .filter(|member| member.id != own)
        {
            match self
                .peers
                .fetch_whole(&member, id, record.length, record.sha256)
                .await
            {
                Ok(chunk) => match self.content.put(chunk).await {
                    Ok(()) => {
                        self.fetched_chunks.fetch_add(1, Ordering::Relaxed);
                        self.no_longer_missing();
                        return false;
                    }
                    Err(ContentError::NoSpace) => return true,
                    Err(error) => {
                        warn!(chunk = %id, %error, "a fetched chunk cannot be stored");
                        return true;
                    }
                },
                Err(error) => reasons.push(format!("node {}: {error}", member.id.slot)),
            }
        }
        tracing::debug!(chunk = %id, reasons = reasons.join("; "), "no node could give a missing chunk");
        true
    }

    fn record(&self, id: ChunkId) -> Result<Option<ChunkRecord>, Failure> {
        self.metadata.view()?.chunk(id)
    }

    fn no_longer_missing(&self) {
        let less = |count: u64| Some(count.saturating_sub(1));
        let _ = self
            .missing_chunks
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}
