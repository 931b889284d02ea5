//! Open files: handles, and one [`SharedInode`] for all handles of a file.
//!
//! Invariants: an inode is in the table from before its open is sent to the cluster until its last handle is gone and
//! its last dirty byte is committed or lost; so an inode in use is never reported as not open. A failed commit is
//! remembered until it is reported. Locks are held briefly and taken in the order table, state; neither is held across
//! an await.
//!
//! This module must not know commands or the cluster; the type of a put in flight is a parameter.

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

/// The number of an open file or directory of this mount.
pub type Handle = u64;

/// The flags of an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFlags {
    /// Open for reading.
    pub read: bool,
    /// Open for writing.
    pub write: bool,
    /// O_APPEND: each write goes to the end of the file.
    pub append: bool,
    /// O_TRUNC.
    pub truncate: bool,
    /// Whether the truncation drops privileges: yes, unless the caller is privileged.
    pub privileges: Privileges,
    /// O_EXCL of a create.
    pub exclusive: bool,
}

impl OpenFlags {
    /// Whether programs can modify the kernel's pages through the handle. With O_APPEND writes bypass the pages; if it
    /// is also open for reading, it can be mapped.
    pub fn writes_pages(self) -> bool {
        self.write && (self.read || !self.append)
    }
}

impl From<i32> for OpenFlags {
    /// Converts the flags of open(2) of an unprivileged caller.
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

/// The dirty bytes to commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Bytes in sealed packs.
    Sealed,
    /// All dirty bytes.
    Everything,
}

/// A file that is open or dirty.
#[derive(Debug)]
pub struct SharedInode<Put> {
    /// The inode number.
    pub inode: InodeNumber,
    /// Held while commands that change the content of this file are sent, so that they take effect in the order of the
    /// writes.
    pub commit_lock: tokio::sync::Mutex<()>,
    /// Held while the kernel's pages of this file are dropped.
    pub page_drop_lock: Arc<tokio::sync::Mutex<()>>,
    /// All other state.
    pub state: Mutex<InodeState<Put>>,
}

/// The state of an open file.
#[derive(Debug)]
pub struct InodeState<Put> {
    /// The newest attributes of the cluster; `None` until the first open is answered.
    pub committed: Option<Attributes>,
    /// Uncommitted bytes.
    pub buffer: WriteBuffer,
    /// The last append, held because more of it may follow. It precedes the bytes in `buffer`.
    pub held_append: Option<HeldAppend>,
    /// Puts in flight or done, by the sequence of their pack.
    pub puts: BTreeMap<u64, Put>,
    /// The extents of the committed content.
    pub extents: ExtentCache,
    /// The state of the kernel's pages beyond the end of the file.
    pub tail: PageTail,
    /// Number of handles through which programs can modify the kernel's pages.
    pub page_writers: u32,
    /// The last byte that this mount appended.
    pub last_appended: Option<LastByte>,
    /// Time of the last write, while dirty.
    pub mtime: Option<Timestamp>,
    /// Whether the next commit drops privileges.
    pub privileges: Privileges,
    /// Whether the command in flight drops privileges.
    pub privileges_sent: Privileges,
    /// Time at which the oldest unsealed byte was written.
    pub dirty_since: Option<Instant>,
    /// The scope of the queued background commit.
    pub queued_commit: Option<Scope>,
    /// The bytes charged to the mount's dirty bytes.
    pub charged_bytes: u64,
    /// Failed commits.
    pub failures: Failures,
}

/// The last byte of a file at a version of its content.
#[derive(Clone, Copy, Debug)]
pub struct LastByte {
    /// The content version.
    pub version: u64,
    /// The offset of the byte.
    pub at: u64,
    /// The value of the byte.
    pub byte: u8,
}

/// Appended bytes that are not committed.
#[derive(Clone, Debug)]
pub struct HeldAppend {
    /// The first part.
    pub first: Bytes,
    /// The second part; may be empty.
    pub second: Bytes,
    /// Whether the append drops privileges.
    pub privileges: Privileges,
    /// The arrival of the first part; after its answer, the time of the answer.
    pub since: Instant,
    /// Whether a second part can be joined.
    pub stage: AppendStage,
    /// Whether a second part is known to follow.
    pub expects_more: bool,
}

/// The stage of a [`HeldAppend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendStage {
    /// A second part can be joined, with or without the commit lock.
    Open,
    /// It is complete or being committed.
    Closed,
}

impl HeldAppend {
    /// Length of both parts.
    pub fn bytes(&self) -> usize {
        self.first.len() + self.second.len()
    }
}

/// Most closed files with unreported failures. Beyond it the oldest is dropped; it was logged.
const UNREPORTED_FILES_MAX: usize = 1024;

