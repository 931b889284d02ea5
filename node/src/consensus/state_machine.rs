//! openraft's state machine: the metadata, and the content inside commands.
//!
//! Entries are applied in batches: one [`Batch`](quorumfs_metadata::Batch) is published at once, and only then are the
//! proposers answered. Content inside an entry goes to the content store before the entry becomes visible.
//!
//! Applying is synchronous and may wait for the disk (when the overlay is full), so it runs where it does not block the
//! runtime.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use futures::{Stream, StreamExt};
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use parking_lot::Mutex;
use quorumfs_proto::{Chunk, ChunkId, codec};
use tokio::sync::mpsc;

use super::fatal::{FatalError, FatalSignal, StartAnew};
use super::flusher::Flusher;
use super::log::LogStore;
use super::meters::Meters;
use super::position::decode_position;
use super::rescue::{RescueError, Rescued, rescue_content};
use super::snapshot::{Builder, SnapshotData, SnapshotTraffic, held_snapshot};
use super::types::{Entry, LogId, SnapshotMeta, StoredMembership, TypeConfig};
use quorumfs_metadata::{ApplyResult, LogBody, LogCommand, MetadataStore, Position, Snapshot, View};

/// Most entries published at once: the first of them waits for the last.
const BATCH_ENTRIES_MAX: usize = 1024;
/// Most bytes of content in the entries published at once.
const BATCH_CONTENT_BYTES_MAX: usize = 8 << 20;
/// Up to this many entries are applied without yielding to other tasks …
const QUICK_ENTRIES_MAX: usize = 16;
/// … if they have no more bytes of content than this.
const QUICK_CONTENT_BYTES_MAX: usize = 128 << 10;

/// The work for the content store. Sent after the change is visible in the metadata. Messages may be lost when the node
/// stops or the receiver is slow: repair compares all content with the metadata from time to time in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppliedEffects {
    /// Effects of entries up to `index`.
    Entries {
        /// The last entry.
        index: u64,
        /// Chunks that files now refer to, including those inside commands (which are held, unless the disk is full).
        named: Vec<ChunkId>,
        /// Chunks that no file refers to any more.
        dead: Vec<ChunkId>,
    },
    /// The whole state was replaced by a snapshot.
    Installed {
        /// The last entry in the snapshot.
        index: u64,
    },
}

/// The outputs of applying for other parts of the node.
pub struct Outlets {
    /// Work for recovery and sweep.
    pub effects: mpsc::Sender<AppliedEffects>,
    /// The state at the last entry that asked for a comparison, until it is taken.
    pub audited: Arc<Mutex<Option<View>>>,
    /// Whether the node already takes part: see [`StateMachine::held_up`].
    pub takes_part: Arc<AtomicBool>,
    /// Whether nothing is applied, because there is no state to apply it to.
    pub log_only: bool,
}

/// The state machine; see the module documentation.
pub struct StateMachine {
    metadata: Arc<MetadataStore>,
    flusher: Arc<Flusher>,
    log: LogStore,
    traffic: SnapshotTraffic,
    outlets: Outlets,
    meters: Arc<Meters>,
    fatal: FatalSignal,
    membership: StoredMembership,
}

/// How long work may take.
#[derive(Clone, Copy)]
enum Wait {
    /// It reads pages that are mostly in memory.
    InPlace,
    /// Long enough that other tasks must continue meanwhile.
    Blocking,
}

/// The work left after applying a batch.
#[derive(Default)]
struct Consequences {
    named: Vec<ChunkId>,
    dead: Vec<ChunkId>,
    answers: Vec<(ApplyResponder<TypeConfig>, ApplyResult)>,
}

impl StateMachine {
    /// Makes a state machine of `metadata` as the last process left it.
    pub fn new(
        metadata: Arc<MetadataStore>,
        flusher: Arc<Flusher>,
        log: LogStore,
        traffic: SnapshotTraffic,
        outlets: Outlets,
        meters: Arc<Meters>,
        fatal: FatalSignal,
    ) -> Result<StateMachine, codec::DecodeError> {
        let position = metadata.position();
        let (_, membership) = decode_position(&position)?;
        let told_through = &meters.effects.through_index;
        told_through.store(position.index, Ordering::Release);
        Ok(StateMachine {
            metadata,
            flusher,
            log,
            traffic,
            outlets,
            meters,
            fatal,
            membership,
        })
    }

    /// Applies some entries; on a full disk only those that the log has on disk, since the rest may wait for a purge
    /// behind them.
    fn apply_some(&mut self, mut entries: Vec<EntryResponder<TypeConfig>>) -> Result<(), FatalError> {
        if self.log.is_pressed() {
            let flushed = entries.partition_point(|(entry, _)| self.log.is_flushed(entry.log_id.index));
            if flushed > 0 && flushed < entries.len() {
                let rest = entries.split_off(flushed);
                self.apply_batch(entries)?;
                entries = rest;
            }
        }
        self.apply_batch(entries)
    }

