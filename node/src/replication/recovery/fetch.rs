//! Fetching of missing chunks, several concurrently, bounded in number, bytes and bytes per second.
//!
//! A fetched chunk is verified against the length and SHA-256 of the metadata before it is stored. The order of the
//! nodes rotates; nodes that did not answer recently are asked last.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use quorumfs_proto::{ChunkId, Member};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::Recovery;
use crate::replication::FetchError;
use quorumfs_content::ContentError;

/// Most concurrent fetches; small chunks share a flush.
const FETCHES_MAX: usize = 32;
/// Most bytes of concurrent fetches.
const FETCH_BYTES_MAX: usize = 16 << 20;
/// Bytes of one permit; a number of permits has 32 bits.
const PERMIT_BYTES: usize = 1 << 10;
/// Interval at which chunks in transit are checked.
const ARRIVAL_TICK_MS: u64 = 100;
/// Most chunks checked each time.
const ARRIVALS_CHECKED_MAX: usize = 1024;
/// Delay after a fetch for which no node answered.
const FAILURE_PAUSE_MS: u64 = 500;
/// Time for which a node that did not answer is asked last.
const UNRESPONSIVE_MS: u64 = 5_000;

/// The outcome of a fetch.
enum FetchOutcome {
    /// The chunk is on disk.
    Stored,
    /// No file refers to the chunk any more, or it is assigned to other nodes.
    NotNeeded,
    /// All nodes answered, and none has a good copy.
    Lost,
    /// Some nodes did not answer.
    Undetermined,
    /// No node answered, or this node cannot store the chunk now.
    Failed,
}

/// Fetches missing chunks; never returns.
pub(super) async fn run(recovery: Arc<Recovery>) {
    let slots = Arc::new(Semaphore::new(FETCHES_MAX));
    let bytes = Arc::new(Semaphore::new(FETCH_BYTES_MAX / PERMIT_BYTES));
    loop {
        let next = recovery.ledger.lock().next(Instant::now());
        let (id, length) = match next {
            Ok(next) => next,
            Err(due) => {
                wait(&recovery, due).await;
                continue;
            }
        };
        let pause = recovery.pace.lock().take(Instant::now(), u64::from(length));
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let permits = (length as usize).div_ceil(PERMIT_BYTES).max(1);
        // Neither semaphore is ever closed.
        let (Ok(slot), Ok(byte_permits)) = (
            slots.clone().acquire_owned().await,
            bytes
                .clone()
                .acquire_many_owned(u32::try_from(permits).unwrap_or(u32::MAX))
                .await,
        ) else {
            return;
        };
        let recovery = recovery.clone();
        recovery.fetches_in_flight.fetch_add(1, Ordering::AcqRel);
        tokio::spawn(async move {
            let outcome = recovery.fetch(id, length).await;
            recovery.finish(id, &outcome);
            recovery.fetches_in_flight.fetch_sub(1, Ordering::AcqRel);
            if matches!(outcome, FetchOutcome::Failed) {
                // The slot is kept, so that unreachable nodes are not called by all fetches at once.
                tokio::time::sleep(Duration::from_millis(FAILURE_PAUSE_MS)).await;
            }
            drop((slot, byte_permits));
        });
    }
}

/// Waits until a chunk is due or may have arrived.
async fn wait(recovery: &Recovery, due: Option<Instant>) {
    let Some(due) = due else {
        recovery.fetch_wakeup.notified().await;
        return;
    };
    let tick = Duration::from_millis(ARRIVAL_TICK_MS);
    let until = due.saturating_duration_since(Instant::now()).min(tick);
    tokio::select! {
        () = recovery.fetch_wakeup.notified() => {}
        () = tokio::time::sleep(until) => {}
    }
    recovery.remove_arrived(ARRIVALS_CHECKED_MAX);
}

impl Recovery {
    fn finish(&self, id: ChunkId, outcome: &FetchOutcome) {
        let mut ledger = self.ledger.lock();
        match outcome {
            FetchOutcome::Stored | FetchOutcome::NotNeeded => ledger.remove(id),
            FetchOutcome::Lost => ledger.postpone(id, Instant::now(), true),
            FetchOutcome::Undetermined | FetchOutcome::Failed => ledger.postpone(id, Instant::now(), false),
        }
        if ledger.walk_requested().is_some() {
            self.pass_wakeup.notify_one();
        }
    }

    /// Fetches one chunk if it is still named and missing.
    async fn fetch(&self, id: ChunkId, length: u32) -> FetchOutcome {
        if self.content.contains(id) {
            return FetchOutcome::Stored;
        }
        if !self.placement.should_hold(id) {
            return FetchOutcome::NotNeeded;
        }
        let record = match self
            .metadata
            .view()
            .map_err(Into::into)
            .and_then(|view| view.chunk(id))
        {
            Ok(Some(record)) => record,
            Ok(None) => return FetchOutcome::NotNeeded,
            Err(fault) => {
                warn!(chunk = %id, %fault, "cannot look up a missing chunk in the metadata");
                return FetchOutcome::Failed;
            }
        };
        debug_assert_eq!(record.length, length, "a chunk never changes");
        let mut reasons = Vec::new();
        let (mut answers, mut unresponsive) = (0, 0);
        for member in self.fetch_order(id) {
            match self
                .peers
                .fetch_whole(&member, id, record.length, record.sha256)
                .await
            {
                Ok(chunk) => return self.store(chunk).await,
                Err(error) => {
                    match &error {
                        FetchError::NotFound { .. } | FetchError::Corrupt { .. } => answers += 1,
                        FetchError::Refused { .. } => unresponsive += 1,
                        FetchError::Unreachable { .. } => {
                            unresponsive += 1;
                            self.unresponsive.lock().insert(member.id, Instant::now());
                        }
                    }
                    reasons.push(format!("node {}: {error}", member.id.slot));
                }
            }
        }
        debug!(chunk = %id, reasons = reasons.join("; "), "no node could provide a missing chunk");
        match (answers, unresponsive) {
            (0, _) => FetchOutcome::Failed,
            (_, 0) => FetchOutcome::Lost,
            _ => FetchOutcome::Undetermined,
        }
    }

    async fn store(&self, chunk: quorumfs_proto::Chunk) -> FetchOutcome {
        let (id, bytes) = (chunk.id(), chunk.payload().len() as u64);
        match self.content.put(chunk).await {
            Ok(()) => {
                self.fetched_chunks.fetch_add(1, Ordering::Relaxed);
                self.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
                self.rate.lock().add(Instant::now(), bytes);
                FetchOutcome::Stored
            }
            Err(ContentError::NoSpace) => {
                // A damaged copy that was set aside may take the space.
                let content = self.content.clone();
                if let Ok(Err(error)) = tokio::task::spawn_blocking(move || content.forget_aside(&[id])).await
                {
                    warn!(chunk = %id, %error, "cannot free the space of a damaged copy");
                }
                FetchOutcome::Failed
            }
            Err(error) => {
                warn!(chunk = %id, %error, "cannot store a fetched chunk");
                FetchOutcome::Failed
            }
        }
    }

    /// Returns the other members in the order in which to fetch `id` from them.
    fn fetch_order(&self, id: ChunkId) -> Vec<Member> {
        let mut others = self.placement.fetch_order(id);
        let mut unresponsive = self.unresponsive.lock();
        unresponsive.retain(|_, since| since.elapsed() < Duration::from_millis(UNRESPONSIVE_MS));
        others.sort_by_key(|member| unresponsive.contains_key(&member.id));
        others
    }
}
