//! The newest rows, in memory, above those of the database.
//!
//! Reads consult the active overlay, then the frozen one, then the database. If an overlay marks a row as removed, the
//! layers below are not consulted. [`Layers`] is all three at one moment: cloning it is cheap (the maps share their
//! nodes), and a clone never changes.
//!
//! This module knows the types of rows but not their meaning, and does not know files.

use std::ops::Bound;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::RangedIter;
use imbl::shared_ptr::DefaultSharedPtr;
use quorumfs_proto::codec;
use redb::{AccessGuard, ReadOnlyTable};

use super::database::Database;
use super::fault::StorageFault;
use super::tables::{RowKey, RowOf, Rows, Table};

/// Memory of a row besides its key and value: two reference-counted allocations, their pointers, its share of tree
/// nodes.
const ROW_OVERHEAD_BYTES: u64 = 120;

/// The encoded value of a row, or `None` if the row is removed.
pub(super) type Cell = Option<Arc<[u8]>>;

/// Rows in memory, by table.
#[derive(Clone)]
pub(super) struct Overlay {
    maps: [OrdMap<RowKey, Cell>; Table::COUNT],
    bytes: u64,
}

impl Overlay {
    pub(super) fn new() -> Overlay {
        Overlay {
            maps: std::array::from_fn(|_| OrdMap::new()),
            bytes: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.maps.iter().all(OrdMap::is_empty)
    }

    /// Returns the approximate memory of the overlay.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn row_count(&self) -> u64 {
        self.maps.iter().map(|map| map.len() as u64).sum()
    }

    pub(super) fn rows(&self, table: Table) -> impl Iterator<Item = (&RowKey, &Cell)> {
        self.map(table).iter()
    }

    pub(super) fn get(&self, table: Table, key: &[u8]) -> Option<&Cell> {
        self.map(table).get(key)
    }

    /// Sets a cell and returns the previous one; `None` if the overlay had none.
    pub(super) fn set(&mut self, table: Table, key: RowKey, cell: Cell) -> Option<Cell> {
        self.bytes += row_bytes(&key, &cell);
        let key_bytes = key.len() as u64;
        let previous = self.maps[usize::from(table.number())].insert(key, cell);
        if let Some(previous) = &previous {
            self.bytes -= row_bytes_of(key_bytes, previous);
        }
        previous
    }

    /// Undoes a [`Overlay::set`] that returned `previous`.
    pub(super) fn restore(&mut self, table: Table, key: RowKey, previous: Option<Cell>) {
        match previous {
            Some(cell) => {
                self.set(table, key, cell);
            }
            None => {
                if let Some(cell) = self.maps[usize::from(table.number())].remove(&key) {
                    self.bytes -= row_bytes(&key, &cell);
                }
            }
        }
    }

    fn map(&self, table: Table) -> &OrdMap<RowKey, Cell> {
        &self.maps[usize::from(table.number())]
    }
}

fn row_bytes(key: &RowKey, cell: &Cell) -> u64 {
    row_bytes_of(key.len() as u64, cell)
}

fn row_bytes_of(key_bytes: u64, cell: &Cell) -> u64 {
    ROW_OVERHEAD_BYTES + key_bytes + cell.as_ref().map_or(0, |value| value.len() as u64)
}

/// The database's rows at one moment. Its tables stay readable as long as this lives, even after later commits or when
/// the file is replaced.
pub(super) struct Base {
    tables: Vec<ReadOnlyTable<&'static [u8], &'static [u8]>>,
    /// Must be dropped after the tables: closing the database would invalidate them.
    database: Arc<Database>,
}

impl Base {
    /// Opens the committed rows; every table must exist.
    pub(super) fn open(database: Arc<Database>) -> Result<Base, StorageFault> {
        let transaction = database.begin_read()?;
        let tables = database.guarded(|| {
            let tables = Table::ALL
                .iter()
                .map(|table| transaction.open_table(table.definition()));
            Ok(tables.collect::<Result<Vec<_>, _>>()?)
        })?;
        Ok(Base { tables, database })
    }

    pub(super) fn database(&self) -> &Arc<Database> {
        &self.database
    }

    pub(super) fn table(&self, table: Table) -> &ReadOnlyTable<&'static [u8], &'static [u8]> {
        &self.tables[usize::from(table.number())]
    }
}

/// A range of keys for a scan.
pub(super) struct KeyRange {
    from: Bound<Vec<u8>>,
    to: Bound<Vec<u8>>,
}

impl KeyRange {
    /// Returns the range of all keys that begin with `prefix`.
    pub(super) fn prefix(prefix: &[u8]) -> KeyRange {
        let mut end = prefix.to_vec();
        while end.pop_if(|byte| *byte == u8::MAX).is_some() {}
        let to = match end.last_mut() {
            Some(byte) => {
                *byte += 1;
                Bound::Excluded(end)
            }
            None => Bound::Unbounded,
        };
        KeyRange {
            from: Bound::Included(prefix.to_vec()),
            to,
        }
    }

