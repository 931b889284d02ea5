//! Queries read metadata. They change nothing and need no request id.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::attributes::{Attributes, FileKind};
use crate::chunk::Extent;
use crate::ids::InodeNumber;
use crate::name::{Name, SymlinkTarget, XattrName};

/// A query. The order of the variants is part of the encoding: append, never reorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// Asks for the inode with this name: [`Answer::Attributes`].
    Lookup {
        /// Inode number of the directory.
        parent: InodeNumber,
        /// Name of the entry.
        name: Name,
    },
    /// Asks for the attributes of an inode: [`Answer::Attributes`].
    Attributes {
        /// Number of the inode.
        inode: InodeNumber,
    },
    /// Asks for the inode at this path (symbolic links are not followed): [`Answer::Attributes`].
    Resolve {
        /// The directory where the path begins.
        from: InodeNumber,
        /// The names, outermost first; empty means `from` itself.
        path: Vec<Name>,
    },
    /// Asks for entries of a directory in the order of their cookies: [`Answer::Entries`].
    ReadDirectory {
        /// Inode number of the directory.
        inode: InodeNumber,
        /// Entries after this cookie; 0 for the first.
        after: u64,
        /// Approximate size of the answer; at most [`crate::limits::DIRECTORY_ANSWER_BYTES_MAX`].
        bytes_max: u32,
        /// Whether each entry comes with its attributes.
        detail: EntryDetail,
    },
    /// Asks for the target of a symbolic link: [`Answer::Target`].
    ReadLink {
        /// Inode number of the link.
        inode: InodeNumber,
    },
    /// Asks for the value of an extended attribute: [`Answer::XattrValue`].
    GetXattr {
        /// Number of the inode.
        inode: InodeNumber,
        /// The attribute's name.
        name: XattrName,
    },
    /// Asks for the names of all extended attributes: [`Answer::XattrNames`].
    ListXattrs {
        /// Number of the inode.
        inode: InodeNumber,
    },
    /// Asks for the extents of a file, and its attributes at the same moment: [`Answer::Extents`].
    Extents {
        /// Inode number of the file.
        inode: InodeNumber,
        /// Start of the range in the file. An extent that begins before it and ends after it is included, whole.
        from: u64,
        /// End of the range (exclusive).
        to: u64,
        /// Most extents in the answer; never more than [`crate::limits::EXTENTS_ANSWER_MAX`].
        extents_max: u32,
    },
    /// Asks for the space and the counts of the cluster: [`Answer::Space`].
    Space,
}

/// The detail of the entries of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryDetail {
    /// Name, number and kind.
    Name,
    /// Name, number, kind and attributes.
    Attributes,
}

/// The answer to a [`Query`]; each query names its variant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The attributes of the inode asked for.
    Attributes(Attributes),
    /// Entries of a directory.
    Entries(DirectoryPage),
    /// The target of a symbolic link.
    Target(SymlinkTarget),
    /// The value of an extended attribute.
    XattrValue(Bytes),
    /// The names of extended attributes.
    XattrNames(Vec<XattrName>),
    /// The extents of a file.
    Extents(ExtentsPage),
    /// Space and counts of the cluster.
    Space(Space),
}

/// Part of the entries of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryPage {
    /// The entries in the order of their cookies. Entries with equal cookies are never split between two pages.
    pub entries: Vec<DirectoryEntry>,
    /// Whether these entries are the last.
    pub end: bool,
}

/// Part of the extents of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentsPage {
    /// The attributes of the file at the same moment.
    pub attributes: Attributes,
    /// The extents by offset, without overlaps; gaps between them are holes.
    pub extents: Vec<Extent>,
    /// The offset up to which `extents` are complete.
    pub known_to: u64,
}

/// Takes the answer to a query of one type; the answer to another query is returned unchanged.
pub type TakeAnswer<A> = fn(Answer) -> Result<A, Box<Answer>>;

/// A query with the type of its answer, `A`.
#[derive(Clone, Debug)]
pub struct TypedQuery<A> {
    query: Query,
    take: TakeAnswer<A>,
}

impl<A> TypedQuery<A> {
    /// Returns the query in the form that is sent.
    pub fn query(&self) -> &Query {
        &self.query
    }

    /// Returns the query in the form that is sent, and the function that takes its answer.
    pub fn into_parts(self) -> (Query, TakeAnswer<A>) {
        (self.query, self.take)
    }
}

/// Makes the function that takes an answer of one variant.
macro_rules! take {
    ($variant:ident) => {
        |answer| match answer {
            Answer::$variant(value) => Ok(value),
            other => Err(Box::new(other)),
        }
    };
}

impl Query {
    /// Asks for the attributes of the inode called `name` in `parent`.
    pub fn lookup(parent: InodeNumber, name: Name) -> TypedQuery<Attributes> {
        TypedQuery {
            query: Query::Lookup { parent, name },
            take: take!(Attributes),
        }
    }

    /// Asks for the attributes of `inode`.
    pub fn attributes(inode: InodeNumber) -> TypedQuery<Attributes> {
        TypedQuery {
            query: Query::Attributes { inode },
            take: take!(Attributes),
        }
    }

    /// Asks for the attributes of the inode at `path`, starting at `from`. Symbolic links are not followed.
    pub fn resolve(from: InodeNumber, path: Vec<Name>) -> TypedQuery<Attributes> {
        TypedQuery {
            query: Query::Resolve { from, path },
            take: take!(Attributes),
        }
    }

    /// Asks for the entries of the directory `inode` after the cookie `after` (0 for the first), about `bytes_max`
    /// bytes of them.
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

    /// Asks for the target of the symbolic link `inode`.
    pub fn read_link(inode: InodeNumber) -> TypedQuery<SymlinkTarget> {
        TypedQuery {
            query: Query::ReadLink { inode },
            take: take!(Target),
        }
    }

    /// Asks for the value of an extended attribute of `inode`.
    pub fn xattr(inode: InodeNumber, name: XattrName) -> TypedQuery<Bytes> {
        TypedQuery {
            query: Query::GetXattr { inode, name },
            take: take!(XattrValue),
        }
    }

    /// Asks for the names of all extended attributes of `inode`.
    pub fn xattr_names(inode: InodeNumber) -> TypedQuery<Vec<XattrName>> {
        TypedQuery {
            query: Query::ListXattrs { inode },
            take: take!(XattrNames),
        }
    }

    /// Asks for the extents of the file `inode` between two offsets, at most `extents_max` of them.
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

    /// Asks for the space and the counts of the cluster.
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
    /// Name of the entry.
    pub name: Name,
    /// The inode with that name.
    pub inode: InodeNumber,
    /// The kind of the inode.
    pub kind: FileKind,
    /// The position after which a listing continues: 3 to i64::MAX, the same as long as the entry exists.
    pub cookie: u64,
    /// The attributes, if the query asked for them.
    pub attributes: Option<Attributes>,
}

/// The numbers that statfs(2) returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Bytes of content that the cluster can hold, each counted once.
    pub capacity_bytes: u64,
    /// Bytes of it that are free.
    pub available_bytes: u64,
    /// Inodes in use.
    pub inodes: u64,
}
