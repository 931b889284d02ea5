//! The write-ahead log: where log entries and votes are made durable.
//!
//! It owes: what it has reported as flushed is found again after a crash, or the log refuses to open and says
//! so ([`WalError::DamagedBelowWatermark`]): a node must not vote with a log that has forgotten. What it has
//! not reported may be found or not, but only from the front: never a later operation without an earlier one.
//!
//! - [`frame`]: the bytes; pure.
//! - [`files`]: the files: creating, recovering, the reserve.
//! - [`memory`]: the index of entries and the cache of the newest; pure. `footprint` says what an entry takes there.
//! - [`writer`]: the one thread that writes: it drains what is queued, one write, one fdatasync, then tells.
//!
//! Knows the types of entries and votes, nothing of what they mean.

pub mod files;
mod footprint;
pub mod frame;
pub mod memory;
pub mod writer;

use std::io;
use std::path::PathBuf;

/// Why the log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// Bytes that had been flushed are not as they were written. The node has lost what it promised: it must
    /// not vote under its identity again.
    #[error("log file {file} is damaged at byte {offset}, below what had been flushed", file = file.display())]
    DamagedBelowWatermark {
        /// Which file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
    },
    /// A file that must be there is not.
    #[error("log file {file} is missing", file = file.display())]
    Missing {
        /// Which.
        file: PathBuf,
    },
    /// Whole records that contradict each other: a fault of the program that wrote them.
    #[error("log file {file}: {reason}", file = file.display())]
    Inconsistent {
        /// In which file.
        file: PathBuf,
        /// How.
        reason: String,
    },
    /// The operating system refused.
    #[error("{doing} {path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
}

/// How the log is kept.
#[derive(Clone, Debug)]
pub struct WalOptions {
    /// Bytes that each file is given when it is made. Purging takes whole files.
    pub file_bytes: u64,
    /// Most entries in a file: a slot in memory is kept for each.
    pub file_entries_max: u64,
    /// Most bytes that entries take which are kept in memory for replication and apply, besides those not yet flushed.
    pub cache_bytes_max: u64,
    /// Most bytes accepted and not yet flushed; beyond it appending waits for the disk.
    pub unflushed_bytes_max: u64,
    /// A slow disk: each flush takes so much longer, in milliseconds.
    #[cfg(test)]
    pub flush_delay_ms: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl Default for WalOptions {
    fn default() -> WalOptions {
        WalOptions {
            file_bytes: 64 << 20,
            file_entries_max: 256 << 10,
            cache_bytes_max: 64 << 20,
            // Twice what admission lets in, since a follower gets what several leaders in turn let in.
            unflushed_bytes_max: 128 << 20,
            #[cfg(test)]
            flush_delay_ms: std::sync::Arc::default(),
        }
    }
}
