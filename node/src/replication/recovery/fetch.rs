//! Fetching: one missing chunk after another, several at a time, bounded in number, bytes and bytes per second.
//!
//! What comes is checked against the length and SHA-256 that the metadata names before it is stored. Which node is
//! asked first goes round; one that did not answer lately is asked last.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use quorumfs_proto::{ChunkId, Member};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::Recovery;
use crate::replication::FetchError;
use quorumfs_content::ContentError;

/// Chunks fetched at once: small ones wait for each other's flush.
const FETCHES_MAX: usize = 32;
/// Bytes of chunks fetched at once.
const FETCH_BYTES_MAX: usize = 16 << 20;
/// Semaphores count permits in 32 bits and less; admission counts in these.
const PERMIT_BYTES: usize = 1 << 10;
/// How often it is seen whether what was on its way has come by itself.
const ARRIVAL_TICK_MS: u64 = 100;
/// How many are looked at then.
const ARRIVALS_LOOKED_AT_MAX: usize = 1024;
/// After a fetch for which no node answered at all.
const SILENCE_PAUSE_MS: u64 = 500;
/// For how long a node that did not answer is asked last.
const SILENT_MS: u64 = 5_000;

/// How a fetch ended.
enum Fetched {
    /// It is here.
    Here,
    /// No file names it any more, or it is for other nodes to hold.
    NotWanted,
    /// All nodes answered, and none has a good copy.
    Nowhere,
    /// Some answered.
    Unknown,
    /// None answered, or this node cannot store it now.
    NotNow,
}

/// Fetches for ever.
pub(super) async fn run(recovery: Arc<Recovery>) {
    let places = Arc::new(Semaphore::new(FETCHES_MAX));
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
        let (Ok(place), Ok(room)) = (
            places.clone().acquire_owned().await,
            bytes
                .clone()
                .acquire_many_owned(u32::try_from(permits).unwrap_or(u32::MAX))
                .await,
        ) else {
            return;
        };
        let recovery = recovery.clone();
        recovery.fetching.fetch_add(1, Ordering::AcqRel);
        tokio::spawn(async move {
            let fetched = recovery.fetch(id, length).await;
            recovery.settle(id, &fetched);
            recovery.fetching.fetch_sub(1, Ordering::AcqRel);
            if matches!(fetched, Fetched::NotNow) {
                // Its place is kept meanwhile, so that the others do not all ask into the silence at once.
                tokio::time::sleep(Duration::from_millis(SILENCE_PAUSE_MS)).await;
            }
            drop((place, room));
        });
    }
}

/// Until something is due or may have arrived.
async fn wait(recovery: &Recovery, due: Option<Instant>) {
    let Some(due) = due else {
        recovery.fetch_soon.notified().await;
        return;
    };
    let tick = Duration::from_millis(ARRIVAL_TICK_MS);
    let until = due.saturating_duration_since(Instant::now()).min(tick);
    tokio::select! {
        () = recovery.fetch_soon.notified() => {}
        () = tokio::time::sleep(until) => {}
    }
    recovery.settle_arrived(ARRIVALS_LOOKED_AT_MAX);
}

impl Recovery {
    fn settle(&self, id: ChunkId, fetched: &Fetched) {
        let mut ledger = self.ledger.lock();
        match fetched {
            Fetched::Here | Fetched::NotWanted => ledger.settled(id),
            Fetched::Nowhere => ledger.postpone(id, Instant::now(), true),
            Fetched::Unknown | Fetched::NotNow => ledger.postpone(id, Instant::now(), false),
        }
        if ledger.walk_wanted().is_some() {
            self.pass_soon.notify_one();
        }
    }

    /// Fetches one chunk if it is still named and missing.
    async fn fetch(&self, id: ChunkId, length: u32) -> Fetched {
        if self.content.contains(id) {
            return Fetched::Here;
        }
        if !self.placement.should_hold(id) {
            return Fetched::NotWanted;
        }
        let record = match self
            .metadata
            .view()
            .map_err(Into::into)
            .and_then(|view| view.chunk(id))
        {
            Ok(Some(record)) => record,
            Ok(None) => return Fetched::NotWanted,
            Err(fault) => {
                warn!(chunk = %id, %fault, "cannot look up a missing chunk");
                return Fetched::NotNow;
            }
        };
        debug_assert_eq!(record.length, length, "a chunk never changes");
        let mut reasons = Vec::new();
        let (mut answers, mut silent) = (0, 0);
        for member in self.sources(id) {
            match self
                .peers
                .fetch_whole(&member, id, record.length, record.sha256)
                .await
            {
                Ok(chunk) => return self.store(chunk).await,
                Err(error) => {
                    match &error {
                        FetchError::NotFound { .. } | FetchError::Corrupt { .. } => answers += 1,
                        FetchError::Refused { .. } => silent += 1,
                        FetchError::Unreachable { .. } => {
                            silent += 1;
                            self.silent.lock().insert(member.id, Instant::now());
                        }
                    }
                    reasons.push(format!("node {}: {error}", member.id.slot));
                }
            }
        }
        debug!(chunk = %id, reasons = reasons.join("; "), "no node could give a missing chunk");
        match (answers, silent) {
            (0, _) => Fetched::NotNow,
            (_, 0) => Fetched::Nowhere,
            _ => Fetched::Unknown,
        }
    }

    async fn store(&self, chunk: quorumfs_proto::Chunk) -> Fetched {
        let (id, bytes) = (chunk.id(), chunk.payload().len() as u64);
        match self.content.put(chunk).await {
            Ok(()) => {
                self.fetched_chunks.fetch_add(1, Ordering::Relaxed);
                self.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
                self.rate.lock().add(Instant::now(), bytes);
                Fetched::Here
            }
            Err(ContentError::NoSpace) => {
                // A bad copy that was kept aside may be what takes the room.
                let content = self.content.clone();
                if let Ok(Err(error)) = tokio::task::spawn_blocking(move || content.forget_aside(&[id])).await
                {
                    warn!(chunk = %id, %error, "the room of a bad copy is not given back");
                }
                Fetched::NotNow
            }
            Err(error) => {
                warn!(chunk = %id, %error, "a fetched chunk cannot be stored");
                Fetched::NotNow
            }
        }
    }

    /// The other members in the order in which to ask them for `id`.
    fn sources(&self, id: ChunkId) -> Vec<Member> {
        let mut others = self.placement.sources(id);
        let mut silent = self.silent.lock();
        silent.retain(|_, since| since.elapsed() < Duration::from_millis(SILENT_MS));
        others.sort_by_key(|member| silent.contains_key(&member.id));
        others
    }
}
