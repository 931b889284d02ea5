//! Recovery: fetches the chunks that files refer to and this node lacks, and deletes copies that other nodes should
//! hold.
//!
//! Missing chunks are known without a walk of the metadata: applied entries report newly referenced chunks
//! ([`Recovery::on_applied`]), reads and the scrub report bad copies ([`Recovery::request_fetch`]). A pass checks the
//! missing chunks every 30 s. A pass walks all referenced chunks only if something may have been missed (the node has
//! started, a snapshot was installed, the queue of effects was full, content was lost), or if an administrator
//! requests it.
//!
//! No state is kept across restarts: fetched chunks are held, and the walk at the start finds the others.
//!
//! [`ledger`] records the missing chunks, `fetch` fetches them, `surplus` deletes surplus copies. `log_release`
//! releases inline content that did not fit on the disk from the log.

mod fetch;
mod lacking;
pub mod ledger;
mod log_release;
mod offer;
mod status;
mod surplus;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::{ChunkId, NodeId};
use tokio::sync::Notify;
use tracing::{info, warn};

use self::ledger::{FetchTime, Ledger, Totals, WalkReason};
use self::surplus::Surplus;
use super::names::FileNameCache;
use crate::consensus::{AppliedEffects, Consensus};
use crate::pace::{Pacer, RateMeter};
use crate::replication::PeerChunks;
use crate::replication::placement::{Placement, PlacementSnapshot};
use crate::wall_clock::unix_ms;
use quorumfs_content::ContentStore;
use quorumfs_metadata::{Failure, MetadataStore};
use quorumfs_tasks::Tasks;

pub use self::offer::{OfferError, OfferOutcome};
pub use self::status::{PassKind, PassReport, RecoveryStatus, SyncReport};

/// Time before a newly referenced chunk is fetched, because it is usually in transit from the leader.
const ARRIVAL_GRACE_MS: u64 = 1_500;
/// Interval between passes.
const PASS_INTERVAL_MS: u64 = 30_000;
/// Chunks compared in one step.
const PAGE_CHUNKS: usize = 4096;
/// Time for which a status waits for applied effects to be processed.
const CATCH_UP_MS_MAX: u64 = 5_000;

/// The recovery of a node; see the module documentation.
pub struct Recovery {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    peers: Arc<PeerChunks>,
    placement: Arc<Placement>,
    // Locked only for one chunk or a page of chunks; never during I/O.
    ledger: Mutex<Ledger>,
    surplus: Surplus,
    pace: Mutex<Pacer>,
    rate: Mutex<RateMeter>,
    /// Nodes that did not answer, with the time; they are asked last for a while.
    unresponsive: Mutex<HashMap<NodeId, Instant>>,
    fetch_wakeup: Notify,
    pass_wakeup: Notify,
    walking: AtomicBool,
    fetches_in_flight: AtomicU64,
    fetched_chunks: AtomicU64,
    fetched_bytes: AtomicU64,
    effects_handled: AtomicU64,
    /// The placement of the last walk, if it did not change during the walk.
    compared_under: Mutex<Option<Arc<PlacementSnapshot>>>,
    last_pass: Mutex<Option<PassReport>>,
    last_complete_pass: Mutex<Option<PassReport>>,
    complete_passes: AtomicU64,
    names: FileNameCache,
}

