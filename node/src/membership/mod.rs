//! The members of the cluster: a node's identity, how the cluster is created, changed and recovered, and the features
//! that all members know.

pub mod bootstrap;
pub mod changes;
pub mod credential;
pub mod features;
pub mod identity;
pub mod recover;
pub mod renounce;
