//! The metadata store: the database file, the two overlays above it, and the moments at which an overlay is frozen and
//! flushed.
//!
//! Invariants:
//!
//! - The database always has a whole state at some log index: one durable transaction writes the frozen overlay and
//!   that index.
//! - A view is one moment: layers change only under the lock of `state`, all together, and the lock is held only while
//!   a few pointers are copied.
//! - One flush or snapshot installation runs at a time (`flushing`); applies and views do not wait for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use quorumfs_proto::{Attributes, FileKind, InodeNumber, Timestamp, codec};

use super::apply::RowWriter;
use super::command::{Applied, LogCommand};
use super::database::{DamageSignal, Database};
use super::fault::StorageFault;
use super::files::{
    INSTALLATION, available_bytes, path_beside, remove_leftover, remove_unfinished_installations,
    sync_directory_of, sync_file,
};
use super::options::{FLUSH_MARGIN_BYTES, MetadataOptions};
use super::overlay::{Base, Overlay};
use super::snapshot::{Installation, Received, Snapshot};
use super::state::StoreState;
use super::summary::Position;
use super::tables::{FORMAT, Format, InodeRecord, Inodes, Meta, MetaRecord, Replicas, Rows, Table};
use super::view::View;

/// Least number of bytes that redb writes for a changed row.
const PAGE_BYTES: u64 = 4096;
/// The permissions of a new root directory.
const ROOT_MODE: u16 = 0o755;

/// The metadata of one node.
pub struct MetadataStore {
    path: PathBuf,
    options: MetadataOptions,
    state: Mutex<StoreState>,
    flushing: Mutex<()>,
    /// Number for the next file name of an installation.
    installations: AtomicU64,
    damage: DamageSignal,
}

impl MetadataStore {
    /// Opens the database file at `path`, or creates it with an empty root directory.
    ///
    /// # Errors
    /// [`StorageFault`] if the file cannot be opened, is damaged, or was written by a newer program.
    pub fn open(path: &Path, options: MetadataOptions) -> Result<MetadataStore, StorageFault> {
        remove_unfinished_installations(path)?;
        if !path
            .try_exists()
            .map_err(StorageFault::io("check whether the metadata database exists"))?
        {
            create_empty(path, options)?;
        }
        let damage = DamageSignal::default();
        let database = Database::open(path, options.cache_bytes, damage.clone())?;
        Ok(MetadataStore {
            path: path.to_path_buf(),
            options,
            state: Mutex::new(StoreState::open(Arc::new(database))?),
            flushing: Mutex::new(()),
            installations: AtomicU64::new(0),
            damage,
        })
    }

    /// Sets a hook that is called once, when a reader finds damage on the disk. From then on the state cannot be relied
    /// on. The reader gets an error as well.
    pub fn on_damage(&self, hook: impl Fn(StorageFault) + Send + Sync + 'static) {
        self.damage.listen(hook);
    }

    /// Returns the present state; the view never changes. Never waits for an apply or a flush.
    ///
    /// # Errors
    /// [`StorageFault`] after damage.
    pub fn view(&self) -> Result<View, StorageFault> {
        Ok(self.state.lock().view())
    }

    /// Returns the log position that views see.
    pub fn position(&self) -> Position {
        self.state.lock().summary.position.clone()
    }

    /// Returns the stamp of the last command that views see.
    pub fn last_stamp(&self) -> Timestamp {
        self.state.lock().summary.last_stamp
    }

    /// Returns [`MetadataStore::position`] and the number of copies that applies there.
    pub fn position_and_replicas(&self) -> (Position, Replicas) {
        let state = self.state.lock();
        (state.summary.position.clone(), state.summary.replicas)
    }

    /// Returns the position up to which the database is durable.
    pub fn durable_position(&self) -> Position {
        self.state.lock().durable_position.clone()
    }

