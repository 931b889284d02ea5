//! The tasks of the leader: accepting content and commands, answering queries behind a barrier, maintaining sessions
//! and their leases, and combining small extents.
//!
//! Followers use this module to read chunks and to report the leader's address.

pub mod leases;
pub mod read;
pub mod rewrite;
pub mod sessions;
pub mod write;
