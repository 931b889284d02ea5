//! The one thread that writes the log.
//!
//! It takes everything that is queued (up to a bound), makes one batch of it, writes it with one write, flushes it with
//! one fdatasync, and then notifies all waiting operations: a thousand appends that wait together share a flush.
//!
//! A failed write or flush is not retried: every waiting operation fails, and [`FatalSignal`] is raised. A full disk is
//! no failure: the thread waits for space, and so do appends. A purge does not wait behind operations that wait for
//! space, since it may free some: see [`WalWriter::purge_meanwhile`].

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use openraft::storage::IOFlushed;
use parking_lot::{Condvar, Mutex};
use quorumfs_measure::Distribution;
use quorumfs_proto::codec;
use tokio::sync::{Notify, oneshot};

use super::files::{OpenFile, Purpose, Start, WalDirectory};
use super::frame::{BatchWriter, Kind};
use super::memory::{EntryLocation, LogMemory};
use super::{WalError, WalOptions};
use crate::consensus::fatal::{FatalError, FatalSignal};
use crate::consensus::types::{Entry, LogId, TypeConfig, Vote};

/// Most bytes in one batch: flushing more takes so long that it is better left to the next flush.
const BATCH_BYTES_MAX: u64 = 4 << 20;
/// Idle time after which the end of the log is sealed (see [`WalWriter::seal`]).
const IDLE_MS: u64 = 1_000;
/// Bytes left at the end of each file for purges while there is no space for another file.
const END_BYTES: u64 = 512;
/// Pause before the thread checks again whether a full disk has space.
const FULL_RETRY_MS: u64 = 200;

/// An operation on the log.
pub enum Operation {
    /// Adds entries, in order.
    Append {
        /// The entries to add.
        entries: Vec<Arc<Entry>>,
        /// Notified when they are on stable storage.
        flushed: IOFlushed<TypeConfig>,
    },
    /// Stores the vote.
    Vote {
        /// The new vote of the node.
        vote: Vote,
        /// Notified when it is on stable storage.
        flushed: oneshot::Sender<io::Result<()>>,
    },
    /// Removes entries after this one.
    Truncate(Option<LogId>),
    /// Purges entries up to this one.
    Purge(LogId),
    /// Ends the thread.
    Stop,
}

/// An operation in the queue.
pub struct Queued {
    /// Number of the operation; counts up by one.
    pub ticket: u64,
    /// Encoded size, for the bounds.
    pub bytes: u64,
    /// The operation to write.
    pub operation: Operation,
}

/// The state that the thread and appending tasks share.
#[derive(Debug)]
pub struct Shared {
    /// The log as readers see it. Locked for short sections only, never across a write or an await.
    pub memory: Mutex<LogMemory>,
    /// Notified after each flush; used with `memory`.
    pub flushed: Condvar,
    /// Notified when the queue has space.
    pub room: Notify,
    /// Locked while the reserve is created.
    pub reserve: Mutex<()>,
    /// Raised when the log is no longer reliable.
    pub fatal: FatalSignal,
    /// Counters of the flushes.
    pub counters: Counters,
}

impl Shared {
    /// Checks whether the reserve exists, and creates it if there is space.
    fn look_after_reserve(&self, directory: &WalDirectory) {
        let _alone = self.reserve.lock();
        self.note_reserve(directory.ensure_reserve());
    }

    /// Like `look_after_reserve`, unless another thread is doing it.
    pub fn try_look_after_reserve(&self, directory: &WalDirectory) {
        if let Some(_alone) = self.reserve.try_lock() {
            self.note_reserve(directory.ensure_reserve());
        }
    }

    fn note_reserve(&self, held: bool) {
        self.counters.reserve_held.store(held, Ordering::Relaxed);
    }
}

/// Counters for `/status` and for the decision to hand on leadership.
#[derive(Debug, Default)]
pub struct Counters {
    /// Number of flushes.
    pub flushes: AtomicU64,
    /// Number of entries in them.
    pub entries_flushed: AtomicU64,
    /// Durations of the flushes, in nanoseconds.
    pub flush_times: Distribution,
    /// Number of entries in each flush that had any.
    pub flush_entries: Distribution,
    /// Start of the flush in progress, in milliseconds since `epoch`, plus one; 0 if there is none.
    flush_began: AtomicU64,
    /// The longest flush that ended since the last query.
    slowest_ms: AtomicU64,
    /// Whether the reserve for a full disk exists.
    pub reserve_held: AtomicBool,
    /// Whether the thread waits for space on the disk.
    pub disk_full: AtomicBool,
    epoch: std::sync::OnceLock<Instant>,
}

impl Counters {
    fn now_ms(&self) -> u64 {
        self.epoch.get_or_init(Instant::now).elapsed().as_millis() as u64
    }

