//! What programs have open: handles, and one [`SharedInode`] for all handles of a file.
//!
//! Invariants: an inode is in the table from before its open is told to the cluster until its last handle is gone and
//! its last dirty byte is settled; so "not open here" is never said of a file that is. A failed flush outlives it until
//! somebody was told. Locks are short and taken in
//! the order table, state; neither is held across an await.
//!
//! It knows nothing of commands or the cluster; what a put in flight is, its user says.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::command::Privileges;
use quorumfs_proto::{Attributes, FsError, InodeNumber, Timestamp};

use crate::caches::extent_cache::{ExtentCache, ExtentCount};
use crate::caches::page_tail::PageTail;
use crate::caches::page_versions::DropId;
use crate::readahead::Readahead;
use crate::write_buffer::WriteBuffer;

/// Names an open file or directory of this mount.
pub type Handle = u64;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFlags {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// O_APPEND: each write goes to the end, wherever that is by then.
    pub append: bool,
    /// O_TRUNC.
    pub truncate: bool,
    /// Whether that drops privileges: it does unless the caller is privileged.
    pub privileges: Privileges,
    /// O_EXCL, of a create.
    pub exclusive: bool,
}

impl OpenFlags {
    /// Whether programs can change pages above through such a handle. One of O_APPEND writes beside them; for reading too it
    /// can be mapped.
    pub fn writes_pages(self) -> bool {
        self.write && (self.read || !self.append)
    }
}

impl From<i32> for OpenFlags {
    /// The flags of open(2), of an unprivileged caller.
    fn from(flags: i32) -> OpenFlags {
        let access = flags & libc::O_ACCMODE;
        OpenFlags {
            read: access != libc::O_WRONLY,
            write: access != libc::O_RDONLY,
            append: flags & libc::O_APPEND != 0,
            truncate: flags & libc::O_TRUNC != 0,
            privileges: Privileges::Drop,
            exclusive: flags & libc::O_EXCL != 0,
        }
    }
}

/// Which dirty bytes a commit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Those in sealed packs.
    Sealed,
    /// All.
    Everything,
}

/// One file that is open or dirty.
#[derive(Debug)]
pub struct SharedInode<Put> {
    /// Its number.
    pub inode: InodeNumber,
    /// Whoever use_count it may send commands about the content of this file: they take effect in the order of writing.
    pub commit_lock: tokio::sync::Mutex<()>,
    /// Whoever use_count it drops pages of this file above.
    pub page_drop_lock: Arc<tokio::sync::Mutex<()>>,
    /// Everything else.
    pub state: Mutex<InodeState<Put>>,
}

/// What is known of an open file.
#[derive(Debug)]
pub struct InodeState<Put> {
    /// The newest attributes the cluster told; `None` until the first open is answered.
    pub view: Option<Attributes>,
    /// What the cluster does not know yet.
    pub buffer: WriteBuffer,
    /// What was appended last, if it is held back because more of it may follow. It lies before what is in the buffer.
    pub held_append: Option<HeldAppend>,
    /// Puts in flight or done, by the sequence of their pack.
    pub puts: BTreeMap<u64, Put>,
    /// Where the committed bytes are.
    pub extents: ExtentCache,
    /// What pages above hold behind the end of the file.
    pub tail: PageTail,
    /// Handles through which programs may write to the pages above.
    pub page_writers: u32,
    /// What this mount appended last.
    pub last_appended: Option<LastByte>,
    /// When a program wrote last, while dirty.
    pub mtime: Option<Timestamp>,
    /// Whether the next flush drops privileges.
    pub privileges: Privileges,
    /// Whether the command under way does.
    pub privileges_sent: Privileges,
    /// When the oldest unsealed byte was written.
    pub dirty_since: Option<Instant>,
    /// The background commit that is queued.
    pub queued_commit: Option<Scope>,
    /// What the buffer counts for in the mount's dirty bytes.
    pub charged_bytes: u64,
    /// Flushes that failed.
    pub failures: Failures,
}

/// The last byte of a file, as of a version of its content.
#[derive(Clone, Copy, Debug)]
pub struct LastByte {
    /// The version.
    pub version: u64,
    /// Its offset.
    pub at: u64,
    /// The byte.
    pub byte: u8,
}

/// Bytes that were appended and are not committed yet.
#[derive(Clone, Debug)]
pub struct HeldAppend {
    /// The bytes.
    pub first: Bytes,
    /// What came behind them as the second part.
    pub second: Bytes,
    /// Whether they drop privileges.
    pub privileges: Privileges,
    /// When the first of them came, and then when that was answered.
    pub since: Instant,
    /// Whether more may come.
    pub stage: AppendStage,
    /// Whether a second part is known to come.
    pub expects_more: bool,
}

