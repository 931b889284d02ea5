//! What a mount remembers of what the cluster told it.
//!
//! - [`chunk_cache`]: bytes of chunks. Chunks are immutable, so they can never be stale.
//! - [`extent_cache`]: where the bytes of one open file are, as of one version of its content.
//! - [`lease_view`]: attributes and names, for as long as nobody else can change them.
//! - [`page_tail`]: what the reader's own page cache holds behind the end of a file.
//! - [`page_versions`]: which version of a file's content the reader's own page cache holds.
//!
//! They know neither handles nor commands, and do no I/O of their own.

pub mod chunk_cache;
pub mod extent_cache;
pub mod lease_view;
pub mod page_tail;
pub mod page_versions;
