//! Tests of the whole part: `against_model` compares random histories with a simple model, `stories` tells of single
//! rules, `unlinked` of inodes without a name, `levels` of what is
//! gated and compared, `full_disk` of snapshots without room, `pace` measures.

mod against_model;
mod events;
mod full_disk;
mod levels;
mod model;
mod model_sessions;
mod pace;
mod stories;
pub(in crate::metadata) mod support;
mod unlinked;
