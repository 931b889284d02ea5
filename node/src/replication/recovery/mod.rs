//! Recovery: what the metadata names and this node lacks is fetched from the others, and what it holds for nobody's need
//! is let go.
//!
//! Applies say which chunks are named ([`Recovery::applied`]), reads and the scrub which are bad
//! ([`Recovery::wanted`]); so what is missing is known without looking at all that is stored. Every 30 s a pass looks
//! at what is still missing. Only where something may have been missed (the node has just begun, a snapshot came, the
//! queue of effects was full, content was lost) or an administrator asks does a pass walk all that is named.
//!
//! Nothing is kept across restarts: what was fetched is held, and the walk at the start finds the rest.
//!
//! [`ledger`] keeps the books, `fetch` does the fetching, `surplus` lets go. What came inside commands and found the
//! disk full is missing too, but lies in the log, which is held up by it: `kept_by_log` relieves the log of it.

mod fetch;
mod kept_by_log;
mod lacking;
pub mod ledger;
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

use self::ledger::{Amount, Ledger, WalkReason, When};
use self::surplus::Surplus;
use super::names::NameFinder;
use crate::consensus::{AppliedEffects, Consensus};
use crate::pace::{Pacer, RateMeter};
use crate::replication::PeerChunks;
use crate::replication::placement::{Placement, PlacementSnapshot};
use quorumfs_tasks::Tasks;
use crate::wall_clock::unix_ms;
use quorumfs_content::ContentStore;
use quorumfs_metadata::{Failure, MetadataStore};

pub use self::offer::{OfferError, Offered};
pub use self::status::{PassKind, PassReport, RecoveryStatus, SyncReport};

/// A chunk named by an apply is mostly on its way from the leader; it is fetched only if it has not come by then.
const ARRIVAL_GRACE_MS: u64 = 1_500;
/// How often a pass looks at what is missing.
const PASS_INTERVAL_MS: u64 = 30_000;
/// Chunks compared under one view of the metadata and looked at in one go.
const PAGE_CHUNKS: usize = 4096;
/// How long a status waits for what was applied to be accounted for.
const CATCH_UP_MS_MAX: u64 = 5_000;

/// See the module.
pub struct Recovery {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    peers: Arc<PeerChunks>,
    placement: Arc<Placement>,
    // Locked for one entry or a page of them; never during I/O.
    ledger: Mutex<Ledger>,
    surplus: Surplus,
    pace: Mutex<Pacer>,
    rate: Mutex<RateMeter>,
    /// Nodes that did not answer, and when: they are asked last for a while.
    silent: Mutex<HashMap<NodeId, Instant>>,
    fetch_soon: Notify,
    pass_soon: Notify,
    walking: AtomicBool,
    fetching: AtomicU64,
    fetched_chunks: AtomicU64,
    fetched_bytes: AtomicU64,
    effects_handled: AtomicU64,
    /// The picture under which everything named was compared with everything held, by the last walk.
    compared_under: Mutex<Option<Arc<PlacementSnapshot>>>,
    last_pass: Mutex<Option<PassReport>>,
    last_complete_pass: Mutex<Option<PassReport>>,
    complete_passes: AtomicU64,
    names: NameFinder,
}

