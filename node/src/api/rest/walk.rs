//! Walks a tree in the byte order of its paths, from any path on, with bounded memory.
//!
//! The cluster lists a directory in the order of its cookies, which is no order of names. So a directory is read
//! whole, of which the smallest entries after the last one given out are kept, up to a bound; when those are used up
//! and there are more, it is read again. A directory of 100,000 entries is read a few times for a page of 10,000.
//!
//! The order is that of whole paths as bytes: `a.txt` comes before `a/x`, because `.` is less than `/`. For that a
//! directory has two places among its siblings: its entry at `name`, what is below it at `name/`.
//!
//! Entries that come and go during the walk are listed or not; each other one exactly once.

use std::collections::{BinaryHeap, VecDeque};
use std::time::Instant;

use quorumfs_proto::query::DirectoryEntry;
use quorumfs_proto::{Attributes, FileKind, FsError, InodeNumber};

use super::calls::{Calls, verdict};
use super::error::ApiError;

/// Most entries of one directory kept at a time (about 5 MiB).
const LEVEL_ITEMS_MAX: usize = 16 << 10;

/// Most entries kept of all directories on the way down; above it outer ones are forgotten and read again later.
const ITEMS_MAX: usize = 4 * LEVEL_ITEMS_MAX;

/// Whether a walk goes into directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Only the one it begins in.
    Level,
    /// All.
    Tree,
}

/// What a walk comes upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// From the root of the filesystem, without a leading `/`.
    pub(super) path: Vec<u8>,
    pub(super) attributes: Attributes,
}

/// A step of a walk.
#[derive(Debug)]
pub(super) enum Step {
    /// An entry.
    Entry(Found),
    /// The time is up; a walk that begins after this path goes on from here.
    Paused {
        /// Not necessarily that of an entry.
        at: Vec<u8>,
    },
    /// There is no more.
    End,
}

/// Where a directory is read by name; the walk is tested without a cluster.
pub(super) trait Directories {
    /// All entries, in any order and maybe in several answers; `None` if there is no such directory (any more).
    async fn page(
        &self,
        directory: InodeNumber,
        after: u64,
    ) -> Result<Option<(Vec<DirectoryEntry>, bool)>, ApiError>;
}

impl Directories for Calls {
    async fn page(
        &self,
        directory: InodeNumber,
        after: u64,
    ) -> Result<Option<(Vec<DirectoryEntry>, bool)>, ApiError> {
        match verdict(self.read_directory(directory, after).await)? {
            Ok(page) => Ok(Some(page)),
            Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => Ok(None),
            Err(other) => Err(other.into()),
        }
    }
}

/// A walk under way.
pub(super) struct Walk<'a, D> {
    directories: &'a D,
    depth: Depth,
    /// Only what begins so, in the directory that the walk begins in.
    partial: Vec<u8>,
    /// The path after which it began.
    after: Vec<u8>,
    deadline: Instant,
    levels: Vec<Level>,
}

struct Level {
    inode: InodeNumber,
    /// Its path with a `/` at the end; empty for the root.
    path: Vec<u8>,
    from: Bound,
    /// What comes next, in order.
    pending: VecDeque<Item>,
    /// Whether nothing comes after `pending`.
    complete: bool,
}

/// Where a directory's items begin.
enum Bound {
    Start,
    /// After the path with this rest below the directory; so what is below `a/` is among them when the rest is `a/x`.
    After(Vec<u8>),
    /// After the item with this key.
    Past(Vec<u8>),
}

/// An entry, or what is below a directory.
struct Item {
    /// The name; with a `/` at the end for what is below.
    key: Vec<u8>,
    attributes: Attributes,
}

impl Item {
    fn is_subtree(&self) -> bool {
        self.key.last() == Some(&b'/')
    }
}

