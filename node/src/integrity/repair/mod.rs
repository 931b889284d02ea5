//! Repair: bad copies are found, put aside, and made anew from healthy ones.
//!
//! Found by the scrub, which reads everything held again and again at a bounded rate and compares it with its CRCs and
//! its SHA-256 ([`Repair::start`]); by reads, whose blocks are checked ([`Repair::found_bad`]); by other nodes that
//! fetched a bad copy; and by who asks for a file to be verified ([`verify`]).
//!
//! A copy that is said to be bad is looked at once more. If it is, it is held no more from that moment, recovery
//! fetches another, and only when that is on disk does the bad one go. So every bad copy is counted once, whoever finds
//! it, and ends in exactly one of three ways: repaired, obsolete (no file names the chunk any more, or it is for others to hold), or still under
//! repair; the latter are unrepairable as long as every node has answered and none has a good copy.
//!
//! Knows nothing of HTTP or of who reads.

pub mod coverage;
mod metadata;
mod status;
pub mod verify;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::ChunkId;
use tokio::sync::Notify;
use tracing::{debug, error, info, warn};

use self::coverage::Coverage;
use crate::consensus::Consensus;
use crate::pace::Pacer;
use crate::replication::PeerChunks;
use crate::replication::names::NameFinder;
use crate::replication::placement::Placement;
use crate::replication::recovery::Recovery;
use crate::replication::recovery::ledger::WalkReason;
use crate::tasks::Tasks;
use crate::transport::Transport;
use crate::wall_clock::unix_ms;
use quorumfs_content::{ContentError, ContentStore, Quarantined};
use quorumfs_metadata::{ChunkRecord, MetadataStore};

pub use self::metadata::MetadataCheck;
pub use self::status::{LastError, RepairStatus};

/// Bad copies that are followed until they are made anew; more are repaired all the same, but found by recovery alone.
const UNDER_REPAIR_MAX: usize = 64 << 10;
/// Passes that end at a copy that cannot be read, before it is passed over until the next coverage.
const READ_ATTEMPTS_MAX: u32 = 3;
/// Chunks listed at a time.
const PAGE_CHUNKS: usize = 1024;
/// Bytes verified between two looks at the time.
const SLICE_BYTES: u64 = 4 << 20;
/// How often the cursor is written while the scrub runs: after a crash so much is read again at most.
const SAVE_INTERVAL_MS: u64 = 5_000;
/// How often it is seen whether a new copy has come.
const SETTLE_TICK_MS: u64 = 100;

/// How fast and how often.
#[derive(Clone, Debug)]
pub struct RepairOptions {
    /// At most so many bytes are verified per second.
    pub bytes_per_s: u64,
    /// From the beginning of one pass to that of the next, if it has ended.
    pub interval: Duration,
    /// Where the cursor is kept.
    pub cursor_file: PathBuf,
}

/// What repair works with.
pub struct RepairParts {
    /// Who is a member.
    pub consensus: Consensus,
    /// What should be there.
    pub metadata: Arc<MetadataStore>,
    /// What is.
    pub content: Arc<ContentStore>,
    /// What others have.
    pub peers: Arc<PeerChunks>,
    /// Who should have what.
    pub placement: Arc<Placement>,
    /// Fetches what was put aside.
    pub recovery: Arc<Recovery>,
    /// The way to the leader, to learn how far the log goes.
    pub transport: Arc<Transport>,
}

/// See the module.
pub struct Repair {
    parts: RepairParts,
    options: RepairOptions,
    // Locked to change a few numbers; never during I/O.
    state: Mutex<State>,
    scrubbing: AtomicBool,
    settle_soon: Notify,
    names: NameFinder,
    /// The last check of the metadata.
    metadata_check: Mutex<Option<MetadataCheck>>,
    /// Chunks whose copy here had the right SHA-256, whoever asked.
    verified_chunks: AtomicU64,
    verified_bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    coverage: Coverage,
    /// Bad copies that no new one has replaced yet, and why they are bad.
    under_repair: BTreeMap<ChunkId, String>,
    found_corrupt: u64,
    repaired: u64,
    obsolete: u64,
    last_error: Option<LastError>,
    /// The copy that could not be read, and how many passes ended at it.
    unreadable: Option<(ChunkId, u32)>,
}

/// What looking at the copy of a chunk on this node's disk showed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Looked {
    /// It is right, and so long.
    Healthy(u32),
    /// There is none.
    Missing,
    /// It is bad.
    Bad(String),
    /// It could not be read, which says nothing of it: too many files are open, or the store has stopped.
    Unknown(String),
}

