//! The filesystem as a few maps, with which `apply` is compared. Every command works on a copy that replaces the
//! original if nothing was refused; file content is a list of bytes, each identified by the chunk it came from.

use std::collections::{BTreeMap, BTreeSet};

use quorumfs_proto::command::*;
use quorumfs_proto::*;

/// A byte of a file: its chunk and its offset there; `None` is a hole.
pub type Byte = Option<(ChunkId, u32)>;

#[derive(Clone, Debug)]
pub struct Inode {
    /// `allocated_bytes` and `content_version` are not modelled.
    pub attributes: Attributes,
    pub entries: BTreeMap<Name, InodeNumber>,
    pub bytes: Vec<Byte>,
    pub target: Option<SymlinkTarget>,
    pub xattrs: BTreeMap<XattrName, bytes::Bytes>,
    /// For an inode without a name: the sessions that may have it open, and its maker.
    pub held_by: BTreeSet<SessionId>,
    /// The sessions that are still asked whether they hold it (from feature level 3 on).
    pub awaited: BTreeSet<SessionId>,
    pub maker: Option<SessionId>,
}

impl Inode {
    /// Whether nothing keeps the inode, so that it may be freed at any moment.
    pub fn is_doomed(&self) -> bool {
        self.attributes.links == 0 && self.held_by.is_empty() && self.awaited.is_empty()
    }
}

#[derive(Clone, Debug)]
pub struct Model {
    pub inodes: BTreeMap<InodeNumber, Inode>,
    pub living: BTreeSet<SessionId>,
    pub next_inode: u64,
    pub now: Timestamp,
    /// Whether every write drops file capabilities.
    pub writes_drop_capabilities: bool,
    /// Whether sessions answer about unlinked inodes in order.
    pub asks: bool,
    session: SessionId,
}

pub(super) type Verdict<T> = Result<T, FsError>;

impl Model {
    pub fn new() -> Model {
        let zero = Timestamp::default();
        let mut model = Model {
            inodes: BTreeMap::new(),
            living: BTreeSet::new(),
            next_inode: 1,
            now: zero,
            writes_drop_capabilities: false,
            asks: false,
            session: SessionId(0),
        };
        let root = NewInode {
            kind: NewKind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
        };
        let root = model.make(&root, None);
        model.inodes.get_mut(&root).unwrap().attributes.parent = root;
        model
    }

    /// Raises the feature level to `level`, 2 or more.
    pub fn raise(&mut self, level: u32) {
        self.writes_drop_capabilities = level >= 3;
        let now = self.now;
        if let Some(root) = self.inodes.get_mut(&InodeNumber::ROOT) {
            let attributes = &mut root.attributes;
            for time in [
                &mut attributes.atime,
                &mut attributes.mtime,
                &mut attributes.ctime,
                &mut attributes.birth_time,
            ] {
                if *time == Timestamp::default() {
                    *time = now;
                }
            }
        }
    }

    pub fn run(&mut self, session: SessionId, command: &Command) -> Verdict<Vec<OperationResult>> {
        let mut copy = self.clone();
        copy.session = session;
        let mut results = Vec::new();
        for operation in &command.operations {
            let result = copy.operate(operation, &results)?;
            results.push(result);
        }
        *self = copy;
        Ok(results)
    }