/// What may become of a [`HeldAppend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendStage {
    /// It may get a second part, whoever has the file's turn.
    Open,
    /// It is whole, or on its way.
    Closed,
}

impl HeldAppend {
    /// How many they are.
    pub fn bytes(&self) -> usize {
        self.first.len() + self.second.len()
    }
}

/// Files that are not open any more whose failures nobody was told. Beyond it the oldest is given up: it was logged.
const UNREPORTED_FILES_MAX: usize = 1024;

/// Flushes of one file that failed, told as Linux tells of failed write-back (`errseq_t`): once to each handle that was
/// open then, and, as long as nobody was told, to the next handle too.
#[derive(Clone, Copy, Debug)]
pub struct Failures {
    count: u64,
    last: FsError,
    reported: bool,
}

impl Default for Failures {
    fn default() -> Failures {
        Failures {
            count: 0,
            last: FsError::Io,
            reported: true,
        }
    }
}

impl Failures {
    /// A flush failed.
    pub fn record(&mut self, error: FsError) {
        self.count += 1;
        self.last = error;
        self.reported = false;
    }

    /// What a handle that is opened now has seen.
    fn seen_by_new_handle(&self) -> u64 {
        if self.reported { self.count } else { self.count - 1 }
    }

    /// Tells a handle that has `seen` so many of what came after.
    fn report(&mut self, seen: &mut u64) -> Result<(), FsError> {
        if *seen == self.count {
            return Ok(());
        }
        *seen = self.count;
        self.reported = true;
        Err(self.last)
    }
}

impl<Put> InodeState<Put> {
    /// Whether the cluster knows all that was written.
    pub fn is_clean(&self) -> bool {
        self.buffer.is_clean() && self.held_append.is_none()
    }

    /// What the cluster does not know, with what it costs to keep it.
    pub fn footprint_bytes(&self) -> u64 {
        self.buffer.footprint_bytes() + self.held_bytes()
    }

    fn held_bytes(&self) -> u64 {
        self.held_append.as_ref().map_or(0, |held| held.bytes() as u64)
    }

    /// Takes what the cluster told, unless it is older than what is known. (Each change moves ctime forward.)
    pub fn update_attributes(&mut self, newer: &Attributes) {
        let is_older =
            |view: &Attributes| newer.ctime < view.ctime || newer.content_version < view.content_version;
        if !self.view.as_ref().is_some_and(is_older) {
            self.view = Some(newer.clone());
        }
    }

    /// How long the file is for programs of this mount, as far as is known.
    pub fn size(&self) -> u64 {
        let committed = self.view.as_ref().map_or(0, |view| view.size);
        committed.max(self.buffer.end())
    }

    /// The attributes as programs of this mount see them: with what they wrote.
    pub fn attributes(&self) -> Option<Attributes> {
        let mut attributes = self.view.clone()?;
        if !self.is_clean() {
            let held_bytes = self.held_bytes();
            attributes.size = (attributes.size + held_bytes).max(self.buffer.end());
            attributes.allocated_bytes += self.buffer.bytes() + held_bytes;
            if let Some(mtime) = self.mtime {
                attributes.mtime = mtime;
                attributes.ctime = attributes.ctime.max(mtime);
            }
        }
        let held = self
            .held_append
            .as_ref()
            .map_or(Privileges::Keep, |held| held.privileges);
        if [self.privileges, self.privileges_sent, held].contains(&Privileges::Drop) {
            attributes.mode = without_privileges(attributes.mode);
            attributes.has_capability = false;
        }
        Some(attributes)
    }
}

/// What a write leaves of a file's mode, as the cluster has it: set-group-id stays where the group may not execute.
fn without_privileges(mode: u16) -> u16 {
    const SET_USER_ID: u16 = 0o4000;
    const SET_GROUP_ID: u16 = 0o2000;
    const GROUP_EXECUTE: u16 = 0o0010;
    match mode & GROUP_EXECUTE {
        0 => mode & !SET_USER_ID,
        _ => mode & !(SET_USER_ID | SET_GROUP_ID),
    }
}

/// One open file of one program.
#[derive(Debug)]
pub struct OpenFile<Put> {
    /// The file.
    pub node: Arc<SharedInode<Put>>,
    /// How it was opened.
    pub flags: OpenFlags,
    /// How it is read.
    pub readahead: Mutex<Readahead>,
    /// What its first request shows to have taken place.
    pub drop_id: Mutex<Option<DropId>>,
    failures_seen: Mutex<u64>,
}

