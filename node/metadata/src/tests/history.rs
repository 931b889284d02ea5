//! The present state of a random history, beside the model's: its commands, and the comparisons.

use std::collections::BTreeMap;

use bytes::Bytes;
use quorumfs_proto::call::Mutation;
use quorumfs_proto::chunk::{ChunkBody, NewChunk};
use quorumfs_proto::command::*;
use quorumfs_proto::query::EntryDetail;
use quorumfs_proto::*;

use super::super::*;
use super::events::{Op, SESSIONS};
use super::model::{Byte, Model};
use super::support::*;

/// The history so far, beside the model's.
pub struct History {
    pub model: Model,
    pub log: Vec<(LogCommand, ApplyResult)>,
    pub clock: i64,
    /// Session `n` ends and a new one takes its place in the history.
    pub session_ids: [u64; SESSIONS as usize],
    pub counters: BTreeMap<SessionId, u64>,
    pub sequences: BTreeMap<SessionId, u64>,
    pub last_mutation: Option<(Mutation, ApplyResult)>,
    pub named: Vec<ChunkId>,
    pub dead: Vec<ChunkId>,
    pub contents: BTreeMap<InodeNumber, (u64, Vec<Byte>)>,
    /// The origin of each byte of a chunk made by a rewrite.
    pub rewritten: BTreeMap<ChunkId, Vec<Byte>>,
    /// The index up to which each session has answered.
    pub marks: BTreeMap<SessionId, u64>,
}

impl History {
    pub fn session(&self, at: u8) -> SessionId {
        SessionId(self.session_ids[usize::from(at)])
    }

    pub fn stamp(&self) -> Timestamp {
        Timestamp {
            seconds: 1000 + self.clock / 1_000_000_000,
            nanoseconds: (self.clock % 1_000_000_000) as u32,
        }
    }

    /// Returns an inode number that is mostly in use, never of an inode that may be freed at any moment.
    pub fn inode(&self, at: u8) -> InodeNumber {
        let inode = InodeNumber(1 + u64::from(at) % self.model.next_inode);
        match self.model.inodes.get(&inode) {
            Some(found) if found.is_doomed() => InodeNumber::ROOT,
            _ => inode,
        }
    }

    pub fn target(&self, at: u8) -> Target {
        match at {
            0..4 => Target::Created(u16::from(at % 2)),
            _ => Target::Inode(self.inode(at)),
        }
    }

    /// Returns a directory more often than not.
    pub fn parent(&self, at: u8) -> Target {
        let directories: Vec<InodeNumber> = self
            .model
            .inodes
            .values()
            .filter(|inode| inode.attributes.kind == FileKind::Directory && !inode.is_doomed())
            .map(|inode| inode.attributes.inode)
            .collect();
        match at {
            0..30 => Target::Inode(directories[usize::from(at) % directories.len()]),
            _ => self.target(at - 30),
        }
    }

    pub fn command(&mut self, session: SessionId, ops: &[Op]) -> Command {
        let mut command = Command {
            chunks: Vec::new(),
            operations: Vec::new(),
        };
        for op in ops {
            let operation = self.operation(session, op, &mut command.chunks);
            command.operations.push(operation);
        }
        command
    }

    pub fn chunk(&mut self, session: SessionId, length: u32, chunks: &mut Vec<NewChunk>) -> ChunkId {
        let counter = self.counters.entry(session).or_insert(0);
        *counter += 1;
        let mut chunk = chunk(session.0, *counter, length);
        if counter.is_multiple_of(2) {
            chunk.body = ChunkBody::Inline(Bytes::from(vec![0; length as usize]));
        }
        let id = chunk.id;
        chunks.push(chunk);
        id
    }

