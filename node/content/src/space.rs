//! The room for chunks.

/// Room for content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// The size of the filesystem.
    pub capacity_bytes: u64,
    /// What it has free.
    pub available_bytes: u64,
    /// What of that the store would take for content: less its reserve, and with what it has preallocated.
    pub room_bytes: u64,
}
