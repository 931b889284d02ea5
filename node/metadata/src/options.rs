//! Options of a metadata store.

/// Default bound of the active overlay: its flush takes about a second.
const OVERLAY_BYTES_MAX: u64 = 64 << 20;
/// Default memory for the database's page cache.
const CACHE_BYTES: usize = 128 << 20;
/// Upper bound of what the database's own metadata adds to a flush.
pub(super) const FLUSH_MARGIN_BYTES: u64 = 4 << 20;

/// Options of a metadata store.
#[derive(Clone, Copy, Debug)]
pub struct MetadataOptions {
    /// Above this many bytes of overlay, callers of [`Batch::apply`](crate::Batch::apply) should wait for a flush.
    pub overlay_bytes_max: u64,
    /// Memory for the database's page cache.
    pub cache_bytes: usize,
}

impl Default for MetadataOptions {
    fn default() -> MetadataOptions {
        MetadataOptions {
            overlay_bytes_max: OVERLAY_BYTES_MAX,
            cache_bytes: CACHE_BYTES,
        }
    }
}
