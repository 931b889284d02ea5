//! The daemon.

pub mod caches;
pub mod fs;
pub mod handles;
pub mod readahead;
pub mod write_buffer;
