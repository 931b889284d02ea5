//! Moves applied changes from memory to disk, in the order that makes a restart correct: first the log, then the
//! content store, then redb. Only then may the log be purged.
//!
//! It runs when the overlay is half full, when a change has waited for some seconds, and when a snapshot is needed.
//!
//! **On a full disk** neither applies nor flushes wait for content that came inside commands: only deletes free space
//! on such a disk, and they come later in the log. Chunks that the content store cannot take are dropped from memory
//! and recorded in [`Unstored`]. They are still in the log, durably, and this node counts as one of the f + 1 holders
//! as long as they are. So the rule of order becomes: redb may pass a chunk that is not stored, the purge may not
//! ([`Flusher::purge_limit`]). When there is space again, the chunk is stored from the log. It is removed from the
//! record when it is stored, when it is dead, or when f + 1 other voters report that they have it on disk
//! (`replication::recovery` asks them, since it would fetch it from there). The record is kept in memory. Before redb
//! passes a recorded chunk, a mark file is written; a node that starts with the mark rebuilds the record from the log.
//!
//! The log itself may have to wait for space that only a purge behind a snapshot frees: see [`Flusher::wait_for_room`]
//! and [`intake`](super::intake). In that state applied changes are flushed without delay.
//!
//! Installing a snapshot empties the record: recorded chunks that the snapshot refers to are stored before (see
//! [`rescue`](super::rescue)).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use quorumfs_proto::{Chunk, ChunkBody, ChunkId};

use super::fatal::{FatalError, FatalSignal};
use super::log::LogStore;
use super::types::Entry;
use super::unstored::Unstored;
use quorumfs_content::{ContentError, ContentStore};
use quorumfs_metadata::{LogBody, LogCommand, MetadataStore, Position, StorageFault};

/// Interval at which the thread looks for work.
const TICK_MS: u64 = 250;
/// While the disk is full, the overlay may grow to this many times its bound: the deletes that free space must be
/// applied.
const FULL_DISK_OVERLAYS: u64 = 4;
/// Chunks stored from the log between two flushes.
const UNSTORED_BATCH: usize = 128;
/// File name of the mark that redb may have passed chunks that only the log has.
const UNSTORED_MARK: &str = "unstored";

/// Why nothing was flushed.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// The disk is full; a later attempt may succeed.
    #[error("the disk is full: {0}")]
    NoSpace(String),
    /// The node must stop.
    #[error(transparent)]
    Fatal(#[from] FatalError),
}

impl From<FlushError> for std::io::Error {
    fn from(error: FlushError) -> std::io::Error {
        match error {
            FlushError::NoSpace(_) => std::io::Error::new(std::io::ErrorKind::StorageFull, error),
            FlushError::Fatal(fatal) => fatal.into(),
        }
    }
}

#[derive(Default)]
struct Work {
    wanted: bool,
    stop: bool,
    full: bool,
    unstored: Unstored,
}

/// The flusher; see the module documentation.
pub struct Flusher {
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    log: LogStore,
    fatal: FatalSignal,
    age_max: Duration,
    overlay_bytes_max: u64,
    unstored_mark: PathBuf,
    /// Locked by one flush, or the installation of a snapshot, at a time.
    serial: Mutex<()>,
    work: Mutex<Work>,
    /// Notified when there is work; used with `work`.
    wake: Condvar,
    /// Notified after each attempt; used with `work`.
    done: Condvar,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Flusher {
    /// Starts the thread. `directory` is the log's. Blocking.
    pub fn start(
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
        log: LogStore,
        fatal: FatalSignal,
        age_max: Duration,
        directory: &Path,
    ) -> std::io::Result<Arc<Flusher>> {
        let overlay_bytes_max = metadata.options().overlay_bytes_max;
        let unstored_mark = directory.join(UNSTORED_MARK);
        let mut work = Work::default();
        if unstored_mark.try_exists()? {
            work.unstored = unstored_in_log(&metadata, &content, &log).map_err(std::io::Error::other)?;
            let chunks = work.unstored.count();
            tracing::info!(
                chunks,
                "content that did not fit on the disk before is in the log"
            );
        }
        let flusher = Arc::new(Flusher {
            metadata,
            content,
            log,
            fatal,
            age_max,
            overlay_bytes_max,
            unstored_mark,
            serial: Mutex::new(()),
            work: Mutex::new(work),
            wake: Condvar::new(),
            done: Condvar::new(),
            thread: Mutex::new(None),
        });
        let this = flusher.clone();
        let thread = std::thread::Builder::new()
            .name("flusher".to_string())
            .spawn(move || this.run())?;
        *flusher.thread.lock() = Some(thread);
        Ok(flusher)
    }

    /// Ends the thread. Changes that were not flushed are in the log. Blocking.
    pub fn stop(&self) {
        self.work.lock().stop = true;
        self.wake.notify_all();
        self.done.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            self.fatal
                .raise("flush the metadata", "the flushing thread panicked");
        }
    }

