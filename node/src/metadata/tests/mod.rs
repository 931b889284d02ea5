//! Tests of the whole part: `against_model` compares random histories with a simple model, `stories` tells of single
//! rules, `levels` of what is gated and compared, `full_disk` of snapshots without room, `pace` measures.

mod against_model;
mod ended;
mod full_disk;
mod levels;
mod model;
mod pace;
mod stories;
pub(in crate::metadata) mod support;
