//! What a mount caches of the cluster's answers.
//!
//! - [`chunk_cache`]: bytes of chunks. Chunks are immutable, so entries are never stale.
//! - [`extent_cache`]: the extents of one open file at one version of its content.
//! - [`lease_view`]: attributes and names, as long as no other session can change them.
//! - [`page_tail`]: the kernel's pages beyond the end of a file.
//! - [`page_versions`]: the content version of the kernel's pages of a file.
//!
//! These modules must not know handles or commands, and do no I/O.

pub mod chunk_cache;
pub mod extent_cache;
pub mod lease_view;
pub mod page_tail;
pub mod page_versions;
