//! The files of the log: `<sequence>.wal` in one directory, without gaps, and a `reserve`.
//!
//! Invariants:
//! - Only the file with the highest sequence is written to; the others were flushed completely. The length of a file
//!   when it was left is in the [`Start`] record of the next.
//! - A file is used only when its `Start` and its name are on stable storage.
//! - Opening always begins a new file, after the tail of the last one has been written again and flushed: bytes that a
//!   crashed process left in the page cache are not known to be on disk, and an fsync after a failed one proves
//!   nothing.
//! - The reserve is a preallocated file of the same size. When the disk is full it becomes the next log file, so that
//!   commands that free space can still be decided. After it files are small, so that each purged one makes space for
//!   the next. A part of the disk is left to the metadata, because nothing is purged without their flushes.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quorumfs_proto::codec;
use serde::{Deserialize, Serialize};

use super::WalError;
use super::frame::{self, BatchWriter, Kind, Scan};
use super::memory::{Cached, EntryLocation, FileInfo, LogMemory};
use crate::consensus::types::{Entry, LogId, Vote};

/// First record of each file: the state that the earlier files leave, since they may be gone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// The length of the previous file.
    pub previous_bytes: u64,
    /// The last vote of the node.
    pub vote: Option<Vote>,
    /// Entries up to this one were purged.
    pub purged: Option<LogId>,
    /// Entries up to this one are committed.
    pub committed: Option<LogId>,
}

/// The `Start` record is within this many bytes from the beginning of a file.
const START_BYTES_MAX: u64 = 4096;

/// Size of a file once the disk has no space for a whole one and the reserve is used.
const SMALL_FILE_BYTES: u64 = 4 << 20;
/// Bytes that growth of the log leaves free on the disk for the metadata …
const LEFT_BYTES_MAX: u64 = 64 << 20;
/// … but at most this part of the disk.
const LEFT_PART_OF_CAPACITY: u64 = 32;

/// The purpose of a new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Growth of the log: some of the disk is left free.
    Growth,
    /// Opening the log: the file may take the last space of the disk.
    Opening,
}

/// The directory of the log.
#[derive(Clone, Debug)]
pub struct WalDirectory {
    path: PathBuf,
    file_bytes: u64,
}

/// A file that is being written.
#[derive(Debug)]
pub struct OpenFile {
    /// Its sequence number.
    pub sequence: u64,
    /// Open for reading and writing.
    pub file: Arc<File>,
    /// Position of the next batch.
    pub offset: u64,
    /// Number of allocated bytes.
    pub capacity_bytes: u64,
}

impl OpenFile {
    /// Returns the file's information before it has entries.
    pub fn begun(&self) -> FileInfo {
        FileInfo {
            file: self.file.clone(),
            bytes: self.offset,
            last_index: None,
            entries: 0,
        }
    }
}

