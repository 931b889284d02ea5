//! The daemon.

pub mod caches;
pub mod readahead;
pub mod write_buffer;
