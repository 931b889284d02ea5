//! The rows as a batch reads and changes them, and the rollback to an earlier moment of the batch.

use std::sync::Arc;

use quorumfs_proto::{InodeNumber, Timestamp, codec};

use crate::command::{Applied, ApplyResult, Crowded, Effects};
use crate::fault::StorageFault;
use crate::overlay::{Cell, Direction, KeyRange, Layers};
use crate::summary::Summary;
use crate::tables::{Inodes, RowKey, RowOf, Rows, Table};

/// A row that was written, and its previous cell in the active overlay.
pub(crate) struct Change {
    pub(crate) table: Table,
    pub(crate) key: RowKey,
    pub(crate) previous: Option<Cell>,
}

/// The rows as the batch reads and changes them.
pub(crate) struct RowWriter {
    pub(crate) layers: Layers,
    pub(crate) summary: Summary,
    /// The index of the entry that is being applied.
    pub(crate) index: u64,
    /// All writes since the batch began, in order.
    pub(crate) journal: Vec<Change>,
    /// Set by a mutation that stopped because it would replace too many extents.
    pub(crate) crowded: Option<Crowded>,
}

/// A moment of a [`RowWriter`] to which it can be rolled back.
pub(in crate::apply) struct Mark {
    journal_length: usize,
    summary: Summary,
}

impl RowWriter {
    pub(crate) fn new(layers: Layers, summary: Summary) -> RowWriter {
        RowWriter {
            layers,
            summary,
            index: 0,
            journal: Vec::new(),
            crowded: None,
        }
    }

    pub(in crate::apply) fn get<R: Rows>(&self, key: &R::Key) -> Result<Option<R::Value>, StorageFault> {
        self.layers.get::<R>(key)
    }

    /// Returns the keys and values of at most `max` rows.
    pub(in crate::apply) fn collect<R: Rows>(
        &self,
        range: KeyRange,
        max: usize,
    ) -> Result<Vec<RowOf<R>>, StorageFault> {
        self.layers.scan::<R>(range, Direction::Up)?.take(max).collect()
    }

    /// Returns at most `max` keys. Values, which may be large, are not read.
    pub(in crate::apply) fn collect_keys<R: Rows>(
        &self,
        range: KeyRange,
        max: usize,
    ) -> Result<Vec<R::Key>, StorageFault> {
        let keys = self.layers.scan_keys::<R>(range, Direction::Up)?;
        keys.take(max).collect()
    }

    pub(crate) fn put<R: Rows>(&mut self, key: &R::Key, value: &R::Value) {
        let encoded = codec::encode_checked(value);
        self.set(R::TABLE, R::key(key), Some(Arc::from(&encoded[..])));
    }

    pub(in crate::apply) fn remove<R: Rows>(&mut self, key: &R::Key) {
        self.set(R::TABLE, R::key(key), None);
    }

    pub(in crate::apply) fn set(&mut self, table: Table, key: RowKey, cell: Cell) {
        let previous = Arc::make_mut(&mut self.layers.active).set(table, key.clone(), cell);
        self.journal.push(Change { table, key, previous });
    }

    /// Sets the times of the root directory. It is created before a time is known, and gets its times as soon as all
    /// members can set them.
    pub(in crate::apply) fn give_root_its_times(&mut self, now: Timestamp) -> Result<(), StorageFault> {
        let Some(mut root) = self.get::<Inodes>(&InodeNumber::ROOT)? else {
            return Err(StorageFault::inconsistent("there is no root directory"));
        };
        let times = [
            &mut root.attributes.atime,
            &mut root.attributes.mtime,
            &mut root.attributes.ctime,
            &mut root.attributes.birth_time,
        ];
        for time in times.into_iter().filter(|time| **time == Timestamp::default()) {
            *time = now;
        }
        self.put::<Inodes>(&InodeNumber::ROOT, &root);
        Ok(())
    }

    pub(in crate::apply) fn mark(&self) -> Mark {
        Mark {
            journal_length: self.journal.len(),
            summary: self.summary.clone(),
        }
    }

    pub(in crate::apply) fn roll_back(&mut self, mark: Mark) {
        let active = Arc::make_mut(&mut self.layers.active);
        for change in self.journal.drain(mark.journal_length..).rev() {
            active.restore(change.table, change.key, change.previous);
        }
        self.summary = mark.summary;
    }
}

/// Returns a result without effects on the content store.
pub(in crate::apply) fn without_effects(result: ApplyResult) -> Applied {
    Applied {
        result,
        effects: Effects::default(),
    }
}
