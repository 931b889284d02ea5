//! Walks a tree in the byte order of its paths, starting after any path, with bounded memory.
//!
//! The cluster lists a directory in the order of its cookies, not of its names. So a directory is read completely, and
//! the smallest entries after the last returned one are kept, up to a bound; when they are used up and there are more,
//! the directory is read again. A directory of 100,000 entries is read a few times for a page of 10,000.
//!
//! The order is that of whole paths as bytes: `a.txt` precedes `a/x`, because `.` is less than `/`. So a directory has
//! two positions among its siblings: its entry at `name`, and its contents at `name/`.
//!
//! Entries that are created or removed during the walk may be listed or not; every other entry is listed exactly once.

use std::collections::{BinaryHeap, VecDeque};
use std::time::Instant;

use quorumfs_proto::query::DirectoryEntry;
use quorumfs_proto::{Attributes, FileKind, FsError, InodeNumber};

use super::access::{Access, verdict};
use super::error::ApiError;

/// Most entries of one directory that are kept (about 5 MiB).
const LEVEL_ITEMS_MAX: usize = 16 << 10;

/// Most entries of all open directories that are kept; beyond it those of outer directories are dropped and read again
/// later.
const ITEMS_MAX: usize = 4 * LEVEL_ITEMS_MAX;

/// Whether a walk includes subdirectories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Only the start directory.
    Level,
    /// All subdirectories.
    Tree,
}

/// An entry found by a walk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WalkEntry {
    /// The path from the root of the filesystem, without a leading `/`.
    pub(super) path: Vec<u8>,
    pub(super) attributes: Attributes,
}

/// A step of a walk.
#[derive(Debug)]
pub(super) enum Step {
    /// An entry.
    Entry(WalkEntry),
    /// The time limit is reached; a walk that starts after this path continues here.
    Paused {
        /// A path, not necessarily of an entry.
        at: Vec<u8>,
    },
    /// There are no more entries.
    End,
}

/// Access to directories, so that the walk can be tested without a cluster.
pub(super) trait Directories {
    /// Returns a page of entries after the cookie `after`, and whether it is the last; `None` if the directory does
    /// not exist (any more).
    async fn page(
        &self,
        directory: InodeNumber,
        after: u64,
    ) -> Result<Option<(Vec<DirectoryEntry>, bool)>, ApiError>;
}

impl Directories for Access {
    async fn page(
        &self,
        directory: InodeNumber,
        after: u64,
    ) -> Result<Option<(Vec<DirectoryEntry>, bool)>, ApiError> {
        match verdict(self.list_directory(directory, after).await)? {
            Ok(page) => Ok(Some((page.entries, page.end))),
            Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => Ok(None),
            Err(other) => Err(other.into()),
        }
    }
}

/// A walk in progress.
pub(super) struct Walk<'a, D> {
    directories: &'a D,
    depth: Depth,
    /// In the start directory, only names with this prefix are listed.
    partial: Vec<u8>,
    /// The path after which the walk starts.
    after: Vec<u8>,
    deadline: Instant,
    levels: Vec<Level>,
}

struct Level {
    inode: InodeNumber,
    /// Its path with a trailing `/`; empty for the root.
    path: Vec<u8>,
    from: Bound,
    /// The next items, in order.
    pending: VecDeque<Item>,
    /// Whether there are no items after `pending`.
    complete: bool,
}

/// The lower bound of the items of a directory.
enum Bound {
    Start,
    /// After the path with this rest below the directory; with the rest `a/x`, the contents of `a/` are included.
    After(Vec<u8>),
    /// After the item with this key.
    Past(Vec<u8>),
}

/// An entry, or the contents of a directory.
struct Item {
    /// The name; with a trailing `/` for the contents.
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
    fn includes(&self, key: &[u8]) -> bool {
        match self {
            Bound::Start => true,
            Bound::After(rest) => key > rest.as_slice() || (key.ends_with(b"/") && rest.starts_with(key)),
            Bound::Past(last) => key > last.as_slice(),
        }
    }
}

impl<'a, D: Directories> Walk<'a, D> {
    /// Starts a walk of the directory `inode` at `path` (with a trailing `/`, or empty). It lists paths that begin
    /// with `partial` there and come after `after` (all if it is empty), until `deadline`.
    pub(super) fn new(
        directories: &'a D,
        (inode, path): (InodeNumber, Vec<u8>),
        partial: Vec<u8>,
        after: Vec<u8>,
        depth: Depth,
        deadline: Instant,
    ) -> Walk<'a, D> {
        // If `after` is behind all paths of the directory, nothing is left.
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

