//! The members of a cluster.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A node's id in the consensus: its configured slot, and the random number that its data folder got when it was
/// created. A folder that lost its content gets a new number, so it never votes as a node whose votes it has forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId {
    /// The configured slot: 1 to 255, unique in the cluster.
    pub slot: u16,
    /// Random number drawn when the data folder was created; never 0.
    pub incarnation: u64,
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:016x}", self.slot, self.incarnation)
    }
}

/// The permanent id of a cluster: 16 bytes, derived from its first members.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClusterId(pub [u8; 16]);

impl ClusterId {
    /// Converts 16 bytes; `None` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Option<ClusterId> {
        bytes.try_into().ok().map(ClusterId)
    }

    /// Parses the hexadecimal form that `Display` writes.
    pub fn from_hex(text: &str) -> Option<ClusterId> {
        if text.len() != 32 || !text.is_ascii() {
            return None;
        }
        let mut id = [0; 16];
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
        }
        Some(ClusterId(id))
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterId({self})")
    }
}

/// The addresses of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// `host:port` of its gRPC service.
    pub grpc: String,
    /// `host:port` of its HTTP service.
    pub http: String,
}

/// A node: its id and its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The node's id.
    pub id: NodeId,
    /// The node's addresses.
    pub addresses: Addresses,
}
