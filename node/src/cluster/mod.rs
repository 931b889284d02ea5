//! The node as a member of a cluster: who it is, how the cluster is made and changed, who has room and who holds what, whose sessions live,
//! who answers, what the time is, what it does and how well.
//!
//! Stands on the consensus; knows nothing of the edges that serve it.

pub mod bootstrap;
pub mod call_stream;
pub mod clock;
pub mod credential;
pub mod features;
pub mod health;
pub mod identity;
pub mod leases;
pub mod membership;
pub mod metrics;
pub mod placement;
pub mod recover;
pub mod renounce;
pub mod sessions;
pub mod space;
