//! A cluster in memory: what commands mean, in as few words as tests need, and with faults on demand.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::chunk::Piece;
use quorumfs_proto::command::{
    AttributeChanges, Held, IfExists, NewInode, NewKind, Privileges, RenameMode, SetTime, Target, XattrMode,
};
use quorumfs_proto::query::{Answer, DirectoryEntry, EntryDetail, Space};
use quorumfs_proto::{
    Attributes, ChunkBody, ChunkId, Command, FileKind, FsError, InodeNumber, Name, NewChunk, Operation,
    OperationResult, Outcome, Query, SessionId, Sha256, SymlinkTarget, Timestamp, XattrName,
};

use crate::caches::extent_cache::clip;
use crate::fs::cluster::{Cluster, FreshContent, UnlinkedHandler};

#[derive(Clone)]
struct Inode {
    attributes: Attributes,
    entries: BTreeMap<Name, InodeNumber>,
    pieces: BTreeMap<u64, Piece>,
    xattrs: BTreeMap<XattrName, Bytes>,
    target: Option<SymlinkTarget>,
    /// Sessions that may have it open although it has no name.
    pins: BTreeSet<SessionId>,
}

#[derive(Clone)]
struct State {
    inodes: BTreeMap<InodeNumber, Inode>,
    last_inode: u64,
    stamp: u64,
}

/// The cluster that all mounts of a test share.
pub struct Reference {
    state: Mutex<State>,
    put: Mutex<HashMap<ChunkId, Bytes>>,
    handlers: Mutex<BTreeMap<SessionId, UnlinkedHandler>>,
    pub commands: Mutex<Vec<Command>>,
    pub puts: AtomicU64,
    pub gets: AtomicU64,
    pub queries: AtomicU64,
    /// What puts answer instead.
    pub put_fault: Mutex<Option<FsError>>,
    /// Whether the next mutation says that its chunks are dead.
    pub kill_chunks: AtomicBool,
    /// Puts wait as long as somebody holds a permit.
    pub put_gate: tokio::sync::RwLock<()>,
}

/// One client's connection.
#[derive(Clone)]
pub struct Connection {
    pub reference: Arc<Reference>,
    session: SessionId,
    counter: Arc<AtomicU64>,
    pauses: Arc<AtomicU64>,
}

#[derive(Clone)]
pub struct Fresh {
    id: ChunkId,
    payload: Bytes,
}

impl FreshContent for Fresh {
    fn id(&self) -> ChunkId {
        self.id
    }
    fn stored(&self) -> NewChunk {
        self.named(ChunkBody::Stored)
    }
    fn inline(&self) -> NewChunk {
        self.named(ChunkBody::Inline(self.payload.clone()))
    }
}

impl Fresh {
    fn named(&self, body: ChunkBody) -> NewChunk {
        NewChunk {
            id: self.id,
            length: self.payload.len() as u32,
            sha256: Sha256([0; 32]),
            body,
        }
    }
}

impl Reference {
    pub fn new() -> Arc<Reference> {
        let mut state = State {
            inodes: BTreeMap::new(),
            last_inode: 1,
            stamp: 1_000_000_000,
        };
        let root = state.inode(
            InodeNumber::ROOT,
            FileKind::Directory,
            0o755,
            0,
            0,
            InodeNumber::ROOT,
        );
        state.inodes.insert(InodeNumber::ROOT, root);
        Arc::new(Reference {
            state: Mutex::new(state),
            put: Mutex::default(),
            handlers: Mutex::default(),
            commands: Mutex::default(),
            puts: AtomicU64::new(0),
            gets: AtomicU64::new(0),
            queries: AtomicU64::new(0),
            put_fault: Mutex::new(None),
            kill_chunks: AtomicBool::new(false),
            put_gate: tokio::sync::RwLock::new(()),
        })
    }

    pub fn connect(self: &Arc<Self>, session: u64) -> Connection {
        Connection {
            reference: Arc::clone(self),
            session: SessionId(session),
            counter: Arc::default(),
            pauses: Arc::default(),
        }
    }

