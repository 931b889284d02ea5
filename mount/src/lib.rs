//! The FUSE client of QuorumFS: mounts a cluster as a local directory.
//!
//! **One write.** The kernel's WRITE is read by a fuser thread, decoded by [`fuse::FuseEdge`] and given to
//! [`fs::Filesystem::write`], which puts the bytes into the file's [`write_buffer`] and returns: the program
//! goes on. Full chunks are put at once, in the background, by [`quorumfs_client::Client::put_chunk`].
//! `close` arrives as FLUSH: [`fs::Filesystem::flush`] waits for the puts and sends one command that names
//! all of them with [`quorumfs_client::Client::mutate`]; when that returns the bytes are on the disks of f +
//! 1 nodes (P1, P2).
//!
//! **One read.** OPEN asks the leader for the file's attributes and extents ([`fs::Filesystem::open`]) and
//! tells the kernel whether the pages it has are still right. READ goes to [`fs::Filesystem::read`]: the
//! file's own dirty bytes, else the [`caches`], else [`quorumfs_client::Client::get_chunk`] from any node
//! that has the chunk, verified (P3); [`readahead`] fetches what a sequential reader will want.
//!
//! Imports point only down this list:
//!
//! - `main`, [`options`], [`daemon`]: the command line, and going into the background.
//! - [`serve`]: one mount from connecting to unmounting. [`mountpoint`]: the directory that is mounted on.
//! - [`fuse`], [`errno`]: the kernel's requests. Nothing below knows of FUSE.
//! - [`statistics`]: what the edge counts. [`interrupt`]: programs that are killed while they wait.
//! - [`fs`]: POSIX's verbs, plain async Rust.
//! - [`handles`], [`write_buffer`], [`readahead`], [`caches`]: what it is made of; no I/O in the last three.
//! - `quorumfs_client`: sessions, calls that happen once, chunks on their way.

pub mod caches;
pub mod daemon;
pub mod errno;
pub mod fs;
pub mod fuse;
pub mod handles;
pub mod interrupt;
pub mod mountpoint;
pub mod options;
pub mod readahead;
pub mod serve;
pub mod statistics;
pub mod write_buffer;
