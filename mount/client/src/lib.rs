//! A client of a QuorumFS cluster: a session, exactly-once calls and chunk transfer. It is used by the mount and by
//! the REST interface of the nodes.
//!
//! A write:
//!
//! 1. [`Client::new_chunk`] gives bytes an id of this session and checksums. From then on the low-water mark of the
//!    session's mutations stays at or below the chunk.
//! 2. [`Client::put_chunk`] sends the chunk to the leader over the stream of puts and waits until f + 1 voters hold it
//!    (P2).
//! 3. [`Client::mutate`] takes a lane, identifies the command by (session, lane, sequence) and sends it over the
//!    stream of calls to the current leader, again and again with the same id, until there is a verdict (P4, P6). A
//!    new leader that does not know whether the chunks are durable asks for them again first. A mutation whose caller
//!    stops waiting is voided in the background; no other mutation is sent until that is decided, so no later change
//!    is overtaken by it.
//!
//! A read: [`Client::query`] asks the leader for extents. [`Client::get_chunk`] reads the bytes from the node with the
//! lowest expected latency, or from the next one if that fails, and verifies them (P3).
//!
//! The modules; each imports only modules below it:
//!
//! - `interface`: the public interface as a trait. `client`: its implementation for a real cluster; time-outs.
//! - `keep_alive`: keep-alives, replacement of a lost session, release of unlinked inodes.
//! - `mutation`: one mutation from its lane to its verdict.
//! - `session`, `lanes`, `chunk`: the state of one session.
//! - `calls`, `chunk_writer`, `chunk_reader`: the three streams. `sources` ranks the nodes to read from.
//! - `leader_link`: a stream that follows the leader and resends unanswered requests, over the multiplexer of
//!   `quorumfs_wire::calls`.
//! - `cluster`: the leader and the addresses of all nodes. `discovery` evaluates the answers of the nodes,
//!   `node_addresses` keeps their addresses.
//! - `lease`: whether this client has exclusive use of the cluster. `clock`: an estimate of the leader's clock.
//! - `connector`: connections and backoff.
//!
//! This crate does not know FUSE, file buffers and caches, or the implementation of a node.

mod calls;
mod chunk;
mod chunk_reader;
mod chunk_writer;
mod client;
mod clock;
mod cluster;
mod connector;
mod discovery;
mod interface;
mod keep_alive;
mod lanes;
mod leader_link;
mod lease;
mod mutation;
mod node_addresses;
mod session;
mod sources;

pub use chunk::FreshChunk;
pub use client::{Client, ClientOptions, ConnectError};
pub use interface::{Cluster, FreshContent, UnlinkedHandler};
