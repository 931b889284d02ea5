//! The members of a cluster.

use std::fmt;

use hex::FromHex as _;
use serde::{Deserialize, Serialize};

/// Who a node is to the consensus: its configured slot and the random number its data folder got when it was first
/// made. A folder that lost its content gets a new one, so that it never votes for what it has forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId {
    /// 1 to 255, unique in the cluster.
    pub slot: u16,
    /// Drawn at random when the data folder was made; never 0.
    pub incarnation: u64,
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:016x}", self.slot, self.incarnation)
    }
}

/// Names a cluster for ever: 16 bytes, derived from its first members.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClusterId(pub [u8; 16]);

impl ClusterId {
    /// The id that `bytes` name, if there are 16 of them.
    pub fn from_bytes(bytes: &[u8]) -> Option<ClusterId> {
        bytes.try_into().ok().map(ClusterId)
    }

    /// The id written in hexadecimal by its `Display`.
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

/// Where a node is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// `host:port` of its gRPC service.
    pub grpc: String,
    /// `host:port` of its HTTP service.
    pub http: String,
}

/// A node: who it is and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Who.
    pub id: NodeId,
    /// Where.
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
