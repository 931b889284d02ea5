//! The QuorumFS daemon.

pub mod api;
pub mod transport;
