//! Consensus.
pub mod fatal;
pub mod flusher;
pub mod log;
pub mod network;
pub mod snapshot;
pub mod state_machine;
pub mod types;
pub mod wal;
