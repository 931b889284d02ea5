//! Chunks on their way between nodes: pushed when they are written, fetched when they are missing.
//!
//! [`peers`] are the other nodes' stores; [`stream`] is one long stream of calls to one of them; [`messages`] turns chunks
//! into messages and back, with their checksums. Knows nothing of which node should hold what.

pub mod messages;
pub mod peers;
mod stream;
#[cfg(test)]
mod tests;

pub use peers::{FetchError, HeldError, PeerChunks, PushError, Verdict};
