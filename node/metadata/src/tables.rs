//! The tables: their numbers, keys and records.
//!
//! Keys are big-endian, so that they sort like their parts and a scan returns rows in a useful order. Every value is a
//! record in the checked encoding of [`quorumfs_proto::codec`]: its checksum is verified when it is decoded. Table
//! numbers and record layouts are part of the disk and snapshot format ([`FORMAT`]).

use std::hash::Hasher as _;
use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::limits::NAME_BYTES_MAX;
use quorumfs_proto::{
    Attributes, ChunkId, FileKind, InodeNumber, Lane, Name, SessionId, Sha256, SymlinkTarget, Timestamp,
    XattrName,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::command::{ApplyResult, SessionKey};

/// The version of the tables as a whole; stored in the first row of `meta`.
pub(super) const FORMAT: u32 = 2;

/// The smallest cookie of an entry: 0 starts a listing, 1 and 2 are `.` and `..`.
const COOKIE_MIN: u64 = 3;
/// The fixed key of the hash of names ("QuorumFS dirents"). Every node must order names alike, so it cannot be random.
const COOKIE_KEY: [u8; 16] = *b"QuorumFS dirents";

/// A key as stored in a table.
pub(super) type RowKey = Arc<[u8]>;

/// The tables, in the order of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Table {
    Meta = 0,
    Inodes = 1,
    Dirents = 2,
    Extents = 3,
    Xattrs = 4,
    Symlinks = 5,
    Sessions = 6,
    Lanes = 7,
    Orphans = 8,
    Pins = 9,
    Reclaimable = 10,
    Chunks = 11,
    Fragmented = 12,
    Unlinked = 13,
    UnlinkedQueue = 14,
    Holds = 15,
    Marks = 16,
    Departed = 17,
    SessionKeys = 18,
    Silences = 19,
}

impl Table {
    pub(super) const COUNT: usize = 20;
    pub(super) const ALL: [Table; Table::COUNT] = [
        Table::Meta,
        Table::Inodes,
        Table::Dirents,
        Table::Extents,
        Table::Xattrs,
        Table::Symlinks,
        Table::Sessions,
        Table::Lanes,
        Table::Orphans,
        Table::Pins,
        Table::Reclaimable,
        Table::Chunks,
        Table::Fragmented,
        Table::Unlinked,
        Table::UnlinkedQueue,
        Table::Holds,
        Table::Marks,
        Table::Departed,
        Table::SessionKeys,
        Table::Silences,
    ];

    pub(super) fn number(self) -> u8 {
        self as u8
    }

    pub(super) fn from_number(number: u8) -> Option<Table> {
        Table::ALL.get(usize::from(number)).copied()
    }

    pub(super) fn definition(self) -> redb::TableDefinition<'static, &'static [u8], &'static [u8]> {
        redb::TableDefinition::new(match self {
            Table::Meta => "meta",
            Table::Inodes => "inodes",
            Table::Dirents => "dirents",
            Table::Extents => "extents",
            Table::Xattrs => "xattrs",
            Table::Symlinks => "symlinks",
            Table::Sessions => "sessions",
            Table::Lanes => "lanes",
            Table::Orphans => "orphans",
            Table::Pins => "pins",
            Table::Reclaimable => "reclaimable",
            Table::Chunks => "chunks",
            Table::Fragmented => "fragmented",
            Table::Unlinked => "unlinked",
            Table::UnlinkedQueue => "unlinked_queue",
            Table::Holds => "holds",
            Table::Marks => "marks",
            Table::Departed => "departed",
            Table::SessionKeys => "session_keys",
            Table::Silences => "silences",
        })
    }
}

/// The key and value types of a table.
pub(super) trait Rows {
    const TABLE: Table;
    type Key;
    type Value: Serialize + DeserializeOwned;
    fn key(key: &Self::Key) -> RowKey;
    /// Decodes a key; `None` if the bytes are not a key of this table.
    fn parse(key: &[u8]) -> Option<Self::Key>;
}

/// A row of a table.
pub(super) type RowOf<R> = (<R as Rows>::Key, <R as Rows>::Value);