    /// Asks every session about unlinked inodes and forgets those that nobody has open.
    pub fn reclaim(&self) {
        let handlers = self.handlers.lock();
        let mut state = self.state.lock();
        let orphans: Vec<InodeNumber> = state
            .inodes
            .values()
            .filter(|i| i.attributes.links == 0)
            .map(|i| i.attributes.inode)
            .collect();
        for (session, handler) in handlers.iter() {
            for inode in handler(&orphans) {
                if let Some(inode) = state.inodes.get_mut(&inode) {
                    inode.pins.remove(session);
                }
            }
        }
        state
            .inodes
            .retain(|_, inode| inode.attributes.links > 0 || !inode.pins.is_empty());
        self.drop_dead_chunks(&state);
    }

    pub fn inode_count(&self) -> usize {
        self.state.lock().inodes.len()
    }

    pub fn pieces_of(&self, inode: InodeNumber) -> Vec<Piece> {
        self.state.lock().inodes[&inode]
            .pieces
            .values()
            .copied()
            .collect()
    }

    fn drop_dead_chunks(&self, state: &State) {
        let live: BTreeSet<ChunkId> = state
            .inodes
            .values()
            .flat_map(|inode| inode.pieces.values().map(|piece| piece.chunk))
            .collect();
        let named: BTreeSet<ChunkId> = self
            .commands
            .lock()
            .iter()
            .flat_map(|c| c.chunks.iter().map(|chunk| chunk.id))
            .collect();
        self.put
            .lock()
            .retain(|id, _| live.contains(id) || !named.contains(id));
    }

    fn apply(&self, session: SessionId, command: &Command) -> Result<Outcome, FsError> {
        command.validate(session)?;
        if !command.chunks.is_empty() && self.kill_chunks.swap(false, Ordering::SeqCst) {
            return Err(FsError::ChunkDead);
        }
        let sessions: BTreeSet<SessionId> = self.handlers.lock().keys().copied().collect();
        let mut state = self.state.lock();
        for chunk in &command.chunks {
            match &chunk.body {
                ChunkBody::Inline(bytes) => {
                    self.put.lock().insert(chunk.id, bytes.clone());
                }
                ChunkBody::Stored => {
                    assert!(self.put.lock().contains_key(&chunk.id), "content before metadata")
                }
            }
        }
        let mut next = state.clone();
        next.stamp += 1;
        let mut touched = BTreeSet::new();
        let mut results = Vec::new();
        for operation in &command.operations {
            let result = next.operate(operation, session, &sessions, &results, &mut touched)?;
            results.push(result);
        }
        let attributes_of = |inode| {
            next.inodes
                .get(inode)
                .map(|inode: &Inode| inode.attributes.clone())
        };
        let touched = touched.iter().filter_map(attributes_of).collect();
        let index = next.stamp;
        *state = next;
        self.commands.lock().push(command.clone());
        self.drop_dead_chunks(&state);
        Ok(Outcome {
            results,
            touched,
            index,
        })
    }
}

impl State {
    fn now(&self) -> Timestamp {
        Timestamp::default()
            .plus_nanoseconds(999_999_999)
            .plus_nanoseconds(self.stamp as u32)
    }

    fn inode(
        &self,
        number: InodeNumber,
        kind: FileKind,
        mode: u16,
        uid: u32,
        gid: u32,
        parent: InodeNumber,
    ) -> Inode {
        let now = self.now();
        Inode {
            attributes: Attributes {
                inode: number,
                kind,
                mode,
                uid,
                gid,
                links: if kind == FileKind::Directory { 2 } else { 1 },
                size: 0,
                allocated_bytes: 0,
                rdev: 0,
                atime: now,
                mtime: now,
                ctime: now,
                birth_time: now,
                content_version: 1,
                xattr_count: 0,
                has_capability: false,
                parent,
            },
            entries: BTreeMap::new(),
            pieces: BTreeMap::new(),
            xattrs: BTreeMap::new(),
            target: None,
            pins: BTreeSet::new(),
        }
    }

