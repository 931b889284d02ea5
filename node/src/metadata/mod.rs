//! Stand-in until the metadata part is merged: keeps sessions, nothing else.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::call::Mutation;
use quorumfs_proto::codec;
use quorumfs_proto::{ChunkId, FsError, InodeNumber, Outcome, SessionId, Sha256, Timestamp};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogCommand {
    pub stamp: Timestamp,
    pub body: LogBody,
}
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogBody {
    Call(Mutation),
    OpenSession { session: SessionId, description: String },
    EndSession { session: SessionId },
    ForgetSession { session: SessionId },
    ReclaimUnlinked { inode: InodeNumber, extents_max: u32 },
}
impl fmt::Display for LogCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command")
    }
}
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallResult {
    Outcome(Result<Outcome, FsError>),
    UnknownSession,
    StaleSequence,
    Done,
}
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    pub inline: Vec<InlineChunk>,
    pub named: Vec<ChunkId>,
    pub dead: Vec<ChunkId>,
}
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlineChunk {
    pub id: ChunkId,
    pub sha256: Sha256,
    pub payload: Bytes,
}
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    pub result: CallResult,
    pub effects: Effects,
}
#[derive(Debug, thiserror::Error)]
pub enum StorageFault {
    #[error("{doing}: {source}")]
    Io {
        doing: &'static str,
        source: std::io::Error,
    },
    #[error("the snapshot is not usable: {reason}")]
    BadSnapshot { reason: String },
    #[error("no space: {needed_bytes} {available_bytes}")]
    NoSpace { needed_bytes: u64, available_bytes: u64 },
}
#[derive(Clone, Copy, Debug)]
pub struct MetadataOptions {
    pub overlay_bytes_max: u64,
    pub cache_bytes: usize,
}
impl Default for MetadataOptions {
    fn default() -> MetadataOptions {
        MetadataOptions {
            overlay_bytes_max: 64 << 20,
            cache_bytes: 128 << 20,
        }
    }
}
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub index: u64,
    pub log_id: Option<Bytes>,
    pub membership: Option<Bytes>,
}
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    pub table: u8,
    pub key: Bytes,
    pub value: Bytes,
}
#[derive(Clone, Default, Serialize, Deserialize)]
struct All {
    position: Position,
    rows: BTreeMap<u64, String>,
}
struct State {
    now: All,
    frozen: Option<All>,
    durable: All,
    bytes: u64,
}
pub struct MetadataStore {
    path: PathBuf,
    options: MetadataOptions,
    state: Mutex<State>,
}
pub struct View(All);
impl View {
    pub fn session(&self, id: SessionId) -> Option<String> {
        self.0.rows.get(&id.0).cloned()
    }
}
pub struct Snapshot(All);
impl Snapshot {
    pub fn position(&self) -> &Position {
        &self.0.position
    }
    pub fn rows(&self) -> impl Iterator<Item = Result<Row, StorageFault>> + Send + '_ {
        let position = Row {
            table: 0,
            key: Bytes::new(),
            value: codec::encode(&self.0.position),
        };
        std::iter::once(position)
            .chain(self.0.rows.iter().map(|(key, value)| Row {
                table: 1,
                key: Bytes::copy_from_slice(&key.to_be_bytes()),
                value: Bytes::copy_from_slice(value.as_bytes()),
            }))
            .map(Ok)
    }
}
#[derive(Default)]
pub struct Installation(All);
impl Installation {
    pub fn add(&mut self, rows: &[Row]) -> Result<(), StorageFault> {
        for row in rows {
            if row.table == 0 {
                self.0.position = codec::decode(&row.value).unwrap();
            } else {
                let key = u64::from_be_bytes(row.key[..].try_into().unwrap());
                self.0
                    .rows
                    .insert(key, String::from_utf8(row.value.to_vec()).unwrap());
            }
        }
        Ok(())
    }
}
pub struct Batch<'a> {
    store: &'a MetadataStore,
    all: All,
    bytes: u64,
    marker: PhantomData<&'a ()>,
}
impl Batch<'_> {
    pub fn apply(&mut self, _index: u64, entry: &LogCommand) -> Result<Applied, StorageFault> {
        let mut effects = Effects::default();
        match &entry.body {
            LogBody::OpenSession { session, description } => {
                self.bytes += 100 + description.len() as u64;
                self.all.rows.insert(session.0, description.clone());
            }
            LogBody::Call(m) => {
                for c in &m.command.chunks {
                    if let quorumfs_proto::ChunkBody::Inline(p) = &c.body {
                        effects.inline.push(InlineChunk {
                            id: c.id,
                            sha256: c.sha256,
                            payload: p.clone(),
                        });
                    }
                }
            }
            _ => {}
        }
        Ok(Applied {
            result: CallResult::Done,
            effects,
        })
    }
    pub fn publish(mut self, position: Position) {
        self.all.position = position;
        let mut state = self.store.state.lock();
        state.bytes += self.bytes + 1;
        state.now = self.all;
    }
}
impl MetadataStore {
    pub fn open(path: &Path, options: MetadataOptions) -> Result<MetadataStore, StorageFault> {
        let all: All = match std::fs::read(path) {
            Ok(bytes) => codec::decode(&bytes).unwrap(),
            Err(_) => All::default(),
        };
        let state = State {
            now: all.clone(),
            frozen: None,
            durable: all,
            bytes: 0,
        };
        Ok(MetadataStore {
            path: path.into(),
            options,
            state: Mutex::new(state),
        })
    }
    pub fn options(&self) -> MetadataOptions {
        self.options
    }
    pub fn view(&self) -> Result<View, StorageFault> {
        Ok(View(self.state.lock().now.clone()))
    }
    pub fn position(&self) -> Position {
        self.state.lock().now.position.clone()
    }
    pub fn durable_position(&self) -> Position {
        self.state.lock().durable.position.clone()
    }
    pub fn begin(&self) -> Batch<'_> {
        Batch {
            store: self,
            all: self.state.lock().now.clone(),
            bytes: 0,
            marker: PhantomData,
        }
    }
    pub fn overlay_bytes(&self) -> u64 {
        self.state.lock().bytes
    }
    pub fn freeze(&self) -> Option<Position> {
        let mut state = self.state.lock();
        if state.frozen.is_none() {
            if state.now.position == state.durable.position {
                return None;
            }
            state.frozen = Some(state.now.clone());
            state.bytes = 0;
        }
        state.frozen.as_ref().map(|f| f.position.clone())
    }
    pub fn flush(&self) -> Result<Position, StorageFault> {
        let Some(frozen) = self.state.lock().frozen.clone() else {
            return Ok(self.durable_position());
        };
        std::fs::write(&self.path, codec::encode(&frozen)).unwrap();
        let mut state = self.state.lock();
        state.frozen = None;
        let position = frozen.position.clone();
        state.durable = frozen;
        Ok(position)
    }
    pub fn snapshot(&self) -> Result<Snapshot, StorageFault> {
        Ok(Snapshot(self.state.lock().durable.clone()))
    }
    pub fn begin_install(&self) -> Result<Installation, StorageFault> {
        Ok(Installation::default())
    }
    pub fn install(&self, installation: Installation) -> Result<Position, StorageFault> {
        std::fs::write(&self.path, codec::encode(&installation.0)).unwrap();
        let mut state = self.state.lock();
        *state = State {
            now: installation.0.clone(),
            frozen: None,
            durable: installation.0,
            bytes: 0,
        };
        Ok(state.now.position.clone())
    }
}
