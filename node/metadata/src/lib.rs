//! The metadata state machine: names, inodes, extents, sessions. What it holds is a function of the log.
//!
//! One life of a command, by the functions that lead it:
//!
//! 1. The consensus layer takes committed entries and calls [`MetadataStore::begin`], then [`Batch::apply`] for each.
//! 2. `apply` fixes the command's time, checks the session's lane (an answer given before is given again), and runs
//!    the operations in a `Transaction`, which either takes effect as a whole or is rolled back to a verdict.
//! 3. What it writes goes to the active overlay, sorted maps in memory, seen only by the batch until
//!    [`Batch::publish`] makes all of it visible to [`MetadataStore::view`] at once.
//! 4. In the background [`MetadataStore::freeze`] sets the overlay aside and [`MetadataStore::flush`] commits it to
//!    redb durably, together with the log index it stands for. Everything above that index the log can replay.
//!
//! A query goes: [`MetadataStore::view`] (a moment of all layers that never changes), then [`View::answer`].
//!
//! What must hold:
//!
//! - `apply` is deterministic: it knows no clock, no randomness and no order but that of keys; every node's rows are
//!   equal at equal indexes.
//! - A verdict ([`quorumfs_proto::FsError`]) is an answer and is remembered; a [`StorageFault`] stops the node and
//!   never becomes an answer.
//! - `chunks` counts exactly the extents that name a chunk. At zero the row goes and the chunk is dead for ever.
//! - The work of one command is bounded by what the command itself holds and [`COMMAND_FREED_EXTENTS_MAX`]: an
//!   unlink leaves an orphan and a long truncation a cut, both freed in steps. A write over more extents than that is
//!   answered [`ApplyResult::Crowded`] and proposed again once the leader has put these together.
//!
//! This part knows nothing of consensus, of content (it names chunks, it never has one), of the network or of async.

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
