//! The QuorumFS daemon.

pub mod consensus;
pub mod content;
pub mod metadata;
pub mod transport;
