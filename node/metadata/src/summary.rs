//! What is known of a state as a whole, beside its rows.

use bytes::Bytes;
use imbl::OrdMap;
use quorumfs_proto::{InodeNumber, SessionId, Timestamp};

use super::fault::StorageFault;
use super::limits::check_feature_level;
use super::marks::MarkTable;
use super::overlay::{Direction, KeyRange, Layers};
use super::tables::{FORMAT, Format, Marks, Meta, MetaRecord, Replicas, Sessions, Silences};

/// Up to where in the log a state goes. The consensus layer's words for it are kept as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The index of the last applied entry; 0: none.
    pub index: u64,
    /// Its log id, encoded by the consensus layer.
    pub log_id: Option<Bytes>,
    /// The last membership up to there, encoded by the consensus layer.
    pub membership: Option<Bytes>,
}

/// How the chunks that files name have changed in number since the state was opened or, by a snapshot, replaced.
/// Whoever counted them at one view knows their number at every later one of the same generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamedChange {
    /// Counts the replacements.
    pub generation: u64,
    /// Chunks more (or less).
    pub chunks: i64,
    /// Their bytes.
    pub bytes: i64,
}

/// What is known of the state as a whole. Everything in it follows from the rows; the counters are written to `meta`
/// with each batch, the living sessions are read again when the database is opened. How the named chunks have changed
/// is kept in memory only.
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
    /// Up to where each of them has answered for unlinked inodes.
    pub(super) marks: MarkTable,
    /// Those that were silent when a leader last looked, for how long in milliseconds.
    pub(super) silences: OrdMap<SessionId, u64>,
    pub(super) named_change: NamedChange,
    /// Below these keys the tables of unlinked inodes are empty, so nobody need look there: the rows that were taken out of
    /// them since the last flush lie in the overlays as removed. They say where a scan begins, never what it finds, so they
    /// may differ between nodes, and are lowest after a start.
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
        None => return Err(StorageFault::damaged("no format is noted")),
    }
    layers
        .get::<Meta>(&())?
        .ok_or_else(|| StorageFault::damaged("no position is noted"))
}
