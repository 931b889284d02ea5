//! The words that the parts of QuorumFS exchange.
//!
//! Two layers, and nothing else:
//!
//! - [`wire`]: what tonic and prost generate from the `.proto` files: envelopes, chunk transfer,
//!   and the opaque, versioned messages of the consensus.
//! - domain types: [`command::Command`] (what changes metadata), [`query::Query`] (what reads it),
//!   [`call`] (how a mount says either), and the newtypes they are made of. They travel in the
//!   envelopes, lie in the Raft log and in the tables, always in the one versioned encoding of
//!   [`codec`].
//!
//! A domain type cannot hold what is not valid: [`name::Name`] has no slash, a
//! [`chunk::NewChunk`] is within its bounds. Validation happens in the constructor and, because
//! decoding goes through it, once on receipt; code behind an edge never checks again.
//!
//! This crate knows nothing of sockets, disks, FUSE or Raft, and looks at no clock.

pub mod attributes;
pub mod call;
pub mod chunk;
pub mod codec;
pub mod command;
pub mod error;
pub mod ids;
pub mod limits;
pub mod member;
pub mod name;
pub mod outcome;
pub mod query;
pub mod statistics;
pub mod steady;

/// Generated from `proto/*.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod wire {
    tonic::include_proto!("quorumfs.v1");
}

pub use attributes::{Attributes, FileKind, Timestamp};
pub use call::{Call, CallReply, Refusal};
pub use chunk::{ChunkBody, NewChunk, Piece, Sha256};
pub use command::{Command, Operation};
pub use error::FsError;
pub use ids::{ChunkId, InodeNumber, Lane, RequestId, SessionId, SessionSecret};
pub use member::{Addresses, ClusterId, Member, NodeId};
pub use name::{Name, SymlinkTarget, XattrName};
pub use outcome::{OperationResult, Outcome};
pub use query::{Answer, Query};
pub use steady::SteadyTime;
