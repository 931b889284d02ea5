//! openraft's log, kept by the [`wal`](super::wal).
//!
//! What is appended can be read when `append` returns, from memory; `IOFlushed` is told when it is durable.
//! Reading goes to memory for the newest entries and to the files, on a blocking thread, for older ones.

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

/// Most bytes of entries in one message to a follower: half of what a message may be, for its envelope and
/// for the one entry that goes over.
const REPLICATION_BYTES_MAX: u64 = 2 << 20;
/// Most bytes of entries that a reader of many holds at once.
const READ_BYTES_MAX: u64 = 4 << 20;

/// The log; clones share it.
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
        // Where nobody receives, the thread has ended already.
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
    /// Bytes of all its files.
    pub bytes: u64,
    /// Flushes since the start.
    pub flushes: u64,
    /// Entries in them.
    pub entries_flushed: u64,
    /// Whether the reserve for a full disk is there.
    pub reserve_held: bool,
    /// Whether writing waits for room on the disk.
    pub disk_full: bool,
}

impl LogStore {
    /// Opens the log in `directory`, or makes one. Blocking.
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
            .map_err(|source| WalError::Io {
                doing: "start the thread that writes",
                path: "the log".into(),
                source,
            })?;
        Ok(LogStore(Arc::new(Handle {
            shared,
            queue,
            thread: Mutex::new(Some(thread)),
            unflushed_bytes_max: options.unflushed_bytes_max,
            directory,
        })))
    }

    /// Writes what is queued and ends the writing thread. Blocking.
    pub fn close(&self) {
        self.0.stop();
    }

    /// Whether it has never held an entry or a vote.
    pub fn is_empty(&self) -> bool {
        let memory = self.0.shared.memory.lock();
        memory.vote.is_none() && memory.last_log_id().is_none()
    }

    /// Numbers.
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

    /// How long flushes took (nanoseconds), and how many entries each made durable.
    pub fn flush_distributions(&self) -> (Snapshot, Snapshot) {
        let counters = &self.0.shared.counters;
        (counters.flush_times.snapshot(), counters.flush_entries.snapshot())
    }

    /// The longest flush since the last call, the one under way included.
    pub fn take_slowest_flush_ms(&self) -> u64 {
        self.0.shared.counters.take_slowest_flush_ms()
    }

    /// What the log takes, on disk and in memory; see [`LogMemory::weight_bytes`].
    pub fn weight_bytes(&self) -> u64 {
        self.0.shared.memory.lock().weight_bytes()
    }

    /// Bytes of the files that hold anything beyond entry `index`.
    pub fn bytes_after(&self, index: Option<u64>) -> u64 {
        self.0.shared.memory.lock().bytes_after(index)
    }

    /// Up to which entry whole files can go; see [`LogMemory::purgeable`].
    pub fn purgeable(&self, snapshot: u64, keep_bytes: u64) -> Option<u64> {
        self.0.shared.memory.lock().purgeable(snapshot, keep_bytes)
    }

    /// The entries held.
    pub fn range(&self) -> Range<u64> {
        self.0.shared.memory.lock().range()
    }

    /// The id of entry `index`, if it is held.
    pub fn log_id(&self, index: u64) -> Option<LogId> {
        self.0.shared.memory.lock().log_id(index)
    }

    /// The last entry, or the purge mark if there is none.
    pub fn last_log_id(&self) -> Option<LogId> {
        self.0.shared.memory.lock().last_log_id()
    }

    /// The last entry that is held no more.
    pub fn purged(&self) -> Option<LogId> {
        self.0.shared.memory.lock().purged
    }

    /// Entry `index`, if it is held. Blocking.
    pub fn read_entry(&self, index: u64) -> io::Result<Option<Entry>> {
        let found = self.0.shared.memory.lock().read(index..index + 1, u64::MAX);
        found.first().map(read_held).transpose()
    }

    /// Makes what was made or removed in its directory durable. Blocking.
    pub fn sync_directory(&self) -> io::Result<()> {
        std::fs::File::open(self.0.directory.path())?.sync_all()
    }

    /// Bytes that have been appended and are not on stable storage yet.
    pub fn unflushed_bytes(&self) -> u64 {
        self.0.shared.memory.lock().unflushed_bytes
    }

    /// Whether what is appended will be written as soon as there is room for it.
    pub fn is_healthy(&self) -> bool {
        self.healthy().is_ok()
    }

    /// Whether the reserve for a full disk is used: from now on every purge counts, and nothing is certain to be written
    /// soon.
    pub fn is_pressed(&self) -> bool {
        let counters = &self.0.shared.counters;
        counters.disk_full.load(Ordering::Relaxed) || !counters.reserve_held.load(Ordering::Relaxed)
    }

    /// Makes the reserve for a full disk if it is missing and there is room. Blocking.
    pub fn look_after_reserve(&self) {
        self.0.shared.try_look_after_reserve(&self.0.directory);
    }

    /// Whether entry `index`, which has been appended, is on stable storage (or purged).
    pub fn is_flushed(&self, index: u64) -> bool {
        self.0.shared.memory.lock().is_placed(index)
    }

    /// Waits until entry `index`, which has been appended, and all before it are on stable storage. Blocking.
    pub fn wait_flushed(&self, index: u64) -> io::Result<()> {
        let shared = &self.0.shared;
        let mut memory = shared.memory.lock();
        while !memory.is_placed(index) {
            self.healthy()?;
            // The time-out only bounds how late a fatal error raised elsewhere is seen.
            shared.flushed.wait_for(&mut memory, Duration::from_millis(100));
        }
        Ok(())
    }

    /// Waits until all that has been appended so far is on stable storage, votes and marks too. Blocking.
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

    /// A node that has lost only its state goes on to vote and to keep the log: without it there may be no majority to make
    /// the state anew from.
    fn healthy(&self) -> io::Result<()> {
        match self.0.shared.fatal.raised() {
            Some(fatal) if !fatal.costs_state() => Err(fatal.into()),
            _ => Ok(()),
        }
    }

    /// Queues `operation` and lets `change` bring memory to what it makes of it, as one step, so that the
    /// queue and memory agree on the order.
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

    /// Waits until there is room for more.
    async fn room(&self) -> io::Result<()> {
        loop {
            let room = self.0.shared.room.notified();
            if self.0.shared.memory.lock().unflushed_bytes < self.0.unflushed_bytes_max {
                return Ok(());
            }
            self.healthy()?;
            // The time-out only bounds how late a fatal error raised elsewhere is seen.
            let _ = tokio::time::timeout(Duration::from_millis(100), room).await;
        }
    }

    /// As [`LogStore::read`]; all of `range` is needed, from its first entry on.
    async fn read_from_first(&self, range: Range<u64>, bytes_max: u64) -> io::Result<Vec<Entry>> {
        let wanted = range.start;
        let first = self.range().start;
        if wanted < first && !range.is_empty() {
            return Err(purged_error(wanted, first));
        }
        let entries = self.read(range, bytes_max).await?;
        // It may have been purged meanwhile.
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

/// Of entries that are purged the log has no answer. One from its first entry on would be taken for theirs.
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

    /// Empty where entry `start` is gone: a stream that has been given up may ask for it still, and entries that follow a
    /// hole must not be sent. openraft makes a question of it.
    /// Empty where entry `start` is gone: a stream that has been given up may still ask for it, and entries that follow a
    /// hole must not be sent. openraft asks again where an answer is empty.
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
        // Goes to disk with whatever is written next.
        self.0.shared.memory.lock().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let memory = self.0.shared.memory.lock();
        // The mark may have been written when the entry had yet to come with a snapshot: then it says
        // nothing.
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

/// What `entry` will take in the log.
fn encoded_bytes(entry: &Entry) -> io::Result<u32> {
    let size = postcard::ser_flavors::Size::default();
    let bytes = postcard::serialize_with_flavor(entry, size).map_err(io::Error::other)?;
    u32::try_from(bytes + 1 + frame::RECORD_HEADER_BYTES).map_err(io::Error::other)
}