    fn get(&self, inode: InodeNumber) -> Result<&Inode, FsError> {
        self.inodes.get(&inode).ok_or(FsError::NotFound)
    }

    fn directory(&mut self, inode: InodeNumber) -> Result<&mut Inode, FsError> {
        let now = self.now();
        let inode = self.inodes.get_mut(&inode).ok_or(FsError::NotFound)?;
        match (inode.attributes.kind, inode.attributes.links) {
            (FileKind::Directory, 1..) => {}
            (FileKind::Directory, 0) => return Err(FsError::NotFound),
            _ => return Err(FsError::NotDirectory),
        }
        inode.attributes.mtime = now;
        inode.attributes.ctime = now;
        Ok(inode)
    }

    fn file(&mut self, inode: InodeNumber) -> Result<&mut Inode, FsError> {
        let now = self.now();
        let inode = self.inodes.get_mut(&inode).ok_or(FsError::NotFound)?;
        inode.attributes.ctime = now;
        Ok(inode)
    }

    fn named(&mut self, parent: InodeNumber, name: &Name) -> Result<InodeNumber, FsError> {
        self.directory(parent)?
            .entries
            .get(name)
            .copied()
            .ok_or(FsError::NotFound)
    }

    /// Takes a name's link away.
    fn unnamed(
        &mut self,
        inode: InodeNumber,
        session: SessionId,
        held: Held,
        all: &BTreeSet<SessionId>,
    ) -> bool {
        let now = self.now();
        let inode = self.inodes.get_mut(&inode).expect("it had a name");
        inode.attributes.links -= 1 + u32::from(inode.attributes.kind == FileKind::Directory);
        inode.attributes.ctime = now;
        if inode.attributes.links == 0 {
            inode.pins = all.clone();
            if held == Held::NotOpen {
                inode.pins.remove(&session);
            }
        }
        inode.attributes.links == 0
    }

    fn put(
        &mut self,
        inode: InodeNumber,
        base: u64,
        pieces: &[Piece],
        privileges: Privileges,
    ) -> Result<(), FsError> {
        let now = self.now();
        let file = self.file(inode)?;
        for piece in pieces {
            let piece = Piece {
                file_offset: base + piece.file_offset,
                ..*piece
            };
            cut(&mut file.pieces, piece.file_offset, piece.file_end());
            file.pieces.insert(piece.file_offset, piece);
            file.attributes.size = file.attributes.size.max(piece.file_end());
        }
        file.attributes.content_version += 1;
        file.attributes.mtime = now;
        if privileges == Privileges::Drop {
            file.attributes.mode &= 0o1777;
        }
        Ok(())
    }

