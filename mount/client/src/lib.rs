//! A client of a QuorumFS cluster: a session, exactly-once calls, chunk transfer. The mount and the nodes' REST
//! interface are its users.
//!
//! One write through it:
//!
//! 1. [`Client::new_chunk`] gives bytes an identity of this session and checksums; from then on the low-water mark of
//!    its mutations stays below it.
//! 2. [`Client::put_chunk`] sends it over the stream of chunks to the leader, and waits until f + 1 voters hold it (P2).
//! 3. [`Client::mutate`] takes a lane, names the command by (session, lane, sequence) and sends it over the stream of
//!    calls, again and again with the same name, wherever the leader is, until there is a verdict (P4, P6). A new
//!    leader that is not sure of the chunks asks for them again first. What a caller gives up waiting for is voided in
//!    the background; until it is settled nothing else is sent, so that nothing later is overtaken by it.
//!
//! One read: [`Client::query`] asks the leader for extents; [`Client::get_chunk`] asks the node that answers best,
//! then the next, for the bytes, and verifies them (P3).
//!
//! Behind it, imports pointing only down this list:
//!
//! - `interface`: what users see, as a trait. `client`: the one that reaches a real cluster; time-outs.
//! - `keep_alive`: keep-alives, a new session for a lost one, release of unlinked inodes.
//! - `mutation`: one mutation from its lane to its verdict.
//! - `session`, `lanes`, `chunk`: what belongs to one session.
//! - `calls`, `chunk_writer`, `chunk_reader`: the three streams; `sources` judges whom to read from.
//! - `leader_link`: a stream that follows the leader and sends again what is not answered, over the multiplexer of
//!   `quorumfs_wire::calls`.
//! - `cluster`: who leads and where everybody is; `discovery` judges what the nodes say,
//!   `address_book` keeps their addresses.
//! - `lease`: whether this client alone uses the cluster; `clock`: what the leader's clock shows.
//! - `connector`: connections and pauses.
//!
//! It knows nothing of FUSE, of files' buffers and caches, or of how a node works.

mod address_book;
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
mod session;
mod sources;

pub use chunk::FreshChunk;
pub use client::{Client, ClientOptions, ConnectError};
pub use interface::{Cluster, FreshContent, UnlinkedHandler};