    fn apply_batch(&mut self, entries: Vec<EntryResponder<TypeConfig>>) -> Result<(), FatalError> {
        let began = Instant::now();
        let entries_count = entries.len() as u64;
        let last_index = entries.last().map_or(0, |(entry, _)| entry.log_id.index);
        self.flusher.wait_for_room(last_index)?;
        let mut consequences = Consequences::default();
        let mut batch = self.metadata.begin();
        let mut last = None;
        // An audit ends its batch, so the published state is the state at that entry.
        let is_audit = entries.last().is_some_and(|(entry, _)| asks_for_audit(entry));
        for (entry, responder) in entries {
            let log_id = entry.log_id;
            last = Some(log_id);
            let result = match &entry.payload {
                EntryPayload::Blank => ApplyResult::Done,
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(log_id), membership.clone());
                    ApplyResult::Done
                }
                EntryPayload::Normal(command) => {
                    let applied = batch
                        .apply(log_id.index, command)
                        .map_err(|fault| self.fatal.raise_at(log_id.index, fault))?;
                    for chunk in applied.effects.inline {
                        consequences.named.push(chunk.id);
                        let chunk = Chunk::with_sha256(chunk.id, chunk.sha256, chunk.payload)
                            .map_err(|bad| self.fatal.raise("read the content of a command", bad))?;
                        self.flusher.store(log_id.index, &chunk)?;
                    }
                    consequences.named.extend(applied.effects.named);
                    consequences.dead.extend(applied.effects.dead);
                    applied.result
                }
            };
            if let Some(responder) = responder {
                consequences.answers.push((responder, result));
            }
        }
        if let Some(last) = last {
            batch.publish(Position {
                index: last.index,
                log_id: Some(codec::encode(&last)),
                membership: Some(codec::encode(&self.membership)),
            });
            if is_audit {
                let view = self
                    .metadata
                    .view()
                    .map_err(|fault| self.fatal.raise("read the state", fault))?;
                *self.outlets.audited.lock() = Some(view);
            }
            self.follow_up(last.index, consequences);
            self.meters.applies.record_duration(began.elapsed());
            self.meters
                .entries_applied
                .fetch_add(entries_count, Ordering::Relaxed);
        }
        Ok(())
    }

    fn follow_up(&self, index: u64, consequences: Consequences) {
        let Consequences { named, dead, answers } = consequences;
        for (responder, result) in answers {
            responder.send(result);
        }
        if !dead.is_empty() {
            self.flusher.settle_unstored(&dead);
        }
        if !(named.is_empty() && dead.is_empty()) {
            self.tell(AppliedEffects::Entries { index, named, dead });
        }
        self.told_through(index);
    }

    fn told_through(&self, index: u64) {
        let through = &self.meters.effects.through_index;
        through.store(index, Ordering::Release);
    }

    /// Runs `work` in a way suited to `wait`. A panic in it would only end openraft's task for the state machine; a
    /// node that does not apply any more must stop.
    fn or_stop(
        &mut self,
        wait: Wait,
        doing: &'static str,
        work: impl FnOnce(&mut StateMachine) -> Result<(), FatalError>,
    ) -> Result<(), FatalError> {
        let fatal = self.fatal.clone();
        let work = || catch_unwind(AssertUnwindSafe(|| work(self)));
        let worked = match wait {
            Wait::InPlace => work(),
            Wait::Blocking => blocking(work),
        };
        worked.unwrap_or_else(|_| Err(fatal.raise(doing, "a panic")))
    }

    /// Handles a failed step. If only the state is lost, the node continues to vote and to keep the log until it may
    /// leave, so that other nodes that fail at the same time can be healed: applying waits, and openraft is not told.
    /// The code that runs the node is told ([`FatalSignal`]), and makes sure that the node does not lead.
    async fn held_up<T>(&self, error: FatalError) -> io::Result<T> {
        // The first failure shows what is lost; later ones may be its consequences.
        let error = self.fatal.raised().unwrap_or(error);
        if error.costs_state() && self.outlets.takes_part.load(Ordering::Acquire) {
            return std::future::pending().await;
        }
        Err(error.into())
    }

    fn tell(&self, effects: AppliedEffects) {
        match self.outlets.effects.try_send(effects) {
            Ok(()) => self.meters.effects.told.fetch_add(1, Ordering::Release),
            Err(_) => self.meters.effects.dropped.fetch_add(1, Ordering::Release),
        };
    }

    fn install(&mut self, meta: &SnapshotMeta, data: SnapshotData) -> Result<(), FatalError> {
        let received = match data {
            SnapshotData::Received(received) => *received,
            SnapshotData::Held(snapshot) => copy_of(&self.metadata, &snapshot)
                .map_err(|fault| self.fatal.raise("install a snapshot", fault))?,
        };
        let installed = self.flusher.instead_of_flushing(|| {
            // Content that redb has passed is stored, except for what did not fit on the disk; other stored content may
            // not be on disk yet.
            let beyond = self.metadata.durable_position().index + 1;
            let unstored = self.flusher.unstored_after(None, 1);
            let first = unstored.first().map_or(beyond, |(oldest, _)| beyond.min(*oldest));
            let rescued = rescue_content(self.flusher.content(), &self.log, &received.view(), first);
            // If the snapshot's file is damaged, the state that it should replace is not.
            let rescued = rescued.map_err(|error| match error {
                RescueError::State(failure) => {
                    let damaged = StartAnew(failure.to_string());
                    self.fatal.raise("look up content in a snapshot", damaged)
                }
                error => self.fatal.raise("save the content of the log", error),
            });
            match rescued? {
                Rescued::All => {}
                Rescued::AllBut(chunks) => {
                    tracing::warn!(chunks, "content in the log is dropped with it, since the disk has no space; other nodes have it");
                }
            }
            let installed = self.metadata.install(received);
            installed.map_err(|fault| self.fatal.raise("install a snapshot", fault))
        });
        let position = installed?;
        let (log_id, membership) =
            decode_position(&position).map_err(|error| self.fatal.raise("install a snapshot", error))?;
        if log_id != meta.last_log_id {
            let found = format!(
                "its position is {log_id:?}, but its header says {:?}",
                meta.last_log_id
            );
            return Err(self.fatal.raise("install a snapshot", found));
        }
        self.membership = membership;
        self.tell(AppliedEffects::Installed {
            index: position.index,
        });
        self.told_through(position.index);
        Ok(())
    }
}

