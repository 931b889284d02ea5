//! A client of a QuorumFS cluster.