    pub fn operation(&mut self, session: SessionId, op: &Op, chunks: &mut Vec<NewChunk>) -> Operation {
        let text = |n: u8| name(["a", "b", "c", "d"][usize::from(n)]);
        let held = |open: bool| if open { Held::Open } else { Held::NotOpen };
        let existing = |open: bool| if open { IfExists::Open } else { IfExists::Refuse };
        let privileges = |drop: bool| if drop { Privileges::Drop } else { Privileges::Keep };
        let xattr = |n: u8| {
            XattrName::new(
                ["user.a", "user.b", "security.capability", "trusted.c"][usize::from(n)].as_bytes(),
            )
            .unwrap()
        };
        let change = |inode, changes| Operation::SetAttributes { inode, changes };
        match op {
            Op::Create(parent, n, kind, open) => Operation::Create {
                parent: self.parent(*parent),
                name: text(*n),
                inode: new_inode(match kind {
                    0..3 => NewKind::File,
                    3..6 => NewKind::Directory,
                    6 => NewKind::Symlink(SymlinkTarget::new(&b"target"[..]).unwrap()),
                    _ => NewKind::CharacterDevice(259),
                }),
                existing: existing(*open),
            },
            Op::CreateUnlinked => Operation::CreateUnlinked {
                inode: new_inode(NewKind::File),
            },
            Op::Link(target, parent, n, open) => Operation::Link {
                inode: self.target(*target),
                parent: self.parent(*parent),
                name: text(*n),
                existing: existing(*open),
            },
            Op::Unlink(parent, n, open) => Operation::Unlink {
                parent: self.parent(*parent),
                name: text(*n),
                held: held(*open),
            },
            Op::RemoveDirectory(parent, n) => Operation::RemoveDirectory {
                parent: self.parent(*parent),
                name: text(*n),
            },
            Op::Rename(from, to, mode, open) => Operation::Rename {
                from_parent: self.parent(from.0),
                from_name: text(from.1),
                to_parent: self.parent(to.0),
                to_name: text(to.1),
                mode: [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange][usize::from(*mode)],
                held: held(*open),
            },
            Op::Truncate(target, size) => change(
                self.target(*target),
                AttributeChanges {
                    size: Some(*size),
                    ..AttributeChanges::default()
                },
            ),
            Op::Write(target, places, time, drop) => {
                let inode = self.target(*target);
                // All extents are in one chunk, as the dirty ranges of a file are.
                let chunk = self.chunk(session, places.iter().map(|place| place.1).sum(), chunks);
                let mut chunk_offset = 0;
                let mut extents = Vec::new();
                for (file_offset, length) in places {
                    extents.push(Extent {
                        file_offset: *file_offset,
                        length: *length,
                        chunk,
                        chunk_offset,
                    });
                    chunk_offset += length;
                }
                Operation::Write {
                    inode,
                    extents,
                    mtime: time.then(|| self.stamp()),
                    privileges: privileges(*drop),
                }
            }
            Op::Append(target, length) => {
                let inode = self.target(*target);
                let chunk = self.chunk(session, *length, chunks);
                let extent = |file_offset, length, chunk_offset| Extent {
                    file_offset,
                    length,
                    chunk,
                    chunk_offset,
                };
                Operation::Append {
                    inode,
                    extents: vec![extent(0, *length, 0)],
                    privileges: Privileges::Drop,
                }
            }
            Op::Chmod(target, mode) => change(
                self.target(*target),
                AttributeChanges {
                    mode: Some(*mode),
                    ..AttributeChanges::default()
                },
            ),
            Op::Chown(target, owner) => change(
                self.target(*target),
                AttributeChanges {
                    uid: Some(*owner),
                    gid: Some(7),
                    ..AttributeChanges::default()
                },
            ),
            Op::Times(target, now) => {
                let time = match now {
                    true => SetTime::Now,
                    false => SetTime::At(self.stamp()),
                };
                change(
                    self.target(*target),
                    AttributeChanges {
                        mtime: Some(time),
                        atime: Some(SetTime::Now),
                        ..AttributeChanges::default()
                    },
                )
            }
            Op::Kill(target) => change(
                self.target(*target),
                AttributeChanges {
                    privileges: Some(Privileges::Drop),
                    ..AttributeChanges::default()
                },
            ),
            Op::SetXattr(target, n, mode) => Operation::SetXattr {
                inode: self.target(*target),
                name: xattr(*n),
                value: Bytes::from(vec![*mode; 3]),
                mode: [XattrMode::Set, XattrMode::Create, XattrMode::Replace][usize::from(*mode)],
            },
            Op::RemoveXattr(target, n) => Operation::RemoveXattr {
                inode: self.target(*target),
                name: xattr(*n),
            },
        }
    }

