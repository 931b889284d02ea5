//! The log of openraft, stored by the [`wal`](super::wal).
//!
//! Appended entries can be read from memory when `append` returns; `IOFlushed` is notified when they are durable. The
//! newest entries are read from memory, older ones from the files on a blocking thread.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{OptionalSend, OptionalSync};
use parking_lot::{Condvar, Mutex};
use quorumfs_measure::Snapshot;
use quorumfs_proto::codec;
use serde::Serialize;
use tokio::sync::{Notify, oneshot};

use super::fatal::FatalSignal;
use super::types::{Entry, LogId, TypeConfig, Vote};
use super::wal::files::WalDirectory;
use super::wal::frame::{self, Kind};
use super::wal::memory::{Cached, EntryLocation, Held, LogMemory};
use super::wal::writer::{Counters, Operation, Queued, Shared, WalWriter};
use super::wal::{WalError, WalOptions};

/// Most bytes of entries in one message to a follower: half of the largest message, which leaves space for its envelope
/// and for the entry that exceeds the bound.
const REPLICATION_BYTES_MAX: u64 = 2 << 20;
/// Most bytes of entries that one read of many entries holds at once.
const READ_BYTES_MAX: u64 = 4 << 20;

/// The log. Clones share it.
#[derive(Clone, Debug)]
pub struct LogStore(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Queued>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    unflushed_bytes_max: u64,
    directory: WalDirectory,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Handle {
    fn stop(&self) {
        let ticket = self.shared.memory.lock().ticket_last;
        let stop = Queued {
            ticket,
            bytes: 0,
            operation: Operation::Stop,
        };
        // If the receiver is gone, the thread has already ended.
        let _ = self.queue.send(stop);
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            self.shared
                .fatal
                .raise("write the log", "the writing thread panicked");
        }
    }
}

/// The log's part of the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LogStatus {
    /// Size of all its files.
    pub bytes: u64,
    /// Number of flushes since the start.
    pub flushes: u64,
    /// Number of entries in these flushes.
    pub entries_flushed: u64,
    /// Whether the reserve for a full disk exists.
    pub reserve_held: bool,
    /// Whether writing waits for space on the disk.
    pub disk_full: bool,
}

impl LogStore {
    /// Opens the log in `directory`, or creates it. Blocking.
    ///
    /// # Errors
    /// [`WalError`].
    pub fn open(directory: &Path, options: &WalOptions, fatal: FatalSignal) -> Result<LogStore, WalError> {
        let directory = WalDirectory::new(directory, options.file_bytes)?;
        let mut memory = LogMemory::new(options.cache_bytes_max);
        let open = directory.recover(&mut memory)?;
        let shared = Arc::new(Shared {
            memory: Mutex::new(memory),
            flushed: Condvar::new(),
            room: Notify::new(),
            reserve: Mutex::new(()),
            fatal,
            counters: Counters::default(),
        });
        let (queue, receiver) = mpsc::channel();
        let writer = WalWriter::new(shared.clone(), directory.clone(), open, receiver, options);
        let thread = std::thread::Builder::new()
            .name("log".to_string())
            .spawn(move || writer.run())
            .map_err(|error| WalError::Io {
                doing: "start the writing thread of the log in",
                path: directory.path().to_path_buf(),
                error,
            })?;
        Ok(LogStore(Arc::new(Handle {
            shared,
            queue,
            thread: Mutex::new(Some(thread)),
            unflushed_bytes_max: options.unflushed_bytes_max,
            directory,
        })))
    }

    /// Writes everything queued and ends the writing thread. Blocking.
    pub fn close(&self) {
        self.0.stop();
    }

    /// Whether the log has never had an entry or a vote.
    pub fn is_empty(&self) -> bool {
        let memory = self.0.shared.memory.lock();
        memory.vote.is_none() && memory.last_log_id().is_none()
    }