    /// Begins a batch. Only one thread may apply: of two concurrent batches, the first to be published would be lost.
    pub fn begin(&self) -> Batch<'_> {
        let state = self.state.lock();
        let writer = RowWriter::new(state.layers.clone(), state.summary.clone());
        Batch {
            store: self,
            writer,
            freezes_at_begin: state.freezes,
        }
    }

    /// Returns the approximate bytes of the active overlay. A frozen one of at most the same size may exist too.
    pub fn overlay_bytes(&self) -> u64 {
        self.state.lock().layers.active.bytes()
    }

    /// Returns the options with which the store was opened.
    pub fn options(&self) -> MetadataOptions {
        self.options
    }

    /// Freezes the active overlay for [`MetadataStore::flush`] and returns its position; `None` if there is nothing to
    /// flush. While a frozen overlay still waits for its flush, its position is returned.
    pub fn freeze(&self) -> Option<Position> {
        let mut state = self.state.lock();
        if state.layers.frozen.is_some() {
            return Some(state.frozen_position.clone());
        }
        if state.layers.active.is_empty() {
            return None;
        }
        state.layers.frozen = Some(std::mem::replace(
            &mut state.layers.active,
            Arc::new(Overlay::new()),
        ));
        state.frozen_position = state.summary.position.clone();
        state.freezes += 1;
        Some(state.frozen_position.clone())
    }

    /// Commits the frozen overlay, if there is one, and returns the durable position. Blocks until the disk is done.
    ///
    /// # Errors
    /// [`StorageFault::NoSpace`] if the disk has too little space; nothing was written then. Any other fault is fatal.
    pub fn flush(&self) -> Result<Position, StorageFault> {
        let _one_at_a_time = self.flushing.lock();
        let (frozen, position, database) = {
            let state = self.state.lock();
            let Some(frozen) = state.layers.frozen.clone() else {
                return Ok(state.durable_position.clone());
            };
            (
                frozen,
                state.frozen_position.clone(),
                state.layers.base.database().clone(),
            )
        };
        self.check_room(&frozen)?;
        write_rows(&database, &frozen)?;
        let base = Arc::new(Base::open(database)?);
        let replaced = {
            let mut state = self.state.lock();
            state.durable_position = position.clone();
            // The old overlay is dropped after the lock is released: freeing a large one takes a while.
            (
                state.layers.frozen.take(),
                std::mem::replace(&mut state.layers.base, base),
            )
        };
        drop(replaced);
        Ok(position)
    }

    /// Commits an empty transaction. redb's own data (free pages, pages to be freed) is read only by a commit, and this
    /// detects damage in it. If there is no space for a commit, the next flush with space detects the damage.
    pub(super) fn commit_nothing(&self) -> Result<(), StorageFault> {
        let _one_at_a_time = self.flushing.lock();
        let database = self.state.lock().layers.base.database().clone();
        match self.check_room(&Overlay::new()) {
            Err(StorageFault::NoSpace { .. }) => return Ok(()),
            room => room?,
        }
        database.guarded(|| Ok(database.begin_durable()?.commit()?))
    }

    /// Begins a stable read of the durable state; applies and flushes continue meanwhile.
    pub fn snapshot(&self) -> Result<Snapshot, StorageFault> {
        let state = self.state.lock();
        Ok(Snapshot::new(
            state.layers.base.clone(),
            state.durable_position.clone(),
        ))
    }

    /// Returns the durable state of the database.
    pub(super) fn base(&self) -> Arc<Base> {
        self.state.lock().layers.base.clone()
    }

    /// Begins to receive a snapshot into a new file beside the database.
    pub fn begin_install(&self) -> Result<Installation, StorageFault> {
        let number = self.installations.fetch_add(1, Ordering::Relaxed);
        let purpose = format!("{INSTALLATION}{number}");
        // Damage of that file does not concern this state until it is installed.
        let installation = Installation::begin(
            path_beside(&self.path, &purpose),
            self.options,
            DamageSignal::default(),
        )?;
        installation.check_room()?;
        Ok(installation)
    }

    /// Replaces the whole state by a received snapshot. Must be called by the apply thread, with no batch begun. Waits
    /// for a running flush, drops the overlays, and durably renames the new file to the old one's name, which needs no
    /// space. Views made before keep the old state.
    pub fn install(&self, received: Received) -> Result<Position, StorageFault> {
        let _no_flush = self.flushing.lock();
        let Received { state: next, file } = received;
        std::fs::rename(file.path(), &self.path).map_err(StorageFault::io("put the snapshot in place"))?;
        sync_directory_of(&self.path)?;
        let position = next.durable_position.clone();
        next.layers.base.database().damage().joins(&self.damage);
        let replaced = {
            let mut state = self.state.lock();
            let mut next = next;
            next.freezes = state.freezes + 1;
            next.summary.named_change.generation = state.summary.named_change.generation + 1;
            std::mem::replace(&mut *state, next)
        };
        drop(replaced);
        Ok(position)
    }

    /// Makes a batch visible.
    fn publish(&self, writer: RowWriter, freezes_at_begin: u64) {
        let mut state = self.state.lock();
        let replaced = if state.freezes == freezes_at_begin {
            std::mem::replace(&mut state.layers.active, writer.layers.active)
        } else {
            // The rows that existed when the batch began are in the frozen overlay (or the database) by now: only the
            // rows that the batch wrote belong into the new active overlay.
            let mut active = Overlay::clone(&state.layers.active);
            for change in &writer.journal {
                if let Some(cell) = writer.layers.active.get(change.table, &change.key) {
                    active.set(change.table, change.key.clone(), cell.clone());
                }
            }
            std::mem::replace(&mut state.layers.active, Arc::new(active))
        };
        state.summary = writer.summary;
        drop(state);
        drop(replaced);
    }

    /// Checks the free space: redb does not survive a full disk in the middle of a commit.
    fn check_room(&self, frozen: &Overlay) -> Result<(), StorageFault> {
        let file_bytes = std::fs::metadata(&self.path)
            .map_err(StorageFault::io("get the size of the metadata database"))?
            .len();
        let available_bytes = available_bytes(&self.path)?;
        // Changed pages are copied, at most all of them; new rows need additional pages, which are two thirds full.
        let needed_bytes =
            (frozen.row_count() * PAGE_BYTES).min(file_bytes) + frozen.bytes() * 2 + FLUSH_MARGIN_BYTES;
        if available_bytes < needed_bytes {
            return Err(StorageFault::NoSpace {
                needed_bytes,
                available_bytes,
            });
        }
        Ok(())
    }
}