impl Repair {
    /// Nothing is read before [`Repair::start`].
    pub fn new(parts: RepairParts, options: RepairOptions) -> Arc<Repair> {
        let state = State {
            coverage: Coverage::load(&options.cursor_file),
            ..State::default()
        };
        Arc::new(Repair {
            names: NameFinder::new(parts.metadata.clone()),
            parts,
            options,
            state: Mutex::new(state),
            scrubbing: AtomicBool::new(false),
            settle_soon: Notify::new(),
            metadata_check: Mutex::default(),
            verified_chunks: AtomicU64::new(0),
            verified_bytes: AtomicU64::new(0),
        })
    }

    /// Somebody found this node's copy of `id` to be bad. When it returns, it is not served any more, and another is
    /// being fetched.
    pub async fn found_bad(self: &Arc<Self>, id: ChunkId, reason: String) {
        let repair = Arc::clone(self);
        let handled = tokio::task::spawn_blocking(move || repair.found_bad_blocking(id, &reason)).await;
        if let Err(panic) = handled {
            warn!(chunk = %id, %panic, "a bad copy could not be put aside");
        }
    }

    fn found_bad_blocking(&self, id: ChunkId, reason: &str) {
        let named = self.named(id).map(|record| record.sha256);
        match self.parts.content.quarantine(id, named) {
            Ok(Quarantined::SetAside) => self.count_bad(id, reason),
            Ok(Quarantined::Healthy) => debug!(chunk = %id, reason, "a copy is good at second sight"),
            Ok(Quarantined::NotHeld) => {}
            Err(error) => warn!(chunk = %id, %error, "a bad copy could not be put aside"),
        }
    }

    /// Copies that were found to be bad while they were moved, and dropped. Blocking.
    pub fn dropped(&self, ids: &[ChunkId]) {
        for id in ids {
            self.count_bad(*id, "found while its segment was rewritten");
        }
    }

    fn count_bad(&self, id: ChunkId, reason: &str) {
        error!(chunk = %id, reason, "a copy failed its check; it is put aside and made anew");
        let fits = {
            let mut state = self.state.lock();
            state.found_corrupt += 1;
            state.last_error = Some(LastError {
                unix_ms: unix_ms(),
                message: format!("chunk {id}: {reason}"),
            });
            let fits = state.under_repair.len() < UNDER_REPAIR_MAX;
            if fits {
                state.under_repair.insert(id, reason.to_string());
            }
            fits
        };
        self.parts.recovery.wanted(id);
        if !fits {
            self.parts.recovery.compare_soon(WalkReason::ContentLost);
        }
        self.settle_soon.notify_one();
    }

