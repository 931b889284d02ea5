//! The layers' keeper: the database file, the two overlays above it, and the moments at which they change places.
//!
//! What must hold:
//!
//! - The database is a whole state at some log index, always: the frozen overlay goes to it in one durable transaction
//!   together with that index.
//! - A view is one moment: layers change only under `state`'s lock, all together, and the lock is held for as long as
//!   it takes to copy a few pointers.
//! - One flush, snapshot installation at a time (`flushing`); applies and views do not wait for it.

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
use super::state::State;
use super::summary::Position;
use super::tables::{FORMAT, Format, InodeRecord, Inodes, Meta, MetaRecord, Replicas, Rows, Table};
use super::view::View;

/// The page that redb writes for a changed row at the least.
const PAGE_BYTES: u64 = 4096;
/// The permissions of the root directory when it is made.
const ROOT_MODE: u16 = 0o755;

/// The metadata of one node.
pub struct MetadataStore {
    path: PathBuf,
    options: MetadataOptions,
    state: Mutex<State>,
    flushing: Mutex<()>,
    /// Names their files.
    installations: AtomicU64,
    damage: DamageSignal,
}

impl MetadataStore {
    /// Opens the database file at `path`, or makes it with an empty root directory.
    pub fn open(path: &Path, options: MetadataOptions) -> Result<MetadataStore, StorageFault> {
        remove_unfinished_installations(path)?;
        if !path
            .try_exists()
            .map_err(StorageFault::io("look for the metadata database"))?
        {
            create_empty(path, options)?;
        }
        let damage = DamageSignal::default();
        let database = Database::open(path, options.cache_bytes, damage.clone())?;
        Ok(MetadataStore {
            path: path.to_path_buf(),
            options,
            state: Mutex::new(State::open(Arc::new(database))?),
            flushing: Mutex::new(()),
            installations: AtomicU64::new(0),
            damage,
        })
    }

    /// `hook` is told, once, when somebody finds the state damaged on the disk: from then on it answers nothing that can
    /// be relied on. Whoever reads gets an error as well.
    pub fn on_damage(&self, hook: impl Fn(StorageFault) + Send + Sync + 'static) {
        self.damage.listen(hook);
    }

    /// The state as it is now; it stays so. Never waits for an apply or a flush.
    pub fn view(&self) -> Result<View, StorageFault> {
        Ok(self.state.lock().view())
    }

    /// Up to where views see.
    pub fn position(&self) -> Position {
        self.state.lock().summary.position.clone()
    }

    /// The stamp of the last command that views see.
    pub fn last_stamp(&self) -> Timestamp {
        self.state.lock().summary.last_stamp
    }

    /// As [`MetadataStore::position`], with the number of copies that holds there.
    pub fn position_and_replicas(&self) -> (Position, Replicas) {
        let state = self.state.lock();
        (state.summary.position.clone(), state.summary.replicas)
    }

    /// Up to where the database holds everything durably.
    pub fn durable_position(&self) -> Position {
        self.state.lock().durable_position.clone()
    }

    /// Begins to apply. For one thread only: of two batches at once, the first to be published would be lost.
    pub fn begin(&self) -> Batch<'_> {
        let state = self.state.lock();
        let writer = RowWriter::new(state.layers.clone(), state.summary.clone());
        Batch {
            store: self,
            writer,
            freezes_at_begin: state.freezes,
        }
    }

    /// About how many bytes the active overlay takes. A frozen one, at most as large, may be there too.
    pub fn overlay_bytes(&self) -> u64 {
        self.state.lock().layers.active.bytes()
    }

    /// The sizes it was opened with.
    pub fn options(&self) -> MetadataOptions {
        self.options
    }

    /// Sets the active overlay aside for [`MetadataStore::flush`] and says up to where it goes. `None`: there is
    /// nothing to flush. While a frozen overlay still waits for its flush, that one is meant.
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

    /// Commits the frozen overlay, if there is one, and answers the durable position. Blocks for as long as the disk
    /// takes.
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
            // What is replaced is dropped after the lock: freeing a large overlay takes a while.
            (
                state.layers.frozen.take(),
                std::mem::replace(&mut state.layers.base, base),
            )
        };
        drop(replaced);
        Ok(position)
    }

    /// Commits nothing: what redb keeps for itself (which pages are free, which will be) is read by a commit only, and the
    /// next one is to find it whole. Where there is no room for a commit, that is left to the one that comes with room.
    pub(super) fn commit_nothing(&self) -> Result<(), StorageFault> {
        let _one_at_a_time = self.flushing.lock();
        let database = self.state.lock().layers.base.database().clone();
        match self.check_room(&Overlay::new()) {
            Err(StorageFault::NoSpace { .. }) => return Ok(()),
            room => room?,
        }
        database.guarded(|| Ok(database.begin_durable()?.commit()?))
    }

    /// A stable read of what the database holds durably; applies and flushes go on meanwhile.
    pub fn snapshot(&self) -> Result<Snapshot, StorageFault> {
        let state = self.state.lock();
        Ok(Snapshot::new(
            state.layers.base.clone(),
            state.durable_position.clone(),
        ))
    }

    /// What the database holds durably now.
    pub(super) fn base(&self) -> Arc<Base> {
        self.state.lock().layers.base.clone()
    }

    /// Begins to receive a snapshot, into a new file beside the database.
    pub fn begin_install(&self) -> Result<Installation, StorageFault> {
        let number = self.installations.fetch_add(1, Ordering::Relaxed);
        let purpose = format!("{INSTALLATION}{number}");
        // Damage of that file is none of this state's, before it takes its place.
        let installation = Installation::begin(
            path_beside(&self.path, &purpose),
            self.options,
            DamageSignal::default(),
        )?;
        installation.check_room()?;
        Ok(installation)
    }

    /// Replaces the whole state by a received snapshot. For the apply thread, with no batch begun: waits for a running
    /// flush, drops the overlays, puts the new file durably in the old one's place, which takes no room. Views made
    /// before keep the old state.
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
            // The rows that the batch began with are in the frozen overlay (or the database) by now: only what it
            // wrote itself belongs into the new active one.
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

    /// redb does not survive a full disk in the middle of a commit, so room is looked for before.
    fn check_room(&self, frozen: &Overlay) -> Result<(), StorageFault> {
        let file_bytes = std::fs::metadata(&self.path)
            .map_err(StorageFault::io("look at the metadata database"))?
            .len();
        let available_bytes = available_bytes(&self.path)?;
        // Changed pages are written anew, at most all there are; new rows come on top, in pages two thirds full.
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

/// Entries that are being applied; nobody sees what they did before [`Batch::publish`]. A batch that is dropped did
/// nothing.
pub struct Batch<'store> {
    store: &'store MetadataStore,
    writer: RowWriter,
    freezes_at_begin: u64,
}

impl Batch<'_> {
    /// Applies one entry: all of it, or nothing and a verdict. After a fault the batch, and the node, must not go on.
    pub fn apply(&mut self, index: u64, entry: &LogCommand) -> Result<Applied, StorageFault> {
        self.writer.apply(index, entry)
    }

    /// Makes what was applied visible to views at once; `position` is that of the last entry (of entries without a
    /// command too).
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

/// Makes the database in a file beside and renames it when it is whole: a crash leaves all of it or nothing.
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

/// An empty filesystem, the same on every node.
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
