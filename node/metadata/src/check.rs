//! Reads the whole database step by step, to find damage before a query meets it.

use std::ops::Bound;

use super::fault::StorageFault;
use super::snapshot::ends_in_its_checksum;
use super::store::MetadataStore;
use super::tables::Table;
use quorumfs_proto::codec::DecodeError;

/// The position of a check. Rows before it may change meanwhile; a changed row is written with a new checksum.
#[derive(Clone, Debug)]
pub struct CheckCursor {
    table: usize,
    after: Vec<u8>,
}

/// The result of one step of a check.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Number of intact rows.
    pub rows: u64,
    /// Bytes of these rows.
    pub bytes: u64,
    /// Where the next step starts; `None` if the check is complete.
    pub next: Option<CheckCursor>,
}

impl MetadataStore {
    /// Reads about `bytes_max` bytes of rows from `from` on, or from the beginning, and after the last row redb's own
    /// pages. Damage is reported through the damage signal, as for every reader. Blocking.
    ///
    /// # Errors
    /// The [`StorageFault`] that was met.
    pub fn check(&self, from: Option<CheckCursor>, bytes_max: u64) -> Result<Checked, StorageFault> {
        let base = self.base();
        let (mut at, mut after) = from.map_or((0, None), |cursor| (cursor.table, Some(cursor.after)));
        let mut checked = Checked::default();
        while let Some(table) = Table::ALL.get(at) {
            let ended = base.database().guarded(|| {
                let begin = match &after {
                    Some(after) => Bound::Excluded(&after[..]),
                    None => Bound::Unbounded,
                };
                let rows = base.table(*table).range::<&[u8]>((begin, Bound::Unbounded))?;
                for row in rows {
                    let (key, value) = row?;
                    if !ends_in_its_checksum(value.value()) {
                        return Err(DecodeError::Checksum { what: "a row" }.into());
                    }
                    checked.rows += 1;
                    checked.bytes += (key.value().len() + value.value().len()) as u64;
                    if checked.bytes >= bytes_max {
                        checked.next = Some(CheckCursor {
                            table: at,
                            after: key.value().to_vec(),
                        });
                        return Ok(false);
                    }
                }
                Ok(true)
            })?;
            if !ended {
                break;
            }
            (at, after) = (at + 1, None);
        }
        if checked.next.is_none() {
            self.commit_nothing()?;
        }
        Ok(checked)
    }
}