    fn operate(&mut self, operation: &Operation, results: &[OperationResult]) -> Verdict<OperationResult> {
        let resolve = |target: Target| match target {
            Target::Inode(inode) => Ok(inode),
            Target::Created(at) => match results.get(at as usize) {
                Some(OperationResult::Entry { inode, .. }) => Ok(*inode),
                _ => Err(FsError::InvalidArgument),
            },
        };
        match operation {
            Operation::Create {
                parent,
                name,
                inode,
                existing,
            } => self.create(resolve(*parent)?, name, inode, *existing),
            Operation::CreateUnlinked { inode } => {
                let made = self.make(inode, None);
                let session = self.session;
                let inode = self.get(made)?;
                inode.attributes.links = 0;
                inode.held_by.insert(session);
                inode.maker = Some(session);
                Ok(OperationResult::Entry {
                    inode: made,
                    created: true,
                })
            }
            Operation::Link {
                inode,
                parent,
                name,
                existing,
            } => {
                let parent = resolve(*parent)?;
                self.directory(parent)?;
                self.link(resolve(*inode)?, parent, name, *existing)
            }
            Operation::Unlink { parent, name, held } => {
                let parent = resolve(*parent)?;
                let inode = self.named(parent, name)?.ok_or(FsError::NotFound)?;
                if self.is_directory(inode) {
                    return Err(FsError::IsDirectory);
                }
                self.detach(parent, name);
                let last = self.lose_link(inode, *held);
                Ok(OperationResult::Removed { inode, last })
            }
            Operation::RemoveDirectory { parent, name } => {
                let parent = resolve(*parent)?;
                let inode = self.named(parent, name)?.ok_or(FsError::NotFound)?;
                if !self.is_directory(inode) {
                    return Err(FsError::NotDirectory);
                }
                if !self.get(inode)?.entries.is_empty() {
                    return Err(FsError::NotEmpty);
                }
                self.detach(parent, name);
                self.lose_link(inode, Held::Open);
                Ok(OperationResult::Removed { inode, last: true })
            }
            Operation::Rename {
                from_parent,
                from_name,
                to_parent,
                to_name,
                mode,
                held,
            } => {
                let from = (resolve(*from_parent)?, from_name);
                self.directory(from.0)?;
                self.rename(from, (resolve(*to_parent)?, to_name), *mode, *held)
            }
            Operation::SetAttributes { inode, changes } => self.set_attributes(resolve(*inode)?, changes),
            Operation::Write {
                inode,
                extents,
                mtime,
                privileges,
            } => {
                let number = resolve(*inode)?;
                self.put(number, extents, 0)?;
                let inode = self.get(number)?;
                if let Some(mtime) = mtime {
                    inode.attributes.mtime = *mtime;
                }
                self.wrote(number, *privileges);
                Ok(OperationResult::Entry {
                    inode: number,
                    created: false,
                })
            }
            Operation::Append {
                inode,
                extents,
                privileges,
            } => {
                let number = resolve(*inode)?;
                let offset = self.file(number)?.bytes.len() as u64;
                self.put(number, extents, offset)?;
                let now = self.now;
                self.get(number)?.attributes.mtime = now;
                self.wrote(number, *privileges);
                Ok(OperationResult::Appended { offset })
            }
            Operation::SetXattr {
                inode,
                name,
                value,
                mode,
            } => {
                let number = resolve(*inode)?;
                let inode = self.get(number)?;
                match (mode, inode.xattrs.contains_key(name)) {
                    (XattrMode::Create, true) => return Err(FsError::Exists),
                    (XattrMode::Replace, false) => return Err(FsError::NoAttribute),
                    _ => {}
                }
                inode.xattrs.insert(name.clone(), value.clone());
                self.touch(number);
                Ok(OperationResult::Entry {
                    inode: number,
                    created: false,
                })
            }
            Operation::RemoveXattr { inode, name } => {
                let number = resolve(*inode)?;
                self.get(number)?
                    .xattrs
                    .remove(name)
                    .ok_or(FsError::NoAttribute)?;
                self.touch(number);
                Ok(OperationResult::Entry {
                    inode: number,
                    created: false,
                })
            }
            Operation::ReleaseUnlinked { inodes } => {
                for number in inodes {
                    let session = self.session;
                    if let Some(inode) = self.inodes.get_mut(number) {
                        inode.held_by.remove(&session);
                    }
                }
                Ok(OperationResult::Done)
            }
        }
    }

    pub(super) fn get(&mut self, inode: InodeNumber) -> Verdict<&mut Inode> {
        self.inodes.get_mut(&inode).ok_or(FsError::Stale)
    }

    pub(super) fn file(&mut self, inode: InodeNumber) -> Verdict<&mut Inode> {
        let found = self.get(inode)?;
        match found.attributes.kind {
            FileKind::File => Ok(found),
            FileKind::Directory => Err(FsError::IsDirectory),
            _ => Err(FsError::InvalidArgument),
        }
    }

    pub(super) fn is_directory(&self, inode: InodeNumber) -> bool {
        self.inodes[&inode].attributes.kind == FileKind::Directory
    }

    fn directory(&mut self, inode: InodeNumber) -> Verdict<&mut Inode> {
        let found = self.get(inode)?;
        match (found.attributes.kind, found.attributes.links) {
            (FileKind::Directory, 0) => Err(FsError::NotFound),
            (FileKind::Directory, _) => Ok(found),
            _ => Err(FsError::NotDirectory),
        }
    }

    fn named(&mut self, parent: InodeNumber, name: &Name) -> Verdict<Option<InodeNumber>> {
        Ok(self.directory(parent)?.entries.get(name).copied())
    }

