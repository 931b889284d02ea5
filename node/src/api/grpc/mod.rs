//! The gRPC services for mounts and for other nodes.

pub mod filesystem;
pub mod peer;
pub mod transfer_budget;
