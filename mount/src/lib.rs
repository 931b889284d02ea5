//! The FUSE client of QuorumFS: mounts a cluster as a local directory.

pub mod caches;
pub mod daemon;
pub mod errno;
pub mod fs;
pub mod fuse;
pub mod handles;
pub mod inode_map;
pub mod mountpoint;
pub mod options;
pub mod readahead;
pub mod serve;
pub mod write_buffer;