    /// Restricts the range to keys at or above `key`.
    pub(super) fn starting_at(self, key: &[u8]) -> KeyRange {
        KeyRange {
            from: Bound::Included(key.to_vec()),
            ..self
        }
    }

    /// Restricts the range to keys above `key`.
    pub(super) fn after(self, key: &[u8]) -> KeyRange {
        KeyRange {
            from: Bound::Excluded(key.to_vec()),
            ..self
        }
    }

    /// Restricts the range to keys below `key`.
    pub(super) fn before(self, key: &[u8]) -> KeyRange {
        KeyRange {
            to: Bound::Excluded(key.to_vec()),
            ..self
        }
    }

    /// Whether the range can contain no key; the maps would panic for such a range.
    fn is_void(&self) -> bool {
        match (&self.from, &self.to) {
            (Bound::Included(from), Bound::Excluded(to)) => from >= to,
            (Bound::Excluded(from), Bound::Excluded(to)) => from >= to,
            _ => false,
        }
    }

    fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        (
            self.from.as_ref().map(Vec::as_slice),
            self.to.as_ref().map(Vec::as_slice),
        )
    }
}

/// The order in which a scan visits its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Up,
    Down,
}

/// Active overlay, frozen overlay and database at one moment.
#[derive(Clone)]
pub(super) struct Layers {
    pub(super) active: Arc<Overlay>,
    pub(super) frozen: Option<Arc<Overlay>>,
    pub(super) base: Arc<Base>,
}

impl Layers {
    /// Returns the row of `key`, if there is one.
    pub(super) fn get<R: Rows>(&self, key: &R::Key) -> Result<Option<R::Value>, StorageFault> {
        let key = R::key(key);
        self.read(R::TABLE, &key, codec::decode_checked)?
            .transpose()
            .map_err(|error| self.base.database.damage().noted(error.into()))
    }

    /// Whether there is a row of `key`.
    pub(super) fn contains<R: Rows>(&self, key: &R::Key) -> Result<bool, StorageFault> {
        Ok(self.read(R::TABLE, &R::key(key), |_| ())?.is_some())
    }

    fn read<T>(
        &self,
        table: Table,
        key: &[u8],
        then: impl FnOnce(&[u8]) -> T,
    ) -> Result<Option<T>, StorageFault> {
        let overlays = [Some(&self.active), self.frozen.as_ref()];
        for overlay in overlays.into_iter().flatten() {
            if let Some(cell) = overlay.get(table, key) {
                return Ok(cell.as_deref().map(then));
            }
        }
        let base = &self.base;
        base.database
            .guarded(|| Ok(base.table(table).get(key)?.map(|guard| then(guard.value()))))
    }

    /// Returns the rows of `range` in order.
    pub(super) fn scan<R: Rows>(
        &self,
        range: KeyRange,
        direction: Direction,
    ) -> Result<impl Iterator<Item = Result<RowOf<R>, StorageFault>> + use<'_, R>, StorageFault> {
        self.scan_with(R::TABLE, range, direction, decode_row::<R>)
    }

    /// Returns the keys of `range` in order. Values, which may be large, are not decoded.
    pub(super) fn scan_keys<R: Rows>(
        &self,
        range: KeyRange,
        direction: Direction,
    ) -> Result<impl Iterator<Item = Result<R::Key, StorageFault>> + use<'_, R>, StorageFault> {
        self.scan_with(R::TABLE, range, direction, |key, _| parse_key::<R>(key))
    }

    fn scan_with<T>(
        &self,
        table: Table,
        range: KeyRange,
        direction: Direction,
        decode: fn(&[u8], &[u8]) -> Result<T, StorageFault>,
    ) -> Result<impl Iterator<Item = Result<T, StorageFault>> + use<'_, T>, StorageFault> {
        let mut scan = match range.is_void() {
            true => None,
            false => Some(
                self.base
                    .database
                    .guarded(|| Scan::new(self, table, &range, direction))?,
            ),
        };
        Ok(std::iter::from_fn(move || {
            let scanned = scan.as_mut()?;
            let row = self.base.database.guarded(|| scanned.next_row(decode));
            let row = row.transpose();
            if matches!(row, Some(Err(_))) {
                scan = None;
            }
            row
        }))
    }

    /// Calls a function with every row of `table`, encoded, in the order of keys.
    pub(super) fn for_each_row(
        &self,
        table: Table,
        mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), StorageFault>,
    ) -> Result<(), StorageFault> {
        self.base.database.guarded(|| {
            let mut scan = Scan::new(self, table, &KeyRange::prefix(&[]), Direction::Up)?;
            while scan.next_row(&mut visit)?.is_some() {}
            Ok(())
        })
    }
}

