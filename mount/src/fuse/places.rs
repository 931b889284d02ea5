//! Under which number the kernel knows each directory, and where.
//!
//! To the kernel a directory has one place. When a look-up finds it at another one, because another mount moved it, the
//! kernel moves its own record of the directory, and all below, if it gets the locks for that; else the call fails with
//! ESTALE. A rename holds one of these locks itself and so always fails. And where parent and child have changed places it
//! sees a loop (ELOOP).
//!
//! So a directory that is found below another parent than the kernel knows it under gets a new number there: to the kernel
//! it is another directory. The record of the old place stays for those who use it (a working directory, an open one);
//! both numbers lead to the same directory of the cluster, and its attributes tell the same inode number. What lies below
//! it the kernel finds anew, since the parent is another one.
//!
//! A number is the inode's own with a tag in the upper bits. The tag is 0 until a directory moves. Bounded by count: of a
//! directory that is remembered no more the kernel is told the number without a tag, and if it has been moved meanwhile a
//! call may fail once.

use fuser::INodeNo;
use parking_lot::Mutex;
use quick_cache::unsync::Cache;

use super::inode_map::{INODE_BITS, untagged};

/// Directories remembered: some 4 MiB at most.
const DIRECTORIES_MAX: usize = 64 << 10;

/// Where an answer names an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// By a name in this directory of the kernel.
    In(INodeNo),
    /// As the directory that was asked about, ".".
    Itself(INodeNo),
    /// As the directory above, "..", or anything that is no directory.
    Anywhere,
}

impl Place {
    /// Of what a look-up of `name` in `parent` finds.
    pub fn of(parent: INodeNo, name: &[u8]) -> Place {
        match name {
            b"." => Place::Itself(parent),
            b".." => Place::Anywhere,
            _ => Place::In(parent),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Known {
    number: INodeNo,
    parent: INodeNo,
}

/// See the module. The lock is held for a look-up.
pub struct Places {
    state: Mutex<State>,
}

struct State {
    /// By the number without a tag.
    directories: Cache<INodeNo, Known>,
    last_tag: u16,
}

impl Default for Places {
    fn default() -> Places {
        Places {
            state: Mutex::new(State {
                directories: Cache::new(DIRECTORIES_MAX),
                last_tag: 0,
            }),
        }
    }
}

impl State {
    fn next_tag(&mut self) -> u64 {
        self.last_tag = self.last_tag.checked_add(1).unwrap_or(1);
        u64::from(self.last_tag)
    }
}

impl Places {
    /// What the kernel is to call the directory `plain` (a number without a tag) that it is told of at `place`.
    pub fn number(&self, plain: INodeNo, place: Place) -> INodeNo {
        if plain == INodeNo::ROOT {
            return plain;
        }
        let mut state = self.state.lock();
        let known = state.directories.get(&plain).copied();
        let parent = match place {
            Place::Itself(number) => return number,
            Place::Anywhere => return known.map_or(plain, |known| known.number),
            Place::In(parent) => parent,
        };
        let number = match known {
            Some(known) if known.parent == parent => return known.number,
            Some(_) => INodeNo(plain.0 | state.next_tag() << INODE_BITS),
            None => plain,
        };
        state.directories.insert(plain, Known { number, parent });
        number
    }

    /// This mount moved the directory `plain` from one parent to another: the kernel moves its record.
    pub fn moved(&self, plain: INodeNo, to_parent: INodeNo) {
        let mut state = self.state.lock();
        let number = state.directories.get(&plain).map_or(plain, |known| known.number);
        let parent = to_parent;
        state.directories.insert(plain, Known { number, parent });
    }

    /// What the kernel called `plain` last.
    pub fn last_number(&self, plain: INodeNo) -> INodeNo {
        self.number(plain, Place::Anywhere)
    }
}

/// Whether `number` says that the directory was moved.
pub fn is_tagged(number: INodeNo) -> bool {
    untagged(number) != number
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Place = Place::In(INodeNo(10));
    const NEW: Place = Place::In(INodeNo(11));

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
    fn tags_are_used_in_turn() {
        let (places, directory) = (Places::default(), INodeNo(7));
        let mut last = places.number(directory, OLD);
        for round in 0..2 * usize::from(u16::MAX) {
            let next = places.number(directory, [NEW, OLD][round % 2]);
            assert!(next != last && is_tagged(next));
            last = next;
        }
    }
}