    /// Returns the log's part of the status.
    pub fn status(&self) -> LogStatus {
        let counters = &self.0.shared.counters;
        LogStatus {
            bytes: self.0.shared.memory.lock().wal_bytes(),
            flushes: counters.flushes.load(Ordering::Relaxed),
            entries_flushed: counters.entries_flushed.load(Ordering::Relaxed),
            reserve_held: counters.reserve_held.load(Ordering::Relaxed),
            disk_full: counters.disk_full.load(Ordering::Relaxed),
        }
    }

    /// Returns the distributions of the durations of flushes (nanoseconds) and of the number of entries in each.
    pub fn flush_distributions(&self) -> (Snapshot, Snapshot) {
        let counters = &self.0.shared.counters;
        (counters.flush_times.snapshot(), counters.flush_entries.snapshot())
    }

    /// Returns the longest flush in milliseconds since the last call, including the one in progress.
    pub fn take_slowest_flush_ms(&self) -> u64 {
        self.0.shared.counters.take_slowest_flush_ms()
    }

    /// Returns the weight of the log on disk and in memory; see [`LogMemory::weight_bytes`].
    pub fn weight_bytes(&self) -> u64 {
        self.0.shared.memory.lock().weight_bytes()
    }

    /// Returns the size of the files that have entries after `index`.
    pub fn bytes_after(&self, index: Option<u64>) -> u64 {
        self.0.shared.memory.lock().bytes_after(index)
    }

    /// Returns the entry up to which whole files can be purged; see [`LogMemory::purgeable`].
    pub fn purgeable(&self, snapshot: u64, keep_bytes: u64) -> Option<u64> {
        self.0.shared.memory.lock().purgeable(snapshot, keep_bytes)
    }

    /// Returns the range of the indexes in the log.
    pub fn range(&self) -> Range<u64> {
        self.0.shared.memory.lock().range()
    }

    /// Returns the id of entry `index`, if the log has it.
    pub fn log_id(&self, index: u64) -> Option<LogId> {
        self.0.shared.memory.lock().log_id(index)
    }

    /// Returns the id of the last entry, or the purge mark if there is none.
    pub fn last_log_id(&self) -> Option<LogId> {
        self.0.shared.memory.lock().last_log_id()
    }

    /// Returns the id of the last purged entry.
    pub fn purged(&self) -> Option<LogId> {
        self.0.shared.memory.lock().purged
    }

    /// Returns entry `index`, if the log has it. Blocking.
    pub fn read_entry(&self, index: u64) -> io::Result<Option<Entry>> {
        let found = self.0.shared.memory.lock().read(index..index + 1, u64::MAX);
        found.first().map(read_held).transpose()
    }

    /// Makes files created or removed in the log's directory durable. Blocking.
    pub fn sync_directory(&self) -> io::Result<()> {
        std::fs::File::open(self.0.directory.path())?.sync_all()
    }

    /// Returns the number of bytes appended and not yet on stable storage.
    pub fn unflushed_bytes(&self) -> u64 {
        self.0.shared.memory.lock().unflushed_bytes
    }

    /// Whether appended entries will be written as soon as there is space.
    pub fn is_healthy(&self) -> bool {
        self.healthy().is_ok()
    }

    /// Whether the reserve for a full disk is used up: from now on every purge matters, and a write may wait long for
    /// space.
    pub fn is_pressed(&self) -> bool {
        let counters = &self.0.shared.counters;
        counters.disk_full.load(Ordering::Relaxed) || !counters.reserve_held.load(Ordering::Relaxed)
    }

    /// Creates the reserve for a full disk if it is missing and there is space. Blocking.
    pub fn look_after_reserve(&self) {
        self.0.shared.try_look_after_reserve(&self.0.directory);
    }

    /// Whether entry `index`, which has been appended, is on stable storage (or purged).
    pub fn is_flushed(&self, index: u64) -> bool {
        self.0.shared.memory.lock().is_placed(index)
    }

