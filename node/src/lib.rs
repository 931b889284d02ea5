//! The QuorumFS daemon.

pub mod transport;
