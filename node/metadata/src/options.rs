//! The sizes of a metadata store.

/// Default bound of the active overlay: a flush of it takes a second or so.
const OVERLAY_BYTES_MAX: u64 = 64 << 20;
/// Default memory for the database's pages.
const CACHE_BYTES: usize = 128 << 20;
/// What the database's own bookkeeping may add to a flush.
pub(super) const FLUSH_MARGIN_BYTES: u64 = 4 << 20;

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct MetadataOptions {
    /// Above this many bytes of overlay the caller of [`Batch::apply`](crate::Batch::apply) waits for a flush.
    pub overlay_bytes_max: u64,
    /// Memory for the database's pages.
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
