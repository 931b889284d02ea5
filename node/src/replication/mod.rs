//! Which nodes hold which chunks, and how these get there: pushed when they are written, fetched when they are missing.
//!
//! [`placement`] says where chunks belong, [`space`] who has room; [`peers`] are the other nodes' stores,
//! [`messages`] turns chunks into messages and back, with their checksums; [`recovery`]
//! fetches what this node lacks.

pub mod messages;
pub mod names;
pub mod peers;
pub mod placement;
pub mod recovery;
pub mod space;
#[cfg(test)]
mod tests;

pub use peers::{FetchError, HeldError, PeerChunks, PushError, Verdict};
