//! Content: immutable chunks in append-only segments on this node's disk.
//!
//! A put goes [`ContentStore::put`] → the I/O thread's queue → `SegmentWriter::append` (one `pwritev` into the active
//! segment, the index is told) → `SegmentWriter::flush` (one `fdatasync` for all who wait) → answered. A read goes
//! [`ContentStore::read`] → index → header and block CRCs → blocks, both verified. A discard
//! ([`ContentStore::discard`]) takes chunks out of the index, marks their records dead in place, flushes the marks,
//! and only then punches the holes.
//!
//! From the bottom: `record` (bytes) · `segment` (one file) · `scan` (opening one) · `salvage` (one that the disk does not
//! give back) · `index` (chunk → place) ·
//! `fault` (failed flushes) · `writer` (append, flush) · `io_thread` (callers that wait for a flush) · `store` (the whole) ·
//! `reclaim` (its discarding half).
//!
//! Knows nothing of metadata: which chunks are needed, and whether one is dead, is for others to say.

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
