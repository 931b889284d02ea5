//! The numbers and the places by which the kernel knows each directory.
//!
//! To the kernel a directory has one place. If a look-up finds it at another one, because another mount moved it, the
//! kernel moves its own record of the directory and everything below, if it gets the locks for that; else the call
//! fails with ESTALE. A rename holds one of these locks itself and so always fails. If parent and child have changed
//! places, the kernel sees a loop (ELOOP).
//!
//! So a directory that is found below another parent than the kernel knows gets a new number there: to the kernel it is
//! another directory. The record of the old place stays for programs that use it (as a working directory or an open
//! one). Both numbers lead to the same directory of the cluster, and its attributes contain the same inode number. The
//! kernel looks up everything below it again, since the parent is another one.
//!
//! A number is the inode's own with a tag in the upper bits. The tag is 0 until a directory moves. The number of
//! remembered directories is bounded: for a forgotten directory the kernel gets the number without a tag, and if it has
//! been moved meanwhile a call may fail once.
//!
//! All numbers that a directory was given are remembered, since the kernel may know it by any of them: a working
//! directory keeps the number of its place long after the newest one is forgotten. So are the names with the older
//! numbers: the kernel may keep these for days, and the directory with them, although no program uses it.

use bytes::Bytes;
use fuser::INodeNo;
use parking_lot::Mutex;
use quick_cache::unsync::Cache;

use super::inode_map::{INODE_BITS, untagged};

/// Most directories remembered: about 4 MiB.
const DIRECTORIES_MAX: usize = 64 << 10;

/// Most tags remembered of a directory that is moved repeatedly: beyond it the oldest is forgotten, and a directory
/// that is used only by that number counts as unused. At most 4 MiB for all directories.
const TAGS_MAX: usize = 32;

/// The place at which an answer names an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// By this name in this directory of the kernel.
    In(INodeNo, Bytes),
    /// As the directory of the request, ".".
    Itself(INodeNo),
    /// As the parent directory, "..", or an inode that is not a directory.
    Anywhere,
}

impl Place {
    /// Returns the place of the result of a look-up of `name` in `parent`.
    pub fn of(parent: INodeNo, name: &Bytes) -> Place {
        match &name[..] {
            b"." => Place::Itself(parent),
            b".." => Place::Anywhere,
            _ => Place::In(parent, name.clone()),
        }
    }
}

#[derive(Clone, Debug)]
struct Known {
    parent: INodeNo,
    /// Empty if this mount moved it there, and the kernel has not looked it up since.
    name: Bytes,
    /// The places that the kernel knew before another mount moved the directory, the oldest first. At most as many as
    /// tags.
    left: Vec<(INodeNo, Bytes)>,
    /// The tags of the numbers given to the kernel, the newest last; before these it was given the number without a
    /// tag.
    tags: Vec<u16>,
}

impl Known {
    /// Returns the number that the kernel was given last.
    fn number(&self, plain: INodeNo) -> INodeNo {
        self.tags.last().map_or(plain, |tag| tagged(plain, *tag))
    }
}

/// The places of all directories; see the module documentation. The lock is held for one look-up.
pub struct Places {
    state: Mutex<PlaceTable>,
}

struct PlaceTable {
    /// By the number without a tag.
    directories: Cache<INodeNo, Known>,
    last_tag: u16,
}

impl Default for Places {
    fn default() -> Places {
        Places {
            state: Mutex::new(PlaceTable {
                directories: Cache::new(DIRECTORIES_MAX),
                last_tag: 0,
            }),
        }
    }
}

impl PlaceTable {
    fn next_tag(&mut self) -> u16 {
        self.last_tag = self.last_tag.checked_add(1).unwrap_or(1);
        self.last_tag
    }
}

impl Places {
    /// Returns the number for the kernel of the directory `plain` (a number without a tag) at `place`.
    pub fn number(&self, plain: INodeNo, place: Place) -> INodeNo {
        if plain == INodeNo::ROOT {
            return plain;
        }
        let mut state = self.state.lock();
        let known = state.directories.get(&plain);
        let (parent, name) = match place {
            Place::Itself(number) => return number,
            Place::Anywhere => return known.map_or(plain, |known| known.number(plain)),
            Place::In(parent, name) => (parent, name),
        };
        let known = match known {
            Some(known) if known.parent == parent && known.name == name => return known.number(plain),
            Some(known) if known.parent == parent => Known {
                name,
                ..known.clone()
            },
            Some(known) => {
                let mut known = known.clone();
                push_bounded(&mut known.left, (known.parent, known.name));
                push_bounded(&mut known.tags, state.next_tag());
                Known {
                    parent,
                    name,
                    ..known
                }
            }
            None => Known {
                parent,
                name,
                left: Vec::new(),
                tags: Vec::new(),
            },
        };
        let number = known.number(plain);
        state.directories.insert(plain, known);
        number
    }

