//! Who belongs to the cluster: a node's identity, how the cluster is made, changed and recovered, and which features all
//! members have.

pub mod bootstrap;
pub mod changes;
pub mod credential;
pub mod features;
pub mod identity;
pub mod recover;
pub mod renounce;