impl Recovery {
    /// Fetches at most `bytes_per_s`. Nothing is done before [`Recovery::start`].
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
            names: NameFinder::new(metadata.clone()),
            metadata,
            content,
            peers,
            placement,
            ledger: Mutex::new(Ledger::new()),
            surplus: Surplus::default(),
            pace: Mutex::new(Pacer::new(bytes_per_s)),
            rate: Mutex::default(),
            silent: Mutex::default(),
            fetch_soon: Notify::new(),
            pass_soon: Notify::new(),
            walking: AtomicBool::new(false),
            fetching: AtomicU64::new(0),
            fetched_chunks: AtomicU64::new(0),
            fetched_bytes: AtomicU64::new(0),
            effects_handled: AtomicU64::new(0),
            compared_under: Mutex::new(None),
            last_pass: Mutex::new(None),
            last_complete_pass: Mutex::new(None),
            complete_passes: AtomicU64::new(0),
        })
    }

    /// This chunk is not here: fetch it now, if it should be and a file names it. Blocks for a look at the metadata.
    pub fn wanted(&self, id: ChunkId) {
        if !self.placement.should_hold(id) {
            return;
        }
        match self.length_if_named(id) {
            Ok(Some(length)) => {
                self.ledger.lock().add(id, length, When::First);
                self.fetch_soon.notify_one();
            }
            Ok(None) => {}
            Err(fault) => {
                warn!(chunk = %id, %fault, "cannot look up a missing chunk");
                self.compare_soon(WalkReason::ContentLost);
            }
        }
    }

    /// Something was applied: what of it has not arrived a little later is fetched, what is dead no longer.
    pub fn applied(&self, effects: &AppliedEffects) {
        match effects {
            AppliedEffects::Entries { named, dead, .. } => {
                let due = Instant::now() + Duration::from_millis(ARRIVAL_GRACE_MS);
                let picture = self.placement.picture();
                for id in named {
                    let wanted = picture.should_hold(*id, self.consensus.id());
                    match (self.content.contains(*id), wanted) {
                        (true, true) | (false, false) => continue,
                        (true, false) => {
                            self.surplus.add(*id);
                            continue;
                        }
                        (false, true) => {}
                    }
                    match self.length_if_named(*id) {
                        Ok(Some(length)) => self.ledger.lock().add(*id, length, When::At(due)),
                        Ok(None) => {}
                        Err(fault) => {
                            warn!(chunk = %id, %fault, "cannot look up a missing chunk");
                            self.compare_soon(WalkReason::EffectsDropped);
                        }
                    }
                    self.fetch_soon.notify_one();
                }
                let mut ledger = self.ledger.lock();
                if ledger.missing() != Amount::default() {
                    dead.iter().for_each(|id| ledger.settled(*id));
                }
            }
            AppliedEffects::Installed { .. } => self.compare_soon(WalkReason::SnapshotInstalled),
        }
        self.effects_handled.fetch_add(1, Ordering::Release);
    }

    /// A copy of `id` was pushed here. Where it stands in for another's and comes after the apply that names it, that
    /// apply found nothing here to let go.
    pub async fn arrived(self: &Arc<Self>, id: ChunkId) {
        if self.placement.should_hold(id) {
            return;
        }
        let recovery = Arc::clone(self);
        let looked = tokio::task::spawn_blocking(move || recovery.length_if_named(id));
        match looked.await {
            Ok(Ok(Some(_))) => self.surplus.add(id),
            // Its apply is yet to come and finds it here.
            Ok(Ok(None)) => {}
            Ok(Err(fault)) => {
                warn!(chunk = %id, %fault, "cannot look up a chunk that was pushed here");
                self.compare_soon(WalkReason::EffectsDropped);
            }
            Err(panic) => {
                warn!(chunk = %id, %panic, "cannot look up a chunk that was pushed here");
                self.compare_soon(WalkReason::EffectsDropped);
            }
        }
    }

    /// Walk all that is named, now.
    pub fn compare_soon(&self, reason: WalkReason) {
        self.ledger.lock().want_walk(reason);
        self.pass_soon.notify_one();
    }

    /// An administrator asks for a pass over everything.
    pub fn sync(&self) -> SyncReport {
        let mut ledger = self.ledger.lock();
        let already_running = self.walking.load(Ordering::Acquire) || ledger.walk_wanted().is_some();
        if !already_running {
            ledger.want_walk(WalkReason::Requested);
            self.pass_soon.notify_one();
        }
        // Whatever waits for another attempt gets it now.
        ledger.hurry();
        drop(ledger);
        self.fetch_soon.notify_one();
        SyncReport {
            started: !already_running,
            already_running,
            began: PassKind::Complete,
            asked_unix_ms: unix_ms(),
        }
    }

    /// Chunks that no node could give although all answered.
    pub fn lost(&self) -> BTreeSet<ChunkId> {
        self.ledger.lock().lost().clone()
    }

    /// Fetches and compares, for ever.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("recovery-passes", self.clone(), Self::run_passes);
        tasks.supervise("recovery-surplus", self.clone(), Self::run_letting_go);
        tasks.supervise("recovery-log", self.clone(), Self::run_relieving_the_log);
        tasks.supervise("recovery-placement", self.clone(), Self::follow_placement);
        tasks.supervise("recovery-fetches", self.clone(), fetch::run);
    }

    /// Where other chunks should be here than before, all that is named is looked at.
    async fn follow_placement(self: Arc<Self>) {
        let mut changes = self.placement.changes();
        while changes.changed().await.is_ok() {
            changes.mark_unchanged();
            let mut ledger = self.ledger.lock();
            ledger.want_walk(WalkReason::PlacementChanged);
            // What is not wanted any more shows when its turn comes.
            ledger.hurry();
            drop(ledger);
            self.pass_soon.notify_one();
            self.fetch_soon.notify_one();
        }
    }

    async fn run_passes(self: Arc<Self>) {
        loop {
            let recovery = self.clone();
            match tokio::task::spawn_blocking(move || recovery.pass()).await {
                Ok(Ok(())) => {}
                Ok(Err(fault)) => warn!(%fault, "content could not be compared with metadata"),
                Err(panic) => warn!(%panic, "content could not be compared with metadata"),
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(PASS_INTERVAL_MS)) => {}
                () = self.pass_soon.notified() => {}
            }
        }
    }

    /// Looks at what is missing or, where something may have been missed, at all that is named. Blocking.
    fn pass(&self) -> Result<(), Failure> {
        let (began, began_unix_ms) = (Instant::now(), unix_ms());
        if let Err(error) = self.content.check_files() {
            warn!(%error, "content was taken away");
        }
        let dropped = self.consensus.effects_sent_and_dropped().1;
        let reason = {
            let mut ledger = self.ledger.lock();
            ledger.effects_dropped(dropped);
            let reason = ledger.walk_begins();
            self.walking.store(reason.is_some(), Ordering::Release);
            reason
        };
        let result = match reason {
            Some(_) => self.walk(),
            None => Ok(self.settle_arrived(usize::MAX)),
        };
        if let (Some(reason), Err(_)) = (reason, &result) {
            self.ledger.lock().want_walk(reason);
        }
        self.walking.store(false, Ordering::Release);
        let looked_at = result?;
        let missing = self.ledger.lock().missing();
        if let (Some(reason), true) = (reason, missing.chunks > 0) {
            let Amount { chunks, bytes } = missing;
            info!(
                ?reason,
                named = looked_at,
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
            chunks_looked_at: looked_at,
            chunks_missing: missing.chunks,
        };
        if report.kind == PassKind::Complete {
            *self.last_complete_pass.lock() = Some(report.clone());
            self.complete_passes.fetch_add(1, Ordering::Release);
        }
        *self.last_pass.lock() = Some(report);
        self.fetch_soon.notify_one();
        Ok(())
    }

    /// Compares everything named with everything held; answers how many are named.
    fn walk(&self) -> Result<u64, Failure> {
        // Before the view: what is named after it is judged by this picture or a later one.
        let began_under = self.placement.picture();
        let mut one_picture = true;
        let view = self.metadata.view()?;
        let own = self.consensus.id();
        let mut named = Amount::default();
        let mut after = None;
        loop {
            let picture = self.placement.picture();
            one_picture &= Arc::ptr_eq(&picture, &began_under);
            let page = view.chunks_after(after, PAGE_CHUNKS)?;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            for (id, record) in &page {
                named.add(record.length);
                match (self.content.contains(*id), picture.should_hold(*id, own)) {
                    (false, true) => self.ledger.lock().walk_found(*id, record.length),
                    (true, false) => self.surplus.add(*id),
                    (true, true) | (false, false) => {}
                }
            }
            self.fetch_soon.notify_one();
        }
        self.ledger.lock().walk_ends(named, view.named_change());
        *self.compared_under.lock() = one_picture.then_some(began_under);
        Ok(named.chunks)
    }

    /// Takes what has arrived by itself off the list; looks at the first `max` that are left alone a little longer.
    fn settle_arrived(&self, max: usize) -> u64 {
        let delayed = self.ledger.lock().delayed(max);
        for id in delayed.iter().filter(|id| self.content.contains(**id)) {
            self.ledger.lock().settled(*id);
        }
        delayed.len() as u64
    }

    fn length_if_named(&self, id: ChunkId) -> Result<Option<u32>, Failure> {
        let record = self.metadata.view()?.chunk(id)?;
        Ok(record.map(|record| record.length))
    }
}
