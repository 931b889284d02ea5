//! The integrity of the stored data: copies are verified and repaired, metadata is compared, and chunks that no file
//! refers to are freed.

pub mod audit;
pub mod completeness;
pub mod repair;
pub mod sweep;
