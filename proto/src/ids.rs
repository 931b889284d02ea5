//! Identifiers. Each has its own type, so that they cannot be confused.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The number of an inode. Never reused; the root directory is [`InodeNumber::ROOT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InodeNumber(pub u64);

impl InodeNumber {
    /// The root directory of the filesystem (FUSE_ROOT_ID).
    pub const ROOT: InodeNumber = InodeNumber(1);
}

impl fmt::Display for InodeNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The id of a session: 64 random bits that the client draws when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The secret that proves that a session belongs to a client. Drawn at random together with the session's id. The
/// cluster keeps only its digest.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSecret(pub [u8; 32]);

impl fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionSecret(…)")
    }
}

/// The id of a chunk: the session that made it and that session's counter. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkId {
    /// The session that made the chunk; only its commands may name it for the first time.
    pub session: SessionId,
    /// Counts up from 1 within the session.
    pub counter: u64,
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.session, self.counter)
    }
}

/// One of a session's lanes (the slots of NFSv4.1, RFC 8881 section 2.10.6). A lane carries one mutation at a time, and
/// the cluster keeps the result of its last one. Below [`crate::limits::LANES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Lane(pub u16);

/// Identifies a mutation, so that it takes effect once however often it is sent (P4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestId {
    /// The session of the sender.
    pub session: SessionId,
    /// The lane that carries the mutation.
    pub lane: Lane,
    /// Starts at 1 and grows by one with each new mutation of the lane.
    pub sequence: u64,
}