    /// Records that this mount moved the directory `plain` to another parent: the kernel moves its record.
    pub fn moved(&self, plain: INodeNo, to_parent: INodeNo) {
        let mut state = self.state.lock();
        let known = state.directories.get(&plain);
        let known = Known {
            parent: to_parent,
            name: Bytes::new(),
            left: known.map_or_else(Vec::new, |known| known.left.clone()),
            tags: known.map_or_else(Vec::new, |known| known.tags.clone()),
        };
        state.directories.insert(plain, known);
    }

    /// Returns all numbers by which the kernel may know `plain`, the newest first.
    pub fn numbers(&self, plain: INodeNo) -> Vec<INodeNo> {
        let state = self.state.lock();
        let tags = state.directories.get(&plain).map_or(&[][..], |known| &known.tags);
        let given = tags.iter().rev().map(|tag| tagged(plain, *tag));
        given.chain([plain]).collect()
    }

    /// Takes the outdated names by which the kernel may still know `plain`; each is returned once.
    pub fn take_left(&self, plain: INodeNo) -> Vec<(INodeNo, Bytes)> {
        let mut state = self.state.lock();
        match state.directories.get(&plain).cloned() {
            Some(mut known) if !known.left.is_empty() => {
                let left = std::mem::take(&mut known.left);
                state.directories.insert(plain, known);
                left
            }
            _ => Vec::new(),
        }
    }
}

fn push_bounded<T>(items: &mut Vec<T>, item: T) {
    if items.len() == TAGS_MAX {
        items.remove(0);
    }
    items.push(item);
}

fn tagged(plain: INodeNo, tag: u16) -> INodeNo {
    INodeNo(plain.0 | u64::from(tag) << INODE_BITS)
}

/// Whether `number` has the tag of a directory that was moved.
pub fn is_tagged(number: INodeNo) -> bool {
    untagged(number) != number
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Place = Place::In(INodeNo(10), Bytes::from_static(b"name"));
    const NEW: Place = Place::In(INodeNo(11), Bytes::from_static(b"name"));

    #[test]
    fn a_directory_keeps_its_number_until_another_mount_moves_it() {
        let (places, directory) = (Places::default(), INodeNo(7));
        assert_eq!(places.number(directory, OLD), directory);
        assert_eq!(places.number(directory, OLD), directory);
        let second = places.number(directory, NEW);
        assert_ne!(second, directory);
        assert_eq!(untagged(second), directory);
        assert_eq!(places.number(directory, NEW), second);
        assert_eq!(places.number(directory, Place::Anywhere), second);
        assert_eq!(places.number(directory, Place::Itself(directory)), directory);
        let third = places.number(directory, OLD);
        assert!(
            third != directory && third != second,
            "the kernel may know both at other places"
        );
        assert_eq!(places.number(INodeNo::ROOT, NEW), INodeNo::ROOT);
    }

    #[test]
    fn a_directory_that_this_mount_moves_keeps_its_number() {
        let (places, directory) = (Places::default(), INodeNo(7));
        assert_eq!(places.number(directory, OLD), directory);
        places.moved(directory, INodeNo(11));
        assert_eq!(places.number(directory, NEW), directory);
        assert_ne!(
            places.number(directory, OLD),
            directory,
            "moved back by another mount"
        );
    }

    #[test]
    fn all_numbers_of_a_directory_are_remembered() {
        let (places, directory) = (Places::default(), INodeNo(7));
        assert_eq!(places.numbers(directory), [directory]);
        let mut given = vec![places.number(directory, OLD)];
        for place in [NEW, OLD, NEW] {
            given.insert(0, places.number(directory, place));
        }
        places.moved(directory, INodeNo(12));
        let renamed = Place::of(INodeNo(12), &Bytes::from_static(b"renamed"));
        assert_eq!(places.number(directory, renamed), given[0]);
        assert_eq!(places.numbers(directory), given);
        let name = Bytes::from_static(b"name");
        let left = [10, 11, 10].map(|parent| (INodeNo(parent), name.clone()));
        assert_eq!(places.take_left(directory), left);
        assert!(places.take_left(directory).is_empty());
        for round in 0..2 * TAGS_MAX {
            given.insert(0, places.number(directory, [OLD, NEW][round % 2].clone()));
        }
        given.truncate(TAGS_MAX);
        given.push(directory);
        assert_eq!(places.numbers(directory), given, "the newest, and the first");
    }

    #[test]
    fn tags_are_used_in_turn() {
        let (places, directory) = (Places::default(), INodeNo(7));
        let mut last = places.number(directory, OLD);
        for round in 0..2 * usize::from(u16::MAX) {
            let next = places.number(directory, [NEW, OLD][round % 2].clone());
            assert!(next != last && is_tagged(next));
            last = next;
        }
    }
}
