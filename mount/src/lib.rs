//! The FUSE client of QuorumFS: mounts a cluster as a local directory.
//!
//! **One write.** A fuser thread reads the kernel's WRITE; [`fuse::FuseEdge`] decodes it and calls
//! [`quorumfs_fs::Filesystem::write`], which puts the bytes into the file's [`quorumfs_fs::write_buffer`] and returns:
//! the program continues. Full chunks are put at once, in the background, by [`quorumfs_client::Client::put_chunk`].
//! `close` arrives as FLUSH: [`quorumfs_fs::Filesystem::flush`] waits for the puts and sends one command that names all
//! of them with [`quorumfs_client::Client::mutate`]; when that returns, the bytes are on the disks of f + 1 nodes (P1,
//! P2).
//!
//! **One read.** OPEN queries the file's attributes and extents from the leader ([`quorumfs_fs::Filesystem::open`]) and
//! tells the kernel whether its cached pages are still valid. READ goes to [`quorumfs_fs::Filesystem::read`]: the bytes
//! come from the file's own dirty data, else from the [`quorumfs_fs::caches`], else by
//! [`quorumfs_client::Client::get_chunk`] from any node that has the chunk, verified (P3); [`quorumfs_fs::readahead`]
//! fetches the next bytes of a sequential reader.
//!
//! Imports only point down this list:
//!
//! - `main`, [`options`], [`daemon`]: the command line, and moving into the background.
//! - [`serve`]: one mount from connecting to unmounting. [`mountpoint`]: the directory that is mounted on.
//! - [`fuse`], [`errno`]: the kernel's requests. No module below knows FUSE.
//! - [`statistics`]: the counters of the edge.
//! - `quorumfs_fs`: the POSIX operations in plain async Rust, with their buffers and caches.
//! - `quorumfs_client`: sessions, calls that take effect once, transfer of chunks.

pub mod daemon;
pub mod errno;
pub mod fuse;
pub mod mountpoint;
pub mod options;
pub mod serve;
pub mod statistics;

#[doc = include_str!("../SEMANTICS.md")]
pub mod semantics {}