    fn flush_begins(&self) {
        self.flush_began.store(self.now_ms() + 1, Ordering::Relaxed);
    }

    fn flush_ends(&self) {
        let began = self.flush_began.swap(0, Ordering::Relaxed);
        self.slowest_ms
            .fetch_max((self.now_ms() + 1).saturating_sub(began), Ordering::Relaxed);
    }

    /// Returns the longest flush in milliseconds since the last call, including the one in progress.
    pub fn take_slowest_flush_ms(&self) -> u64 {
        let began = self.flush_began.load(Ordering::Relaxed);
        let under_way = if began == 0 {
            0
        } else {
            (self.now_ms() + 1).saturating_sub(began)
        };
        self.slowest_ms.swap(0, Ordering::Relaxed).max(under_way)
    }
}

/// The state of the thread.
pub struct WalWriter {
    shared: Arc<Shared>,
    directory: WalDirectory,
    open: OpenFile,
    queue: Receiver<Queued>,
    buffer: Vec<u8>,
    /// The state of the written records. The shared memory is ahead of it by the queued operations.
    written: Start,
    /// Entries in the open file.
    entries: u64,
    file_entries_max: u64,
    sealed: bool,
    #[cfg(test)]
    flush_delay_ms: Arc<AtomicU64>,
}

/// The location of each entry of a batch: index, ticket, location.
type Places = Vec<(u64, u64, EntryLocation)>;

impl WalWriter {
    /// Makes a writer that continues in `open`.
    pub fn new(
        shared: Arc<Shared>,
        directory: WalDirectory,
        open: OpenFile,
        queue: Receiver<Queued>,
        options: &WalOptions,
    ) -> WalWriter {
        let written = {
            let memory = shared.memory.lock();
            Start {
                previous_bytes: 0,
                vote: memory.vote,
                purged: memory.purged,
                committed: memory.committed,
            }
        };
        WalWriter {
            shared,
            directory,
            open,
            queue,
            buffer: Vec::new(),
            written,
            entries: 0,
            file_entries_max: options.file_entries_max,
            sealed: true,
            #[cfg(test)]
            flush_delay_ms: options.flush_delay_ms.clone(),
        }
    }

    /// Runs until [`Operation::Stop`], or until a write or flush fails.
    pub fn run(mut self) {
        self.shared.look_after_reserve(&self.directory);
        loop {
            let first = match self.queue.recv_timeout(Duration::from_millis(IDLE_MS)) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => {
                    self.seal();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return self.seal(),
            };
            let (operations, stop) = self.gather(first);
            if !operations.is_empty() {
                match self.write(&operations) {
                    Ok(places) => self.complete(operations, places),
                    Err(error) => return self.fail(operations, stop, error),
                }
            }
            if stop {
                return self.seal();
            }
        }
    }

    fn gather(&self, first: Queued) -> (Vec<Queued>, bool) {
        let mut operations = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(queued) = next {
            if matches!(queued.operation, Operation::Stop) {
                return (operations, true);
            }
            bytes += queued.bytes;
            operations.push(queued);
            if bytes >= BATCH_BYTES_MAX {
                break;
            }
            next = self.queue.try_recv().ok();
        }
        (operations, false)
    }

