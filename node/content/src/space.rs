//! Space for content.

/// Space for content, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Size of the filesystem.
    pub capacity_bytes: u64,
    /// Free space of the filesystem.
    pub available_bytes: u64,
    /// Space that the store would use for content: the free space less the reserve, plus unused preallocations.
    pub room_bytes: u64,
}