impl WalDirectory {
    /// Creates the directory if it does not exist.
    pub fn new(path: &Path, file_bytes: u64) -> Result<WalDirectory, WalError> {
        std::fs::create_dir_all(path).map_err(io_error("create directory", path))?;
        Ok(WalDirectory {
            path: path.to_path_buf(),
            file_bytes,
        })
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of file `sequence`.
    pub fn file_path(&self, sequence: u64) -> PathBuf {
        self.path.join(format!("{sequence:016x}.wal"))
    }

    fn reserve_path(&self) -> PathBuf {
        self.path.join("reserve")
    }

    /// Makes the names of files durable.
    pub fn sync(&self) -> Result<(), WalError> {
        File::open(&self.path)
            .and_then(|directory| directory.sync_all().map_err(io::Error::other))
            .map_err(io_error("flush directory", &self.path))
    }

    /// Creates file `sequence` with space for at least `bytes_min` after its start.
    ///
    /// # Errors
    /// `ErrorKind::StorageFull` if the disk is full and the reserve is used up.
    pub fn create(
        &self,
        sequence: u64,
        start: &Start,
        bytes_min: u64,
        purpose: Purpose,
    ) -> Result<OpenFile, WalError> {
        let path = self.file_path(sequence);
        let mut batch = BatchWriter::new(sequence, 0, Vec::new());
        batch.record(Kind::Start, |out| out.extend_from_slice(&codec::encode(start)));
        let batch = batch.finish();
        let needed_bytes = batch.len() as u64 + bytes_min;
        let (file, capacity_bytes) = self
            .allocate_some(&path, needed_bytes, purpose)
            .map_err(io_error("create log file", &path))?;
        if let Err(error) = file.write_all_at(&batch, 0) {
            // Preallocation is no guarantee on some filesystems (ZFS), so the disk may still be full; a later attempt
            // starts again.
            let _ = std::fs::remove_file(&path);
            return Err(io_error("write log file", &path)(error));
        }
        // A failed flush is not retried, whatever the cause. It must not be reported as a full disk, for which writers
        // wait.
        let flushed = file.sync_all().map_err(io::Error::other);
        flushed.map_err(io_error("flush log file", &path))?;
        self.sync()?;
        Ok(OpenFile {
            sequence,
            file: Arc::new(file),
            offset: batch.len() as u64,
            capacity_bytes,
        })
    }

    /// Creates a file at `path`, or moves the reserve there. Returns it with its size, at least `needed_bytes`.
    fn allocate_some(&self, path: &Path, needed_bytes: u64, purpose: Purpose) -> io::Result<(File, u64)> {
        let is_full = |result: &io::Result<File>| {
            let error = result.as_ref().err();
            error.is_some_and(|error| error.kind() == ErrorKind::StorageFull)
        };
        let whole_bytes = self.file_bytes.max(needed_bytes);
        let whole = self.allocate_leaving_room(path, whole_bytes);
        if !is_full(&whole) {
            return Ok((whole?, whole_bytes));
        }
        if needed_bytes <= self.file_bytes && std::fs::rename(self.reserve_path(), path).is_ok() {
            let reserve = OpenOptions::new().read(true).write(true).open(path)?;
            return Ok((reserve, self.file_bytes));
        }
        let small_bytes = SMALL_FILE_BYTES.min(self.file_bytes).max(needed_bytes);
        let small = match purpose {
            Purpose::Growth => self.allocate_leaving_room(path, small_bytes),
            Purpose::Opening => allocate(path, small_bytes),
        };
        Ok((small?, small_bytes))
    }

    fn allocate_leaving_room(&self, path: &Path, bytes: u64) -> io::Result<File> {
        // If the free space is unknown, a full disk is noticed by a failed write.
        if let Ok(stat) = nix::sys::statvfs::statvfs(&self.path) {
            let unit = stat.fragment_size();
            let left_bytes = (stat.blocks() * unit / LEFT_PART_OF_CAPACITY).min(LEFT_BYTES_MAX);
            if stat.blocks_available() * unit < bytes + left_bytes {
                return Err(ErrorKind::StorageFull.into());
            }
        }
        allocate(path, bytes)
    }

    /// Removes file `sequence` durably: if a later file were gone and an earlier one not, opening would fail.
    pub fn remove(&self, sequence: u64) -> Result<(), WalError> {
        let path = self.file_path(sequence);
        std::fs::remove_file(&path).map_err(io_error("remove log file", &path))?;
        self.sync()
    }

    /// Whether the reserve exists; creates it if there is space. Called by one thread at a time.
    pub fn ensure_reserve(&self) -> bool {
        let path = self.reserve_path();
        if std::fs::metadata(&path).is_ok_and(|found| found.len() == self.file_bytes) {
            return true;
        }
        let unfinished = self.path.join("reserve.new");
        let made = match std::fs::remove_file(&unfinished) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => self.allocate_leaving_room(&unfinished, self.file_bytes),
        };
        let made = made
            .and_then(|file| file.sync_all())
            .and_then(|()| std::fs::rename(&unfinished, &path));
        made.is_ok() && self.sync().is_ok()
    }

