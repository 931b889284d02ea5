//! The edges: each decodes, calls, encodes; nothing else.

pub mod grpc;
pub mod http;