impl Recovery {
    /// Creates a recovery that fetches at most `bytes_per_s`; it does nothing before [`Recovery::start`].
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
        peers: Arc<PeerChunks>,
        placement: Arc<Placement>,
        bytes_per_s: u64,
    ) -> Arc<Recovery> {
        Arc::new(Recovery {
            consensus,
            names: FileNameCache::new(metadata.clone()),
            metadata,
            content,
            peers,
            placement,
            ledger: Mutex::new(Ledger::new()),
            surplus: Surplus::default(),
            pace: Mutex::new(Pacer::new(bytes_per_s)),
            rate: Mutex::default(),
            unresponsive: Mutex::default(),
            fetch_wakeup: Notify::new(),
            pass_wakeup: Notify::new(),
            walking: AtomicBool::new(false),
            fetches_in_flight: AtomicU64::new(0),
            fetched_chunks: AtomicU64::new(0),
            fetched_bytes: AtomicU64::new(0),
            effects_handled: AtomicU64::new(0),
            compared_under: Mutex::new(None),
            last_pass: Mutex::new(None),
            last_complete_pass: Mutex::new(None),
            complete_passes: AtomicU64::new(0),
        })
    }

    /// Fetches `id` now if this node should hold it and a file refers to it. Reads the metadata, so it blocks.
    pub fn request_fetch(&self, id: ChunkId) {
        if !self.placement.should_hold(id) {
            return;
        }
        match self.length_if_named(id) {
            Ok(Some(length)) => {
                self.ledger.lock().add(id, length, FetchTime::Urgent);
                self.fetch_wakeup.notify_one();
            }
            Ok(None) => {}
            Err(fault) => {
                warn!(chunk = %id, %fault, "cannot look up a missing chunk in the metadata");
                self.request_comparison(WalkReason::ContentLost);
            }
        }
    }

    /// Processes applied entries: newly referenced chunks that do not arrive soon are fetched, dead ones no longer
    /// are.
    pub fn on_applied(&self, effects: &AppliedEffects) {
        match effects {
            AppliedEffects::Entries { named, dead, .. } => {
                let due = Instant::now() + Duration::from_millis(ARRIVAL_GRACE_MS);
                let snapshot = self.placement.snapshot();
                for id in named {
                    let wanted = snapshot.should_hold(*id, self.consensus.id());
                    match (self.content.contains(*id), wanted) {
                        (true, true) | (false, false) => continue,
                        (true, false) => {
                            self.surplus.add(*id);
                            continue;
                        }
                        (false, true) => {}
                    }
                    match self.length_if_named(*id) {
                        Ok(Some(length)) => self.ledger.lock().add(*id, length, FetchTime::NotBefore(due)),
                        Ok(None) => {}
                        Err(fault) => {
                            warn!(chunk = %id, %fault, "cannot look up a missing chunk in the metadata");
                            self.request_comparison(WalkReason::EffectsDropped);
                        }
                    }
                    self.fetch_wakeup.notify_one();
                }
                let mut ledger = self.ledger.lock();
                if ledger.missing() != Totals::default() {
                    dead.iter().for_each(|id| ledger.remove(*id));
                }
            }
            AppliedEffects::Installed { .. } => self.request_comparison(WalkReason::SnapshotInstalled),
        }
        self.effects_handled.fetch_add(1, Ordering::Release);
    }

    /// Called after a copy of `id` was pushed to this node. A copy that replaces another node's and arrives after the
    /// entry that refers to it is surplus, which [`Recovery::on_applied`] could not know.
    pub async fn on_pushed(self: &Arc<Self>, id: ChunkId) {
        if self.placement.should_hold(id) {
            return;
        }
        let recovery = Arc::clone(self);
        let length = tokio::task::spawn_blocking(move || recovery.length_if_named(id));
        match length.await {
            Ok(Ok(Some(_))) => self.surplus.add(id),
            // The entry that refers to it is not applied yet and will find it here.
            Ok(Ok(None)) => {}
            Ok(Err(fault)) => {
                warn!(chunk = %id, %fault, "cannot look up a pushed chunk in the metadata");
                self.request_comparison(WalkReason::EffectsDropped);
            }
            Err(panic) => {
                warn!(chunk = %id, %panic, "cannot look up a pushed chunk in the metadata");
                self.request_comparison(WalkReason::EffectsDropped);
            }
        }
    }

    /// Requests a complete pass.
    pub fn request_comparison(&self, reason: WalkReason) {
        self.ledger.lock().request_walk(reason);
        self.pass_wakeup.notify_one();
    }

    /// Requests a complete pass for an administrator, and retries all missing chunks.
    pub fn sync(&self) -> SyncReport {
        let mut ledger = self.ledger.lock();
        let already_running = self.walking.load(Ordering::Acquire) || ledger.walk_requested().is_some();
        if !already_running {
            ledger.request_walk(WalkReason::Requested);
            self.pass_wakeup.notify_one();
        }
        // Delayed chunks are retried now.
        ledger.retry_now();
        drop(ledger);
        self.fetch_wakeup.notify_one();
        SyncReport {
            started: !already_running,
            already_running,
            began: PassKind::Complete,
            asked_unix_ms: unix_ms(),
        }
    }

    /// Returns the chunks that no node has, although all answered.
    pub fn lost(&self) -> BTreeSet<ChunkId> {
        self.ledger.lock().lost().clone()
    }

    /// Starts the tasks of recovery.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("recovery-passes", self.clone(), Self::run_passes);
        tasks.supervise("recovery-surplus", self.clone(), Self::run_surplus_removal);
        tasks.supervise("recovery-log", self.clone(), Self::run_log_release);
        tasks.supervise("recovery-placement", self.clone(), Self::follow_placement);
        tasks.supervise("recovery-fetches", self.clone(), fetch::run);
    }

    /// Requests a complete pass after each change of the placement.
    async fn follow_placement(self: Arc<Self>) {
        let mut changes = self.placement.changes();
        while changes.changed().await.is_ok() {
            changes.mark_unchanged();
            let mut ledger = self.ledger.lock();
            ledger.request_walk(WalkReason::PlacementChanged);
            // Chunks that are no longer needed are dropped when their turn comes.
            ledger.retry_now();
            drop(ledger);
            self.pass_wakeup.notify_one();
            self.fetch_wakeup.notify_one();
        }
    }

    async fn run_passes(self: Arc<Self>) {
        loop {
            let recovery = self.clone();
            match tokio::task::spawn_blocking(move || recovery.pass()).await {
                Ok(Ok(())) => {}
                Ok(Err(fault)) => {
                    warn!(%fault, "cannot compare content with metadata; the next pass tries again")
                }
                Err(panic) => {
                    warn!(%panic, "cannot compare content with metadata; the next pass tries again")
                }
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(PASS_INTERVAL_MS)) => {}
                () = self.pass_wakeup.notified() => {}
            }
        }
    }

    /// Checks the missing chunks, or all referenced chunks if a walk is requested. Blocking.
    fn pass(&self) -> Result<(), Failure> {
        let (began, began_unix_ms) = (Instant::now(), unix_ms());
        if let Err(error) = self.content.check_files() {
            warn!(%error, "the check of the content files failed");
        }
        let dropped = self.consensus.effects_sent_and_dropped().1;
        let reason = {
            let mut ledger = self.ledger.lock();
            ledger.note_dropped_effects(dropped);
            let reason = ledger.begin_walk();
            self.walking.store(reason.is_some(), Ordering::Release);
            reason
        };
        let result = match reason {
            Some(_) => self.walk(),
            None => Ok(self.remove_arrived(usize::MAX)),
        };
        if let (Some(reason), Err(_)) = (reason, &result) {
            self.ledger.lock().request_walk(reason);
        }
        self.walking.store(false, Ordering::Release);
        let examined = result?;
        let missing = self.ledger.lock().missing();
        if let (Some(reason), true) = (reason, missing.chunks > 0) {
            let Totals { chunks, bytes } = missing;
            info!(
                %reason,
                named = examined,
                chunks,
                bytes,
                "content is missing on this node; fetching it"
            );
        }
        let report = PassReport {
            kind: match reason {
                Some(_) => PassKind::Complete,
                None => PassKind::Changes,
            },
            reason,
            began_unix_ms,
            duration_ms: began.elapsed().as_millis() as u64,
            chunks_looked_at: examined,
            chunks_missing: missing.chunks,
        };
        if report.kind == PassKind::Complete {
            *self.last_complete_pass.lock() = Some(report.clone());
            self.complete_passes.fetch_add(1, Ordering::Release);
        }
        *self.last_pass.lock() = Some(report);
        self.fetch_wakeup.notify_one();
        Ok(())
    }

    /// Compares all referenced chunks with the held ones; returns the number of referenced chunks.
    fn walk(&self) -> Result<u64, Failure> {
        // Read before the view: chunks referenced later are judged by this placement or a later one.
        let began_with = self.placement.snapshot();
        let mut is_unchanged = true;
        let view = self.metadata.view()?;
        let own = self.consensus.id();
        let mut named = Totals::default();
        let mut after = None;
        loop {
            let snapshot = self.placement.snapshot();
            is_unchanged &= Arc::ptr_eq(&snapshot, &began_with);
            let page = view.chunks_after(after, PAGE_CHUNKS)?;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            for (id, record) in &page {
                named.add(record.length);
                match (self.content.contains(*id), snapshot.should_hold(*id, own)) {
                    (false, true) => self.ledger.lock().add_from_walk(*id, record.length),
                    (true, false) => self.surplus.add(*id),
                    (true, true) | (false, false) => {}
                }
            }
            self.fetch_wakeup.notify_one();
        }
        self.ledger.lock().end_walk(named, view.named_change());
        *self.compared_under.lock() = is_unchanged.then_some(began_with);
        Ok(named.chunks)
    }

    /// Removes delayed chunks that have arrived, among the first `max`; returns the number examined.
    fn remove_arrived(&self, max: usize) -> u64 {
        let delayed = self.ledger.lock().delayed(max);
        for id in delayed.iter().filter(|id| self.content.contains(**id)) {
            self.ledger.lock().remove(*id);
        }
        delayed.len() as u64
    }

    fn length_if_named(&self, id: ChunkId) -> Result<Option<u32>, Failure> {
        let record = self.metadata.view()?.chunk(id)?;
        Ok(record.map(|record| record.length))
    }
}
