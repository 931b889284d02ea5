//! The rows as a batch sees and changes them, and the way back to an earlier moment of it.

use std::sync::Arc;

use quorumfs_proto::{InodeNumber, Timestamp, codec};

use crate::command::{Applied, ApplyResult, Crowded, Effects};
use crate::fault::StorageFault;
use crate::overlay::{Cell, Direction, KeyRange, Layers};
use crate::summary::Summary;
use crate::tables::{Inodes, RowKey, RowOf, Rows, Table};

/// A row that was written, and what the active overlay had in its place.
pub(crate) struct Change {
    pub(crate) table: Table,
    pub(crate) key: RowKey,
    pub(crate) previous: Option<Cell>,
}

/// The rows as the batch sees and changes them.
pub(crate) struct RowWriter {
    pub(crate) layers: Layers,
    pub(crate) summary: Summary,
    /// Of the entry that is being applied.
    pub(crate) index: u64,
    /// Everything written since the batch began, in order.
    pub(crate) journal: Vec<Change>,
    /// Set by a mutation that stopped because of it.
    pub(crate) crowded: Option<Crowded>,
}

/// A moment of a [`RowWriter`] to which it can go back.
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

    /// The keys and values of at most `max` rows.
    pub(in crate::apply) fn collect<R: Rows>(
        &self,
        range: KeyRange,
        max: usize,
    ) -> Result<Vec<RowOf<R>>, StorageFault> {
        self.layers.scan::<R>(range, Direction::Up)?.take(max).collect()
    }

    /// At most `max` keys; values, which may be large, stay where they are.
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

    /// The root directory is made before there is a time; it gets one as soon as all members can give it.
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

/// What came of an entry that concerns nobody else.
pub(in crate::apply) fn without_effects(result: ApplyResult) -> Applied {
    Applied {
        result,
        effects: Effects::default(),
    }
}
