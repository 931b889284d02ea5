//! Tests of the whole part: `against_model` compares random histories with a simple model, `stories` tells of single
//! rules, `freeing` of what nobody can reach any more, `listing` of directories in pages, `unlinked` of inodes without a name, `levels` of what is gated and compared, `bounded` of the work of one
//! command, `rewriting` of small extents that are put together, `full_disk` of snapshots without room, `damage` of what
//! lies on the disk otherwise than it was written, `pace` measures.

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
