//! Repair: bad copies are found, set aside, and replaced from good ones.
//!
//! Bad copies are found by the scrub, which repeatedly reads everything held at a bounded rate and compares it with its
//! CRCs and its SHA-256 ([`Repair::start`]); by reads, which check blocks ([`Repair::found_bad`]); by other nodes that
//! fetched a bad copy; and by requests to verify a file ([`verify`]).
//!
//! A copy that is reported as bad is checked once more. If it is bad, it is no longer held from that moment, recovery
//! fetches another, and only when that is on disk is the bad one removed. So every bad copy is counted once, whoever
//! finds it, and ends in exactly one of three states: repaired, obsolete (no file refers to the chunk any more, or
//! other nodes should hold it), or under repair; the last are unrepairable while every node has answered and none has a
//! good copy.
//!
//! This module does not know HTTP or the readers.

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
use crate::replication::names::FileNameCache;
use crate::replication::placement::Placement;
use crate::replication::recovery::Recovery;
use crate::replication::recovery::ledger::WalkReason;
use crate::transport::Transport;
use crate::wall_clock::unix_ms;
use quorumfs_content::{ContentError, ContentStore, Quarantined};
use quorumfs_metadata::{ChunkRecord, MetadataStore};
use quorumfs_tasks::Tasks;

pub use self::metadata::MetadataCheck;
pub use self::status::{LastError, RepairStatus};

/// Bad copies that are tracked until they are replaced; more are repaired too, but only found by recovery.
const UNDER_REPAIR_MAX: usize = 64 << 10;
/// Passes that end at a copy that cannot be read, before it is skipped until the next coverage.
const READ_ATTEMPTS_MAX: u32 = 3;
/// Chunks listed at a time.
const PAGE_CHUNKS: usize = 1024;
/// Bytes verified between two checks of the rate.
const SLICE_BYTES: u64 = 4 << 20;
/// Interval at which the cursor is written during a scrub: after a crash at most the work of this time is repeated.
const SAVE_INTERVAL_MS: u64 = 5_000;
/// Interval at which new copies are looked for.
const SETTLE_TICK_MS: u64 = 100;

/// The rate and the interval of the scrub.
#[derive(Clone, Debug)]
pub struct RepairOptions {
    /// Most bytes verified per second.
    pub bytes_per_s: u64,
    /// Time from the start of one pass to the start of the next, if the first has ended by then.
    pub interval: Duration,
    /// File in which the cursor is stored.
    pub cursor_file: PathBuf,
}

/// The parts of the node that repair uses.
pub struct RepairParts {
    /// Knows the members.
    pub consensus: Consensus,
    /// The chunks that should be held.
    pub metadata: Arc<MetadataStore>,
    /// The chunks that are held.
    pub content: Arc<ContentStore>,
    /// The chunks of other nodes.
    pub peers: Arc<PeerChunks>,
    /// The nodes that should hold each chunk.
    pub placement: Arc<Placement>,
    /// Fetches copies that were set aside.
    pub recovery: Arc<Recovery>,
    /// The connection to the leader, to learn the commit index.
    pub transport: Arc<Transport>,
}

/// Repair on a node; see the module documentation.
pub struct Repair {
    parts: RepairParts,
    options: RepairOptions,
    // Locked to change a few numbers; never during I/O.
    state: Mutex<RepairState>,
    scrubbing: AtomicBool,
    settle_soon: Notify,
    names: FileNameCache,
    /// The last check of the metadata that found it intact.
    metadata_check: Mutex<Option<MetadataCheck>>,
    /// Chunks whose copy here had the right SHA-256, in all checks.
    verified_chunks: AtomicU64,
    verified_bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct RepairState {
    coverage: Coverage,
    /// Bad copies without a replacement, and why they are bad.
    under_repair: BTreeMap<ChunkId, String>,
    found_corrupt: u64,
    repaired: u64,
    obsolete: u64,
    last_error: Option<LastError>,
    /// The copy that could not be read, and the number of passes that ended at it.
    unreadable: Option<(ChunkId, u32)>,
}

/// The result of examining the copy of a chunk on this node's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum CopyCheck {
    /// The copy is good and has this length.
    Healthy(u32),
    /// There is no copy.
    Missing,
    /// The copy is bad, for this reason.
    Bad(String),
    /// The copy could not be read, which says nothing about it: too many files are open, or the store has stopped.
    Unknown(String),
}

