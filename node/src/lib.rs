//! The QuorumFS daemon.

pub mod content;
pub mod transport;
