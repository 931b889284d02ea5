//! Reading all of the database, some at a time, to find what is damaged before somebody needs it.

use std::ops::Bound;

use super::fault::StorageFault;
use super::snapshot::ends_in_its_checksum;
use super::store::MetadataStore;
use super::tables::Table;
use quorumfs_proto::codec::DecodeError;

/// How far a check has come. The rows behind it may change meanwhile: what changes is written anew, with new checksums.
#[derive(Clone, Debug)]
pub struct CheckCursor {
    table: usize,
    after: Vec<u8>,
}

/// What a step of a check has read.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Rows that are in order.
    pub rows: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Where to go on; `None`: that was all.
    pub next: Option<CheckCursor>,
}

impl MetadataStore {
    /// Reads about `bytes_max` bytes of rows from `from` on, or from the beginning, and after the last row what redb keeps
    /// beside them. Damage is told as whoever reads is told of it. Blocking.
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