impl Repair {
    /// Makes the repair; it reads nothing before [`Repair::start`].
    pub fn new(parts: RepairParts, options: RepairOptions) -> Arc<Repair> {
        let state = RepairState {
            coverage: Coverage::load(&options.cursor_file),
            ..RepairState::default()
        };
        Arc::new(Repair {
            names: FileNameCache::new(parts.metadata.clone()),
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

    /// Called when this node's copy of `id` was found to be bad. When it returns, the copy is no longer served, and
    /// another is being fetched.
    pub async fn found_bad(self: &Arc<Self>, id: ChunkId, reason: String) {
        let repair = Arc::clone(self);
        let handled = tokio::task::spawn_blocking(move || repair.found_bad_blocking(id, &reason)).await;
        if let Err(panic) = handled {
            warn!(chunk = %id, %panic, "cannot set a bad copy aside");
        }
    }

    fn found_bad_blocking(&self, id: ChunkId, reason: &str) {
        let named = self.named(id).map(|record| record.sha256);
        match self.parts.content.quarantine(id, named) {
            Ok(Quarantined::SetAside) => self.count_bad(id, reason),
            Ok(Quarantined::Healthy) => debug!(chunk = %id, reason, "a copy reported as bad is good"),
            Ok(Quarantined::NotHeld) => {}
            Err(error) => warn!(chunk = %id, %error, "cannot set a bad copy aside"),
        }
    }

    /// Counts copies that were found to be bad during a move and dropped. Blocking.
    pub fn dropped(&self, ids: &[ChunkId]) {
        for id in ids {
            self.count_bad(*id, "found while its segment was rewritten");
        }
    }

    fn count_bad(&self, id: ChunkId, reason: &str) {
        error!(chunk = %id, reason, "a copy failed its check; it is set aside and replaced");
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
        self.parts.recovery.request_fetch(id);
        if !fits {
            self.parts.recovery.request_comparison(WalkReason::ContentLost);
        }
        self.settle_soon.notify_one();
    }

    /// Starts the tasks that scrub and that count replaced copies.
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
                warn!(reason, "the scrub pass ends early; the next pass continues");
            }
            tokio::time::sleep(self.options.interval.saturating_sub(began.elapsed())).await;
        }
    }

    /// Verifies held chunks from the cursor to the end of the coverage.
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
                // The bytes have been read already; the time that they may take is waited afterwards.
                pacer.take(Instant::now(), bytes);
                tokio::time::sleep(pacer.take(Instant::now(), 0)).await;
                if saved.elapsed() >= Duration::from_millis(SAVE_INTERVAL_MS) {
                    saved = Instant::now();
                    self.save();
                }
            }
        }
    }

    /// Verifies the first ids of `page` and removes them: about [`SLICE_BYTES`] of them, or as many as a tenth of a
    /// second allows. Returns the number of bytes. Blocking.
    fn scrub_slice(&self, page: &mut Vec<ChunkId>) -> Result<u64, String> {
        let most = SLICE_BYTES.min(self.options.bytes_per_s / 10);
        let mut bytes = 0;
        let mut done = 0;
        for id in page.iter() {
            if bytes >= most && done > 0 {
                break;
            }
            done += 1;
            // Bad copies count too: a disk with many of them must not be loaded more than a good one.
            bytes += self.parts.content.length(*id).map_or(0, u64::from);
            let length = match self.check_copy(*id) {
                CopyCheck::Healthy(length) => length,
                CopyCheck::Missing => 0,
                CopyCheck::Bad(reason) => {
                    self.found_bad_blocking(*id, &reason);
                    0
                }
                CopyCheck::Unknown(reason) => self
                    .is_to_be_passed_over(*id, &reason)
                    .then_some(0)
                    .ok_or(reason)?,
            };
            self.state.lock().coverage.examined(*id, length);
        }
        page.drain(..done);
        Ok(bytes)
    }

    /// Whether to skip a copy that cannot be read. The pass ends and the next begins with it again, but not for ever.
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

    /// Reads the copy of `id` from disk and checks it. Blocking.
    fn check_copy(&self, id: ChunkId) -> CopyCheck {
        let named = self.named(id);
        match self.parts.content.verify(id) {
            Ok((sha256, length)) => {
                if named.is_some_and(|named| named.sha256 != sha256 || named.length != length) {
                    // Not a failing disk, but another chunk under this id: nothing here shows which is right.
                    return CopyCheck::Bad(
                        "it is whole, but its SHA-256 differs from that in the metadata".to_string(),
                    );
                }
                self.verified_chunks.fetch_add(1, Ordering::Relaxed);
                self.verified_bytes
                    .fetch_add(u64::from(length), Ordering::Relaxed);
                CopyCheck::Healthy(length)
            }
            Err(ContentError::NotFound { .. }) => CopyCheck::Missing,
            Err(error) if error.is_bad_copy() => CopyCheck::Bad(error.to_string()),
            Err(error) => CopyCheck::Unknown(error.to_string()),
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
            "all held chunks were verified"
        );
        self.save();
    }

    fn save(&self) {
        let coverage = self.state.lock().coverage;
        if let Err(failed) = coverage.save(&self.options.cursor_file) {
            let message = format!("cannot store the progress of the scrub: {failed}");
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
                warn!(%panic, "cannot count the repaired copies");
            }
            tokio::time::sleep(Duration::from_millis(SETTLE_TICK_MS)).await;
        }
    }

    /// Counts the copies that were replaced, and removes the bad ones. Blocking.
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
                debug!(%error, "cannot free the space of bad copies");
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