    /// Whether the last attempt found the disk full.
    pub fn disk_full(&self) -> bool {
        self.work.lock().full
    }

    fn run(&self) {
        let mut oldest: Option<Instant> = None;
        loop {
            {
                let mut work = self.work.lock();
                if !work.wanted && !work.stop {
                    self.wake.wait_for(&mut work, Duration::from_millis(TICK_MS));
                }
                if work.stop {
                    return;
                }
            }
            // The fatal signal was raised where the error occurred.
            if self.store_unstored().is_err() {
                return;
            }
            if self.metadata.position() == self.metadata.durable_position() {
                oldest = None;
            } else if oldest.is_none() {
                oldest = Some(Instant::now());
            }
            // If the log waits for a purge, the purge waits for this flush.
            let age_max = if self.log.is_pressed() {
                Duration::from_millis(TICK_MS).min(self.age_max)
            } else {
                self.age_max
            };
            let aged = oldest.is_some_and(|since| since.elapsed() >= age_max);
            let large = self.metadata.overlay_bytes() >= self.overlay_bytes_max / 2;
            if !(self.work.lock().wanted || aged || large) {
                continue;
            }
            let result = self.flush();
            let mut work = self.work.lock();
            work.wanted = false;
            drop(work);
            self.done.notify_all();
            match result {
                Ok(_) => oldest = None,
                // The fatal signal was raised where the error occurred; the code that runs the node logs it and exits.
                Err(FlushError::Fatal(_)) => return,
                // Logged once, in `flush`. The pause comes before the next attempt.
                Err(FlushError::NoSpace(_)) => std::thread::sleep(Duration::from_millis(TICK_MS)),
            }
        }
    }

    /// Flushes everything applied so far; returns the position up to which redb is durable then. Blocking.
    pub fn flush(&self) -> Result<Position, FlushError> {
        let _serial = self.serial.lock();
        let result = self.flush_alone();
        let mut work = self.work.lock();
        let full = matches!(result, Err(FlushError::NoSpace(_)));
        // A fatal error is logged by the code that runs the node.
        if let (Err(error @ FlushError::NoSpace(_)), false) = (&result, work.full) {
            tracing::warn!(%error, "cannot flush the metadata; the flush is tried again when there is space");
        }
        work.full = full;
        result
    }

    fn flush_alone(&self) -> Result<Position, FlushError> {
        if let Some(fatal) = self.fatal.raised() {
            return Err(fatal.into());
        }
        let Some(frozen) = self.metadata.freeze() else {
            return Ok(self.metadata.durable_position());
        };
        // The frozen entries were appended to the log before they were committed, but perhaps not flushed by this node.
        // Later entries may have to wait for space, which this flush may help to free.
        self.log
            .wait_flushed(frozen.index)
            .map_err(|error| self.fatal.raise("wait for the log", error))?;
        match self.content.sync() {
            Ok(()) => {}
            Err(ContentError::NoSpace) => return Err(FlushError::NoSpace("content".to_string())),
            Err(error) => return Err(self.fatal.raise("flush content", error).into()),
        }
        self.mark_unstored()?;
        match self.metadata.flush() {
            Ok(position) => Ok(position),
            Err(error @ StorageFault::NoSpace { .. }) => Err(FlushError::NoSpace(error.to_string())),
            Err(error) => Err(self.fatal.raise("flush the metadata", error).into()),
        }
    }

