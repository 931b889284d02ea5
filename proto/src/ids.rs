//! Identifiers, each a type of its own so that none is taken for another.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An inode's number. Never reused; the root directory is [`InodeNumber::ROOT`].
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

/// A client's identity in the cluster: 64 random bits that the client draws when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What a client knows and nobody else: it proves that a session is its own. Drawn at random with the session's id. The
/// cluster keeps only its digest.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSecret(pub [u8; 32]);

impl fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionSecret(…)")
    }
}

/// A chunk's identity: the session that made it and that session's counter. Never reused.
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

/// One of a session's lanes (the slots of NFSv4.1, RFC 8881 section 2.10.6): it carries one
/// mutation at a time and remembers the last one's result. Below [`crate::limits::LANES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Lane(pub u16);

/// Names one mutation once, however often it is sent (P4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestId {
    /// Whose mutation it is.
    pub session: SessionId,
    /// The lane it travels in.
    pub lane: Lane,
    /// Counts up by one from 1 with each new mutation of the lane.
    pub sequence: u64,
}