    pub fn mutation(&mut self, session: SessionId, command: Command) -> Mutation {
        let sequence = self.sequences.entry(session).or_insert(0);
        *sequence += 1;
        Mutation {
            request: RequestId {
                session,
                lane: Lane(3),
                sequence: *sequence,
            },
            chunk_low_water: 0,
            command,
        }
    }

    pub fn apply(&mut self, batch: &mut Batch<'_>, body: LogBody) -> Applied {
        let entry = LogCommand {
            stamp: self.stamp(),
            body,
        };
        self.model.tick(entry.stamp);
        let applied = batch.apply(self.log.len() as u64 + 1, &entry).unwrap();
        self.log.push((entry, applied.result.clone()));
        let brought = applied.effects.inline.iter().map(|chunk| chunk.id);
        self.named
            .extend(brought.chain(applied.effects.named.iter().copied()));
        self.dead.extend(&applied.effects.dead);
        applied
    }

    /// Runs a command in both and compares verdict, results and touched attributes.
    pub fn mutate(&mut self, batch: &mut Batch<'_>, session: SessionId, command: Command) {
        let mutation = self.mutation(session, command);
        let alive = self.model.living.contains(&session);
        let applied = self.apply(batch, LogBody::Call(mutation.clone()));
        if !alive {
            assert!(is_of_no_living_session(&applied.result));
            *self.sequences.get_mut(&session).unwrap() -= 1;
            return;
        }
        if let ApplyResult::Crowded(place) = applied.result {
            assert!(self.model.writes_drop_capabilities, "only from its level on");
            assert!(self.model.inodes.contains_key(&place.inode));
            // Nothing was done, and the lane waits for the same.
            *self.sequences.get_mut(&session).unwrap() -= 1;
            return;
        }
        self.last_mutation = Some((mutation.clone(), applied.result.clone()));
        let expected = self.model.run(session, &mutation.command);
        let ApplyResult::Outcome(outcome) = applied.result else {
            panic!("not decided: {mutation:?}");
        };
        let results = outcome.as_ref().map(|outcome| outcome.results.clone());
        assert_eq!(results, expected.as_ref().cloned(), "{mutation:?}");
        for touched in outcome.iter().flat_map(|outcome| &outcome.touched) {
            let modelled = &self.model.inodes[&touched.inode];
            if modelled.is_doomed() {
                // This very command may free half of it.
                continue;
            }
            assert_eq!(comparable(touched), modelled.attributes, "after {mutation:?}");
        }
        if let Ok(outcome) = &outcome {
            for result in &outcome.results {
                if let OperationResult::Entry { inode, .. } = result {
                    assert!(outcome.attributes_of(*inode).is_some());
                }
            }
        }
    }

    /// Combines runs of the file as the leader does, from a view that may be outdated.
    pub fn rewrite(&mut self, batch: &mut Batch<'_>, store: &MetadataStore, file: InodeNumber, any: bool) {
        let terms = if any { RunTerms::Any } else { RunTerms::Worthwhile };
        let view = store.view().unwrap();
        let Ok(found) = view.runs(file, 0, u64::MAX, terms) else {
            return;
        };
        let session = self.session(0);
        for run in found.runs {
            let mut chunks = Vec::new();
            let length = (run.to() - run.from()) as u32;
            let id = self.chunk(session, length, &mut chunks);
            let mut bytes: Vec<Byte> = vec![None; length as usize];
            for extent in &run.extents {
                for at in 0..extent.length {
                    let place = (extent.file_offset - run.from()) as usize + at as usize;
                    bytes[place] = self.origin((extent.chunk, extent.chunk_offset + at));
                }
            }
            self.rewritten.insert(id, bytes);
            let body = LogBody::Rewrite {
                inode: file,
                from: run.from(),
                extents: run.extents.len() as u32,
                digest: run.digest,
                chunk: chunks.swap_remove(0),
            };
            let result = self.apply(batch, body).result;
            let refused = matches!(
                result,
                ApplyResult::Outcome(Err(FsError::Stale | FsError::NotSupported))
                    | ApplyResult::UnknownSession
            );
            assert!(result == ApplyResult::Done || refused, "{result:?}");
        }
    }