    /// Updates derived values and the change time.
    pub(super) fn touch(&mut self, number: InodeNumber) {
        let now = self.now;
        let subdirectories = self.inodes[&number]
            .entries
            .values()
            .filter(|inode| self.is_directory(**inode))
            .count();
        let inode = self.inodes.get_mut(&number).unwrap();
        let attributes = &mut inode.attributes;
        attributes.ctime = now;
        attributes.xattr_count = inode.xattrs.len() as u32;
        attributes.has_capability = inode
            .xattrs
            .keys()
            .any(|n| n.as_bytes() == b"security.capability");
        match attributes.kind {
            FileKind::File => attributes.size = inode.bytes.len() as u64,
            FileKind::Directory => {
                attributes.size = inode.entries.len() as u64;
                if attributes.links > 0 {
                    attributes.links = 2 + subdirectories as u32;
                }
            }
            _ => {}
        }
    }

    fn touch_entries(&mut self, number: InodeNumber) {
        self.touch(number);
        let now = self.now;
        self.inodes.get_mut(&number).unwrap().attributes.mtime = now;
    }

    fn make(&mut self, new: &NewInode, parent: Option<InodeNumber>) -> InodeNumber {
        let number = InodeNumber(self.next_inode);
        self.next_inode += 1;
        let (kind, rdev, target) = match &new.kind {
            NewKind::File => (FileKind::File, 0, None),
            NewKind::Directory => (FileKind::Directory, 0, None),
            NewKind::Symlink(target) => (FileKind::Symlink, 0, Some(target.clone())),
            NewKind::Fifo => (FileKind::Fifo, 0, None),
            NewKind::Socket => (FileKind::Socket, 0, None),
            NewKind::CharacterDevice(rdev) => (FileKind::CharacterDevice, *rdev, None),
            NewKind::BlockDevice(rdev) => (FileKind::BlockDevice, *rdev, None),
        };
        let group = parent
            .map(|parent| &self.inodes[&parent].attributes)
            .filter(|parent| parent.mode & 0o2000 != 0)
            .map(|parent| parent.gid);
        let mut mode = new.mode;
        if kind == FileKind::Directory && group.is_some() {
            mode |= 0o2000;
        }
        if kind == FileKind::Symlink {
            mode = 0o777;
        }
        let is_directory = kind == FileKind::Directory;
        let inode = Inode {
            attributes: Attributes {
                inode: number,
                kind,
                mode,
                uid: new.uid,
                gid: group.unwrap_or(new.gid),
                links: if is_directory { 2 } else { 1 },
                size: target.as_ref().map_or(0, |target| target.as_bytes().len() as u64),
                allocated_bytes: 0,
                rdev,
                atime: self.now,
                mtime: self.now,
                ctime: self.now,
                birth_time: self.now,
                content_version: 0,
                xattr_count: 0,
                has_capability: false,
                parent: parent.filter(|_| is_directory).unwrap_or(InodeNumber(0)),
            },
            entries: BTreeMap::new(),
            bytes: Vec::new(),
            target,
            xattrs: BTreeMap::new(),
            held_by: BTreeSet::new(),
            awaited: BTreeSet::new(),
            maker: None,
        };
        self.inodes.insert(number, inode);
        number
    }

    fn create(
        &mut self,
        parent: InodeNumber,
        name: &Name,
        new: &NewInode,
        existing: IfExists,
    ) -> Verdict<OperationResult> {
        let (inode, created) = match self.named(parent, name)? {
            Some(_) if existing == IfExists::Refuse => return Err(FsError::Exists),
            Some(inode) => match (self.is_directory(inode), new.kind == NewKind::Directory) {
                (true, false) => return Err(FsError::IsDirectory),
                (false, true) => return Err(FsError::NotDirectory),
                _ => (inode, false),
            },
            None => {
                let inode = self.make(new, Some(parent));
                self.attach(parent, name, inode);
                (inode, true)
            }
        };
        Ok(OperationResult::Entry { inode, created })
    }

    fn attach(&mut self, parent: InodeNumber, name: &Name, inode: InodeNumber) {
        let directory = self.inodes.get_mut(&parent).unwrap();
        assert!(directory.entries.insert(name.clone(), inode).is_none());
        self.touch_entries(parent);
    }

    fn detach(&mut self, parent: InodeNumber, name: &Name) {
        self.inodes
            .get_mut(&parent)
            .unwrap()
            .entries
            .remove(name)
            .unwrap();
        self.touch_entries(parent);
    }