    fn sequences(&self) -> Result<Vec<u64>, WalError> {
        let listing = || -> io::Result<Vec<u64>> {
            let mut found = Vec::new();
            for item in std::fs::read_dir(&self.path)? {
                let name = item?.file_name();
                let Some(digits) = name.to_str().and_then(|name| name.strip_suffix(".wal")) else {
                    continue;
                };
                if digits.len() == 16
                    && let Ok(sequence) = u64::from_str_radix(digits, 16)
                {
                    found.push(sequence);
                }
            }
            found.sort_unstable();
            Ok(found)
        };
        listing().map_err(io_error("list directory", &self.path))
    }

    /// Returns the `Start` of file `sequence`, if it has a whole one.
    fn start_of(&self, sequence: u64) -> Result<Option<Start>, WalError> {
        let path = self.file_path(sequence);
        let bytes = read_front(&path, START_BYTES_MAX)?;
        let found = frame::scan(&bytes, sequence);
        match found.records.first() {
            Some(record) if record.kind == Kind::Start => codec::decode(record.payload(&bytes))
                .map(Some)
                .map_err(|error| inconsistent(&path, error)),
            _ => Ok(None),
        }
    }

    /// Reads all files into `memory` and begins a new one.
    pub fn recover(&self, memory: &mut LogMemory) -> Result<OpenFile, WalError> {
        let mut sequences = self.sequences()?;
        if let Some(&last) = sequences.last()
            && self.start_of(last)?.is_none()
        {
            // Its creation was interrupted, unless it has more than its start.
            let path = self.file_path(last);
            let bytes = std::fs::read(&path).map_err(io_error("read log file", &path))?;
            if let Some(offset) = frame::scan(&bytes, last).damaged_below_watermark {
                return Err(damaged(&path, offset));
            }
            tracing::warn!(file = %path.display(), "removed a log file whose creation was interrupted when the node stopped");
            self.remove(last)?;
            sequences.pop();
        }
        for pair in sequences.windows(2) {
            if pair[1] != pair[0] + 1 {
                return Err(WalError::Missing {
                    file: self.file_path(pair[0] + 1),
                });
            }
        }
        let mut previous_bytes = 0;
        for (at, &sequence) in sequences.iter().enumerate() {
            let sealed_bytes = match sequences.get(at + 1) {
                None => None,
                Some(&next) => match self.start_of(next)? {
                    Some(start) => Some(start.previous_bytes),
                    None => return Err(damaged(&self.file_path(next), 0)),
                },
            };
            previous_bytes = self.recover_file(sequence, sealed_bytes, memory)?;
        }
        if let Some(hole) = memory.missing_entry() {
            return Err(WalError::Inconsistent {
                file: self.file_path(sequences.first().copied().unwrap_or(1)),
                reason: format!("entry {hole} is missing and was not purged"),
            });
        }
        let start = Start {
            previous_bytes,
            vote: memory.vote,
            purged: memory.purged,
            committed: memory.committed,
        };
        let sequence = sequences.last().map_or(1, |last| last + 1);
        let open = self.create(sequence, &start, 0, Purpose::Opening)?;
        memory.files.insert(sequence, open.begun());
        Ok(open)
    }

