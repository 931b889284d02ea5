//! The node's edges: each decodes, calls and encodes, nothing else.

pub mod rest;