    /// Stores `chunk`, which the applied entry `index` brought. If there is no space, records that the log has it.
    pub fn store(&self, index: u64, chunk: &Chunk) -> Result<(), FatalError> {
        match self.content.append(chunk) {
            Ok(()) => Ok(()),
            Err(ContentError::NoSpace) => {
                self.work.lock().unstored.add(index, chunk.id());
                Ok(())
            }
            Err(error) => Err(self.fatal.raise("store content that came with a command", error)),
        }
    }

    /// Removes chunks from the record: they are dead, or other nodes have them.
    pub fn settle_unstored(&self, ids: &[ChunkId]) {
        self.work.lock().unstored.settle(ids);
    }

    /// Returns up to `max` chunks after `after` that only the log has on this node, with the entries that brought them.
    pub fn unstored_after(&self, after: Option<(u64, ChunkId)>, max: usize) -> Vec<(u64, ChunkId)> {
        self.work.lock().unstored.after(after, max)
    }

    /// Returns the entry up to which the log may be purged, given that it may be purged up to `upto` otherwise.
    pub fn purge_limit(&self, upto: u64) -> Option<u64> {
        self.work.lock().unstored.purge_limit(upto)
    }

    /// Stores recorded chunks from the log, as far as there is space.
    fn store_unstored(&self) -> Result<(), FatalError> {
        // An installation purges the log, which is read here.
        let _serial = self.serial.lock();
        loop {
            let waiting = self.work.lock().unstored.after(None, UNSTORED_BATCH);
            let mut stored = Vec::new();
            for (index, id) in &waiting {
                match self.store_from_log(*index, *id)? {
                    Stored::Here | Stored::Gone => stored.push(*id),
                    Stored::NoRoom => break,
                }
            }
            if stored.is_empty() {
                return Ok(());
            }
            // Only chunks that are on disk may be removed from the record.
            match self.content.sync() {
                Ok(()) => self.settle_unstored(&stored),
                Err(ContentError::NoSpace) => return Ok(()),
                Err(error) => return Err(self.fatal.raise("flush content", error)),
            }
            if stored.len() < waiting.len() {
                return Ok(());
            }
        }
    }

    fn store_from_log(&self, index: u64, id: ChunkId) -> Result<Stored, FatalError> {
        const DOING: &str = "store content of the log";
        if self.content.contains(id) {
            return Ok(Stored::Here);
        }
        let entry = self.log.read_entry(index);
        let entry = entry.map_err(|error| self.fatal.raise(DOING, error))?;
        let Some(chunk) = entry.as_ref().and_then(|entry| inline_chunk(entry, id)) else {
            return Ok(Stored::Gone);
        };
        match self.content.append(&chunk) {
            Ok(()) => Ok(Stored::Here),
            Err(ContentError::NoSpace) => Ok(Stored::NoRoom),
            Err(error) => Err(self.fatal.raise(DOING, error)),
        }
    }

