//! Lists the files below a directory, sorted by path, a page at a time, for REST.
//!
//! Entries are stored by the hash of their names. So a page picks the names it needs from each directory it visits, and
//! never holds more of them than the answer may have.

use std::collections::{BTreeMap, VecDeque};

use quorumfs_proto::{Attributes, FileKind, InodeNumber};

use super::fault::Failure;
use super::overlay::{Direction, KeyRange};
use super::tables::{DirentRecord, Dirents};
use super::view::View;

/// Least number of entries picked at a time: each pick reads the whole directory.
const PICK_ENTRIES_MIN: usize = 1024;

/// A directory that is being visited.
struct Visit {
    directory: InodeNumber,
    /// The path of the directory with a slash at its end; empty for the first.
    prefix: Vec<u8>,
    /// Only paths after this one are listed; relative to the directory.
    after: Vec<u8>,
    /// The next entries, sorted.
    picked: VecDeque<(Vec<u8>, DirentRecord)>,
    /// The last entry that was picked.
    picked_to: Option<Vec<u8>>,
    /// Whether no entries are left to pick.
    complete: bool,
}

impl Visit {
    fn new(directory: InodeNumber, prefix: Vec<u8>, after: Vec<u8>) -> Visit {
        Visit {
            directory,
            prefix,
            after,
            picked: VecDeque::new(),
            picked_to: None,
            complete: false,
        }
    }

    /// Whether an entry that was not picked yet belongs to the listing.
    fn wants(&self, sort_name: &[u8], kind: FileKind) -> bool {
        if self.picked_to.as_ref().is_some_and(|last| sort_name <= &last[..]) {
            return false;
        }
        match kind {
            FileKind::File => sort_name > &self.after[..],
            FileKind::Directory => sort_name > &self.after[..] || self.after.starts_with(sort_name),
            _ => false,
        }
    }
}

impl View {
    /// Returns at most `max` regular files below `from`, in the byte order of their paths (names joined by `/`,
    /// relative to `from`), after `after_path`. If there are fewer than `max`, they are the last.
    pub fn list_tree(
        &self,
        from: InodeNumber,
        after_path: &[u8],
        max: usize,
    ) -> Result<Vec<(Vec<u8>, Attributes)>, Failure> {
        self.directory(from)?;
        let mut found = Vec::new();
        let mut visits = vec![Visit::new(from, Vec::new(), after_path.to_vec())];
        while let Some(visit) = visits.last_mut() {
            if found.len() >= max {
                break;
            }
            if visit.picked.is_empty() && !visit.complete {
                self.pick(visit, (max - found.len()).max(PICK_ENTRIES_MIN))?;
            }
            let Some((sort_name, entry)) = visit.picked.pop_front() else {
                visits.pop();
                continue;
            };
            let path = [&visit.prefix[..], &sort_name].concat();
            if entry.kind == FileKind::Directory {
                let after = visit
                    .after
                    .strip_prefix(&sort_name[..])
                    .unwrap_or_default()
                    .to_vec();
                visits.push(Visit::new(entry.inode, path, after));
            } else {
                found.push((path, self.named(entry.inode)?));
            }
        }
        Ok(found)
    }

    /// Picks the first `max` entries that the visit needs. A directory sorts like its name with a slash, as all paths
    /// below it do.
    fn pick(&self, visit: &mut Visit, max: usize) -> Result<(), Failure> {
        let mut smallest = BTreeMap::new();
        let mut dropped = false;
        let range = KeyRange::prefix(&visit.directory.0.to_be_bytes());
        for row in self.layers.scan::<Dirents>(range, Direction::Up)? {
            let (key, entry) = row?;
            let mut sort_name = key.name.as_bytes().to_vec();
            if entry.kind == FileKind::Directory {
                sort_name.push(b'/');
            }
            if !visit.wants(&sort_name, entry.kind) {
                continue;
            }
            smallest.insert(sort_name, entry);
            if smallest.len() > max {
                smallest.pop_last();
                dropped = true;
            }
        }
        visit.complete = !dropped;
        visit.picked_to = smallest.last_key_value().map(|(name, _)| name.clone());
        visit.picked = smallest.into_iter().collect();
        Ok(())
    }
}
