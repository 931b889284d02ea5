//! The REST API, for programs and administrators.

pub mod admin;
pub mod connections;
pub mod files;
pub mod metrics;
pub mod status;
