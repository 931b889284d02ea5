//! What only a leader does: it takes content and commands, answers queries behind a barrier, keeps sessions and their leases
//! alive, and puts small extents together.
//!
//! A follower answers here too, with what any node may: chunks, and who leads.

pub mod leases;
pub mod read;
pub mod rewrite;
pub mod sessions;
pub mod write;
