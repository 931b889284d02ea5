//! What a node does so that nobody has to: missing content is fetched, dead content is freed.

pub mod completeness;
pub mod recovery;
pub mod sweep;