    fn lose_link(&mut self, number: InodeNumber, held: Held) -> bool {
        let (asks, living) = (self.asks, self.living.clone());
        let mut holders = living.clone();
        if held == Held::NotOpen {
            holders.remove(&self.session);
        }
        let is_directory = self.is_directory(number);
        let inode = self.inodes.get_mut(&number).unwrap();
        inode.attributes.links = if is_directory {
            0
        } else {
            inode.attributes.links - 1
        };
        let last = inode.attributes.links == 0;
        if last {
            match asks {
                true => inode.awaited = living,
                false => inode.held_by = holders,
            }
        }
        self.touch(number);
        last
    }

    fn link(
        &mut self,
        inode: InodeNumber,
        parent: InodeNumber,
        name: &Name,
        existing: IfExists,
    ) -> Verdict<OperationResult> {
        let found = self.get(inode)?.clone();
        if found.attributes.kind == FileKind::Directory {
            return Err(FsError::NotPermitted);
        }
        let done = Ok(OperationResult::Entry {
            inode,
            created: false,
        });
        let replaced = self.named(parent, name)?;
        if let Some(replaced) = replaced {
            if existing == IfExists::Refuse {
                return Err(FsError::Exists);
            }
            if replaced == inode {
                return done;
            }
            if self.is_directory(replaced) {
                return Err(FsError::IsDirectory);
            }
        }
        if found.attributes.links == 0 && found.maker != Some(self.session) {
            return Err(FsError::NotFound);
        }
        if let Some(replaced) = replaced {
            self.detach(parent, name);
            self.lose_link(replaced, Held::Open);
        }
        let found = self.get(inode)?;
        found.held_by.clear();
        found.maker = None;
        found.attributes.links += 1;
        self.touch(inode);
        self.attach(parent, name, inode);
        done
    }

    fn lies_below(&self, mut inode: InodeNumber, ancestor: InodeNumber) -> bool {
        loop {
            if inode == ancestor {
                return true;
            }
            if inode == InodeNumber::ROOT {
                return false;
            }
            inode = self.inodes[&inode].attributes.parent;
        }
    }

    fn rename(
        &mut self,
        from: (InodeNumber, &Name),
        to: (InodeNumber, &Name),
        mode: RenameMode,
        held: Held,
    ) -> Verdict<OperationResult> {
        self.directory(to.0)?;
        let inode = self.named(from.0, from.1)?.ok_or(FsError::NotFound)?;
        let other = self.named(to.0, to.1)?;
        if mode == RenameMode::NoReplace && other.is_some() {
            return Err(FsError::Exists);
        }
        if mode == RenameMode::Exchange && other.is_none() {
            return Err(FsError::NotFound);
        }
        if self.is_directory(inode) && self.lies_below(to.0, inode) {
            return Err(FsError::InvalidArgument);
        }
        let result = OperationResult::Renamed { inode, other };
        let Some(other) = other else {
            self.detach(from.0, from.1);
            self.place(inode, to);
            return Ok(result);
        };
        if other == inode {
            return Ok(result);
        }
        if mode == RenameMode::Exchange {
            if self.is_directory(other) && self.lies_below(from.0, other) {
                return Err(FsError::InvalidArgument);
            }
            self.detach(from.0, from.1);
            self.detach(to.0, to.1);
            self.place(inode, to);
            self.place(other, from);
            return Ok(result);
        }
        match (self.is_directory(inode), self.is_directory(other)) {
            (true, false) => return Err(FsError::NotDirectory),
            (false, true) => return Err(FsError::IsDirectory),
            (true, true) if !self.inodes[&other].entries.is_empty() => return Err(FsError::NotEmpty),
            _ => {}
        }
        self.detach(from.0, from.1);
        self.detach(to.0, to.1);
        let held = if self.is_directory(other) {
            Held::Open
        } else {
            held
        };
        self.lose_link(other, held);
        self.place(inode, to);
        Ok(result)
    }

    fn place(&mut self, inode: InodeNumber, at: (InodeNumber, &Name)) {
        if self.is_directory(inode) {
            self.inodes.get_mut(&inode).unwrap().attributes.parent = at.0;
        }
        self.touch(inode);
        self.attach(at.0, at.1, inode);
    }

    fn put(&mut self, number: InodeNumber, extents: &[Extent], base: u64) -> Verdict<()> {
        let inode = self.file(number)?;
        for extent in extents {
            let from = (base + extent.file_offset) as usize;
            let to = from + extent.length as usize;
            if inode.bytes.len() < to {
                inode.bytes.resize(to, None);
            }
            for at in from..to {
                inode.bytes[at] = Some((extent.chunk, extent.chunk_offset + (at - from) as u32));
            }
        }
        if !extents.is_empty() {
            self.touch(number);
        }
        Ok(())
    }
}
