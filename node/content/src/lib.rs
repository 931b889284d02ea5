//! The content store: immutable chunks in append-only segments on this node's disk.
//!
//! A put takes these steps: [`ContentStore::put`] → the I/O thread's queue → `SegmentWriter::append` (one `pwritev`
//! into the active segment, then the index is updated) → `SegmentWriter::flush` (one `fdatasync` for all waiting puts)
//! → answer. A read: [`ContentStore::read`] → index → header and block CRCs → blocks, both verified. A discard
//! ([`ContentStore::discard`]) removes chunks from the index, marks their records dead in place, flushes the marks, and
//! only then punches the holes.
//!
//! From the bottom: `record` (bytes) · `segment` (one file) · `scan` (opening a segment) · `salvage` (a segment that
//! the disk cannot read) · `index` (chunk → location) · `fault` (failed flushes) · `writer` (append, flush) ·
//! `io_thread` (callers that wait for a flush) · `store` (the public interface) · `reclaim` (discarding).
//!
//! This crate does not know metadata: its callers decide which chunks are needed and which are dead.

mod aside;
mod error;
mod fault;
mod index;
mod io_thread;
mod options;
mod reclaim;
mod record;
mod salvage;
mod scan;
mod segment;
mod space;
mod store;
#[cfg(test)]
mod tests;
mod writer;

pub use error::{ContentError, Stopped};
pub use options::{ContentOptions, Unlisted};
pub use reclaim::{Quarantined, Rewritten};
pub use space::Space;
pub use store::{ContentStore, FlushCounts, OpenReport};

#[doc = include_str!("../FORMAT.md")]
pub mod format {}
