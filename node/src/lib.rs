//! The QuorumFS daemon.

pub mod api;
pub mod metadata;
pub mod transport;
