//! The words that the parts of QuorumFS exchange.
//!
//! [`command::Command`] (what changes metadata), [`query::Query`] (what reads it), [`call`] (how a mount says either), and
//! the types they are made of. They lie in the Raft log and in the tables, and travel in the messages of
//! `quorumfs_wire`, always in the one versioned encoding of [`codec`].
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

pub use attributes::{Attributes, FileKind, Timestamp};
pub use call::{ClientRequest, ClientResponse, Refusal};
pub use chunk::{BadChunk, Chunk, ChunkBody, ChunkRange, Extent, NewChunk, Sha256};
pub use command::{Command, Operation};
pub use error::FsError;
pub use ids::{ChunkId, InodeNumber, Lane, RequestId, SessionId, SessionSecret};
pub use member::{Addresses, ClusterId, Member, NodeId};
pub use name::{Name, SymlinkTarget, XattrName};
pub use outcome::{OperationResult, Outcome};
pub use query::{Answer, Query};
pub use steady::SteadyTime;