    fn operate(
        &mut self,
        operation: &Operation,
        session: SessionId,
        sessions: &BTreeSet<SessionId>,
        results: &[OperationResult],
        touched: &mut BTreeSet<InodeNumber>,
    ) -> Result<OperationResult, FsError> {
        let number = |target: &Target| match target {
            Target::Inode(inode) => *inode,
            Target::Created(at) => match results[usize::from(*at)] {
                OperationResult::Entry { inode, .. } => inode,
                _ => panic!("not an entry"),
            },
        };
        let entry = |inode, created| Ok(OperationResult::Entry { inode, created });
        match operation {
            Operation::Create {
                parent,
                name,
                inode,
                existing,
            } => {
                let parent = number(parent);
                if let Ok(found) = self.named(parent, name) {
                    touched.insert(found);
                    return match existing {
                        IfExists::Refuse => Err(FsError::Exists),
                        IfExists::Open => entry(found, false),
                    };
                }
                let made = self.make(parent, inode);
                let directory = self.directory(parent)?;
                directory.entries.insert(name.clone(), made);
                touched.extend([made, parent]);
                entry(made, true)
            }
            Operation::Link {
                inode, parent, name, ..
            } => {
                let (inode, parent) = (number(inode), number(parent));
                if self.named(parent, name).is_ok() {
                    return Err(FsError::Exists);
                }
                self.file(inode)?.attributes.links += 1;
                self.directory(parent)?.entries.insert(name.clone(), inode);
                touched.extend([inode, parent]);
                entry(inode, false)
            }
            Operation::Unlink { parent, name, held } => {
                let parent = number(parent);
                let inode = self.named(parent, name)?;
                self.directory(parent)?.entries.remove(name);
                let last = self.unnamed(inode, session, *held, sessions);
                touched.extend([inode, parent]);
                Ok(OperationResult::Removed { inode, last })
            }
            Operation::RemoveDirectory { parent, name } => {
                let inode = self.named(number(parent), name)?;
                if !self.get(inode)?.entries.is_empty() {
                    return Err(FsError::NotEmpty);
                }
                let (parent, name, held) = (*parent, name.clone(), Held::Open);
                let unlink = Operation::Unlink { parent, name, held };
                self.operate(&unlink, session, sessions, results, touched)
            }
            Operation::Rename {
                from_parent,
                from_name,
                to_parent,
                to_name,
                mode,
                held,
            } => {
                let (from, to) = (number(from_parent), number(to_parent));
                let inode = self.named(from, from_name)?;
                let other = self.named(to, to_name).ok();
                touched.extend([inode, from, to]);
                touched.extend(other);
                match (mode, other) {
                    (RenameMode::NoReplace, Some(_)) => return Err(FsError::Exists),
                    (RenameMode::Exchange, None) => return Err(FsError::NotFound),
                    (_, Some(other)) if other == inode => {
                        return Ok(OperationResult::Renamed { inode, other: None });
                    }
                    (RenameMode::Exchange, Some(other)) => {
                        self.directory(from)?.entries.insert(from_name.clone(), other);
                    }
                    (_, other) => {
                        self.directory(from)?.entries.remove(from_name);
                        if let Some(other) = other {
                            self.unnamed(other, session, *held, sessions);
                        }
                    }
                }
                self.directory(to)?.entries.insert(to_name.clone(), inode);
                self.file(inode)?;
                Ok(OperationResult::Renamed { inode, other })
            }
            Operation::SetAttributes { inode, changes } => {
                let inode = number(inode);
                self.set_attributes(inode, changes)?;
                touched.insert(inode);
                entry(inode, false)
            }
            Operation::Write {
                inode,
                pieces,
                mtime,
                privileges,
            } => {
                let inode = number(inode);
                self.put(inode, 0, pieces, *privileges)?;
                if let Some(mtime) = mtime {
                    self.file(inode)?.attributes.mtime = *mtime;
                }
                touched.insert(inode);
                entry(inode, false)
            }
            Operation::Append {
                inode,
                pieces,
                privileges,
            } => {
                let inode = number(inode);
                let offset = self.get(inode)?.attributes.size;
                self.put(inode, offset, pieces, *privileges)?;
                touched.insert(inode);
                Ok(OperationResult::Appended { offset })
            }
            Operation::SetXattr {
                inode,
                name,
                value,
                mode,
            } => {
                let inode = number(inode);
                match (mode, self.get(inode)?.xattrs.contains_key(name)) {
                    (XattrMode::Create, true) => return Err(FsError::Exists),
                    (XattrMode::Replace, false) => return Err(FsError::NoAttribute),
                    _ => {}
                }
                self.file(inode)?.xattrs.insert(name.clone(), value.clone());
                touched.insert(inode);
                entry(inode, false)
            }
            Operation::RemoveXattr { inode, name } => {
                let inode = number(inode);
                self.file(inode)?
                    .xattrs
                    .remove(name)
                    .ok_or(FsError::NoAttribute)?;
                touched.insert(inode);
                entry(inode, false)
            }
            Operation::ReleaseUnlinked { inodes } => {
                for inode in inodes {
                    if let Some(inode) = self.inodes.get_mut(inode) {
                        inode.pins.remove(&session);
                    }
                }
                self.inodes
                    .retain(|_, inode| inode.attributes.links > 0 || !inode.pins.is_empty());
                Ok(OperationResult::Done)
            }
            Operation::CreateUnlinked { .. } => Err(FsError::NotSupported),
        }
    }

