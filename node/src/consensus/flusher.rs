//! Moves what has been applied from memory to disk, in the order that makes a restart right: the log first,
//! then the content store, then redb. Only then may the log be purged.
//!
//! Runs when the overlay is half full, when something has waited for some seconds, and when a snapshot is
//! wanted.
//!
//! **On a full disk** neither applies nor flushes wait for content that came inside commands: on such a disk nothing
//! makes room but deletes, and those lie behind it in the log. What the content store does not take is let go from
//! memory and noted ([`Unstored`]); it still lies in the log, durably, and this node counts as one of the f + 1 that
//! hold it for as long as it does. So the rule of order is kept in this form: redb may pass a chunk that is not stored,
//! the purge may not ([`Flusher::purge_limit`]). From the log it is stored when there is room again; it leaves the books
//! when it is, when it is dead, or when f + 1 other voters say that they have it on disk (`replication::recovery` asks
//! them, since it fetches it from there when there is room). The books are kept in memory. Before redb passes what is in
//! them a mark is put on the disk, and who starts with the mark there makes them again from what the log has.
//!
//! The log itself may have to wait for room, which only a purge may make, behind a snapshot: see
//! [`Flusher::wait_for_room`] and [`intake`](super::intake), and then nothing applied is left to wait for its time.
//!
//! A snapshot that is installed empties the books: what of them it names is stored before (see
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

/// How often the thread looks whether there is something to do.
const TICK_MS: u64 = 250;
/// While redb finds no room the overlay may grow to so many times its bound: the deletes that make room must be applied.
const FULL_DISK_OVERLAYS: u64 = 4;
/// Chunks stored between two flushes, out of the log.
const UNSTORED_BATCH: usize = 128;
/// The mark that redb may have passed what the log alone has.
const UNSTORED_MARK: &str = "unstored";

/// Why nothing was flushed.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// The disk is full; later.
    #[error("no room on the disk: {0}")]
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

/// See the module.
pub struct Flusher {
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    log: LogStore,
    fatal: FatalSignal,
    age_max: Duration,
    overlay_bytes_max: u64,
    unstored_mark: PathBuf,
    /// One flush, or the installation of a snapshot, at a time.
    serial: Mutex<()>,
    work: Mutex<Work>,
    /// Told when there is work, with `work`.
    wake: Condvar,
    /// Told after each attempt, with `work`.
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
            tracing::info!(chunks, "content that found no room before is in the log");
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

    /// Ends the thread. What has not been flushed the log has. Blocking.
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
            // It was raised where it happened.
            if self.store_unstored().is_err() {
                return;
            }
            if self.metadata.position() == self.metadata.durable_position() {
                oldest = None;
            } else if oldest.is_none() {
                oldest = Some(Instant::now());
            }
            // Where the log waits for a purge, the purge waits for this.
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
                // It was raised where it happened; whoever runs the node logs it and exits.
                Err(FlushError::Fatal(_)) => return,
                // Said once, in `flush`. The tick is the pause before the next attempt.
                Err(FlushError::NoSpace(_)) => std::thread::sleep(Duration::from_millis(TICK_MS)),
            }
        }
    }

    /// Flushes everything applied so far; answers up to where redb is durable then. Blocking.
    pub fn flush(&self) -> Result<Position, FlushError> {
        let _serial = self.serial.lock();
        let result = self.flush_alone();
        let mut work = self.work.lock();
        let full = matches!(result, Err(FlushError::NoSpace(_)));
        if let (Err(error), false) = (&result, work.full) {
            tracing::warn!(%error, "cannot flush the metadata");
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
        // What is frozen was appended to the log before it was committed, though perhaps not flushed by this
        // node. What came after it may have to wait for room, which this flush may be the first step to.
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

    /// Stores `chunk`, which the applied entry `index` brought; where there is no room, notes that the log has it.
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

    /// The log need not keep these any more: nobody names them, or others have them.
    pub fn settle_unstored(&self, ids: &[ChunkId]) {
        self.work.lock().unstored.settle(ids);
    }

    /// Up to `max` chunks after `after` that the log alone has here, with the entries that brought them.
    pub fn unstored_after(&self, after: Option<(u64, ChunkId)>, max: usize) -> Vec<(u64, ChunkId)> {
        self.work.lock().unstored.after(after, max)
    }

    /// Up to which entry the log may be purged, if it may be up to `upto` otherwise.
    pub fn purge_limit(&self, upto: u64) -> Option<u64> {
        self.work.lock().unstored.purge_limit(upto)
    }

    /// Stores what the log has, as far as there is room.
    fn store_unstored(&self) -> Result<(), FatalError> {
        // An installation purges the log and with it what would be read here.
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
            // Only what is on disk may go from the log.
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
        const DOING: &str = "store content that the log has";
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

    /// Sees to it that the mark is on the disk before redb passes what is in the books, and goes when they are empty.
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
            Err(error) => Err(self.fatal.raise("mark that content is not stored", error).into()),
        }
    }

    /// Whether [`Flusher::wait_for_room`] would return at once.
    pub fn has_room(&self) -> bool {
        self.metadata.overlay_bytes() < self.overlay_bytes_max / 2 && !self.log.is_pressed()
    }

    /// Waits until the overlay has room for more and, where the log may have to wait for room, until the log has entry
    /// `last` on the disk: what is applied and not logged could not be flushed, so nothing could be purged either, and
    /// the log would wait for ever. Blocking; for the thread that applies.
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
            // The time-out only bounds how late a fatal error raised elsewhere is seen.
            self.done.wait_for(&mut work, Duration::from_millis(TICK_MS));
        }
    }

    /// Where content is stored.
    pub fn content(&self) -> &ContentStore {
        &self.content
    }

    /// Does `install` while nothing is being flushed; what waited to be stored belongs to the state that
    /// goes.
    pub fn instead_of_flushing<T>(&self, install: impl FnOnce() -> T) -> T {
        let _serial = self.serial.lock();
        let result = install();
        self.work.lock().unstored.clear();
        result
    }
}

/// What became of a chunk that the log has.
enum Stored {
    /// The content store has it, not yet flushed.
    Here,
    /// A snapshot that is about to be installed has taken it from the log.
    Gone,
    /// Nothing, for want of room.
    NoRoom,
}

/// What of the content in the log redb has passed and the content store does not have. Blocking.
fn unstored_in_log(
    metadata: &MetadataStore,
    content: &ContentStore,
    log: &LogStore,
) -> Result<Unstored, Box<dyn std::error::Error + Send + Sync>> {
    let view = metadata.view()?;
    let mut unstored = Unstored::default();
    for index in log.range() {
        // What redb has not passed is applied again.
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
