//! The database file: opening, creating and converting it, and the one place where its damage is detected.
//!
//! The database is stored in blocks with checksums ([`quorumfs_blocks`]), so damage is an error of the read that meets
//! it, before a wrong row can result. Every reader can meet it: an apply, a query, the scrub, an audit, a snapshot that
//! is being sent. They need not report it: every fault that is damage raises the [`DamageSignal`] where it arises. A
//! panic inside redb is such a fault too ([`Database::guarded`]).

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use quorumfs_blocks::{BlockFile, Kind, OnDamage, convert, is_medium_error, kind_of};
use redb::ReadableDatabase as _;

use super::fault::StorageFault;
use super::files::{available_bytes, path_beside, remove_leftover, sync_directory_of};
use super::tables::Table;

/// Suffix of the file to which a plain file is converted.
const CONVERSION: &str = "converted";

type Hook = Box<dyn Fn(StorageFault) + Send + Sync>;

/// Raised by every reader that meets damage; calls one hook.
#[derive(Clone, Default)]
pub(super) struct DamageSignal(Arc<Mutex<Damage>>);

#[derive(Default)]
struct Damage {
    /// The first damage found.
    found: Option<String>,
    hook: Option<Arc<Hook>>,
}

impl DamageSignal {
    /// Reports `what`, unless damage was reported before: later damage may be a consequence of the first.
    pub(super) fn raise(&self, what: &str) {
        let hook = {
            let mut damage = self.0.lock();
            if damage.found.is_some() {
                return;
            }
            damage.found = Some(what.to_string());
            damage.hook.clone()
        };
        if let Some(hook) = hook {
            hook(StorageFault::damaged(what));
        }
    }

    /// Sets the hook. If damage was found before, the hook is called at once.
    pub(super) fn listen(&self, hook: impl Fn(StorageFault) + Send + Sync + 'static) {
        let hook: Arc<Hook> = Arc::new(Box::new(hook));
        let found = {
            let mut damage = self.0.lock();
            damage.hook = Some(hook.clone());
            damage.found.clone()
        };
        if let Some(found) = found {
            hook(StorageFault::damaged(found));
        }
    }

    /// Forwards reports of this signal to `other`, including an earlier one.
    pub(super) fn joins(&self, other: &DamageSignal) {
        let other = other.clone();
        self.listen(move |fault| match fault {
            StorageFault::Damaged { what } => other.raise(&what),
            fault => other.raise(&fault.to_string()),
        });
    }

    /// Returns `fault`, and raises the signal if it is damage.
    pub(super) fn noted(&self, fault: StorageFault) -> StorageFault {
        if fault.is_damage() {
            self.raise(&fault.to_string());
        }
        fault
    }

    fn for_blocks(&self) -> OnDamage {
        let signal = self.clone();
        Arc::new(move |what| signal.raise(what))
    }
}

/// An open database.
pub(super) struct Database {
    redb: redb::Database,
    damage: DamageSignal,
}

impl Database {
    /// Opens the file at `path`. A file made by an earlier version is converted first.
    pub(super) fn open(
        path: &Path,
        cache_bytes: usize,
        damage: DamageSignal,
    ) -> Result<Database, StorageFault> {
        let file = open_file(OpenOptions::new().read(true).write(true), path);
        let file = file.map_err(cannot_open("open the metadata database"))?;
        let kind = kind_of(&file).map_err(cannot_open("read the beginning of the metadata database"))?;
        let plain = kind == Kind::Plain && !take_over(path, &file, cache_bytes)?;
        drop(file);
        let redb = guarded(&damage, || {
            let mut builder = redb::Builder::new();
            builder.set_cache_size(cache_bytes);
            if plain {
                return Ok(builder.open(path)?);
            }
            let file = open_file(OpenOptions::new().read(true).write(true), path)
                .map_err(StorageFault::io("open the metadata database"))?;
            let blocks = BlockFile::open(file, damage.for_blocks()).map_err(redb::StorageError::Io)?;
            Ok(builder.create_with_backend(blocks)?)
        })?;
        let database = Database { redb, damage };
        database.create_missing_tables()?;
        Ok(database)
    }