    /// Makes `operations` durable.
    fn write(&mut self, operations: &[Queued]) -> Result<Places, WalError> {
        let committed = self.shared.memory.lock().committed;
        let (mut batch, mut places) = self.encode(operations, committed);
        let room = self.open.capacity_bytes.saturating_sub(self.open.offset);
        // Not on a full disk, which has no space for another file.
        let is_full = self.entries >= self.file_entries_max
            && self.shared.counters.reserve_held.load(Ordering::Relaxed);
        if is_full && !places.is_empty() || batch.len() as u64 + END_BYTES > room {
            self.next_file(batch.len() as u64 + END_BYTES, first_entry(operations))?;
            // The checksums cover the position, and the position has changed.
            self.buffer = batch;
            (batch, places) = self.encode(operations, committed);
        }
        let path = self.directory.file_path(self.open.sequence);
        let io_error = |doing: &'static str| {
            let path = path.clone();
            move |error| WalError::Io { doing, path, error }
        };
        self.when_room(|| self.open.file.write_all_at(&batch, self.open.offset))
            .map_err(io_error("write log file"))?;
        self.shared.counters.flush_begins();
        let began = Instant::now();
        #[cfg(test)]
        std::thread::sleep(Duration::from_millis(self.flush_delay_ms.load(Ordering::Relaxed)));
        let flushed = self.open.file.sync_data();
        self.shared.counters.flush_times.record_duration(began.elapsed());
        self.shared.counters.flush_ends();
        flushed.map_err(io_error("flush log file"))?;
        self.open.offset += batch.len() as u64;
        self.entries += places.len() as u64;
        self.buffer = batch;
        self.written.committed = committed;
        for queued in operations {
            match &queued.operation {
                Operation::Vote { vote, .. } => self.written.vote = Some(*vote),
                Operation::Purge(upto) => self.written.purged = self.written.purged.max(Some(*upto)),
                Operation::Append { .. } | Operation::Truncate(_) | Operation::Stop => {}
            }
        }
        self.sealed = false;
        Ok(places)
    }

    fn encode(&mut self, operations: &[Queued], committed: Option<LogId>) -> (Vec<u8>, Places) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut batch = BatchWriter::new(self.open.sequence, self.open.offset, buffer);
        let mut places = Places::new();
        let plain = |encoded: bytes::Bytes| move |out: &mut Vec<u8>| out.extend_from_slice(&encoded);
        for Queued {
            ticket, operation, ..
        } in operations
        {
            match operation {
                Operation::Append { entries, .. } => {
                    for entry in entries {
                        let at = batch.record(Kind::Entry, |out| encode_entry(entry, out));
                        let place = EntryLocation {
                            file: self.open.sequence,
                            at: at.start,
                            bytes: (at.end - at.start) as u32,
                        };
                        places.push((entry.log_id.index, *ticket, place));
                    }
                }
                Operation::Vote { vote, .. } => {
                    batch.record(Kind::Vote, plain(codec::encode(vote)));
                }
                Operation::Truncate(last) => {
                    batch.record(Kind::Truncate, plain(codec::encode(last)));
                }
                Operation::Purge(upto) => {
                    batch.record(Kind::Purge, plain(codec::encode(upto)));
                }
                Operation::Stop => {}
            }
        }
        if let Some(committed) = committed
            && Some(committed) != self.written.committed
        {
            batch.record(Kind::Committed, plain(codec::encode(&committed)));
        }
        (batch.finish(), places)
    }

    /// Leaves the file and begins the next, for operations whose first entry is `first_entry`.
    fn next_file(&mut self, bytes_min: u64, first_entry: Option<u64>) -> Result<(), WalError> {
        let sequence = self.open.sequence + 1;
        let next = loop {
            let start = Start {
                previous_bytes: self.open.offset,
                ..self.written.clone()
            };
            match self
                .directory
                .create(sequence, &start, bytes_min, Purpose::Growth)
            {
                Err(WalError::Io { error, .. }) if error.kind() == ErrorKind::StorageFull => {
                    self.wait_for_room();
                    self.purge_meanwhile(first_entry)?;
                }
                created => break created?,
            }
        };
        self.shared.counters.disk_full.store(false, Ordering::Relaxed);
        // Frees the unused part of the old file; a failure does no harm.
        let _ = self.open.file.set_len(self.open.offset);
        let mut memory = self.shared.memory.lock();
        if let Some(left) = memory.files.get_mut(&self.open.sequence) {
            left.bytes = self.open.offset;
        }
        memory.files.insert(sequence, next.begun());
        drop(memory);
        self.open = next;
        self.entries = 0;
        self.shared.look_after_reserve(&self.directory);
        Ok(())
    }

    /// While the disk is full, and operations wait whose first entry is `first_entry`: purges the entries before it,
    /// all of which are written, as far as a queued purge allows. The mark is written to the end of the full file.
    fn purge_meanwhile(&mut self, first_entry: Option<u64>) -> Result<(), WalError> {
        let purged = self.shared.memory.lock().purged;
        let is_written = |upto: &LogId| first_entry.is_some_and(|first| upto.index < first);
        let Some(upto) = purged.filter(|upto| purged > self.written.purged && is_written(upto)) else {
            return Ok(());
        };
        let mut batch = BatchWriter::new(self.open.sequence, self.open.offset, Vec::new());
        batch.record(Kind::Purge, |out| out.extend_from_slice(&codec::encode(&upto)));
        let batch = batch.finish();
        if self.open.offset + batch.len() as u64 > self.open.capacity_bytes {
            return Ok(());
        }
        let path = self.directory.file_path(self.open.sequence);
        let written = self.open.file.write_all_at(&batch, self.open.offset);
        written
            .and_then(|()| self.open.file.sync_data())
            .map_err(|error| WalError::Io {
                doing: "write a purge to log file",
                path,
                error,
            })?;
        self.open.offset += batch.len() as u64;
        self.written.purged = purged;
        self.sealed = false;
        let purged_files = self.shared.memory.lock().purged_files(purged);
        self.remove(purged_files);
        Ok(())
    }

    fn wait_for_room(&self) {
        if !self.shared.counters.disk_full.swap(true, Ordering::Relaxed) {
            tracing::warn!("the disk is full and the log's reserve is used up: waiting for room");
        }
        std::thread::sleep(Duration::from_millis(FULL_RETRY_MS));
    }

    /// Calls `act`, and repeats it while the disk is full.
    fn when_room<T>(&self, act: impl Fn() -> io::Result<T>) -> io::Result<T> {
        loop {
            match act() {
                Err(error) if error.kind() == ErrorKind::StorageFull => self.wait_for_room(),
                result => {
                    self.shared.counters.disk_full.store(false, Ordering::Relaxed);
                    return result;
                }
            }
        }
    }

    /// Reports that `operations` are on stable storage.
    fn complete(&mut self, operations: Vec<Queued>, places: Places) {
        let purged_files = {
            let mut memory = self.shared.memory.lock();
            for (index, ticket, place) in &places {
                memory.placed(*index, *ticket, *place);
            }
            if let Some(file) = memory.files.get_mut(&self.open.sequence) {
                file.bytes = self.open.offset;
            }
            for queued in &operations {
                memory.ticket_flushed = queued.ticket;
                memory.unflushed_bytes -= queued.bytes;
            }
            memory.evict();
            memory.purged_files(self.written.purged)
        };
        self.shared.flushed.notify_all();
        self.shared.room.notify_waiters();
        let counters = &self.shared.counters;
        counters.flushes.fetch_add(1, Ordering::Relaxed);
        counters
            .entries_flushed
            .fetch_add(places.len() as u64, Ordering::Relaxed);
        if !places.is_empty() {
            counters.flush_entries.record(places.len() as u64);
        }
        for queued in operations {
            match queued.operation {
                Operation::Append { flushed, .. } => flushed.io_completed(Ok(())),
                Operation::Vote { flushed, .. } => {
                    // The receiver may be gone; the vote is stored in any case.
                    let _ = flushed.send(Ok(()));
                }
                Operation::Truncate(_) | Operation::Purge(_) | Operation::Stop => {}
            }
        }
        self.remove(purged_files);
    }

    fn remove(&mut self, files: Vec<u64>) {
        let gives_room = !files.is_empty();
        for sequence in files {
            match self.directory.remove(sequence) {
                Ok(()) => {
                    self.shared.memory.lock().files.remove(&sequence);
                }
                Err(error) => {
                    // Does no harm: the next purge tries again.
                    tracing::warn!(%error, "cannot remove a purged log file");
                    return;
                }
            }
        }
        // The reserve is created first: content would leave no space for it.
        if gives_room && !self.shared.counters.reserve_held.load(Ordering::Relaxed) {
            self.shared.look_after_reserve(&self.directory);
        }
    }

    /// Fails all present and later operations: the log is no longer reliable.
    fn fail(self, operations: Vec<Queued>, stop: bool, error: WalError) {
        let fatal = self.shared.fatal.raise("write the log", error);
        self.shared.flushed.notify_all();
        self.shared.room.notify_waiters();
        let refuse = |operation: Operation, fatal: FatalError| match operation {
            Operation::Append { flushed, .. } => flushed.io_completed(Err(fatal.into())),
            Operation::Vote { flushed, .. } => {
                let _ = flushed.send(Err(fatal.into()));
            }
            Operation::Truncate(_) | Operation::Purge(_) | Operation::Stop => {}
        };
        for queued in operations {
            refuse(queued.operation, fatal.clone());
        }
        while !stop && let Ok(queued) = self.queue.recv() {
            if matches!(queued.operation, Operation::Stop) {
                return;
            }
            refuse(queued.operation, fatal.clone());
        }
    }

    /// Writes an empty batch at the end, which the next one overwrites: its header proves that the bytes before it were
    /// flushed, so that later damage to them is not taken for a torn write. It is not flushed; nothing depends on it.
    fn seal(&mut self) {
        if self.sealed {
            return;
        }
        let seal = BatchWriter::new(self.open.sequence, self.open.offset, Vec::new()).finish();
        if self.open.offset + seal.len() as u64 <= self.open.capacity_bytes {
            self.sealed = self.open.file.write_all_at(&seal, self.open.offset).is_ok();
        }
    }
}

/// Returns the index of the first entry that `operations` append.
fn first_entry(operations: &[Queued]) -> Option<u64> {
    operations.iter().find_map(|queued| match &queued.operation {
        Operation::Append { entries, .. } => entries.first().map(|entry| entry.log_id.index),
        _ => None,
    })
}

/// Encodes like [`codec::encode`], directly into the batch.
fn encode_entry(entry: &Entry, out: &mut Vec<u8>) {
    out.push(codec::VERSION);
    let whole = postcard::to_extend(entry, std::mem::take(out)).expect("encoding to memory");
    *out = whole;
}
