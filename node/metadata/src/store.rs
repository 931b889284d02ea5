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

use bytes::Bytes;
use imbl::OrdMap;
use parking_lot::Mutex;
use quorumfs_proto::{Attributes, FileKind, InodeNumber, SessionId, Timestamp, codec};

use super::apply::{Batch, Writer, check_feature_level};
use super::database::{DamageSignal, Database};
use super::fault::StorageFault;
use super::files::{
    INSTALLATION, available_bytes, path_beside, remove_leftover, remove_unfinished_installations,
    sync_directory_of, sync_file,
};
use super::marks::MarkTable;
use super::overlay::{Base, Direction, KeyRange, Layers, Overlay};
use super::snapshot::{Installation, Received, Snapshot};
use super::tables::{
    FORMAT, Format, InodeRecord, Inodes, Marks, Meta, MetaRecord, Replicas, Rows, Sessions, Silences, Table,
};
use super::view::View;

/// Default bound of the active overlay: a flush of it takes a second or so.
const OVERLAY_BYTES_MAX: u64 = 64 << 20;
/// Default memory for the database's pages.
const CACHE_BYTES: usize = 128 << 20;
/// What the database's own bookkeeping may add to a flush.
pub(super) const FLUSH_MARGIN_BYTES: u64 = 4 << 20;
/// The page that redb writes for a changed row at the least.
const PAGE_BYTES: u64 = 4096;
/// The permissions of the root directory when it is made.
const ROOT_MODE: u16 = 0o755;

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct MetadataOptions {
    /// Above this many bytes of overlay the caller of [`Batch::apply`] waits for a flush.
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

/// Up to where in the log a state goes. The consensus layer's words for it are kept as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The index of the last applied entry; 0: none.
    pub index: u64,
    /// Its log id, encoded by the consensus layer.
    pub log_id: Option<Bytes>,
    /// The last membership up to there, encoded by the consensus layer.
    pub membership: Option<Bytes>,
}

/// How the chunks that files name have changed in number since the state was opened or, by a snapshot, replaced.
/// Whoever counted them at one view knows their number at every later one of the same generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamedChange {
    /// Counts the replacements.
    pub generation: u64,
    /// Chunks more (or less).
    pub chunks: i64,
    /// Their bytes.
    pub bytes: i64,
}

/// What is known of the state as a whole. Everything in it follows from the rows; the counters are written to `meta`
/// with each batch, the living sessions are read again when the database is opened. How the named chunks have changed
/// is kept in memory only.
#[derive(Clone)]
pub(super) struct Summary {
    pub(super) position: Position,
    pub(super) last_stamp: Timestamp,
    pub(super) feature_level: u32,
    pub(super) replicas: Replicas,
    pub(super) next_inode: u64,
    pub(super) inode_count: u64,
    /// Sessions that have not ended, with their chunks' low-water marks.
    pub(super) living: OrdMap<SessionId, u64>,
    /// Up to where each of them has answered for unlinked inodes.
    pub(super) marks: MarkTable,
    /// Those that were silent when a leader last looked, for how long in milliseconds.
    pub(super) silences: OrdMap<SessionId, u64>,
    pub(super) named_change: NamedChange,
    /// Below these keys the tables of unlinked inodes are empty, so nobody need look there: the rows that were taken out of
    /// them since the last flush lie in the overlays as removed. They say where a scan begins, never what it finds, so they
    /// may differ between nodes, and are lowest after a start.
    pub(super) queue_from: (u64, InodeNumber),
    pub(super) reclaimable_from: InodeNumber,
}

impl Summary {
    fn load(layers: &Layers) -> Result<Summary, StorageFault> {
        let meta = read_meta(layers)?;
        check_feature_level(meta.feature_level)?;
        let (mut living, mut marks) = (OrdMap::new(), MarkTable::default());
        for row in layers.scan::<Sessions>(KeyRange::prefix(&[]), Direction::Up)? {
            let (session, record) = row?;
            if record.ended.is_none() {
                living.insert(session, record.chunk_low_water);
                marks.opened(session, layers.get::<Marks>(&session)?);
            }
        }
        let silences = layers.scan::<Silences>(KeyRange::prefix(&[]), Direction::Up)?;
        let silences = silences.collect::<Result<OrdMap<_, _>, _>>()?;
        Ok(Summary {
            position: position_of(&meta),
            last_stamp: meta.last_stamp,
            feature_level: meta.feature_level,
            replicas: meta.replicas,
            next_inode: meta.next_inode,
            inode_count: meta.inode_count,
            living,
            marks,
            silences,
            named_change: NamedChange::default(),
            queue_from: (0, InodeNumber(0)),
            reclaimable_from: InodeNumber(0),
        })
    }

    pub(super) fn meta(&self) -> MetaRecord {
        MetaRecord {
            index: self.position.index,
            log_id: self.position.log_id.clone(),
            membership: self.position.membership.clone(),
            last_stamp: self.last_stamp,
            feature_level: self.feature_level,
            replicas: self.replicas,
            next_inode: self.next_inode,
            inode_count: self.inode_count,
        }
    }
}

fn position_of(meta: &MetaRecord) -> Position {
    Position {
        index: meta.index,
        log_id: meta.log_id.clone(),
        membership: meta.membership.clone(),
    }
}

fn read_meta(layers: &Layers) -> Result<MetaRecord, StorageFault> {
    match layers.get::<Format>(&())? {
        Some(FORMAT) => {}
        Some(found) => {
            return Err(StorageFault::UnknownFormat { found, known: FORMAT });
        }
        None => return Err(StorageFault::damaged("no format is noted")),
    }
    layers
        .get::<Meta>(&())?
        .ok_or_else(|| StorageFault::damaged("no position is noted"))
}

/// What views are made of; see the module's invariants.
pub(super) struct State {
    layers: Layers,
    summary: Summary,
    /// What the frozen overlay, if there is one, goes up to.
    frozen_position: Position,
    durable_position: Position,
    /// Counts [`MetadataStore::freeze`], so that a batch notices one that came between.
    freezes: u64,
}

impl State {
    /// The state of a database without overlays.
    pub(super) fn open(database: Arc<Database>) -> Result<State, StorageFault> {
        let layers = Layers {
            active: Arc::new(Overlay::new()),
            frozen: None,
            base: Arc::new(Base::open(database)?),
        };
        let summary = Summary::load(&layers)?;
        let position = summary.position.clone();
        Ok(State {
            layers,
            summary,
            frozen_position: position.clone(),
            durable_position: position,
            freezes: 0,
        })
    }

    pub(super) fn view(&self) -> View {
        View::new(self.layers.clone(), self.summary.clone())
    }
}

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
        let writer = Writer::new(state.layers.clone(), state.summary.clone());
        Batch::new(self, writer, state.freezes)
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
    pub(super) fn publish(&self, writer: Writer, freezes_at_begin: u64) {
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
