//! The node as a member of a cluster: who it is, how the cluster is made, who has room, whose sessions live,
//! what it does and how well.
//!
//! Stands on the consensus; knows nothing of the edges that serve it.

pub mod bootstrap;
pub mod identity;
pub mod leases;
pub mod metrics;
pub mod sessions;
pub mod space;