/// Implements [`Rows`] for a table whose key is one number.
macro_rules! rows_by_number {
    ($(#[$doc:meta])* $rows:ident, $key:ident, $value:ty) => {
        $(#[$doc])*
        pub(super) struct $rows;
        impl Rows for $rows {
            const TABLE: Table = Table::$rows;
            type Key = $key;
            type Value = $value;
            fn key(key: &$key) -> RowKey {
                Arc::new(key.0.to_be_bytes())
            }
            fn parse(key: &[u8]) -> Option<$key> {
                Some($key(u64::from_be_bytes(key.try_into().ok()?)))
            }
        }
    };
}

rows_by_number!(
    /// All inodes, with or without a name.
    Inodes,
    InodeNumber,
    InodeRecord
);
rows_by_number!(
    /// The targets of symbolic links.
    Symlinks,
    InodeNumber,
    SymlinkTarget
);
rows_by_number!(
    /// Inodes unlinked below feature level 3.
    Orphans,
    InodeNumber,
    OrphanRecord
);
rows_by_number!(
    /// Inodes without a name.
    Unlinked,
    InodeNumber,
    UnlinkedRecord
);
rows_by_number!(
    /// Inodes with data to free: orphans that no session holds, and files with cut-off extents.
    Reclaimable,
    InodeNumber,
    ()
);

rows_by_number!(
    /// Files that may have many small neighbouring extents, with the content version at which that was last noted.
    Fragmented,
    InodeNumber,
    u64
);

/// The first row of `meta`; the rows of this table have different types.
pub(super) struct Format;
/// The second row of `meta`.
pub(super) struct Meta;

impl Rows for Format {
    const TABLE: Table = Table::Meta;
    type Key = ();
    type Value = u32;
    fn key(_: &()) -> RowKey {
        Arc::from(&b"format"[..])
    }
    fn parse(key: &[u8]) -> Option<()> {
        (key == b"format").then_some(())
    }
}

impl Rows for Meta {
    const TABLE: Table = Table::Meta;
    type Key = ();
    type Value = MetaRecord;
    fn key(_: &()) -> RowKey {
        Arc::from(&b"state"[..])
    }
    fn parse(key: &[u8]) -> Option<()> {
        (key == b"state").then_some(())
    }
}

/// The entries of directories: (directory, cookie, name).
pub(super) struct Dirents;

impl Rows for Dirents {
    const TABLE: Table = Table::Dirents;
    type Key = DirentKey;
    type Value = DirentRecord;
    fn key(key: &DirentKey) -> RowKey {
        let mut bytes = [0; 16 + NAME_BYTES_MAX];
        let name = key.name.as_bytes();
        bytes[..8].copy_from_slice(&key.directory.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&key.cookie.to_be_bytes());
        bytes[16..16 + name.len()].copy_from_slice(name);
        Arc::from(&bytes[..16 + name.len()])
    }
    fn parse(key: &[u8]) -> Option<DirentKey> {
        let (directory, rest) = key.split_first_chunk::<8>()?;
        let (cookie, name) = rest.split_first_chunk::<8>()?;
        Some(DirentKey {
            directory: InodeNumber(u64::from_be_bytes(*directory)),
            cookie: u64::from_be_bytes(*cookie),
            name: Name::new(Bytes::copy_from_slice(name)).ok()?,
        })
    }
}

/// The key of an entry.
pub(super) struct DirentKey {
    pub(super) directory: InodeNumber,
    pub(super) cookie: u64,
    pub(super) name: Name,
}

impl DirentKey {
    pub(super) fn new(directory: InodeNumber, name: &Name) -> DirentKey {
        DirentKey {
            directory,
            cookie: name_cookie(name),
            name: name.clone(),
        }
    }
}

/// Returns the position of a name in its directory's listing, 3 to i64::MAX.
fn name_cookie(name: &Name) -> u64 {
    let mut hasher = siphasher::sip::SipHasher24::new_with_key(&COOKIE_KEY);
    hasher.write(name.as_bytes());
    (hasher.finish() >> 1).max(COOKIE_MIN)
}

/// The content of files: (inode, offset). Rows of one inode never overlap.
pub(super) struct Extents;

impl Rows for Extents {
    const TABLE: Table = Table::Extents;
    type Key = (InodeNumber, u64);
    type Value = ExtentRecord;
    fn key((inode, offset): &(InodeNumber, u64)) -> RowKey {
        Arc::new(pair(inode.0, *offset))
    }
    fn parse(key: &[u8]) -> Option<(InodeNumber, u64)> {
        let (inode, offset) = unpair(key)?;
        Some((InodeNumber(inode), offset))
    }
}

/// Extended attributes: (inode, name).
pub(super) struct Xattrs;

impl Rows for Xattrs {
    const TABLE: Table = Table::Xattrs;
    type Key = (InodeNumber, XattrName);
    type Value = Bytes;
    fn key((inode, name): &(InodeNumber, XattrName)) -> RowKey {
        Arc::from([&inode.0.to_be_bytes()[..], name.as_bytes()].concat())
    }
    fn parse(key: &[u8]) -> Option<(InodeNumber, XattrName)> {
        let (inode, name) = key.split_first_chunk::<8>()?;
        let name = XattrName::new(Bytes::copy_from_slice(name)).ok()?;
        Some((InodeNumber(u64::from_be_bytes(*inode)), name))
    }
}

rows_by_number!(
    /// Sessions, living and ended.
    Sessions,
    SessionId,
    SessionRecord
);
rows_by_number!(
    /// For each living session, the log index up to which it has stated which unlinked inodes it holds; see
    /// `apply::unlinked`.
    Marks,
    SessionId,
    u64
);
rows_by_number!(
    /// Ended sessions with more pins or holds than one step drops.
    Departed,
    SessionId,
    ()
);
rows_by_number!(
    /// The keys of sessions whose clients have a secret.
    SessionKeys,
    SessionId,
    SessionKey
);
rows_by_number!(
    /// How long living sessions were silent when a leader last looked, in milliseconds.
    Silences,
    SessionId,
    u64
);

/// The last mutation of each lane: (session, lane).
pub(super) struct Lanes;

impl Rows for Lanes {
    const TABLE: Table = Table::Lanes;
    type Key = (SessionId, Lane);
    type Value = LaneRecord;
    fn key((session, lane): &(SessionId, Lane)) -> RowKey {
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&session.0.to_be_bytes());
        bytes[8..].copy_from_slice(&lane.0.to_be_bytes());
        Arc::new(bytes)
    }
    fn parse(key: &[u8]) -> Option<(SessionId, Lane)> {
        let (session, lane) = key.split_first_chunk::<8>()?;
        Some((
            SessionId(u64::from_be_bytes(*session)),
            Lane(u16::from_be_bytes(lane.try_into().ok()?)),
        ))
    }
}

/// Implements [`Rows`] for a table without values whose keys are pairs of a session and an inode.
macro_rules! rows_by_session_and_inode {
    ($(#[$doc:meta])* $rows:ident) => {
        $(#[$doc])*
        pub(super) struct $rows;
        impl Rows for $rows {
            const TABLE: Table = Table::$rows;
            type Key = (SessionId, InodeNumber);
            type Value = ();
            fn key((session, inode): &(SessionId, InodeNumber)) -> RowKey {
                Arc::new(pair(session.0, inode.0))
            }
            fn parse(key: &[u8]) -> Option<(SessionId, InodeNumber)> {
                let (session, inode) = unpair(key)?;
                Some((SessionId(session), InodeNumber(inode)))
            }
        }
    };
}

rows_by_session_and_inode!(
    /// The sessions that may hold an orphan open: the inverse of the orphans' `waiting_for`.
    Pins
);
rows_by_session_and_inode!(
    /// The sessions that hold an unlinked inode. [`UnlinkedRecord::holds`] counts them.
    Holds
);

/// Unlinked inodes about which sessions are still asked, in the order of their unlinking: (log index, inode).
pub(super) struct UnlinkedQueue;

impl Rows for UnlinkedQueue {
    const TABLE: Table = Table::UnlinkedQueue;
    type Key = (u64, InodeNumber);
    type Value = ();
    fn key((since, inode): &(u64, InodeNumber)) -> RowKey {
        Arc::new(pair(*since, inode.0))
    }
    fn parse(key: &[u8]) -> Option<(u64, InodeNumber)> {
        let (since, inode) = unpair(key)?;
        Some((since, InodeNumber(inode)))
    }
}

/// The chunks that extents refer to.
pub(super) struct Chunks;

impl Rows for Chunks {
    const TABLE: Table = Table::Chunks;
    type Key = ChunkId;
    type Value = ChunkRecord;
    fn key(key: &ChunkId) -> RowKey {
        Arc::new(pair(key.session.0, key.counter))
    }
    fn parse(key: &[u8]) -> Option<ChunkId> {
        let (session, counter) = unpair(key)?;
        Some(ChunkId {
            session: SessionId(session),
            counter,
        })
    }
}

fn pair(first: u64, second: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first.to_be_bytes());
    bytes[8..].copy_from_slice(&second.to_be_bytes());
    bytes
}

fn unpair(key: &[u8]) -> Option<(u64, u64)> {
    let (first, second) = key.split_first_chunk::<8>()?;
    Some((
        u64::from_be_bytes(*first),
        u64::from_be_bytes(second.try_into().ok()?),
    ))
}

/// The number of nodes that hold each chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replicas {
    /// Number of copies, if there are as many nodes.
    pub count: u8,
    /// The log index since which it applies; 0 means always.
    pub since_index: u64,
}

impl Replicas {
    /// The number of copies until it is set.
    pub const DEFAULT: Replicas = Replicas {
        count: 3,
        since_index: 0,
    };
}

/// The state as a whole, at one log index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MetaRecord {
    pub(super) index: u64,
    pub(super) log_id: Option<Bytes>,
    pub(super) membership: Option<Bytes>,
    /// The effective time of the last command.
    pub(super) last_stamp: Timestamp,
    pub(super) feature_level: u32,
    /// The number of nodes that hold each chunk.
    pub(super) replicas: Replicas,
    /// The number of the next new inode.
    pub(super) next_inode: u64,
    /// Number of rows of `inodes`.
    pub(super) inode_count: u64,
}

