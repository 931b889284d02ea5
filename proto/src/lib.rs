//! The domain types that the parts of QuorumFS exchange.
//!
//! They are [`command::Command`] (a change of metadata), [`query::Query`] (a read of metadata), [`call`] (the requests
//! and responses that carry them), and the types that these are made of. They are stored in the Raft log and in the
//! tables, and travel in the messages of `quorumfs_wire`, always in the one versioned encoding of [`codec`].
//!
//! A domain type cannot hold an invalid value: [`name::Name`] has no slash, a [`chunk::NewChunk`] is within its bounds.
//! Validation happens in the constructor; decoding calls the constructor, so a value is validated once, on receipt, and
//! code behind an edge never checks it again.
//!
//! This crate does not know sockets, disks, FUSE or Raft, and reads no clock.

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