fn decode_row<R: Rows>(key: &[u8], value: &[u8]) -> Result<RowOf<R>, StorageFault> {
    Ok((parse_key::<R>(key)?, codec::decode_checked(value)?))
}

fn parse_key<R: Rows>(key: &[u8]) -> Result<R::Key, StorageFault> {
    R::parse(key).ok_or_else(|| {
        StorageFault::inconsistent(format!("key {} of table {:?}", key.escape_ascii(), R::TABLE))
    })
}

type OverlayIterator<'a> = RangedIter<'a, RowKey, Cell, DefaultSharedPtr>;
type BaseIterator = redb::Range<'static, &'static [u8], &'static [u8]>;
type BaseRow = (
    AccessGuard<'static, &'static [u8]>,
    AccessGuard<'static, &'static [u8]>,
);

/// An iterator over an overlay's rows of a range, with the next row at hand.
struct OverlayRows<'a> {
    rows: OverlayIterator<'a>,
    head: Option<(&'a RowKey, &'a Cell)>,
}

impl<'a> OverlayRows<'a> {
    fn step(&mut self, direction: Direction) {
        self.head = match direction {
            Direction::Up => self.rows.next(),
            Direction::Down => self.rows.next_back(),
        };
    }
}

/// The merge of the three layers. If several layers have a key, the uppermost counts.
struct Scan<'a> {
    direction: Direction,
    /// The active and the frozen overlay.
    overlays: [Option<OverlayRows<'a>>; 2],
    base: BaseIterator,
    base_head: Option<BaseRow>,
}

impl<'a> Scan<'a> {
    fn new(
        layers: &'a Layers,
        table: Table,
        range: &KeyRange,
        direction: Direction,
    ) -> Result<Scan<'a>, StorageFault> {
        let rows_of = |overlay: &'a Arc<Overlay>| {
            let mut rows = OverlayRows {
                rows: overlay.map(table).range::<_, [u8]>(range.bounds()),
                head: None,
            };
            rows.step(direction);
            rows
        };
        let overlays = [Some(rows_of(&layers.active)), layers.frozen.as_ref().map(rows_of)];
        let base = layers.base.table(table).range::<&[u8]>(range.bounds())?;
        let mut scan = Scan {
            direction,
            overlays,
            base,
            base_head: None,
        };
        scan.step_base()?;
        Ok(scan)
    }

    fn step_base(&mut self) -> Result<(), StorageFault> {
        let next = match self.direction {
            Direction::Up => self.base.next(),
            Direction::Down => self.base.next_back(),
        };
        self.base_head = next.transpose()?;
        Ok(())
    }

    /// Returns the next row that is not removed, decoded by `decode`.
    fn next_row<T>(
        &mut self,
        mut decode: impl FnMut(&[u8], &[u8]) -> Result<T, StorageFault>,
    ) -> Result<Option<T>, StorageFault> {
        loop {
            #[cfg(test)]
            visited::count();
            let comes_first = |one: &[u8], other: &[u8]| match self.direction {
                Direction::Up => one < other,
                Direction::Down => one > other,
            };
            let mut first: Option<(&'a RowKey, &'a Cell)> = None;
            for head in self.overlays.iter().flatten().filter_map(|rows| rows.head) {
                if first.is_none_or(|(key, _)| comes_first(head.0, key)) {
                    first = Some(head);
                }
            }
            let from_base = match (&self.base_head, first) {
                (None, None) => return Ok(None),
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (Some((key, _)), Some((overlay_key, _))) => comes_first(key.value(), overlay_key),
            };
            if from_base {
                let row = self.base_head.take();
                self.step_base()?;
                // `from_base` is only true if there was a row.
                return row
                    .map(|(key, value)| decode(key.value(), value.value()))
                    .transpose();
            }
            let Some((key, cell)) = first else { continue };
            for rows in self.overlays.iter_mut().flatten() {
                if rows.head.is_some_and(|(other, _)| other == key) {
                    rows.step(self.direction);
                }
            }
            if self
                .base_head
                .as_ref()
                .is_some_and(|(other, _)| other.value() == &key[..])
            {
                self.step_base()?;
            }
            if let Some(value) = cell {
                return decode(key, value).map(Some);
            }
        }
    }
}

/// Counts the rows that scans of this thread have visited, including removed ones.
#[cfg(test)]
pub(super) mod visited {
    use std::cell::Cell;

    thread_local! {
        static ROWS: Cell<u64> = const { Cell::new(0) };
    }

    pub(super) fn count() {
        ROWS.set(ROWS.get() + 1);
    }

    pub(crate) fn rows() -> u64 {
        ROWS.get()
    }
}