    /// Returns the next step.
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
                    self.evict_outer_levels();
                }
                continue;
            };
            let mut path = level.path.clone();
            path.extend_from_slice(&item.key);
            level.from = Bound::Past(item.key.clone());
            if !item.is_subtree() {
                return Ok(Step::Entry(WalkEntry {
                    path,
                    attributes: item.attributes,
                }));
            }
            // Pauses only after the start path, otherwise the next walk would start at the same path.
            let progress = path > self.after;
            if progress && Instant::now() >= self.deadline {
                return Ok(Step::Paused { at: path });
            }
            self.enter(item.attributes.inode, path);
        }
    }

    fn evict_outer_levels(&mut self) {
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
        // A max-heap: the greatest item is replaced by a smaller one.
        let mut smallest: BinaryHeap<Item> = BinaryHeap::new();
        let mut is_truncated = false;
        let mut keep = |key: Vec<u8>, attributes: &Attributes| {
            if !self.from.includes(&key) {
                return;
            }
            if smallest.len() >= LEVEL_ITEMS_MAX {
                is_truncated = true;
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
                    return Err(ApiError::internal("a directory listing has no attributes"));
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
        self.complete = !is_truncated;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Duration;

    use proptest::prelude::*;
    use quorumfs_proto::{Name, Timestamp};

    use super::*;

    /// Directories by number, entries by name; answers a few entries at a time in an order that is not theirs.
    #[derive(Default)]
    struct Tree(BTreeMap<InodeNumber, BTreeMap<Vec<u8>, (InodeNumber, FileKind)>>);

    impl Tree {
        fn of(paths: &BTreeSet<Vec<u8>>) -> Tree {
            let mut tree = Tree::default();
            tree.0.insert(InodeNumber::ROOT, BTreeMap::new());
            let mut next = 1;
            for path in paths {
                let mut at = InodeNumber::ROOT;
                let names: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
                for (depth, name) in names.iter().enumerate() {
                    let kind = if depth + 1 == names.len() {
                        FileKind::File
                    } else {
                        FileKind::Directory
                    };
                    let known = tree.0[&at].get(*name).copied();
                    let (inode, kind) = known.unwrap_or_else(|| {
                        next += 1;
                        (InodeNumber(next), kind)
                    });
                    let entries = tree.0.get_mut(&at).unwrap();
                    entries.insert(name.to_vec(), (inode, kind));
                    if kind == FileKind::Directory {
                        tree.0.entry(inode).or_default();
                    } else {
                        break;
                    }
                    at = inode;
                }
            }
            tree
        }

        /// What a walk should find, by brute force.
        fn all(&self, directory: InodeNumber, path: &[u8], depth: Depth, into: &mut BTreeSet<Vec<u8>>) {
            for (name, (inode, kind)) in &self.0[&directory] {
                let path = [path, name].concat();
                into.insert(path.clone());
                if *kind == FileKind::Directory && depth == Depth::Tree {
                    self.all(*inode, &[&path[..], b"/"].concat(), depth, into);
                }
            }
        }
    }

    impl Directories for Tree {
        async fn page(
            &self,
            directory: InodeNumber,
            after: u64,
        ) -> Result<Option<(Vec<DirectoryEntry>, bool)>, ApiError> {
            let Some(entries) = self.0.get(&directory) else {
                return Ok(None);
            };
            let cookie = |inode: InodeNumber| 3 + inode.0.wrapping_mul(7919) % 1_000_003;
            let mut answer: Vec<DirectoryEntry> = entries
                .iter()
                .filter(|(_, (inode, _))| cookie(*inode) > after)
                .map(|(name, (inode, kind))| DirectoryEntry {
                    name: Name::new(name.clone()).unwrap(),
                    inode: *inode,
                    kind: *kind,
                    cookie: cookie(*inode),
                    attributes: Some(attributes(*inode, *kind)),
                })
                .collect();
            answer.sort_by_key(|entry| entry.cookie);
            let end = answer.len() <= 1000;
            answer.truncate(1000);
            Ok(Some((answer, end)))
        }
    }

    fn attributes(inode: InodeNumber, kind: FileKind) -> Attributes {
        let time = Timestamp::default();
        Attributes {
            inode,
            kind,
            mode: 0o644,
            uid: 0,
            gid: 0,
            links: 1,
            size: 0,
            allocated_bytes: 0,
            rdev: 0,
            atime: time,
            mtime: time,
            ctime: time,
            birth_time: time,
            content_version: 1,
            xattr_count: 0,
            has_capability: false,
            parent: InodeNumber::ROOT,
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// All that pages of `limit` entries list together.
    async fn paged(tree: &Tree, partial: &[u8], depth: Depth, limit: usize, pause: bool) -> Vec<Vec<u8>> {
        let mut listed: Vec<Vec<u8>> = Vec::new();
        let mut after = Vec::new();
        for _page in 0..10_000 {
            let deadline = if pause { Instant::now() } else { soon() };
            let root = (InodeNumber::ROOT, Vec::new());
            let mut walk = Walk::new(tree, root, partial.to_vec(), after.clone(), depth, deadline);
            for _ in 0..limit {
                match walk.next().await.unwrap() {
                    Step::Entry(entry) => {
                        after = entry.path.clone();
                        listed.push(entry.path);
                    }
                    Step::Paused { at } => {
                        assert!(at > after, "a pause that makes no progress never ends");
                        after = at;
                        break;
                    }
                    Step::End => return listed,
                }
            }
        }
        panic!("the walk does not end");
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(future)
    }

    fn tree_paths() -> impl Strategy<Value = BTreeSet<Vec<u8>>> {
        // Bytes on both sides of '/', so that the order of siblings and of subtrees differ.
        let name = prop::collection::vec(prop::sample::select(vec![b'-', b'.', b'0', b'a', 0xff]), 1..4)
            .prop_filter("a name", |name| Name::new(name.clone()).is_ok());
        let path = prop::collection::vec(name, 1..4).prop_map(|names| names.join(&b'/'));
        prop::collection::btree_set(path, 0..40)
    }

    proptest! {
        #[test]
        fn pages_of_any_size_list_everything_once_in_order(
            paths in tree_paths(),
            limit in 1usize..8,
            pause in any::<bool>(),
            tree_wide in any::<bool>(),
        ) {
            let tree = Tree::of(&paths);
            let depth = if tree_wide { Depth::Tree } else { Depth::Level };
            let mut expected = BTreeSet::new();
            tree.all(InodeNumber::ROOT, b"", depth, &mut expected);
            let listed = run(paged(&tree, b"", depth, limit, pause));
            prop_assert_eq!(listed, expected.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn a_walk_begins_after_any_path(paths in tree_paths(), after in tree_paths(), slash in any::<bool>()) {
            let tree = Tree::of(&paths);
            let mut expected = BTreeSet::new();
            tree.all(InodeNumber::ROOT, b"", Depth::Tree, &mut expected);
            for mut after in after {
                if slash {
                    after.push(b'/');
                }
                let root = (InodeNumber::ROOT, Vec::new());
                let mut walk = Walk::new(&tree, root, Vec::new(), after.clone(), Depth::Tree, soon());
                let mut listed = Vec::new();
                while let Step::Entry(entry) = run(walk.next()).unwrap() {
                    listed.push(entry.path);
                }
                let expected: Vec<_> = expected.iter().filter(|path| **path > after).cloned().collect();
                prop_assert_eq!(listed, expected);
            }
        }

        #[test]
        fn a_partial_name_narrows_only_the_first_level(paths in tree_paths(), limit in 1usize..5) {
            let tree = Tree::of(&paths);
            let mut expected = BTreeSet::new();
            tree.all(InodeNumber::ROOT, b"", Depth::Tree, &mut expected);
            expected.retain(|path| path.starts_with(b"a"));
            let listed = run(paged(&tree, b"a", Depth::Tree, limit, false));
            prop_assert_eq!(listed, expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_directory_larger_than_what_is_kept_is_listed_whole() {
        let count = 2 * LEVEL_ITEMS_MAX + 17;
        let paths: BTreeSet<Vec<u8>> = (0..count).map(|n| format!("d/{n:06}").into_bytes()).collect();
        let tree = Tree::of(&paths);
        let listed = run(paged(&tree, b"d", Depth::Tree, 10_000, false));
        let expected: Vec<Vec<u8>> = std::iter::once(b"d".to_vec()).chain(paths).collect();
        assert!(listed == expected, "{} of {}", listed.len(), expected.len());
    }

    #[test]
    fn outer_levels_are_forgotten_and_read_again() {
        // Five levels, each with more siblings behind the way down than are kept of all together.
        let mut paths = BTreeSet::new();
        let mut prefix = Vec::new();
        for _ in 0..6 {
            for n in 0..LEVEL_ITEMS_MAX {
                paths.insert([&prefix[..], format!("f{n:05}").as_bytes()].concat());
            }
            prefix.extend_from_slice(b"a/");
        }
        let tree = Tree::of(&paths);
        run(async {
            let root = (InodeNumber::ROOT, Vec::new());
            let mut walk = Walk::new(&tree, root, Vec::new(), Vec::new(), Depth::Tree, soon());
            let mut files = Vec::new();
            while let Step::Entry(entry) = walk.next().await.unwrap() {
                let held: usize = walk.levels.iter().map(|level| level.pending.len()).sum();
                assert!(held <= ITEMS_MAX, "{held} entries held");
                if entry.attributes.kind == FileKind::File {
                    files.push(entry.path);
                }
            }
            assert!(files.iter().eq(&paths), "{} of {}", files.len(), paths.len());
        });
    }
}
