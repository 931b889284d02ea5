//! The work of a leader: it takes content and commands, answers queries behind a barrier, keeps sessions and their
//! leases alive, and combines small extents.
//!
//! A follower uses it for what every node may answer: chunks, and the address of the leader.

pub mod leases;
pub mod read;
pub mod rewrite;
pub mod sessions;
pub mod write;
