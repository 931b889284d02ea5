//! Finds the names of files from their chunks; no table is sorted for that.
//!
//! Extents are sorted by inode and entries by directory, so this walks both tables once, within the caller's bounds. It
//! serves people who must know which files are damaged or missing, not the filesystem itself.

use std::collections::{BTreeMap, BTreeSet};

use quorumfs_proto::{ChunkId, FileKind, InodeNumber, Name};

use super::fault::StorageFault;
use super::overlay::{Direction, KeyRange};
use super::tables::{Dirents, Extents, Inodes};
use super::view::View;

/// Most directories above one another: as many as a path of 4,096 bytes can have.
const DEPTH_MAX: usize = 2048;

/// A file that refers to one of the chunks asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    /// Inode number of the file.
    pub inode: InodeNumber,
    /// One of its paths from the root, names joined by `/`; `None` if it has none, or none was found within the bound.
    pub path: Option<Vec<u8>>,
}

/// The files that refer to some chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkFiles {
    /// The files, by inode number.
    pub files: Vec<NamedFile>,
    /// Whether all files were found; otherwise a bound was reached.
    pub complete: bool,
}

/// The number of rows that may still be read.
struct Budget {
    rows: u64,
}

impl Budget {
    fn take(&mut self) -> bool {
        let left = self.rows > 0;
        self.rows = self.rows.saturating_sub(1);
        left
    }
}

impl View {
    /// Returns the first `files_max` files with an extent in one of `chunks`. Reads at most `rows_max` rows. Blocking.
    pub fn files_of_chunks(
        &self,
        chunks: &BTreeSet<ChunkId>,
        files_max: usize,
        rows_max: u64,
    ) -> Result<ChunkFiles, StorageFault> {
        let mut budget = Budget { rows: rows_max };
        let mut inodes = BTreeSet::new();
        let mut complete = true;
        if !chunks.is_empty() {
            for row in self
                .layers
                .scan::<Extents>(KeyRange::prefix(&[]), Direction::Up)?
            {
                let ((inode, _), extent) = row?;
                let wanted = chunks.contains(&extent.chunk) && !inodes.contains(&inode);
                if !budget.take() || (wanted && inodes.len() == files_max) {
                    complete = false;
                    break;
                }
                if wanted {
                    inodes.insert(inode);
                }
            }
        }
        let mut names = self.names_of(&inodes, &mut budget)?;
        let files = inodes.into_iter().map(|inode| NamedFile {
            inode,
            path: names.remove(&inode),
        });
        Ok(ChunkFiles {
            files: files.collect(),
            complete,
        })
    }

    fn names_of(
        &self,
        inodes: &BTreeSet<InodeNumber>,
        budget: &mut Budget,
    ) -> Result<BTreeMap<InodeNumber, Vec<u8>>, StorageFault> {
        let mut entries: BTreeMap<InodeNumber, (InodeNumber, Name)> = BTreeMap::new();
        if !inodes.is_empty() {
            for row in self
                .layers
                .scan::<Dirents>(KeyRange::prefix(&[]), Direction::Up)?
            {
                if entries.len() == inodes.len() || !budget.take() {
                    break;
                }
                let (key, entry) = row?;
                if inodes.contains(&entry.inode) {
                    entries.entry(entry.inode).or_insert((key.directory, key.name));
                }
            }
        }
        let mut directories = BTreeMap::from([(InodeNumber::ROOT, Vec::new())]);
        let mut paths = BTreeMap::new();
        for (inode, (directory, name)) in entries {
            if let Some(mut path) = self.path_of_directory(directory, &mut directories, budget)? {
                path.extend_from_slice(name.as_bytes());
                paths.insert(inode, path);
            }
        }
        Ok(paths)
    }

    /// Returns the path of a directory with a slash at its end, empty for the root; `known` caches paths.
    fn path_of_directory(
        &self,
        directory: InodeNumber,
        known: &mut BTreeMap<InodeNumber, Vec<u8>>,
        budget: &mut Budget,
    ) -> Result<Option<Vec<u8>>, StorageFault> {
        let mut names = Vec::new();
        let mut at = directory;
        while !known.contains_key(&at) {
            let Some(name) = self.name_of_directory(at, budget)? else {
                return Ok(None);
            };
            if names.len() == DEPTH_MAX {
                return Ok(None);
            }
            let (parent, name) = name;
            names.push((at, name));
            at = parent;
        }
        let mut path = known[&at].clone();
        for (inode, name) in names.into_iter().rev() {
            path.extend_from_slice(name.as_bytes());
            path.push(b'/');
            known.insert(inode, path.clone());
        }
        Ok(Some(path))
    }

    fn name_of_directory(
        &self,
        directory: InodeNumber,
        budget: &mut Budget,
    ) -> Result<Option<(InodeNumber, Name)>, StorageFault> {
        let Some(record) = self.layers.get::<Inodes>(&directory)? else {
            return Ok(None);
        };
        let parent = record.attributes.parent;
        for row in self
            .layers
            .scan::<Dirents>(KeyRange::prefix(&parent.0.to_be_bytes()), Direction::Up)?
        {
            if !budget.take() {
                return Ok(None);
            }
            let (key, entry) = row?;
            if entry.inode == directory && entry.kind == FileKind::Directory {
                return Ok(Some((parent, key.name)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use quorumfs_proto::command::{NewKind, Target};

    use super::super::tests::support::{Node, chunk, create, write_chunks};
    use super::*;

    #[test]
    fn chunks_lead_to_the_paths_of_their_files() {
        let mut node = Node::with_sessions(1);
        let outer = node.entry(create(InodeNumber::ROOT, "outer", NewKind::Directory));
        let inner = node.entry(create(outer, "inner", NewKind::Directory));
        let mut counter = 1;
        let mut write = |node: &mut Node, parent, name: &str| {
            let inode = node.entry(create(parent, name, NewKind::File));
            let (result, _) = node.call(
                1,
                write_chunks(Target::Inode(inode), 1, counter, &[0, 1 << 20], 4096),
            );
            result.unwrap();
            counter += 2;
            inode
        };
        let top = write(&mut node, InodeNumber::ROOT, "top");
        let deep = write(&mut node, inner, "deep");
        write(&mut node, outer, "healthy");
        let view = node.view();
        let bad = BTreeSet::from([chunk(1, 1, 1).id, chunk(1, 3, 1).id, chunk(1, 4, 1).id]);
        let found = view.files_of_chunks(&bad, 10, 1000).unwrap();
        let named = |inode, path: &str| NamedFile {
            inode,
            path: Some(path.as_bytes().to_vec()),
        };
        assert_eq!(found.files, [named(top, "top"), named(deep, "outer/inner/deep")]);
        assert!(found.complete);
        let first = view.files_of_chunks(&bad, 1, 1000).unwrap();
        assert_eq!((first.files.len(), first.complete), (1, false));
        assert!(!view.files_of_chunks(&bad, 10, 2).unwrap().complete);
        assert_eq!(
            (view.named_change().chunks, view.named_change().bytes),
            (6, 6 * 4096)
        );
    }
}