    /// Waits until entry `index`, which has been appended, and all entries before it are on stable storage. Blocking.
    pub fn wait_flushed(&self, index: u64) -> io::Result<()> {
        let shared = &self.0.shared;
        let mut memory = shared.memory.lock();
        while !memory.is_placed(index) {
            self.healthy()?;
            // The time-out only bounds the delay until a fatal error raised elsewhere is noticed.
            shared.flushed.wait_for(&mut memory, Duration::from_millis(100));
        }
        Ok(())
    }

    /// Waits until everything appended so far, votes and marks included, is on stable storage. Blocking.
    #[cfg(test)]
    pub fn wait_all_flushed(&self) {
        let mut memory = self.0.shared.memory.lock();
        let ticket = memory.ticket_last;
        while memory.ticket_flushed < ticket {
            self.0
                .shared
                .flushed
                .wait_for(&mut memory, Duration::from_millis(100));
        }
    }

    /// Fails if the node must stop. A node that has lost only its state continues to vote and to keep the log: without
    /// it there may be no majority from which the state can be rebuilt.
    fn healthy(&self) -> io::Result<()> {
        match self.0.shared.fatal.raised() {
            Some(fatal) if !fatal.costs_state() => Err(fatal.into()),
            _ => Ok(()),
        }
    }

    /// Queues `operation` and updates memory with `change` as one step, so that queue and memory have the same order.
    fn queue(
        &self,
        bytes: u64,
        operation: Operation,
        change: impl FnOnce(&mut LogMemory, u64) -> Result<(), String>,
    ) -> io::Result<()> {
        self.healthy()?;
        let mut memory = self.0.shared.memory.lock();
        let ticket = memory.ticket_last + 1;
        change(&mut memory, ticket).map_err(|reason| io::Error::new(io::ErrorKind::InvalidInput, reason))?;
        memory.ticket_last = ticket;
        memory.unflushed_bytes += bytes;
        let queued = Queued {
            ticket,
            bytes,
            operation,
        };
        self.0
            .queue
            .send(queued)
            .map_err(|_| io::Error::other("the log has been closed"))
    }

    /// Waits until the queue has space.
    async fn room(&self) -> io::Result<()> {
        loop {
            let room = self.0.shared.room.notified();
            if self.0.shared.memory.lock().unflushed_bytes < self.0.unflushed_bytes_max {
                return Ok(());
            }
            self.healthy()?;
            // The time-out only bounds the delay until a fatal error raised elsewhere is noticed.
            let _ = tokio::time::timeout(Duration::from_millis(100), room).await;
        }
    }

    /// Like [`LogStore::read`], but fails if the first entry of `range` is missing.
    async fn read_from_first(&self, range: Range<u64>, bytes_max: u64) -> io::Result<Vec<Entry>> {
        let wanted = range.start;
        let first = self.range().start;
        if wanted < first && !range.is_empty() {
            return Err(purged_error(wanted, first));
        }
        let entries = self.read(range, bytes_max).await?;
        // The entry may have been purged meanwhile.
        match entries.first() {
            Some(entry) if entry.log_id.index != wanted => Err(purged_error(wanted, entry.log_id.index)),
            _ => Ok(entries),
        }
    }

    async fn read(&self, range: Range<u64>, bytes_max: u64) -> io::Result<Vec<Entry>> {
        let found = self.0.shared.memory.lock().read(range, bytes_max);
        if found.iter().all(|held| matches!(held, Held::InMemory(_))) {
            return found.iter().map(read_held).collect();
        }
        let read = tokio::task::spawn_blocking(move || found.iter().map(read_held).collect());
        match read.await {
            Ok(result) => result,
            Err(panicked) => Err(io::Error::other(panicked)),
        }
    }
}

/// The error for purged entries. The entries after them must not be returned in their place.
fn purged_error(wanted: u64, first: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        format!("entry {wanted} of the log was purged; it begins at entry {first}"),
    )
}