    fn make(&mut self, parent: InodeNumber, new: &NewInode) -> InodeNumber {
        self.last_inode += 1;
        let number = InodeNumber(self.last_inode);
        let (kind, target, device) = match &new.kind {
            NewKind::File => (FileKind::File, None, 0),
            NewKind::Directory => (FileKind::Directory, None, 0),
            NewKind::Symlink(target) => (FileKind::Symlink, Some(target.clone()), 0),
            NewKind::Fifo => (FileKind::Fifo, None, 0),
            NewKind::Socket => (FileKind::Socket, None, 0),
            NewKind::CharacterDevice(device) => (FileKind::CharacterDevice, None, *device),
            NewKind::BlockDevice(device) => (FileKind::BlockDevice, None, *device),
        };
        let mut inode = self.inode(number, kind, new.mode, new.uid, new.gid, parent);
        inode.target = target;
        inode.attributes.rdev = device;
        self.inodes.insert(number, inode);
        number
    }

    fn set_attributes(&mut self, inode: InodeNumber, changes: &AttributeChanges) -> Result<(), FsError> {
        let now = self.now();
        let file = self.file(inode)?;
        let attributes = &mut file.attributes;
        attributes.mode = changes.mode.unwrap_or(attributes.mode);
        attributes.uid = changes.uid.unwrap_or(attributes.uid);
        attributes.gid = changes.gid.unwrap_or(attributes.gid);
        if changes.privileges == Some(Privileges::Drop) && attributes.kind == FileKind::File {
            attributes.mode &= 0o1777;
        }
        if let Some(size) = changes.size {
            cut(&mut file.pieces, size, u64::MAX);
            attributes.size = size;
            attributes.content_version += 1;
            attributes.mtime = now;
        }
        let time = |time: SetTime| match time {
            SetTime::Now => now,
            SetTime::At(at) => at,
        };
        attributes.mtime = changes.mtime.map_or(attributes.mtime, time);
        attributes.atime = changes.atime.map_or(attributes.atime, time);
        Ok(())
    }

    fn answer(&self, query: &Query) -> Result<Answer, FsError> {
        match query {
            Query::Lookup { parent, name } => {
                let found = self.get(*parent)?.entries.get(name).ok_or(FsError::NotFound)?;
                Ok(Answer::Attributes(self.get(*found)?.attributes.clone()))
            }
            Query::Attributes { inode } => Ok(Answer::Attributes(self.get(*inode)?.attributes.clone())),
            Query::ReadDirectory {
                inode,
                after,
                bytes_max,
                detail,
            } => {
                let mut all: Vec<DirectoryEntry> = Vec::new();
                for (name, inode) in &self.get(*inode)?.entries {
                    let attributes = self.get(*inode)?.attributes.clone();
                    all.push(DirectoryEntry {
                        name: name.clone(),
                        inode: *inode,
                        kind: attributes.kind,
                        cookie: cookie_of(name),
                        attributes: (*detail == EntryDetail::Attributes).then_some(attributes),
                    });
                }
                all.retain(|entry| entry.cookie > *after);
                all.sort_by_key(|entry| entry.cookie);
                let mut most = (*bytes_max as usize / 2048).max(1);
                while most < all.len() && all[most].cookie == all[most - 1].cookie {
                    most += 1;
                }
                let end = all.len() <= most;
                all.truncate(most);
                Ok(Answer::Entries { entries: all, end })
            }
            Query::ReadLink { inode } => Ok(Answer::Target(
                self.get(*inode)?.target.clone().ok_or(FsError::InvalidArgument)?,
            )),
            Query::GetXattr { inode, name } => {
                let value = self.get(*inode)?.xattrs.get(name).ok_or(FsError::NoAttribute)?;
                Ok(Answer::XattrValue(value.clone()))
            }
            Query::ListXattrs { inode } => Ok(Answer::XattrNames(
                self.get(*inode)?.xattrs.keys().cloned().collect(),
            )),
            Query::Extents {
                inode,
                from,
                to,
                pieces_max,
            } => {
                let inode = self.get(*inode)?;
                let reaches = |piece: &&Piece| piece.file_end() > *from && piece.file_offset < *to;
                let mut pieces: Vec<Piece> = inode.pieces.values().filter(reaches).copied().collect();
                let most = *pieces_max as usize;
                let mut known_to = *to;
                if pieces.len() > most {
                    known_to = pieces[most].file_offset;
                    pieces.truncate(most);
                }
                Ok(Answer::Extents {
                    attributes: inode.attributes.clone(),
                    pieces,
                    known_to,
                })
            }
            Query::Space => Ok(Answer::Space(Space {
                capacity_bytes: 1 << 40,
                available_bytes: 1 << 39,
                inodes: self.inodes.len() as u64,
            })),
            Query::Resolve { .. } => Err(FsError::NotSupported),
        }
    }
}

