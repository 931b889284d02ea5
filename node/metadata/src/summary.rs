//! The summary of a state: what is known of it as a whole, besides its rows.

use bytes::Bytes;
use imbl::OrdMap;
use quorumfs_proto::{InodeNumber, SessionId, Timestamp};

use super::fault::StorageFault;
use super::limits::check_feature_level;
use super::marks::MarkTable;
use super::overlay::{Direction, KeyRange, Layers};
use super::tables::{FORMAT, Format, Marks, Meta, MetaRecord, Replicas, Sessions, Silences};

/// The log position of a state. The consensus layer's part is stored as opaque bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The index of the last applied entry; 0 if there is none.
    pub index: u64,
    /// The log id of that entry, encoded by the consensus layer.
    pub log_id: Option<Bytes>,
    /// The last membership up to that entry, encoded by the consensus layer.
    pub membership: Option<Bytes>,
}

/// The change of the number of chunks that files refer to, since the state was opened or replaced by a snapshot. A
/// caller that counted them at one view knows their number at every later view of the same generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamedChange {
    /// Number of replacements by a snapshot.
    pub generation: u64,
    /// Change of the number of chunks.
    pub chunks: i64,
    /// Change of the number of bytes.
    pub bytes: i64,
}

/// The summary of a state. All of it follows from the rows. The counters are written to `meta` with each batch; the
/// living sessions are read when the database is opened; the change of named chunks is only in memory.
#[derive(Clone)]
pub(super) struct Summary {
    pub(super) position: Position,
    pub(super) last_stamp: Timestamp,
    pub(super) feature_level: u32,
    pub(super) replicas: Replicas,
    pub(super) next_inode: u64,
    pub(super) inode_count: u64,
    /// Sessions that have not ended, with their chunks' low-water marks.
    pub(super) living: OrdMap<SessionId, u64>,
    /// For each living session, the index up to which it has answered for unlinked inodes.
    pub(super) marks: MarkTable,
    /// The sessions that were silent when a leader last looked, with the duration in milliseconds.
    pub(super) silences: OrdMap<SessionId, u64>,
    pub(super) named_change: NamedChange,
    /// Below these keys the tables of unlinked inodes are empty, so a scan need not start there: rows that were removed
    /// since the last flush are still in the overlays, marked as removed. The keys determine where a scan begins, never
    /// what it finds, so they may differ between nodes; after a start they are lowest.
    pub(super) queue_from: (u64, InodeNumber),
    pub(super) reclaimable_from: InodeNumber,
}

impl Summary {
    pub(super) fn load(layers: &Layers) -> Result<Summary, StorageFault> {
        let meta = read_meta(layers)?;
        check_feature_level(meta.feature_level)?;
        let (mut living, mut marks) = (OrdMap::new(), MarkTable::default());
        for row in layers.scan::<Sessions>(KeyRange::prefix(&[]), Direction::Up)? {
            let (session, record) = row?;
            if record.ended.is_none() {
                living.insert(session, record.chunk_low_water);
                marks.opened(session, layers.get::<Marks>(&session)?);
            }
        }
        let silences = layers.scan::<Silences>(KeyRange::prefix(&[]), Direction::Up)?;
        let silences = silences.collect::<Result<OrdMap<_, _>, _>>()?;
        Ok(Summary {
            position: position_of(&meta),
            last_stamp: meta.last_stamp,
            feature_level: meta.feature_level,
            replicas: meta.replicas,
            next_inode: meta.next_inode,
            inode_count: meta.inode_count,
            living,
            marks,
            silences,
            named_change: NamedChange::default(),
            queue_from: (0, InodeNumber(0)),
            reclaimable_from: InodeNumber(0),
        })
    }

    pub(super) fn meta(&self) -> MetaRecord {
        MetaRecord {
            index: self.position.index,
            log_id: self.position.log_id.clone(),
            membership: self.position.membership.clone(),
            last_stamp: self.last_stamp,
            feature_level: self.feature_level,
            replicas: self.replicas,
            next_inode: self.next_inode,
            inode_count: self.inode_count,
        }
    }
}

fn position_of(meta: &MetaRecord) -> Position {
    Position {
        index: meta.index,
        log_id: meta.log_id.clone(),
        membership: meta.membership.clone(),
    }
}

fn read_meta(layers: &Layers) -> Result<MetaRecord, StorageFault> {
    match layers.get::<Format>(&())? {
        Some(FORMAT) => {}
        Some(found) => {
            return Err(StorageFault::UnknownFormat { found, known: FORMAT });
        }
        None => return Err(StorageFault::damaged("the row with the format is missing")),
    }
    layers
        .get::<Meta>(&())?
        .ok_or_else(|| StorageFault::damaged("the row with the position is missing"))
}
