//! What reads metadata. Queries change nothing and need no request id.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::attributes::{Attributes, FileKind};
use crate::chunk::Extent;
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
        /// From this offset in the file (an extent that only ends after it comes too, whole).
        from: u64,
        /// To this offset (exclusive).
        to: u64,
        /// At most so many; never more than [`crate::limits::EXTENTS_ANSWER_MAX`].
        extents_max: u32,
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
    Entries(DirectoryPage),
    /// Where a symbolic link points.
    Target(SymlinkTarget),
    /// The value of an extended attribute.
    XattrValue(Bytes),
    /// The names of extended attributes.
    XattrNames(Vec<XattrName>),
    /// Where the bytes of a file are.
    Extents(ExtentsPage),
    /// Space and counts.
    Space(Space),
}

/// Part of the entries of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryPage {
    /// In the order of their cookies. Entries of equal cookies are never split between two pages.
    pub entries: Vec<DirectoryEntry>,
    /// Whether these are the last.
    pub end: bool,
}

/// Part of the extents of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentsPage {
    /// Of the file, at the same moment.
    pub attributes: Attributes,
    /// By offset, not overlapping; what lies between them is a hole.
    pub extents: Vec<Extent>,
    /// The offset up to which `extents` are complete.
    pub known_to: u64,
}

/// Takes the answer to a query of one type; an answer to another query comes back as it is.
pub type TakeAnswer<A> = fn(Answer) -> Result<A, Box<Answer>>;

/// A query together with the type of its answer: `A`.
#[derive(Clone, Debug)]
pub struct TypedQuery<A> {
    query: Query,
    take: TakeAnswer<A>,
}

impl<A> TypedQuery<A> {
    /// The query as it is sent.
    pub fn query(&self) -> &Query {
        &self.query
    }

    /// The query as it is sent, and the function that takes its answer.
    pub fn into_parts(self) -> (Query, TakeAnswer<A>) {
        (self.query, self.take)
    }
}

/// The function that takes an answer of one variant.
macro_rules! take {
    ($variant:ident) => {
        |answer| match answer {
            Answer::$variant(value) => Ok(value),
            other => Err(Box::new(other)),
        }
    };
}

impl Query {
    /// The attributes of what `name` names in `parent`.
    pub fn lookup(parent: InodeNumber, name: Name) -> TypedQuery<Attributes> {
        TypedQuery {
            query: Query::Lookup { parent, name },
            take: take!(Attributes),
        }
    }

    /// The attributes of `inode`.
    pub fn attributes(inode: InodeNumber) -> TypedQuery<Attributes> {
        TypedQuery {
            query: Query::Attributes { inode },
            take: take!(Attributes),
        }
    }

    /// The attributes of what lies at `path` from `from`. Symbolic links are not followed.
    pub fn resolve(from: InodeNumber, path: Vec<Name>) -> TypedQuery<Attributes> {
        TypedQuery {
            query: Query::Resolve { from, path },
            take: take!(Attributes),
        }
    }

    /// The entries of the directory `inode` after the cookie `after` (0: the first), about `bytes_max` bytes of them.
    pub fn read_directory(
        inode: InodeNumber,
        after: u64,
        bytes_max: u32,
        detail: EntryDetail,
    ) -> TypedQuery<DirectoryPage> {
        TypedQuery {
            query: Query::ReadDirectory {
                inode,
                after,
                bytes_max,
                detail,
            },
            take: take!(Entries),
        }
    }

    /// The target of the symbolic link `inode`.
    pub fn read_link(inode: InodeNumber) -> TypedQuery<SymlinkTarget> {
        TypedQuery {
            query: Query::ReadLink { inode },
            take: take!(Target),
        }
    }

    /// The value of an extended attribute of `inode`.
    pub fn xattr(inode: InodeNumber, name: XattrName) -> TypedQuery<Bytes> {
        TypedQuery {
            query: Query::GetXattr { inode, name },
            take: take!(XattrValue),
        }
    }

    /// The names of all extended attributes of `inode`.
    pub fn xattr_names(inode: InodeNumber) -> TypedQuery<Vec<XattrName>> {
        TypedQuery {
            query: Query::ListXattrs { inode },
            take: take!(XattrNames),
        }
    }

    /// The extents of the file `inode` between two offsets, at most `extents_max` of them.
    pub fn extents(inode: InodeNumber, from: u64, to: u64, extents_max: u32) -> TypedQuery<ExtentsPage> {
        TypedQuery {
            query: Query::Extents {
                inode,
                from,
                to,
                extents_max,
            },
            take: take!(Extents),
        }
    }

    /// Space and counts of the cluster.
    pub fn space() -> TypedQuery<Space> {
        TypedQuery {
            query: Query::Space,
            take: take!(Space),
        }
    }
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
