//! The QuorumFS daemon: a Raft member with a metadata database and a content store.
//!
//! # One write
//!
//! A program writes 3 MiB and closes the file.
//!
//! 1. The mount cuts the bytes into chunks and sends each in its `PutChunks` stream to the leader, where
//!    [`api::grpc::filesystem`] decodes it and calls [`leader::write::WritePath::put_chunk`].
//! 2. The leader appends the chunk to its own store ([`quorumfs_content::ContentStore::put`]) and at the same time pushes it
//!    to every other member ([`replication::PeerChunks::push`], served there by [`api::grpc::peer`]). Each answers after a
//!    flush, which it shares with other waiting chunks. When a majority has the chunk on disk, the leader answers the mount
//!    (P2).
//! 3. The mount sends one command that names the three chunks. [`leader::write::WritePath::mutate`] checks that each is known
//!    to be on a quorum in this term, stamps the time, and proposes the command: [`consensus::Consensus::propose`].
//! 4. openraft appends the command to the log ([`consensus`]'s WAL, many entries to one flush) on the leader and on the
//!    followers. Once a majority has flushed it, it is committed, whichever minority of nodes fails next (P1).
//! 5. The apply thread applies it: [`quorumfs_metadata`]'s `apply` first checks the session's lane (a retry gets the first
//!    answer, P4), then changes inodes and extents in the overlay, as a whole or not at all. The outcome, with the new
//!    attributes of all changed inodes, is sent to the mount, and `close` returns.
//! 6. Later, in the background: the overlay goes to redb in one durable transaction, the log behind it is purged, and
//!    every node compares the chunks that it holds with those that files refer to ([`integrity`]).
//!
//! A few KiB of content travel inside the command instead (without steps 1 and 2); each node moves them to its store when
//! it applies the command.
//!
//! # One read
//!
//! 1. `open` asks the leader for the file's attributes and extents: [`leader::read::ReadPath::query`] confirms that the node
//!    still leads and has applied everything acknowledged before ([`consensus::Consensus::barrier`]), then answers from one
//!    consistent [`quorumfs_metadata::View`].
//! 2. `read` asks any node for a range of a chunk: [`leader::read::ReadPath::chunk`] reads whole blocks and checks their CRCs. A
//!    node that lacks the chunk, or whose copy is bad, fetches it from another node for the caller and repairs itself (P3, P7).
//!
//! # Layers
//!
//! Modules import only downwards: [`server`], [`api`], [`node`], [`leader`], [`integrity`], [`membership`], [`observe`],
//! [`replication`], [`consensus`], [`config`], [`transport`], [`logging`], [`call_stream`], [`incoming`], [`private_files`],
//! [`pace`], [`wall_clock`].

pub mod api;
pub mod call_stream;
pub mod config;
pub mod consensus;
pub mod incoming;
pub mod integrity;
pub mod leader;
pub mod logging;
pub mod membership;
pub mod node;
pub mod observe;
pub mod pace;
pub mod private_files;
pub mod replication;
pub mod server;
mod to_end;
pub mod transport;
pub mod wall_clock;

#[doc = include_str!("../ARCHITECTURE.md")]
pub mod architecture {}