    /// Scrubs and settles, for ever.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("repair-settling", self.clone(), Self::run_settling);
        tasks.supervise("scrub", self.clone(), Self::run_scrub);
        tasks.supervise("metadata-check", self.clone(), Self::run_metadata_checks);
    }

    async fn run_scrub(self: Arc<Self>) {
        loop {
            let began = Instant::now();
            self.scrubbing.store(true, Ordering::Release);
            let outcome = self.scrub().await;
            self.scrubbing.store(false, Ordering::Release);
            if let Err(reason) = outcome {
                warn!(reason, "the scrub stops; the next pass goes on");
            }
            tokio::time::sleep(self.options.interval.saturating_sub(began.elapsed())).await;
        }
    }

    /// Verifies what is held, from the cursor to the end of the coverage.
    async fn scrub(self: &Arc<Self>) -> Result<(), String> {
        let mut pacer = Pacer::new(self.options.bytes_per_s);
        let mut saved = Instant::now();
        {
            let mut state = self.state.lock();
            if state.coverage.began_unix_ms == 0 {
                state.coverage.began_unix_ms = unix_ms();
            }
        }
        loop {
            let after = self.state.lock().coverage.cursor;
            let mut page = self.parts.content.ids_after(after, PAGE_CHUNKS);
            if page.is_empty() {
                self.end_coverage();
                return Ok(());
            }
            while !page.is_empty() {
                let repair = Arc::clone(self);
                let slice = tokio::task::spawn_blocking(move || {
                    let bytes = repair.scrub_slice(&mut page)?;
                    Ok::<_, String>((page, bytes))
                });
                let (rest, bytes) = slice.await.map_err(|panic| panic.to_string())??;
                page = rest;
                // The bytes were read already; the time they may take is waited out afterwards.
                pacer.take(Instant::now(), bytes);
                tokio::time::sleep(pacer.take(Instant::now(), 0)).await;
                if saved.elapsed() >= Duration::from_millis(SAVE_INTERVAL_MS) {
                    saved = Instant::now();
                    self.save();
                }
            }
        }
    }

    /// Verifies the first ids of `page`, about [`SLICE_BYTES`] of them or what a tenth of a second allows, and takes
    /// them out; answers how many bytes they were. Blocking.
    fn scrub_slice(&self, page: &mut Vec<ChunkId>) -> Result<u64, String> {
        let most = SLICE_BYTES.min(self.options.bytes_per_s / 10);
        let mut bytes = 0;
        let mut done = 0;
        for id in page.iter() {
            if bytes >= most && done > 0 {
                break;
            }
            done += 1;
            // Bad ones count as well: a disk that gives many of them must not be worn harder than a good one.
            bytes += self.parts.content.length(*id).map_or(0, u64::from);
            let length = match self.look_at(*id) {
                Looked::Healthy(length) => length,
                Looked::Missing => 0,
                Looked::Bad(reason) => {
                    self.found_bad_blocking(*id, &reason);
                    0
                }
                Looked::Unknown(reason) => self
                    .is_to_be_passed_over(*id, &reason)
                    .then_some(0)
                    .ok_or(reason)?,
            };
            self.state.lock().coverage.looked_at(*id, length);
        }
        page.drain(..done);
        Ok(bytes)
    }

    /// A copy could not be read. The pass ends and the next begins with it again, but not for ever.
    fn is_to_be_passed_over(&self, id: ChunkId, reason: &str) -> bool {
        let mut state = self.state.lock();
        let attempts = match state.unreadable {
            Some((before, attempts)) if before == id => attempts + 1,
            _ => 1,
        };
        state.unreadable = Some((id, attempts));
        state.last_error = Some(LastError {
            unix_ms: unix_ms(),
            message: format!("chunk {id} cannot be read: {reason}"),
        });
        attempts >= READ_ATTEMPTS_MAX
    }

    /// Reads the copy of `id` from disk. Blocking.
    fn look_at(&self, id: ChunkId) -> Looked {
        let named = self.named(id);
        match self.parts.content.verify(id) {
            Ok((sha256, length)) => {
                if named.is_some_and(|named| named.sha256 != sha256 || named.length != length) {
                    // Not a failing disk, but another chunk under this name: nothing here can tell which is right.
                    return Looked::Bad("it is whole, but not what the metadata names".to_string());
                }
                self.verified_chunks.fetch_add(1, Ordering::Relaxed);
                self.verified_bytes
                    .fetch_add(u64::from(length), Ordering::Relaxed);
                Looked::Healthy(length)
            }
            Err(ContentError::NotFound { .. }) => Looked::Missing,
            Err(error) if error.is_bad_copy() => Looked::Bad(error.to_string()),
            Err(error) => Looked::Unknown(error.to_string()),
        }
    }

    fn named(&self, id: ChunkId) -> Option<ChunkRecord> {
        let view = self.parts.metadata.view().ok()?;
        view.chunk(id).ok()?
    }

    fn end_coverage(&self) {
        let coverage = {
            let mut state = self.state.lock();
            state.coverage.complete(unix_ms());
            state.coverage
        };
        debug!(
            chunks = coverage.completed_chunks,
            ms = coverage.completed_duration_ms,
            "everything held was verified"
        );
        self.save();
    }

    fn save(&self) {
        let coverage = self.state.lock().coverage;
        if let Err(failed) = coverage.save(&self.options.cursor_file) {
            let message = format!("note how far the scrub is: {failed}");
            self.state.lock().last_error = Some(LastError {
                unix_ms: unix_ms(),
                message,
            });
        }
    }

    async fn run_settling(self: Arc<Self>) {
        loop {
            if self.state.lock().under_repair.is_empty() {
                self.settle_soon.notified().await;
            }
            let repair = Arc::clone(&self);
            if let Err(panic) = tokio::task::spawn_blocking(move || repair.settle()).await {
                warn!(%panic, "what was repaired could not be counted");
            }
            tokio::time::sleep(Duration::from_millis(SETTLE_TICK_MS)).await;
        }
    }

    /// Counts the copies that were made anew, and lets the bad ones go. Blocking.
    fn settle(&self) {
        let waiting: Vec<ChunkId> = self.state.lock().under_repair.keys().copied().collect();
        let mut repaired = Vec::new();
        let mut obsolete = Vec::new();
        for id in waiting {
            if self.parts.content.holds(id) {
                repaired.push(id);
            } else if let Ok(view) = self.parts.metadata.view()
                && (matches!(view.chunk(id), Ok(None)) || !self.parts.placement.should_hold(id))
            {
                obsolete.push(id);
            }
        }
        if repaired.is_empty() && obsolete.is_empty() {
            return;
        }
        for ids in [&repaired, &obsolete] {
            if let Err(error) = self.parts.content.forget_aside(ids) {
                debug!(%error, "the room of bad copies is not given back");
            }
        }
        let mut state = self.state.lock();
        for id in repaired.iter().chain(&obsolete) {
            state.under_repair.remove(id);
        }
        state.repaired += repaired.len() as u64;
        state.obsolete += obsolete.len() as u64;
        drop(state);
        for id in repaired {
            info!(chunk = %id, "a bad copy was replaced by a good one");
        }
    }
}
