//! How a content store is laid out.

/// How a content store is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentOptions {
    /// Size of a segment; smaller ones are made where the disk has little room.
    pub segment_bytes: u64,
    /// What content leaves free of the disk for log, metadata and who deletes; at most a sixteenth of the disk.
    pub reserve_bytes: u64,
    /// What is done about a folder that the disk does not list.
    pub unlisted: Unlisted,
}

/// What is done about a content folder that the disk does not list, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlisted {
    /// It is set aside, and its content fetched from other nodes.
    SetAside,
    /// It stays, and the store does not open: nobody else has its content.
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
