//! Options of a content store.

/// Options of a content store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentOptions {
    /// Size of a segment in bytes; segments are smaller if the disk has little space.
    pub segment_bytes: u64,
    /// Bytes of the disk that content leaves free for the log, the metadata and deletions; at most a sixteenth of the
    /// disk.
    pub reserve_bytes: u64,
    /// What to do with a folder that cannot be listed.
    pub unlisted: Unlisted,
}

/// What to do with a content folder that repeatedly cannot be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlisted {
    /// Set it aside; its content is fetched from other nodes.
    SetAside,
    /// Leave it, and do not open the store: no other node has its content.
    Refuse,
}

impl Default for ContentOptions {
    fn default() -> ContentOptions {
        ContentOptions {
            segment_bytes: 256 << 20,
            reserve_bytes: 256 << 20,
            unlisted: Unlisted::Refuse,
        }
    }
}