/// Many names share a cookie, as they may by bad luck in a large cluster.
pub fn cookie_of(name: &Name) -> u64 {
    let hash = name.as_bytes().iter().fold(7u64, |hash, byte| {
        hash.wrapping_mul(31).wrapping_add(u64::from(*byte))
    });
    3 + hash % 997
}

fn cut(pieces: &mut BTreeMap<u64, Piece>, from: u64, to: u64) {
    let touched: Vec<Piece> = pieces
        .values()
        .filter(|piece| piece.file_end() > from && piece.file_offset < to)
        .copied()
        .collect();
    for piece in touched {
        pieces.remove(&piece.file_offset);
        for rest in [clip(piece, 0..from), clip(piece, to..u64::MAX)]
            .into_iter()
            .flatten()
        {
            pieces.insert(rest.file_offset, rest);
        }
    }
}

impl Connection {
    /// Lets others run, now and then.
    async fn pause(&self) {
        for _ in 0..self.pauses.fetch_add(1, Ordering::Relaxed) * 7 % 5 {
            tokio::task::yield_now().await;
        }
    }
}

impl Cluster for Connection {
    type Chunk = Fresh;

    async fn mutate(&self, command: Command, _stored: &[Fresh]) -> Result<Outcome, FsError> {
        self.pause().await;
        let outcome = self.reference.apply(self.session, &command);
        self.pause().await;
        outcome
    }

    async fn query(&self, query: Query) -> Result<Answer, FsError> {
        self.reference.queries.fetch_add(1, Ordering::Relaxed);
        self.pause().await;
        let answer = self.reference.state.lock().answer(&query);
        self.pause().await;
        answer
    }

    fn new_chunk(&self, payload: Bytes) -> Fresh {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
        let id = ChunkId {
            session: self.session,
            counter,
        };
        Fresh { id, payload }
    }

    async fn put_chunk(&self, chunk: &Fresh) -> Result<(), FsError> {
        let _open = self.reference.put_gate.read().await;
        self.pause().await;
        if let Some(fault) = *self.reference.put_fault.lock() {
            return Err(fault);
        }
        self.reference.puts.fetch_add(1, Ordering::Relaxed);
        self.reference.put.lock().insert(chunk.id, chunk.payload.clone());
        Ok(())
    }

    async fn get_chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        self.reference.gets.fetch_add(1, Ordering::Relaxed);
        self.pause().await;
        let chunk = self
            .reference
            .put
            .lock()
            .get(&id)
            .cloned()
            .ok_or(FsError::Stale)?;
        Ok(chunk.slice(offset as usize..(offset + length) as usize))
    }

    fn set_unlinked_handler(&self, handler: UnlinkedHandler) {
        self.reference.handlers.lock().insert(self.session, handler);
    }
}
