//! Whether what the nodes hold is right and no more than that: copies are verified and repaired, metadata compared, what
//! nobody names freed.

pub mod audit;
pub mod completeness;
pub mod repair;
pub mod sweep;
