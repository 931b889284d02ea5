//! The whole state as a sequence of rows: read from a durable moment of the database, and loaded into a new one.
//!
//! A snapshot has every table, sorted by table and key, including `meta` with its position. Sender and receiver have
//! the same rows.

use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::codec::DecodeError;

use super::database::{DamageSignal, Database};
use super::fault::StorageFault;
use super::files::{TemporaryFile, available_bytes, sync_file};
use super::options::{FLUSH_MARGIN_BYTES, MetadataOptions};
use super::overlay::Base;
use super::state::StoreState;
use super::summary::Position;
use super::tables::Table;
use super::view::View;

/// A row of any table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The table's number.
    pub table: u8,
    /// The key as stored in the table.
    pub key: Bytes,
    /// The value with its checksum.
    pub value: Bytes,
}

/// One durable moment of the database, stable as long as this lives.
pub struct Snapshot {
    base: Arc<Base>,
    position: Position,
}

impl Snapshot {
    pub(super) fn new(base: Arc<Base>, position: Position) -> Snapshot {
        Snapshot { base, position }
    }

    /// Returns the log position of the snapshot.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Returns all rows, sorted by table and key, up to the first damaged one.
    pub fn rows(&self) -> impl Iterator<Item = Result<Row, StorageFault>> + Send + '_ {
        Table::ALL.into_iter().flat_map(|table| {
            let database = self.base.database();
            let (mut rows, failed) =
                match database.guarded(|| Ok(self.base.table(table).range::<&[u8]>(..)?)) {
                    Ok(rows) => (Some(rows), None),
                    Err(fault) => (None, Some(Err(fault))),
                };
            let rows = std::iter::from_fn(move || {
                let row = database.guarded(|| {
                    let row = rows.as_mut().and_then(Iterator::next).transpose()?;
                    row.map(|(key, value)| copy_row(table, key.value(), value.value()))
                        .transpose()
                });
                if row.is_err() {
                    rows = None;
                }
                row.transpose()
            });
            rows.chain(failed)
        })
    }
}

fn copy_row(table: Table, key: &[u8], value: &[u8]) -> Result<Row, StorageFault> {
    if !ends_in_its_checksum(value) {
        return Err(DecodeError::Checksum { what: "a row" }.into());
    }
    Ok(Row {
        table: table.number(),
        key: Bytes::copy_from_slice(key),
        value: Bytes::copy_from_slice(value),
    })
}

/// A snapshot that is being received into a file of its own. The file is removed on drop unless it is installed.
pub struct Installation {
    /// Declared before the database: an open transaction must not outlive it.
    transaction: redb::WriteTransaction,
    database: Database,
    file: TemporaryFile,
    /// Bytes of the rows received so far.
    bytes: u64,
}

/// A snapshot that was received as a whole, in a durable file of its own. The file is removed on drop unless it is
/// installed.
pub struct Received {
    pub(super) state: StoreState,
    pub(super) file: TemporaryFile,
}

impl Received {
    /// Returns a view of the state after installation.
    pub fn view(&self) -> View {
        self.state.view()
    }
}

impl Installation {
    pub(super) fn begin(
        path: PathBuf,
        options: MetadataOptions,
        damage: DamageSignal,
    ) -> Result<Installation, StorageFault> {
        let database = Database::create(&path, options.cache_bytes, damage)?;
        let transaction = database.begin_durable()?;
        Ok(Installation {
            transaction,
            database,
            file: TemporaryFile::new(path),
            bytes: 0,
        })
    }

    /// Adds rows that follow those added before.
    ///
    /// # Errors
    /// [`StorageFault::BadSnapshot`] for rows that are damaged, out of order or of an unknown table.
    pub fn add(&mut self, rows: &[Row]) -> Result<(), StorageFault> {
        self.bytes += rows
            .iter()
            .map(|row| (row.key.len() + row.value.len()) as u64)
            .sum::<u64>();
        self.check_room()?;
        let (database, transaction) = (&self.database, &self.transaction);
        database.guarded(|| add_rows(transaction, rows))
    }

    /// Makes the file durable and checks that it has a state. A failure here, even for lack of space, costs only this
    /// snapshot.
    pub fn finish(self) -> Result<Received, StorageFault> {
        self.check_room()?;
        let (database, transaction) = (self.database, self.transaction);
        database.guarded(|| Ok(transaction.commit()?))?;
        sync_file(self.file.path())?;
        Ok(Received {
            state: StoreState::open(Arc::new(database))?,
            file: self.file,
        })
    }

    /// Gives up a snapshot before it takes the last space of the disk from the log and from flushes.
    pub(super) fn check_room(&self) -> Result<(), StorageFault> {
        let written_bytes = std::fs::metadata(self.file.path())
            .map_err(StorageFault::io("get the size of a snapshot's file"))?
            .len();
        let available_bytes = available_bytes(self.file.path())?;
        // Pages are two thirds full; the bytes already in the file are not needed again.
        let needed_bytes = (self.bytes * 3 / 2).saturating_sub(written_bytes) + FLUSH_MARGIN_BYTES;
        match available_bytes < needed_bytes {
            true => Err(StorageFault::NoSpace {
                needed_bytes,
                available_bytes,
            }),
            false => Ok(()),
        }
    }
}

fn add_rows(transaction: &redb::WriteTransaction, rows: &[Row]) -> Result<(), StorageFault> {
    for of_one_table in rows.chunk_by(|one, next| one.table == next.table) {
        let number = of_one_table[0].table;
        let table = Table::from_number(number).ok_or_else(|| StorageFault::BadSnapshot {
            reason: format!("table {number} is not known; use a newer program"),
        })?;
        let mut into = transaction.open_table(table.definition())?;
        let mut end = into.upper_bound_mut(Bound::<&[u8]>::Unbounded)?;
        for row in of_one_table {
            if !ends_in_its_checksum(&row.value) {
                return Err(StorageFault::BadSnapshot {
                    reason: format!("a row of {table:?} is damaged"),
                });
            }
            end.insert_before(&row.key[..], &row.value[..])
                .map_err(|error| match error {
                    redb::CursorError::UnorderedKey => StorageFault::BadSnapshot {
                        reason: format!("rows of {table:?} are out of order"),
                    },
                    other => other.into(),
                })?;
        }
        end.close()?;
    }
    Ok(())
}

pub(super) fn ends_in_its_checksum(value: &[u8]) -> bool {
    value
        .split_last_chunk::<4>()
        .is_some_and(|(body, crc)| crc32c::crc32c(body) == u32::from_le_bytes(*crc))
}
