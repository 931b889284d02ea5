//! The QuorumFS daemon.

pub mod metadata;
pub mod transport;
