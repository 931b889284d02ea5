//! Tests of the whole part: `against_model` compares random histories with a simple model, `stories` tells of single
//! rules, `levels` of what is gated and compared, `bounded` of the work of one command, `rewriting` of small extents that
//! are put together, `full_disk` of snapshots without room, `pace` measures.

mod against_model;
mod bounded;
//! rules, `unlinked` of inodes without a name, `levels` of what is
//! gated and compared, `full_disk` of snapshots without room, `pace` measures.

mod against_model;
mod events;
mod full_disk;
mod levels;
mod model;
mod model_attributes;
mod model_sessions;
mod pace;
mod rewriting;
mod stories;
pub(in crate::metadata) mod support;
mod unlinked;
