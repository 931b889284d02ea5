//! The edges: each decodes, calls, encodes; nothing else.

pub mod admin;
pub mod answers;
pub mod carried;
pub mod connections;
pub mod fs;
pub mod http_metrics;
pub mod peer;
pub mod rest;
pub mod status;