/// Entries that are being applied. Their changes are invisible before [`Batch::publish`]. A batch that is dropped
/// changes nothing.
pub struct Batch<'store> {
    store: &'store MetadataStore,
    writer: RowWriter,
    freezes_at_begin: u64,
}

impl Batch<'_> {
    /// Applies one entry as a whole, or returns a verdict and changes nothing. After a fault the batch and the node
    /// must stop.
    pub fn apply(&mut self, index: u64, entry: &LogCommand) -> Result<Applied, StorageFault> {
        self.writer.apply(index, entry)
    }

    /// Makes the changes of the batch visible to views at once. `position` is that of the last entry, entries without a
    /// command included.
    pub fn publish(mut self, position: Position) {
        self.writer.summary.position = position;
        let meta = self.writer.summary.meta();
        self.writer.put::<Meta>(&(), &meta);
        self.store.publish(self.writer, self.freezes_at_begin);
    }
}

/// Commits the rows of `overlay` durably, all or none.
fn write_rows(database: &Database, overlay: &Overlay) -> Result<(), StorageFault> {
    database.guarded(|| {
        let transaction = database.begin_durable()?;
        for table in Table::ALL {
            let mut rows = overlay.rows(table).peekable();
            if rows.peek().is_none() {
                continue;
            }
            let mut into = transaction.open_table(table.definition())?;
            for (key, cell) in rows {
                match cell {
                    Some(value) => into.insert(&key[..], &value[..])?,
                    None => into.remove(&key[..])?,
                };
            }
        }
        transaction.commit()?;
        Ok(())
    })
}

/// Creates the database under another name and renames it when it is complete: a crash leaves all of it or nothing.
fn create_empty(path: &Path, options: MetadataOptions) -> Result<(), StorageFault> {
    let beside = path_beside(path, "new");
    remove_leftover(&beside)?;
    let database = Database::create(&beside, options.cache_bytes, DamageSignal::default())?;
    write_rows(&database, &first_rows())?;
    drop(database);
    sync_file(&beside)?;
    std::fs::rename(&beside, path).map_err(StorageFault::io("put the new metadata database in place"))?;
    sync_directory_of(path)
}

/// Returns the rows of an empty filesystem, the same on every node.
fn first_rows() -> Overlay {
    let root = InodeRecord {
        attributes: Attributes {
            inode: InodeNumber::ROOT,
            kind: FileKind::Directory,
            mode: ROOT_MODE,
            uid: 0,
            gid: 0,
            links: 2,
            size: 0,
            allocated_bytes: 0,
            rdev: 0,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            birth_time: Timestamp::default(),
            content_version: 1,
            xattr_count: 0,
            has_capability: false,
            parent: InodeNumber::ROOT,
        },
        cuts: Vec::new(),
        trim_cursor: 0,
    };
    let meta = MetaRecord {
        index: 0,
        log_id: None,
        membership: None,
        last_stamp: Timestamp::default(),
        feature_level: 1,
        replicas: Replicas::DEFAULT,
        next_inode: InodeNumber::ROOT.0 + 1,
        inode_count: 1,
    };
    let mut rows = Overlay::new();
    put::<Format>(&mut rows, &(), &FORMAT);
    put::<Meta>(&mut rows, &(), &meta);
    put::<Inodes>(&mut rows, &InodeNumber::ROOT, &root);
    rows
}

fn put<R: Rows>(rows: &mut Overlay, key: &R::Key, value: &R::Value) {
    rows.set(
        R::TABLE,
        R::key(key),
        Some(Arc::from(&codec::encode_checked(value)[..])),
    );
}
