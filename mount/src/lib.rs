//! The mount.

pub mod daemon;
pub mod errno;
pub mod inode_map;
pub mod mountpoint;
pub mod options;
