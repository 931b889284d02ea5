//! The members of a cluster.

use std::fmt;

use hex::FromHex as _;
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
        <[u8; 16]>::from_hex(text).ok().map(ClusterId)
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_id_is_read_as_it_is_written() {
        let id = ClusterId(std::array::from_fn(|at| at as u8 * 17));
        assert_eq!(id.to_string(), "00112233445566778899aabbccddeeff");
        assert_eq!(ClusterId::from_hex(&id.to_string()), Some(id));
        for wrong in [
            "",
            "00",
            "+0112233445566778899aabbccddeeff",
            "0011223344556677é9aabbccddeeff",
        ] {
            assert_eq!(ClusterId::from_hex(wrong), None, "{wrong:?}");
        }
    }
}
