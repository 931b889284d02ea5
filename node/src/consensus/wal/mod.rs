//! The write-ahead log, which makes log entries and votes durable.
//!
//! Contract: everything that it has reported as flushed is found again after a crash, or the log refuses to open and
//! says so ([`WalError::DamagedBelowWatermark`]): a node must not vote with a log that has lost entries. Operations
//! that it has not reported may be found or not, but never a later one without an earlier one.
//!
//! - [`frame`]: the bytes; pure.
//! - [`files`]: the files: creating, recovering, the reserve.
//! - [`memory`]: the index of entries and the cache of the newest; pure. `footprint` estimates the memory of an entry.
//! - [`writer`]: the one thread that writes: it drains the queue, writes once, flushes once, then notifies the waiting
//!   operations.
//!
//! This module knows the types of entries and votes, not their meaning.

pub mod files;
mod footprint;
pub mod frame;
pub mod memory;
pub mod writer;

use std::io;
use std::path::PathBuf;

/// Why the log cannot be opened. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// Flushed bytes are damaged. The node has lost promises: it must not vote under its incarnation again.
    #[error("log file {file} is damaged at byte {offset}, below what had been flushed", file = file.display())]
    DamagedBelowWatermark {
        /// Path of the log file.
        file: PathBuf,
        /// Offset in the file.
        offset: u64,
    },
    /// A required file is missing.
    #[error("log file {file} is missing", file = file.display())]
    Missing {
        /// Path of the log file.
        file: PathBuf,
    },
    /// Whole records contradict each other: an error of the program that wrote them.
    #[error("log file {file}: {reason}", file = file.display())]
    Inconsistent {
        /// Path of the log file.
        file: PathBuf,
        /// How they contradict each other.
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {doing} {path}: {error}", path = path.display())]
    Io {
        /// The action that failed.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the system.
        error: io::Error,
    },
}

/// Options of the log.
#[derive(Clone, Debug)]
pub struct WalOptions {
    /// Size of each file. Purging removes whole files.
    pub file_bytes: u64,
    /// Most entries in a file: each has a slot in memory.
    pub file_entries_max: u64,
    /// Most bytes of memory for written entries that are cached for replication and apply.
    pub cache_bytes_max: u64,
    /// Most bytes accepted and not yet flushed; above it appending waits for the disk.
    pub unflushed_bytes_max: u64,
    /// Simulates a slow disk: additional duration of each flush, in milliseconds.
    #[cfg(test)]
    pub flush_delay_ms: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl Default for WalOptions {
    fn default() -> WalOptions {
        WalOptions {
            file_bytes: 64 << 20,
            file_entries_max: 256 << 10,
            cache_bytes_max: 64 << 20,
            // Twice the bound of admission, since a follower gets the entries that several leaders in turn admitted.
            unflushed_bytes_max: 128 << 20,
            #[cfg(test)]
            flush_delay_ms: std::sync::Arc::default(),
        }
    }
}