impl<Put> OpenFile<Put> {
    /// The failure of a flush since the open or the last call, told once; after the open also one before it that nobody
    /// was told.
    pub fn take_failure(&self) -> Result<(), FsError> {
        let mut state = self.node.state.lock();
        state.failures.report(&mut self.failures_seen.lock())
    }

    /// The failure that [`OpenFile::take_failure`] would tell, which stays to be told.
    pub fn failure(&self) -> Result<(), FsError> {
        let state = self.node.state.lock();
        match *self.failures_seen.lock() == state.failures.count {
            true => Ok(()),
            false => Err(state.failures.last),
        }
    }
}

#[derive(Debug)]
struct Entry<Put> {
    node: Arc<SharedInode<Put>>,
    /// Handles, and opens under way.
    use_count: u32,
}

#[derive(Debug)]
struct Tables<Put> {
    inodes: HashMap<InodeNumber, Entry<Put>>,
    files: HashMap<Handle, Arc<OpenFile<Put>>>,
    last_handle: Handle,
    /// Of files that are in `inodes` no more, oldest first.
    unreported: VecDeque<(InodeNumber, Failures)>,
}

impl<Put> Tables<Put> {
    fn take_unreported(&mut self, inode: InodeNumber) -> Failures {
        let at = self
            .unreported
            .iter()
            .position(|(unreported, _)| *unreported == inode);
        let taken = at.and_then(|at| self.unreported.remove(at));
        taken.map_or_else(Failures::default, |(_, failures)| failures)
    }
}

/// All open files of a mount. As many as programs hold open: the kernel bounds them.
#[derive(Debug)]
pub struct OpenFiles<Put> {
    tables: Mutex<Tables<Put>>,
    extents: ExtentCount,
}

impl<Put> Default for OpenFiles<Put> {
    fn default() -> OpenFiles<Put> {
        OpenFiles {
            tables: Mutex::new(Tables {
                inodes: HashMap::new(),
                files: HashMap::new(),
                last_handle: 0,
                unreported: VecDeque::new(),
            }),
            extents: ExtentCount::default(),
        }
    }
}

impl<Put> OpenFiles<Put> {
    /// Says that `inode` is open here, before it is.
    pub fn acquire(&self, inode: InodeNumber) -> Arc<SharedInode<Put>> {
        let mut tables = self.tables.lock();
        let failures = match tables.inodes.contains_key(&inode) {
            true => Failures::default(),
            false => tables.take_unreported(inode),
        };
        let entry = tables.inodes.entry(inode).or_insert_with(|| Entry {
            node: Arc::new(SharedInode {
                inode,
                commit_lock: tokio::sync::Mutex::new(()),
                page_drop_lock: Arc::default(),
                state: Mutex::new(InodeState {
                    view: None,
                    buffer: WriteBuffer::default(),
                    held_append: None,
                    puts: BTreeMap::new(),
                    extents: ExtentCache::with_count(&self.extents),
                    tail: PageTail::default(),
                    page_writers: 0,
                    last_appended: None,
                    mtime: None,
                    privileges: Privileges::Keep,
                    privileges_sent: Privileges::Keep,
                    dirty_since: None,
                    queued_commit: None,
                    charged_bytes: 0,
                    failures,
                }),
            }),
            use_count: 0,
        });
        entry.use_count += 1;
        Arc::clone(&entry.node)
    }

    /// How many handles and opens under way `inode` has.
    pub fn use_count(&self, inode: InodeNumber) -> u32 {
        self.tables
            .lock()
            .inodes
            .get(&inode)
            .map_or(0, |entry| entry.use_count)
    }

    /// Takes a hold back.
    pub fn release(&self, node: &SharedInode<Put>) {
        let mut tables = self.tables.lock();
        if let Some(entry) = tables.inodes.get_mut(&node.inode) {
            entry.use_count -= 1;
        }
        remove_entry_if_idle(&mut tables, node.inode);
    }

    /// Forgets `node` if nobody has it open and it is clean.
    pub fn remove_if_idle(&self, node: &SharedInode<Put>) {
        remove_entry_if_idle(&mut self.tables.lock(), node.inode);
    }

    /// Makes a hold into a handle.
    pub fn add(&self, node: Arc<SharedInode<Put>>, flags: OpenFlags, drop_id: Option<DropId>) -> Handle {
        let seen = {
            let mut state = node.state.lock();
            state.page_writers += u32::from(flags.writes_pages());
            state.failures.seen_by_new_handle()
        };
        let mut tables = self.tables.lock();
        tables.last_handle += 1;
        let handle = tables.last_handle;
        let file = OpenFile {
            node,
            flags,
            readahead: Mutex::default(),
            drop_id: Mutex::new(drop_id),
            failures_seen: Mutex::new(seen),
        };
        tables.files.insert(handle, Arc::new(file));
        handle
    }