/// The record of an inode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InodeRecord {
    pub(super) attributes: Attributes,
    /// Truncations that left more extents behind than one step frees, ascending in both fields; mostly empty. Each
    /// stands for thousands of extents that were written since the previous one, so there are few.
    pub(super) cuts: Vec<Cut>,
    /// If there are cuts: extents below this offset have been examined.
    pub(super) trim_cursor: u64,
}

/// A truncation whose extents have not been freed yet: those at or above `from` and older than `version` are dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cut {
    pub(super) from: u64,
    pub(super) version: u64,
}

impl InodeRecord {
    /// Whether a truncation has cut off the extent at `offset`.
    pub(super) fn is_cut_off(&self, offset: u64, extent: &ExtentRecord) -> bool {
        self.cuts
            .iter()
            .any(|cut| offset >= cut.from && extent.version < cut.version)
    }
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DirentRecord {
    pub(super) inode: InodeNumber,
    pub(super) kind: FileKind,
}

/// An extent of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ExtentRecord {
    pub(super) length: u32,
    pub(super) chunk: ChunkId,
    pub(super) chunk_offset: u32,
    /// The content version of the file that wrote the extent.
    pub(super) version: u64,
}

/// A chunk that extents refer to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRecord {
    /// Number of extents that refer to it; never 0.
    pub references: u32,
    /// Number of bytes.
    pub length: u32,
    /// SHA-256 of the bytes.
    pub sha256: Sha256,
}

