//! The digest of a state. It is equal on all nodes with the same state, however the rows are divided between overlays
//! and disk.
//!
//! It covers all rows as encoded, in the order of tables and keys. Of `meta`, which also has data of the consensus
//! layer, it covers the counters.

use quorumfs_proto::{Sha256, codec};
use sha2::Digest as _;

use super::fault::StorageFault;
use super::tables::Table;
use super::view::View;

/// Rows between two pauses.
const PAUSE_ROWS: u64 = 2_000;

impl View {
    /// Returns the SHA-256 of the state. It reads all rows; `pause` is called repeatedly, and may block.
    pub fn digest(&self, mut pause: impl FnMut()) -> Result<Sha256, StorageFault> {
        let mut hasher = sha2::Sha256::new();
        hasher.update(codec::encode(&self.counters()));
        let mut rows = 0u64;
        for table in Table::ALL.into_iter().filter(|table| *table != Table::Meta) {
            self.layers.for_each_row(table, |key, value| {
                hasher.update([table.number()]);
                for part in [key, value] {
                    hasher.update((part.len() as u64).to_le_bytes());
                    hasher.update(part);
                }
                rows += 1;
                if rows.is_multiple_of(PAUSE_ROWS) {
                    pause();
                }
                Ok(())
            })?;
        }
        Ok(Sha256(hasher.finalize().into()))
    }
}