    /// The file of a handle. [`FsError::Stale`] where there is none.
    pub fn get(&self, handle: Handle) -> Result<Arc<OpenFile<Put>>, FsError> {
        self.tables
            .lock()
            .files
            .get(&handle)
            .cloned()
            .ok_or(FsError::Stale)
    }

    /// Ends a handle; its hold stays until [`OpenFiles::release`].
    pub fn remove(&self, handle: Handle) -> Result<Arc<OpenFile<Put>>, FsError> {
        let file = self.tables.lock().files.remove(&handle).ok_or(FsError::Stale)?;
        file.node.state.lock().page_writers -= u32::from(file.flags.writes_pages());
        Ok(file)
    }

    /// The open (or dirty) file of this number.
    pub fn find(&self, inode: InodeNumber) -> Option<Arc<SharedInode<Put>>> {
        self.tables
            .lock()
            .inodes
            .get(&inode)
            .map(|entry| Arc::clone(&entry.node))
    }

    /// Has files other than `used` forget their extents, if there are too many in memory. The caller use_count no file's state.
    pub fn bound_extents(&self, used: &SharedInode<Put>) {
        if !self.extents.is_exceeded() {
            return;
        }
        let nodes: Vec<Arc<SharedInode<Put>>> = {
            let tables = self.tables.lock();
            tables
                .inodes
                .values()
                .map(|entry| Arc::clone(&entry.node))
                .collect()
        };
        for node in nodes.iter().filter(|node| node.inode != used.inode) {
            if self.extents.has_room() {
                return;
            }
            node.state.lock().extents.clear();
        }
    }

    /// Whether nothing is open.
    pub fn is_empty(&self) -> bool {
        self.tables.lock().inodes.is_empty()
    }

    /// Those of `inodes` that are not open here.
    pub fn not_open(&self, inodes: &[InodeNumber]) -> Vec<InodeNumber> {
        let tables = self.tables.lock();
        inodes
            .iter()
            .filter(|inode| !tables.inodes.contains_key(inode))
            .copied()
            .collect()
    }
}

fn remove_entry_if_idle<Put>(tables: &mut Tables<Put>, inode: InodeNumber) {
    let is_idle = |entry: &Entry<Put>| entry.use_count == 0 && entry.node.state.lock().is_clean();
    if !tables.inodes.get(&inode).is_some_and(is_idle) {
        return;
    }
    let failures = tables
        .inodes
        .remove(&inode)
        .map(|entry| entry.node.state.lock().failures);
    if let Some(failures) = failures.filter(|failures| !failures.reported) {
        if tables.unreported.len() == UNREPORTED_FILES_MAX {
            tables.unreported.pop_front();
        }
        tables.unreported.push_back((inode, failures));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files_with_a_failure(inode: InodeNumber) -> OpenFiles<()> {
        let files = OpenFiles::default();
        let node = files.acquire(inode);
        node.state.lock().failures.record(FsError::NoSpace);
        files.release(&node);
        assert!(files.is_empty());
        files
    }

    fn open(files: &OpenFiles<()>, inode: InodeNumber) -> Arc<OpenFile<()>> {
        let handle = files.add(files.acquire(inode), OpenFlags::from(libc::O_RDWR), None);
        files.get(handle).unwrap()
    }

    #[test]
    fn an_unreported_failure_is_reported_to_the_next_handles() {
        let files = files_with_a_failure(InodeNumber(7));
        let (first, second) = (open(&files, InodeNumber(7)), open(&files, InodeNumber(7)));
        assert_eq!(first.take_failure(), Err(FsError::NoSpace));
        assert_eq!(first.take_failure(), Ok(()));
        assert_eq!(
            second.take_failure(),
            Err(FsError::NoSpace),
            "it was open before the failure was reported"
        );
        assert_eq!(open(&files, InodeNumber(7)).take_failure(), Ok(()));
        assert_eq!(
            open(&files, InodeNumber(8)).take_failure(),
            Ok(()),
            "another file"
        );
    }

    #[test]
    fn unreported_failures_are_bounded() {
        let files = files_with_a_failure(InodeNumber(1));
        for inode in 2..=UNREPORTED_FILES_MAX as u64 + 1 {
            let node = files.acquire(InodeNumber(inode));
            node.state.lock().failures.record(FsError::Io);
            files.release(&node);
        }
        assert_eq!(files.tables.lock().unreported.len(), UNREPORTED_FILES_MAX);
        assert_eq!(
            open(&files, InodeNumber(1)).take_failure(),
            Ok(()),
            "the oldest is dropped"
        );
        assert_eq!(open(&files, InodeNumber(2)).take_failure(), Err(FsError::Io));
    }
}