/// The record of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// Description for people: host, process, mount point.
    pub description: String,
    /// Time of opening.
    pub opened: Timestamp,
    /// Time of the end, if it has ended.
    pub ended: Option<Timestamp>,
    /// Chunks of this session with smaller counters are dead unless a file refers to them.
    pub chunk_low_water: u64,
}

/// The last mutation that a lane decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LaneRecord {
    pub(super) sequence: u64,
    pub(super) result: ApplyResult,
}

/// An inode without a name below feature level 3.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OrphanRecord {
    /// Sessions that may have it open.
    pub(super) waiting_for: Vec<SessionId>,
    /// For an inode that never had a name, the session that made it and may name it.
    pub(super) maker: Option<SessionId>,
}

/// An inode without a name, from feature level 3 on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UnlinkedRecord {
    /// The log index at which the last name was removed, or at which the inode was created without one.
    pub(super) since: u64,
    /// For an inode that never had a name, the session that made it and may name it.
    pub(super) maker: Option<SessionId>,
    /// Number of sessions that hold it.
    pub(super) holds: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_stay_where_listings_expect_them_and_never_change() {
        let name = |text: &'static str| Name::new(text.as_bytes()).unwrap();
        for text in ["a", "b", "some longer name", "\u{1}"] {
            let cookie = name_cookie(&name(text));
            assert!((COOKIE_MIN..=i64::MAX as u64).contains(&cookie));
        }
        // The value is part of the disk format: with another hash no entry would be found.
        assert_eq!(name_cookie(&name("file")), 5_621_046_901_954_648_356);
    }

    #[test]
    fn keys_sort_as_their_parts_and_parse_back() {
        let low = Extents::key(&(InodeNumber(1), u64::MAX));
        let high = Extents::key(&(InodeNumber(2), 0));
        assert!(low < high);
        assert_eq!(Extents::parse(&low), Some((InodeNumber(1), u64::MAX)));
        let name = Name::new(vec![b'x'; 255]).unwrap();
        let key = DirentKey::new(InodeNumber(7), &name);
        let parsed = Dirents::parse(&Dirents::key(&key)).unwrap();
        let parts = (key.directory, key.cookie, name);
        assert_eq!((parsed.directory, parsed.cookie, parsed.name), parts);
        for table in Table::ALL {
            assert_eq!(Table::from_number(table.number()), Some(table));
        }
        assert_eq!(Table::from_number(Table::COUNT as u8), None);
    }
}