    /// Replays file `sequence`, which ends at `sealed_bytes` if it is not the last; returns where it ends.
    fn recover_file(
        &self,
        sequence: u64,
        sealed_bytes: Option<u64>,
        memory: &mut LogMemory,
    ) -> Result<u64, WalError> {
        let path = self.file_path(sequence);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(io_error("open log file", &path))?;
        let bytes = read_front(&path, sealed_bytes.unwrap_or(u64::MAX))?;
        let found = frame::scan(&bytes, sequence);
        if let Some(offset) = found.damaged_below_watermark {
            return Err(damaged(&path, offset));
        }
        match sealed_bytes {
            Some(sealed) if found.end as u64 != sealed => return Err(damaged(&path, found.end)),
            Some(_) => {}
            None => rewrite_tail(&path, &file, &bytes, &found)?,
        }
        memory.files.insert(
            sequence,
            FileInfo {
                file: Arc::new(file),
                bytes: found.end as u64,
                last_index: None,
                entries: 0,
            },
        );
        for record in &found.records {
            let place = EntryLocation {
                file: sequence,
                at: record.place.start as u64,
                bytes: record.place.len() as u32,
            };
            replay(record.kind, record.payload(&bytes), place, memory)
                .map_err(|reason| inconsistent(&path, reason))?;
        }
        Ok(found.end as u64)
    }
}

fn replay(kind: Kind, payload: &[u8], place: EntryLocation, memory: &mut LogMemory) -> Result<(), String> {
    let text = |error: codec::DecodeError| error.to_string();
    match kind {
        Kind::Start => {
            let start: Start = codec::decode(payload).map_err(text)?;
            memory.vote = start.vote;
            memory.committed = start.committed;
            if let Some(purged) = start.purged {
                memory.purge(purged);
            }
        }
        Kind::Entry => {
            let entry: Entry = codec::decode(payload).map_err(text)?;
            memory.append(Arc::new(entry), Cached::WrittenAt(place))?;
        }
        Kind::Vote => memory.vote = Some(codec::decode(payload).map_err(text)?),
        Kind::Truncate => memory.truncate_after(codec::decode(payload).map_err(text)?),
        Kind::Purge => memory.purge(codec::decode(payload).map_err(text)?),
        Kind::Committed => memory.committed = Some(codec::decode(payload).map_err(text)?),
    }
    Ok(())
}

/// Makes the last file durable: bytes that were read may never have reached the disk. The last batch is written again
/// (the earlier ones were flushed before it was begun), a torn part is cut off, and the file is flushed.
fn rewrite_tail(path: &Path, file: &File, bytes: &[u8], found: &Scan) -> Result<(), WalError> {
    let torn = bytes[found.end..].iter().any(|byte| *byte != 0);
    if torn {
        tracing::warn!(file = %path.display(), offset = found.end, "the log ended in a torn write, which was cut off");
    }
    file.write_all_at(&bytes[found.last_batch..found.end], found.last_batch as u64)
        .map_err(io_error("rewrite log file", path))?;
    file.set_len(found.end as u64)
        .map_err(io_error("cut log file", path))?;
    file.sync_all().map_err(io_error("flush log file", path))
}

fn read_front(path: &Path, bytes_max: u64) -> Result<Vec<u8>, WalError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(File::open(path)?, bytes_max), &mut bytes)?;
        Ok(bytes)
    };
    read().map_err(io_error("read log file", path))
}

/// Creates a file with `bytes` allocated; removes it again if there is no space.
fn allocate(path: &Path, bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(crate::private_files::FILE_MODE)
        .open(path)?;
    let length = i64::try_from(bytes).map_err(|_| io::Error::from(ErrorKind::FileTooLarge))?;
    match nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, length) {
        Ok(()) => Ok(file),
        // A filesystem that cannot preallocate extends the file instead: slower, but correct.
        Err(nix::errno::Errno::EOPNOTSUPP) => file.set_len(bytes).map(|()| file),
        Err(error) => {
            let _ = std::fs::remove_file(path);
            Err(io::Error::from(error))
        }
    }
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WalError {
    let path = path.to_path_buf();
    move |error| WalError::Io { doing, path, error }
}

fn damaged(file: &Path, offset: usize) -> WalError {
    WalError::DamagedBelowWatermark {
        file: file.to_path_buf(),
        offset: offset as u64,
    }
}

fn inconsistent(file: &Path, reason: impl ToString) -> WalError {
    WalError::Inconsistent {
        file: file.to_path_buf(),
        reason: reason.to_string(),
    }
}
