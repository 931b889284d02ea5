//! The services for mounts and for other nodes.

pub mod carried;
pub mod filesystem;
pub mod peer;