    /// Creates an empty database in a new file.
    pub(super) fn create(
        path: &Path,
        cache_bytes: usize,
        damage: DamageSignal,
    ) -> Result<Database, StorageFault> {
        let mut options = OpenOptions::new();
        let file = open_file(options.read(true).write(true).create_new(true), path)
            .map_err(StorageFault::io("create a metadata database"))?;
        let redb = guarded(&damage, || {
            let blocks = BlockFile::create(file, damage.for_blocks());
            redb::Builder::new()
                .set_cache_size(cache_bytes)
                .create_with_backend(blocks)
                .map_err(StorageFault::from)
        })?;
        let database = Database { redb, damage };
        database.create_missing_tables()?;
        Ok(database)
    }

    /// Returns the signal on which damage is reported.
    pub(super) fn damage(&self) -> &DamageSignal {
        &self.damage
    }

    /// Begins a stable read of the committed state.
    pub(super) fn begin_read(&self) -> Result<redb::ReadTransaction, StorageFault> {
        self.guarded(|| Ok(self.redb.begin_read()?))
    }

    /// Begins a transaction whose commit is on disk when it returns. After it, reopening needs no walk of the file.
    pub(super) fn begin_durable(&self) -> Result<redb::WriteTransaction, StorageFault> {
        self.guarded(|| {
            let mut transaction = self.redb.begin_write()?;
            transaction.set_durability(redb::Durability::Immediate)?;
            transaction.set_quick_repair(true);
            Ok(transaction)
        })
    }

    /// Runs a function that may meet damage, in redb or in a row. A panic counts as damage; after one in a write the
    /// database is not used any more.
    pub(super) fn guarded<T>(
        &self,
        work: impl FnOnce() -> Result<T, StorageFault>,
    ) -> Result<T, StorageFault> {
        guarded(&self.damage, work)
    }

    /// Creates tables that a newer program has and the program that made the file did not.
    fn create_missing_tables(&self) -> Result<(), StorageFault> {
        self.guarded(|| {
            let present = self.redb.begin_read()?.list_tables()?.count();
            if present == Table::COUNT {
                return Ok(());
            }
            let transaction = self.begin_durable()?;
            for table in Table::ALL {
                transaction.open_table(table.definition())?;
            }
            transaction.commit()?;
            Ok(())
        })
    }
}

fn guarded<T>(
    damage: &DamageSignal,
    work: impl FnOnce() -> Result<T, StorageFault>,
) -> Result<T, StorageFault> {
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let reason = panic_message(&*panic);
        Err(StorageFault::damaged(format!("redb panicked: {reason}")))
    });
    result.map_err(|fault| damage.noted(fault))
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Converts the error of opening a database that exists: an error of the medium is damage.
fn cannot_open(doing: &'static str) -> impl FnOnce(std::io::Error) -> StorageFault {
    move |error| match is_medium_error(&error) {
        true => StorageFault::damaged(format!("cannot {doing}: {error}")),
        false => StorageFault::io(doing)(error),
    }
}

fn open_file(options: &OpenOptions, path: &Path) -> std::io::Result<File> {
    options.open(path)
}

/// Replaces a plain file by a copy in blocks, if the file is intact. Returns false if there is no space for the copy
/// yet.
fn take_over(path: &Path, plain: &File, cache_bytes: usize) -> Result<bool, StorageFault> {
    const DOING: &str = "convert the metadata database of an earlier version";
    let beside = path_beside(path, CONVERSION);
    remove_leftover(&beside)?;
    let bytes = plain.metadata().map_err(StorageFault::io(DOING))?.len();
    if available_bytes(path)? < bytes + bytes / 8 {
        tracing::warn!(
            bytes,
            "no space to convert the metadata database of an earlier version: its blocks have no checksums until a \
             later start"
        );
        return Ok(false);
    }
    // Reads the whole file: damaged rows must not get valid checksums.
    let is_sound = guarded(&DamageSignal::default(), || {
        let mut builder = redb::Builder::new();
        let mut database = builder.set_cache_size(cache_bytes).open(path)?;
        Ok(database.check_integrity()?)
    })?;
    if !is_sound {
        return Err(StorageFault::damaged(
            "the metadata database of an earlier version does not match its checksums",
        ));
    }
    let into = open_file(
        OpenOptions::new().read(true).write(true).create_new(true),
        &beside,
    );
    into.and_then(|into| convert(plain, into))
        .and_then(|()| std::fs::rename(&beside, path))
        .map_err(StorageFault::io(DOING))?;
    sync_directory_of(path)?;
    tracing::info!(
        bytes,
        "the metadata database was converted to blocks with checksums"
    );
    Ok(true)
}