/// Failed commits of one file, reported like failed write-back in Linux (`errseq_t`): once to each handle that was
/// open, and, until reported to any handle, to the next handle too.
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
    /// Records a failed commit.
    pub fn record(&mut self, error: FsError) {
        self.count += 1;
        self.last = error;
        self.reported = false;
    }

    /// Returns the number of failures that a new handle counts as seen.
    fn seen_by_new_handle(&self) -> u64 {
        if self.reported { self.count } else { self.count - 1 }
    }

    /// Reports the last failure to a handle that has `seen` this many, if there are more; updates `seen`.
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
    /// Whether all written bytes are committed.
    pub fn is_clean(&self) -> bool {
        self.buffer.is_clean() && self.held_append.is_none()
    }

    /// Memory of the uncommitted bytes, with overhead.
    pub fn footprint_bytes(&self) -> u64 {
        self.buffer.footprint_bytes() + self.held_bytes()
    }

    fn held_bytes(&self) -> u64 {
        self.held_append.as_ref().map_or(0, |held| held.bytes() as u64)
    }

    /// Replaces the attributes unless the known ones are newer. (Every change increases ctime.)
    pub fn update_attributes(&mut self, newer: &Attributes) {
        let is_older = |committed: &Attributes| {
            newer.ctime < committed.ctime || newer.content_version < committed.content_version
        };
        if !self.committed.as_ref().is_some_and(is_older) {
            self.committed = Some(newer.clone());
        }
    }

    /// Size of the file as this mount knows it, with uncommitted writes.
    pub fn size(&self) -> u64 {
        let committed = self.committed.as_ref().map_or(0, |committed| committed.size);
        committed.max(self.buffer.end())
    }

    /// Attributes with the effect of uncommitted writes of this mount.
    pub fn attributes(&self) -> Option<Attributes> {
        let mut attributes = self.committed.clone()?;
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

/// Returns the mode after a write, by the rule of the cluster: set-group-id stays if the group cannot execute.
fn without_privileges(mode: u16) -> u16 {
    const SET_USER_ID: u16 = 0o4000;
    const SET_GROUP_ID: u16 = 0o2000;
    const GROUP_EXECUTE: u16 = 0o0010;
    match mode & GROUP_EXECUTE {
        0 => mode & !SET_USER_ID,
        _ => mode & !(SET_USER_ID | SET_GROUP_ID),
    }
}

/// An open handle of a file.
#[derive(Debug)]
pub struct OpenFile<Put> {
    /// The file.
    pub node: Arc<SharedInode<Put>>,
    /// The flags of the open.
    pub flags: OpenFlags,
    /// The read-ahead state of this handle.
    pub readahead: Mutex<Readahead>,
    /// The page drop that the first request of this handle proves to have happened.
    pub drop_id: Mutex<Option<DropId>>,
    failures_seen: Mutex<u64>,
}

impl<Put> OpenFile<Put> {
    /// Consumes the unreported failure of this handle.
    ///
    /// # Errors
    /// The last failed commit since the open or the last call; after the open also an earlier one that was never
    /// reported.
    pub fn take_failure(&self) -> Result<(), FsError> {
        let mut state = self.node.state.lock();
        state.failures.report(&mut self.failures_seen.lock())
    }

    /// Like [`OpenFile::take_failure`], but leaves the failure unreported.
    ///
    /// # Errors
    /// The failure that [`OpenFile::take_failure`] would return.
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
    /// Handles, and opens in progress.
    use_count: u32,
}

#[derive(Debug)]
struct Tables<Put> {
    inodes: HashMap<InodeNumber, Entry<Put>>,
    files: HashMap<Handle, Arc<OpenFile<Put>>>,
    last_handle: Handle,
    /// Unreported failures of files that are no longer in `inodes`, oldest first.
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

/// All open files of a mount. The kernel bounds their number by the descriptors of programs.
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
    /// Counts a use of `inode`, before it is opened.
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
                    committed: None,
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

    /// Returns the number of handles and opens in progress of `inode`.
    pub fn use_count(&self, inode: InodeNumber) -> u32 {
        self.tables
            .lock()
            .inodes
            .get(&inode)
            .map_or(0, |entry| entry.use_count)
    }

    /// Ends a use.
    pub fn release(&self, node: &SharedInode<Put>) {
        let mut tables = self.tables.lock();
        if let Some(entry) = tables.inodes.get_mut(&node.inode) {
            entry.use_count -= 1;
        }
        remove_entry_if_idle(&mut tables, node.inode);
    }

    /// Removes `node` if it is not in use and clean.
    pub fn remove_if_idle(&self, node: &SharedInode<Put>) {
        remove_entry_if_idle(&mut self.tables.lock(), node.inode);
    }

    /// Turns a use into a handle.
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

    /// Returns the file of a handle.
    ///
    /// # Errors
    /// [`FsError::Stale`] if there is no such handle.
    pub fn get(&self, handle: Handle) -> Result<Arc<OpenFile<Put>>, FsError> {
        self.tables
            .lock()
            .files
            .get(&handle)
            .cloned()
            .ok_or(FsError::Stale)
    }

    /// Ends a handle; its use lasts until [`OpenFiles::release`].
    ///
    /// # Errors
    /// [`FsError::Stale`] if there is no such handle.
    pub fn remove(&self, handle: Handle) -> Result<Arc<OpenFile<Put>>, FsError> {
        let file = self.tables.lock().files.remove(&handle).ok_or(FsError::Stale)?;
        file.node.state.lock().page_writers -= u32::from(file.flags.writes_pages());
        Ok(file)
    }

    /// Returns the open or dirty file of this number.
    pub fn find(&self, inode: InodeNumber) -> Option<Arc<SharedInode<Put>>> {
        self.tables
            .lock()
            .inodes
            .get(&inode)
            .map(|entry| Arc::clone(&entry.node))
    }

    /// Clears the cached extents of files other than `used` if there are too many in memory. The caller holds no file's
    /// state lock.
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

    /// Whether no file is open or dirty.
    pub fn is_empty(&self) -> bool {
        self.tables.lock().inodes.is_empty()
    }

    /// Returns those of `inodes` that are neither open nor dirty here.
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
