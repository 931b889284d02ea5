//! The metadata state machine: names, inodes, extents, sessions. Its state is a function of the log.
//!
//! The path of a command, by function:
//!
//! 1. The consensus layer takes committed entries and calls [`MetadataStore::begin`], then [`Batch::apply`] for each.
//! 2. `apply` fixes the command's time, checks the session's lane (an earlier result is returned again), and runs the
//!    operations in a `Transaction`, which takes effect as a whole or is rolled back to a verdict.
//! 3. Rows are written to the active overlay, sorted maps in memory. Only the batch sees them until [`Batch::publish`]
//!    makes all of them visible to [`MetadataStore::view`] at once.
//! 4. In the background [`MetadataStore::freeze`] freezes the overlay and [`MetadataStore::flush`] commits it durably
//!    to redb, together with its log index. Everything above that index can be replayed from the log.
//!
//! The path of a query: [`MetadataStore::view`] (one moment of all layers, which never changes), then [`View::answer`].
//!
//! Invariants:
//!
//! - `apply` is deterministic: it uses no clock, no randomness and no order except that of keys. The rows of every node
//!   are equal at equal indexes.
//! - A verdict ([`quorumfs_proto::FsError`]) is an answer and is stored; a [`StorageFault`] stops the node and never
//!   becomes an answer.
//! - `chunks` counts exactly the extents that refer to a chunk. At zero the row is removed and the chunk is dead for
//!   ever.
//! - The work of one command is bounded by its own contents and [`COMMAND_FREED_EXTENTS_MAX`]: an unlink leaves an
//!   orphan and a long truncation a cut, both freed in steps. A write over more extents than that is answered with
//!   [`ApplyResult::Crowded`] and proposed again when the leader has combined the extents.
//!
//! This crate does not know consensus, content (it refers to chunks, it never has their bytes), the network or async.

mod apply;
mod check;
mod command;
mod database;
mod digest;
mod fault;
mod files;
mod fragments;
mod limits;
mod listing;
mod marks;
mod names;
mod options;
mod overlay;
mod query_cost;
mod snapshot;
mod state;
mod store;
mod summary;
mod tables;
mod unlinked;
mod view;

#[cfg(test)]
mod tests;

pub use check::{CheckCursor, Checked};
pub use command::{
    Applied, ApplyResult, Crowded, Effects, InlineChunk, LogBody, LogCommand, SessionKey, UnlinkedAnswer,
};
pub use fault::{Failure, StorageFault};
pub use fragments::{Run, RunTerms, Runs};
pub use limits::{COMMAND_FREED_EXTENTS_MAX, FEATURE_LEVEL};
pub use names::{ChunkFiles, NamedFile};
pub use options::MetadataOptions;
pub use snapshot::{Installation, Received, Row, Snapshot};
pub use store::{Batch, MetadataStore};
pub use summary::{NamedChange, Position};
pub use tables::{ChunkRecord, Replicas, SessionRecord};
pub use unlinked::UnlinkedPage;
pub use view::View;

#[doc = include_str!("../FORMAT.md")]
pub mod format {}
