//! What reads metadata. Queries change nothing and need no request id.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::attributes::{Attributes, FileKind};
use crate::chunk::Piece;
use crate::ids::InodeNumber;
use crate::name::{Name, SymlinkTarget, XattrName};

/// A question. The order of the variants is part of the encoding: append, never reorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// What has this name: [`Answer::Attributes`].
    Lookup {
        /// The directory.
        parent: InodeNumber,
        /// The name.
        name: Name,
    },
    /// What is known of an inode: [`Answer::Attributes`].
    Attributes {
        /// Which.
        inode: InodeNumber,
    },
    /// What lies at this path, from `from` (symbolic links are not followed): [`Answer::Attributes`].
    Resolve {
        /// Where the path begins.
        from: InodeNumber,
        /// Names, outermost first; empty: `from` itself.
        path: Vec<Name>,
    },
    /// Entries of a directory in the order of their cookies: [`Answer::Entries`].
    ReadDirectory {
        /// The directory.
        inode: InodeNumber,
        /// Entries after this cookie; 0: from the start.
        after: u64,
        /// About how many bytes of entries; at most [`crate::limits::DIRECTORY_ANSWER_BYTES_MAX`].
        bytes_max: u32,
        /// Whether each comes with its attributes.
        detail: EntryDetail,
    },
    /// Where a symbolic link points: [`Answer::Target`].
    ReadLink {
        /// The link.
        inode: InodeNumber,
    },
    /// The value of an extended attribute: [`Answer::XattrValue`].
    GetXattr {
        /// Whose.
        inode: InodeNumber,
        /// Which.
        name: XattrName,
    },
    /// The names of all extended attributes: [`Answer::XattrNames`].
    ListXattrs {
        /// Whose.
        inode: InodeNumber,
    },
    /// Where the bytes of a file are, and its attributes at the same moment: [`Answer::Extents`].
    Extents {
        /// The file.
        inode: InodeNumber,
        /// From this offset in the file (a piece that only ends after it comes too, whole).
        from: u64,
        /// To this offset (exclusive).
        to: u64,
        /// At most so many; never more than [`crate::limits::EXTENTS_ANSWER_MAX`].
        pieces_max: u32,
    },
    /// Space and counts: [`Answer::Space`].
    Space,
}

/// How much a listing tells of each entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryDetail {
    /// Name, number and kind.
    Name,
    /// The attributes too.
    Attributes,
}

/// The answer to a [`Query`]; each names its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Of the inode asked for.
    Attributes(Attributes),
    /// Entries of a directory.
    Entries {
        /// In the order of their cookies. Entries of equal cookies are never split between two answers.
        entries: Vec<DirectoryEntry>,
        /// Whether there are no more.
        end: bool,
    },
    /// Where a symbolic link points.
    Target(SymlinkTarget),
    /// The value of an extended attribute.
    XattrValue(Bytes),
    /// The names of extended attributes.
    XattrNames(Vec<XattrName>),
    /// The pieces of a file, by offset, not overlapping; what lies between is a hole.
    Extents {
        /// At the same moment.
        attributes: Attributes,
        /// By offset.
        pieces: Vec<Piece>,
        /// Up to where in the file `pieces` tell everything.
        known_to: u64,
    },
    /// Space and counts.
    Space(Space),
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryEntry {
    /// Its name.
    pub name: Name,
    /// What it names.
    pub inode: InodeNumber,
    /// What kind of thing that is.
    pub kind: FileKind,
    /// Where a listing goes on after it: 3 to i64::MAX, and the same as long as the entry exists.
    pub cookie: u64,
    /// If asked for.
    pub attributes: Option<Attributes>,
}

/// What statfs(2) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Bytes that the cluster can hold of content, each counted once.
    pub capacity_bytes: u64,
    /// Bytes of it still free.
    pub available_bytes: u64,
    /// Inodes in use.
    pub inodes: u64,
}