fn read_held(held: &Held) -> io::Result<Entry> {
    let (
        file,
        EntryLocation {
            file: sequence,
            at,
            bytes,
        },
    ) = match held {
        Held::InMemory(entry) => return Ok(Entry::clone(entry)),
        Held::OnDisk { file, place } => (file, *place),
    };
    let mut record = vec![0; bytes as usize];
    file.read_exact_at(&mut record, at)?;
    match frame::open_record(&record, sequence, at) {
        Some((Kind::Entry, payload)) => codec::decode(payload).map_err(io::Error::other),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("log file {sequence:016x} is damaged at byte {at}"),
        )),
    }
}

fn bounds(range: impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(before) => before + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last + 1,
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        self.read(bounds(range), u64::MAX).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.0.shared.memory.lock().vote)
    }

    /// Returns nothing if entry `start` is gone: a stream that has been given up may still ask for it, and entries
    /// after a gap must not be sent. openraft asks again after an empty answer.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let mut entries = self.read(start..end, REPLICATION_BYTES_MAX).await?;
        if entries.first().is_some_and(|first| first.log_id.index != start) {
            entries.clear();
        }
        Ok(entries)
    }

    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let log = self.clone();
        let pieces = futures::stream::unfold(bounds(range), move |left| {
            let log = log.clone();
            async move {
                if left.is_empty() {
                    return None;
                }
                match log.read_from_first(left.clone(), READ_BYTES_MAX).await {
                    Ok(entries) => {
                        let next = entries.last()?.log_id.index + 1;
                        Some((entries.into_iter().map(Ok).collect(), next..left.end))
                    }
                    Err(error) => Some((vec![Err(error)], left.end..left.end)),
                }
            }
        });
        pieces
            .map(|piece: Vec<io::Result<Entry>>| futures::stream::iter(piece))
            .flatten()
    }
}

impl RaftLogStorage<TypeConfig> for LogStore
where
    LogStore: OptionalSend + OptionalSync,
{
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let memory = self.0.shared.memory.lock();
        Ok(LogState {
            last_purged_log_id: memory.purged,
            last_log_id: memory.last_log_id(),
        })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let (flushed, done) = oneshot::channel();
        let vote = *vote;
        self.queue(0, Operation::Vote { vote, flushed }, |memory, _| {
            memory.vote = Some(vote);
            Ok(())
        })?;
        match done.await {
            Ok(result) => result,
            Err(_) => Err(io::Error::other("the log was closed before the vote was written")),
        }
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        // Written together with the next operation.
        self.0.shared.memory.lock().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let memory = self.0.shared.memory.lock();
        // The mark may have been written before its entry arrived with a snapshot: then it is ignored.
        Ok(memory
            .committed
            .filter(|mark| memory.log_id(mark.index) == Some(*mark)))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut sized = Vec::new();
        for entry in entries {
            let bytes = encoded_bytes(&entry)?;
            sized.push((Arc::new(entry), bytes));
        }
        self.room().await?;
        let bytes = sized.iter().map(|(_, bytes)| u64::from(*bytes)).sum();
        let operation = Operation::Append {
            entries: sized.iter().map(|(entry, _)| entry.clone()).collect(),
            flushed: callback,
        };
        self.queue(bytes, operation, |memory, ticket| {
            for (entry, bytes) in sized {
                memory.append(entry, Cached::Unwritten { ticket, bytes })?;
            }
            Ok(())
        })
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        self.queue(0, Operation::Truncate(last_log_id), |memory, _| {
            memory.truncate_after(last_log_id);
            Ok(())
        })
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        self.queue(0, Operation::Purge(log_id), |memory, _| {
            memory.purge(log_id);
            Ok(())
        })
    }
}

/// Returns the encoded size of `entry`.
fn encoded_bytes(entry: &Entry) -> io::Result<u32> {
    let size = postcard::ser_flavors::Size::default();
    let bytes = postcard::serialize_with_flavor(entry, size).map_err(io::Error::other)?;
    u32::try_from(bytes + 1 + frame::RECORD_HEADER_BYTES).map_err(io::Error::other)
}