    /// Returns what the model knows as the origin of a byte of a chunk.
    pub fn origin(&self, (chunk, at): (ChunkId, u32)) -> Byte {
        match self.rewritten.get(&chunk) {
            Some(bytes) => bytes[at as usize],
            None => Some((chunk, at)),
        }
    }

    /// Compares the whole tree with the model.
    pub fn compare(&mut self, view: &View) {
        assert_eq!(view.last_stamp(), self.model.now);
        for (number, inode) in &self.model.inodes {
            if inode.is_doomed() {
                continue;
            }
            let attributes = view.attributes(*number).unwrap();
            assert_eq!(comparable(&attributes), inode.attributes);
            let names: Vec<XattrName> = inode.xattrs.keys().cloned().collect();
            assert_eq!(view.xattr_names(*number).unwrap(), names);
            for (name, value) in &inode.xattrs {
                assert_eq!(view.xattr(*number, name).unwrap(), value);
            }
            match attributes.kind {
                FileKind::Directory => {
                    let listed = list(view, *number);
                    let entries: BTreeMap<Name, InodeNumber> =
                        listed.iter().map(|entry| (entry.0.clone(), entry.1)).collect();
                    assert_eq!(listed.len(), entries.len(), "listed twice");
                    assert_eq!(entries, inode.entries);
                }
                FileKind::File => {
                    let bytes = read(view, *number, attributes.size);
                    let origin = |byte: Byte| byte.and_then(|byte| self.origin(byte));
                    let bytes: Vec<Byte> = bytes.into_iter().map(origin).collect();
                    assert_eq!(bytes, inode.bytes, "bytes of {number}");
                    let seen = (attributes.content_version, bytes);
                    if let Some(before) = self.contents.insert(*number, seen.clone()) {
                        assert!(before.1 == seen.1 || before.0 < seen.0, "version of {number}");
                    }
                }
                FileKind::Symlink => {
                    assert_eq!(view.read_link(*number).unwrap(), *inode.target.as_ref().unwrap());
                }
                _ => {}
            }
        }
        check_invariants(view);
    }
}

pub fn comparable(attributes: &Attributes) -> Attributes {
    Attributes {
        allocated_bytes: 0,
        content_version: 0,
        ..attributes.clone()
    }
}

/// A directory's entries, a few at a time.
pub fn list(view: &View, directory: InodeNumber) -> Vec<(Name, InodeNumber)> {
    let mut found = Vec::new();
    let mut after = 0;
    loop {
        let page = view
            .read_directory(directory, after, 1, EntryDetail::Attributes)
            .unwrap();
        for entry in page.entries {
            assert!(entry.cookie > after);
            after = entry.cookie;
            assert_eq!(entry.attributes.unwrap().inode, entry.inode);
            found.push((entry.name, entry.inode));
        }
        if page.end {
            return found;
        }
    }
}

/// Reads a file's bytes, two extents at a time.
pub fn read(view: &View, file: InodeNumber, size: u64) -> Vec<Byte> {
    let mut bytes = vec![None; size as usize];
    let mut from = 0;
    while from < size {
        let page = view.extents(file, from, size, 2).unwrap();
        for extent in page.extents {
            for at in 0..u64::from(extent.length) {
                let place = (extent.file_offset + at) as usize;
                bytes[place] = Some((extent.chunk, extent.chunk_offset + at as u32));
            }
        }
        assert!(page.known_to > from);
        from = page.known_to;
    }
    bytes
}

pub fn reapply(store: &MetadataStore, log: &[(LogCommand, ApplyResult)]) {
    let durable = store.position().index as usize;
    let mut batch = store.begin();
    for (at, (entry, result)) in log.iter().enumerate().skip(durable) {
        assert_eq!(&batch.apply(at as u64 + 1, entry).unwrap().result, result);
    }
    batch.publish(at(log.len() as u64));
}
