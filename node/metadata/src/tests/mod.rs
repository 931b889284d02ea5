//! Tests of the whole crate:
//! - `against_model` compares random histories with a simple model.
//! - `stories` checks single rules.
//! - `freeing` checks the freeing of unreachable data.
//! - `listing` checks directories and trees in pages.
//! - `unlinked` checks inodes without a name.
//! - `levels` checks feature levels and digests.
//! - `bounded` checks the bounds of the work of a command.
//! - `rewriting` checks the combining of small extents.
//! - `full_disk` checks snapshots without space.
//! - `damage` checks damage on disk.

mod against_model;
mod bounded;
mod damage;
mod ended;
mod events;
mod freeing;
mod full_disk;
mod history;
mod levels;
mod listing;
mod model;
mod model_attributes;
mod model_sessions;
mod rewriting;
mod stories;
pub(crate) mod support;
mod unlinked;