    /// Writes the mark before redb passes recorded chunks, and removes it when the record is empty.
    fn mark_unstored(&self) -> Result<(), FlushError> {
        let wanted = self.work.lock().unstored.count() > 0;
        let marked = self.unstored_mark.exists();
        let changed = match (wanted, marked) {
            (true, false) => std::fs::File::create(&self.unstored_mark).and_then(|mark| mark.sync_all()),
            (false, true) => std::fs::remove_file(&self.unstored_mark),
            (true, true) | (false, false) => return Ok(()),
        };
        let changed = changed.and_then(|()| self.log.sync_directory());
        match changed {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                Err(FlushError::NoSpace("the mark of unstored content".to_string()))
            }
            Err(error) => Err(self
                .fatal
                .raise("write the mark of content that only the log has", error)
                .into()),
        }
    }

    /// Whether [`Flusher::wait_for_room`] would return at once.
    pub fn has_room(&self) -> bool {
        self.metadata.overlay_bytes() < self.overlay_bytes_max / 2 && !self.log.is_pressed()
    }

    /// Waits until the overlay has space and, if the log may have to wait for space on the disk, until the log has
    /// entry `last` on disk: a change that is applied but not in the log could not be flushed, so nothing could be
    /// purged, and the log would wait for ever. Blocking; called by the thread that applies.
    pub fn wait_for_room(&self, last: u64) -> Result<(), FatalError> {
        if self.log.is_pressed() {
            let flushed = self.log.wait_flushed(last);
            flushed.map_err(|error| self.fatal.raise("wait for the log", error))?;
        }
        loop {
            if let Some(fatal) = self.fatal.raised() {
                return Err(fatal);
            }
            let overlay_bytes = self.metadata.overlay_bytes();
            let mut work = self.work.lock();
            let overlays = if work.full { FULL_DISK_OVERLAYS } else { 1 };
            if overlay_bytes < overlays * self.overlay_bytes_max || work.stop {
                if overlay_bytes >= self.overlay_bytes_max / 2 && !work.wanted {
                    work.wanted = true;
                    self.wake.notify_all();
                }
                return Ok(());
            }
            work.wanted = true;
            self.wake.notify_all();
            // The time-out only bounds the delay until a fatal error raised elsewhere is noticed.
            self.done.wait_for(&mut work, Duration::from_millis(TICK_MS));
        }
    }

    /// Returns the content store.
    pub fn content(&self) -> &ContentStore {
        &self.content
    }

    /// Calls `install` while nothing is being flushed, and empties the record, which belongs to the old state.
    pub fn instead_of_flushing<T>(&self, install: impl FnOnce() -> T) -> T {
        let _serial = self.serial.lock();
        let result = install();
        self.work.lock().unstored.clear();
        result
    }
}

/// The result of storing a chunk from the log.
enum Stored {
    /// The content store has it, not yet flushed.
    Here,
    /// The log no longer has it: a snapshot that is about to be installed has stored it.
    Gone,
    /// There is no space.
    NoRoom,
}

/// Finds the content in the log that redb has passed and the content store does not have. Blocking.
fn unstored_in_log(
    metadata: &MetadataStore,
    content: &ContentStore,
    log: &LogStore,
) -> Result<Unstored, Box<dyn std::error::Error + Send + Sync>> {
    let view = metadata.view()?;
    let mut unstored = Unstored::default();
    for index in log.range() {
        // Entries that redb has not passed are applied again.
        if index > view.index() {
            break;
        }
        let Some(entry) = log.read_entry(index)? else {
            continue;
        };
        for id in inline_ids(&entry) {
            if !content.contains(id) && view.chunk(id)?.is_some() {
                unstored.add(index, id);
            }
        }
    }
    Ok(unstored)
}

fn command_of(entry: &Entry) -> Option<&quorumfs_proto::Command> {
    match &entry.payload {
        openraft::EntryPayload::Normal(LogCommand {
            body: LogBody::Call(mutation),
            ..
        }) => Some(&mutation.command),
        _ => None,
    }
}

fn inline_ids(entry: &Entry) -> impl Iterator<Item = ChunkId> {
    let chunks = command_of(entry).map_or(&[][..], |command| &command.chunks);
    let inline = chunks
        .iter()
        .filter(|chunk| matches!(chunk.body, ChunkBody::Inline(_)));
    inline.map(|chunk| chunk.id)
}

fn inline_chunk(entry: &Entry, id: ChunkId) -> Option<Chunk> {
    let chunk = command_of(entry)?.chunks.iter().find(|chunk| chunk.id == id)?;
    match &chunk.body {
        ChunkBody::Inline(payload) => Chunk::with_sha256(id, chunk.sha256, payload.clone()).ok(),
        ChunkBody::Stored => None,
    }
}
