//! Replication of content: which nodes hold which chunks, and how copies get there. Chunks are pushed when they are
//! written and fetched when they are missing.
//!
//! [`placement`] assigns chunks to nodes. [`space`] tracks free disk space. [`peers`] accesses the content stores of
//! other nodes. [`messages`] converts chunks to and from messages. [`recovery`] fetches the chunks that this node
//! lacks.

pub mod messages;
pub mod names;
pub mod peers;
pub mod placement;
pub mod recovery;
pub mod space;
#[cfg(test)]
mod tests;

pub use peers::{FetchError, HeldError, PeerChunks, PushError, Verdict};