/// Copies a snapshot of this node as if it had been received.
fn copy_of(
    metadata: &MetadataStore,
    snapshot: &Snapshot,
) -> Result<quorumfs_metadata::Received, quorumfs_metadata::StorageFault> {
    let mut installation = metadata.begin_install()?;
    for row in snapshot.rows() {
        installation.add(&[row?])?;
    }
    installation.finish()
}

/// Runs `work`, which may wait for a disk, without blocking other tasks.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

fn asks_for_audit(entry: &Entry) -> bool {
    let EntryPayload::Normal(command) = &entry.payload else {
        return false;
    };
    matches!(command.body, LogBody::Audit)
}

fn content_bytes(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(LogCommand {
            body: LogBody::Call(mutation),
            ..
        }) => mutation.command.inline_bytes(),
        _ => 0,
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        decode_position(&self.metadata.position()).map_err(io::Error::other)
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        if self.outlets.log_only {
            while let Some(entry) = entries.next().await {
                let (entry, _) =
                    entry.map_err(|error| self.fatal.raise("read the log to apply it", error))?;
                if let EntryPayload::Membership(membership) = entry.payload {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                }
            }
            return Ok(());
        }
        let mut ended = false;
        while !ended {
            let mut batch = Vec::new();
            let mut bytes = 0;
            while batch.len() < BATCH_ENTRIES_MAX && bytes < BATCH_CONTENT_BYTES_MAX {
                let Some(entry) = entries.next().await else {
                    ended = true;
                    break;
                };
                let entry = entry.map_err(|error| self.fatal.raise("read the log to apply it", error))?;
                bytes += content_bytes(&entry.0);
                let ends_batch = asks_for_audit(&entry.0);
                batch.push(entry);
                if ends_batch {
                    break;
                }
            }
            if batch.is_empty() {
                continue;
            }
            // Moving the runtime to another thread costs more than a few commands do.
            let slow = batch.len() > QUICK_ENTRIES_MAX || bytes > QUICK_CONTENT_BYTES_MAX;
            let wait = if slow || !self.flusher.has_room() {
                Wait::Blocking
            } else {
                Wait::InPlace
            };
            if let Err(error) = self.or_stop(wait, "apply commands", |this| this.apply_some(batch)) {
                return self.held_up(error).await;
            }
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
        // Behind a new snapshot the log is purged, and a follower that is being sent the old snapshot would need
        // another. So it is not built now, unless the log has grown too long.
        if self.outlets.log_only || !force && self.traffic.must_wait(self.log.weight_bytes()) {
            return None;
        }
        Some(self.get_snapshot_builder().await)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder::new(self.metadata.clone(), self.flusher.clone())
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotData) -> io::Result<()> {
        let installed = self.or_stop(Wait::Blocking, "install a snapshot", |this| {
            this.install(meta, snapshot)
        });
        match installed {
            Ok(()) => Ok(()),
            Err(error) => self.held_up(error).await,
        }
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<openraft::alias::SnapshotOf<TypeConfig, SnapshotData>>> {
        let snapshot = match held_snapshot(&self.metadata) {
            Ok(snapshot) => snapshot,
            Err(error) => return self.held_up(self.fatal.raise("open a snapshot", error)).await,
        };
        Ok(Some(snapshot).filter(|snapshot| snapshot.meta.last_log_id.is_some()))
    }
}