impl PartialEq for Item {
    fn eq(&self, other: &Item) -> bool {
        self.key == other.key
    }
}
impl Eq for Item {}
impl PartialOrd for Item {
    fn partial_cmp(&self, other: &Item) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Item {
    fn cmp(&self, other: &Item) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

impl Bound {
    fn admits(&self, key: &[u8]) -> bool {
        match self {
            Bound::Start => true,
            Bound::After(rest) => key > rest.as_slice() || (key.ends_with(b"/") && rest.starts_with(key)),
            Bound::Past(last) => key > last.as_slice(),
        }
    }
}

impl<'a, D: Directories> Walk<'a, D> {
    /// Of the directory `inode` at `path` (with a `/` at the end, or empty): what begins with `partial` there and comes
    /// after the path `after` (empty: everything).
    pub(super) fn new(
        directories: &'a D,
        (inode, path): (InodeNumber, Vec<u8>),
        partial: Vec<u8>,
        after: Vec<u8>,
        depth: Depth,
        deadline: Instant,
    ) -> Walk<'a, D> {
        // All paths of the directory begin with its own; a path behind all of those leaves nothing.
        let nothing_left = after > path && !after.starts_with(&path);
        let mut walk = Walk {
            directories,
            depth,
            partial,
            after,
            deadline,
            levels: Vec::new(),
        };
        if !nothing_left {
            walk.enter(inode, path);
        }
        walk
    }

    fn enter(&mut self, inode: InodeNumber, path: Vec<u8>) {
        let from = match self.after.strip_prefix(path.as_slice()) {
            Some(rest) if !rest.is_empty() => Bound::After(rest.to_vec()),
            _ => Bound::Start,
        };
        self.levels.push(Level {
            inode,
            path,
            from,
            pending: VecDeque::new(),
            complete: false,
        });
    }

    /// The next entry.
    pub(super) async fn next(&mut self) -> Result<Step, ApiError> {
        loop {
            let outermost = self.levels.len() == 1;
            let Some(level) = self.levels.last_mut() else {
                return Ok(Step::End);
            };
            let Some(item) = level.pending.pop_front() else {
                if level.complete {
                    self.levels.pop();
                } else {
                    let partial = if outermost { self.partial.as_slice() } else { b"" };
                    level.fill(self.directories, partial, self.depth).await?;
                    self.forget_outer_levels();
                }
                continue;
            };
            let mut path = level.path.clone();
            path.extend_from_slice(&item.key);
            level.from = Bound::Past(item.key.clone());
            if !item.is_subtree() {
                return Ok(Step::Entry(Found {
                    path,
                    attributes: item.attributes,
                }));
            }
            // Only a path that is further than where the walk began is progress: else the next walk would begin at
            // the same place.
            let progress = path > self.after;
            if progress && Instant::now() >= self.deadline {
                return Ok(Step::Paused { at: path });
            }
            self.enter(item.attributes.inode, path);
        }
    }

    fn forget_outer_levels(&mut self) {
        let mut held: usize = self.levels.iter().map(|level| level.pending.len()).sum();
        let innermost = self.levels.len().saturating_sub(1);
        for level in &mut self.levels[..innermost] {
            if held <= ITEMS_MAX {
                break;
            }
            if !level.pending.is_empty() {
                held -= level.pending.len();
                level.pending = VecDeque::new();
                level.complete = false;
            }
        }
    }
}

impl Level {
    /// Reads the directory for its next items.
    async fn fill(
        &mut self,
        directories: &impl Directories,
        partial: &[u8],
        depth: Depth,
    ) -> Result<(), ApiError> {
        // The greatest on top, so that it makes room for a lesser one.
        let mut smallest: BinaryHeap<Item> = BinaryHeap::new();
        let mut left_out = false;
        let mut keep = |key: Vec<u8>, attributes: &Attributes| {
            if !self.from.admits(&key) {
                return;
            }
            if smallest.len() >= LEVEL_ITEMS_MAX {
                left_out = true;
                if smallest.peek().is_some_and(|greatest| greatest.key <= key) {
                    return;
                }
                smallest.pop();
            }
            let attributes = attributes.clone();
            smallest.push(Item { key, attributes });
        };
        let mut after = 0;
        while let Some((entries, end)) = directories.page(self.inode, after).await? {
            let last = entries.last().map(|entry| entry.cookie);
            for entry in entries {
                let Some(attributes) = &entry.attributes else {
                    return Err(ApiError::internal(
                        "a listing lacks the attributes that were asked for",
                    ));
                };
                let name = entry.name.as_bytes();
                if !name.starts_with(partial) {
                    continue;
                }
                keep(name.to_vec(), attributes);
                if entry.kind == FileKind::Directory && depth == Depth::Tree {
                    keep([name, b"/"].concat(), attributes);
                }
            }
            match last {
                Some(cookie) if !end => after = cookie,
                _ => break,
            }
        }
        self.pending = smallest.into_sorted_vec().into();
        self.complete = !left_out;
        Ok(())
    }
}
