//! The messages and gRPC services that the parts of QuorumFS talk with: what tonic and prost generate from
//! `proto/*.proto`, and the conversions between these messages and the domain types of `quorumfs_proto`.
//!
//! Commands and queries travel inside these messages as bytes in the encoding of `quorumfs_proto::codec`; the messages
//! of the consensus are opaque here. [`calls`] carries those messages over streams: the one multiplexer of all protocols
//! and its peer. This crate knows nothing of sockets, disks, FUSE or Raft.

pub mod calls;
mod chunk;
mod member;
mod statistics;

/// Generated from `proto/*.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod messages {
    tonic::include_proto!("quorumfs.v1");
}

pub use chunk::MalformedChunk;
pub use member::NotAMember;
pub use messages::*;

#[doc = include_str!("../FORMAT.md")]
pub mod format {}
