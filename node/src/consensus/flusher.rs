//! Moves what has been applied from memory to disk, in the order that makes a restart right: the log first,
//! then the content store, then redb. Only then may the log be purged.
//!
//! Runs when the overlay is half full, when something has waited for some seconds, and when a snapshot is
//! wanted. Also keeps the chunks that came inside commands and found the disk full: until they are stored
//! nothing beyond them is flushed, so the log keeps them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::fatal::{FatalError, FatalSignal};
use super::log::LogStore;
use crate::content::{ContentError, ContentStore, StoredChunk};
use crate::metadata::{MetadataStore, Position, StorageFault};

/// How often the thread looks whether there is something to do.
const TICK_MS: u64 = 250;
/// Most bytes of chunks that wait for room on the disk: as much as an overlay, which waits as long.
const UNSTORED_BYTES_MAX: usize = 64 << 20;

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
    unstored: Vec<StoredChunk>,
    unstored_bytes: usize,
}

/// See the module.
pub struct Flusher {
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    log: LogStore,
    fatal: FatalSignal,
    age_max: Duration,
    overlay_bytes_max: u64,
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
    /// Starts the thread.
    pub fn start(
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
        log: LogStore,
        fatal: FatalSignal,
        age_max: Duration,
    ) -> std::io::Result<Arc<Flusher>> {
        let overlay_bytes_max = metadata.options().overlay_bytes_max;
        let flusher = Arc::new(Flusher {
            metadata,
            content,
            log,
            fatal,
            age_max,
            overlay_bytes_max,
            serial: Mutex::new(()),
            work: Mutex::new(Work::default()),
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
            if self.metadata.position() == self.metadata.durable_position() {
                oldest = None;
            } else if oldest.is_none() {
                oldest = Some(Instant::now());
            }
            let aged = oldest.is_some_and(|since| since.elapsed() >= self.age_max);
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
        if self.metadata.freeze().is_none() {
            return Ok(self.metadata.durable_position());
        }
        // What is frozen was appended to the log before it was committed, though perhaps not flushed by this
        // node.
        self.log
            .wait_flushed()
            .map_err(|error| self.fatal.raise("wait for the log", error))?;
        self.store_unstored()?;
        match self.content.sync() {
            Ok(()) => {}
            Err(ContentError::NoSpace) => return Err(FlushError::NoSpace("content".to_string())),
            Err(error) => return Err(self.fatal.raise("flush content", error).into()),
        }
        match self.metadata.flush() {
            Ok(position) => Ok(position),
            Err(error @ StorageFault::NoSpace { .. }) => Err(FlushError::NoSpace(error.to_string())),
            Err(error) => Err(self.fatal.raise("flush the metadata", error).into()),
        }
    }

    /// Stores `chunk`, which an applied command brought, now or when there is room.
    pub fn store(&self, chunk: StoredChunk) -> Result<(), FatalError> {
        match self.content.append(&chunk) {
            Ok(()) => Ok(()),
            Err(ContentError::NoSpace) => {
                let mut work = self.work.lock();
                work.unstored_bytes += chunk.payload.len();
                work.unstored.push(chunk);
                Ok(())
            }
            Err(error) => Err(self.fatal.raise("store content that came with a command", error)),
        }
    }

    fn store_unstored(&self) -> Result<(), FlushError> {
        loop {
            let Some(chunk) = self.work.lock().unstored.last().cloned() else {
                return Ok(());
            };
            match self.content.append(&chunk) {
                Ok(()) => {}
                Err(ContentError::NoSpace) => {
                    return Err(FlushError::NoSpace("content that came with commands".to_string()));
                }
                Err(error) => {
                    let doing = "store content that came with a command";
                    return Err(self.fatal.raise(doing, error).into());
                }
            }
            let mut work = self.work.lock();
            // Others only add, so what was last may not be any more.
            if let Some(at) = work.unstored.iter().position(|waiting| waiting.id == chunk.id) {
                let stored = work.unstored.swap_remove(at);
                work.unstored_bytes -= stored.payload.len();
            }
        }
    }

    /// Whether [`Flusher::wait_for_room`] would return at once.
    pub fn has_room(&self) -> bool {
        let overlay_bytes = self.metadata.overlay_bytes();
        overlay_bytes < self.overlay_bytes_max / 2 && self.work.lock().unstored_bytes < UNSTORED_BYTES_MAX / 2
    }

    /// Waits until the overlay has room for more. Blocking; for the thread that applies.
    pub fn wait_for_room(&self) -> Result<(), FatalError> {
        loop {
            if let Some(fatal) = self.fatal.raised() {
                return Err(fatal);
            }
            let overlay_bytes = self.metadata.overlay_bytes();
            let mut work = self.work.lock();
            if (overlay_bytes < self.overlay_bytes_max && work.unstored_bytes < UNSTORED_BYTES_MAX)
                || work.stop
            {
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
        let mut work = self.work.lock();
        work.unstored.clear();
        work.unstored_bytes = 0;
        result
    }
}
