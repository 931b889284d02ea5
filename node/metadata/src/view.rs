//! Reading: one moment of the state, and its answers to queries.
//!
//! A view never changes and never waits. Its verdicts ([`Failure::Verdict`]) are those of every node at this index;
//! faults of this node are distinguished from them.

use bytes::Bytes;
use quorumfs_proto::chunk::Extent;
use quorumfs_proto::limits::{DIRECTORY_ANSWER_BYTES_MAX, EXTENTS_ANSWER_MAX};
use quorumfs_proto::query::{DirectoryEntry, DirectoryPage, EntryDetail, ExtentsPage};
use quorumfs_proto::{
    Answer, Attributes, ChunkId, FileKind, FsError, InodeNumber, Name, Query, SessionId, SymlinkTarget,
    Timestamp, XattrName,
};

use super::fault::Failure;
use super::overlay::{Direction, KeyRange, Layers};
use super::summary::{NamedChange, Position, Summary};
use super::tables::{
    ChunkRecord, Chunks, DirentKey, Dirents, Extents, InodeRecord, Inodes, Pins, Reclaimable, Replicas,
    Rows as _, SessionRecord, Sessions, Symlinks, Xattrs,
};

/// Most cut-off extents that one answer skips before it reports how far it got.
const CUT_OFF_EXTENTS_PASSED_MAX: usize = 100_000;
/// Bytes of an entry in an answer, without its name and attributes.
const ENTRY_BYTES: usize = 24;
/// Bytes of an entry's attributes.
const ENTRY_ATTRIBUTES_BYTES: usize = 104;

/// The state at one moment. Cheap to make and to clone.
#[derive(Clone)]
pub struct View {
    pub(super) layers: Layers,
    pub(super) summary: Summary,
}

impl View {
    pub(super) fn new(layers: Layers, summary: Summary) -> View {
        View { layers, summary }
    }

    /// Answers any query except [`Query::Space`], which depends on the disks: only [`View::inode_count`] is known here,
    /// so the verdict is [`FsError::NotSupported`].
    pub fn answer(&self, query: &Query) -> Result<Answer, Failure> {
        match query {
            Query::Lookup { parent, name } => self.lookup(*parent, name).map(Answer::Attributes),
            Query::Attributes { inode } => self.attributes(*inode).map(Answer::Attributes),
            Query::Resolve { from, path } => self.resolve(*from, path).map(Answer::Attributes),
            Query::ReadDirectory {
                inode,
                after,
                bytes_max,
                detail,
            } => self
                .read_directory(*inode, *after, *bytes_max, *detail)
                .map(Answer::Entries),
            Query::ReadLink { inode } => self.read_link(*inode).map(Answer::Target),
            Query::GetXattr { inode, name } => self.xattr(*inode, name).map(Answer::XattrValue),
            Query::ListXattrs { inode } => self.xattr_names(*inode).map(Answer::XattrNames),
            Query::Extents {
                inode,
                from,
                to,
                extents_max,
            } => self
                .extents(*inode, *from, *to, *extents_max)
                .map(Answer::Extents),
            Query::Space => Err(FsError::NotSupported.into()),
        }
    }

    /// Returns the attributes of an inode, with or without a name.
    ///
    /// # Errors
    /// [`FsError::Stale`] if it does not exist.
    pub fn attributes(&self, inode: InodeNumber) -> Result<Attributes, Failure> {
        Ok(self.inode(inode)?.attributes)
    }

    /// Returns the attributes of the inode with this name in the directory.
    pub fn lookup(&self, parent: InodeNumber, name: &Name) -> Result<Attributes, Failure> {
        self.directory(parent)?;
        let entry = self
            .layers
            .get::<Dirents>(&DirentKey::new(parent, name))?
            .ok_or(FsError::NotFound)?;
        self.attributes(entry.inode)
    }

    /// Returns the attributes of the inode at this path, starting at `from`; symbolic links are not followed.
    pub fn resolve(&self, from: InodeNumber, path: &[Name]) -> Result<Attributes, Failure> {
        let mut found = self.attributes(from)?;
        for name in path {
            found = self.lookup(found.inode, name)?;
        }
        Ok(found)
    }

    /// Returns entries after a cookie, about `bytes_max` bytes of them and at least one. Entries with equal cookies
    /// come together.
    pub fn read_directory(
        &self,
        directory: InodeNumber,
        after: u64,
        bytes_max: u32,
        detail: EntryDetail,
    ) -> Result<DirectoryPage, Failure> {
        self.directory(directory)?;
        let bytes_max = bytes_max.min(DIRECTORY_ANSWER_BYTES_MAX) as usize;
        let mut page = DirectoryPage {
            entries: Vec::new(),
            end: true,
        };
        let mut range = KeyRange::prefix(&directory.0.to_be_bytes());
        if after > 0 {
            let Some(next) = after.checked_add(1) else {
                return Ok(page);
            };
            let first = [directory.0.to_be_bytes(), next.to_be_bytes()].concat();
            range = range.starting_at(&first);
        }
        let mut bytes = 0;
        for row in self.layers.scan::<Dirents>(range, Direction::Up)? {
            let (key, record) = row?;
            let same_as_last = page.entries.last().is_some_and(|last| last.cookie == key.cookie);
            if bytes >= bytes_max && !page.entries.is_empty() && !same_as_last {
                page.end = false;
                break;
            }
            let attributes = match detail {
                EntryDetail::Name => None,
                EntryDetail::Attributes => Some(self.named(record.inode)?),
            };
            bytes += ENTRY_BYTES + key.name.as_bytes().len();
            bytes += attributes.as_ref().map_or(0, |_| ENTRY_ATTRIBUTES_BYTES);
            page.entries.push(DirectoryEntry {
                name: key.name,
                inode: record.inode,
                kind: record.kind,
                cookie: key.cookie,
                attributes,
            });
        }
        Ok(page)
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// [`FsError::InvalidArgument`] if the inode is not a symbolic link.
    pub fn read_link(&self, inode: InodeNumber) -> Result<SymlinkTarget, Failure> {
        if self.attributes(inode)?.kind != FileKind::Symlink {
            return Err(FsError::InvalidArgument.into());
        }
        let target = self.layers.get::<Symlinks>(&inode)?;
        Ok(target.ok_or_else(|| inconsistent(format!("symbolic link {inode} has no target")))?)
    }

    /// Returns the value of an extended attribute.
    pub fn xattr(&self, inode: InodeNumber, name: &XattrName) -> Result<Bytes, Failure> {
        self.inode(inode)?;
        let value = self.layers.get::<Xattrs>(&(inode, name.clone()))?;
        Ok(value.ok_or(FsError::NoAttribute)?)
    }

    /// Returns the names of all extended attributes, sorted.
    pub fn xattr_names(&self, inode: InodeNumber) -> Result<Vec<XattrName>, Failure> {
        if self.attributes(inode)?.xattr_count == 0 {
            return Ok(Vec::new());
        }
        let range = KeyRange::prefix(&inode.0.to_be_bytes());
        let keys = self.layers.scan_keys::<Xattrs>(range, Direction::Up)?;
        Ok(keys
            .map(|key| key.map(|(_, name)| name))
            .collect::<Result<Vec<_>, _>>()?)
    }

    /// Returns the extents of a file that overlap `from..to`, whole, and the file's attributes.
    pub fn extents(
        &self,
        inode: InodeNumber,
        from: u64,
        to: u64,
        extents_max: u32,
    ) -> Result<ExtentsPage, Failure> {
        let record = self.inode(inode)?;
        match record.attributes.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(FsError::IsDirectory.into()),
            _ => return Err(FsError::InvalidArgument.into()),
        }
        let extents_max = extents_max.clamp(1, EXTENTS_ANSWER_MAX) as usize;
        let mut page = ExtentsPage {
            attributes: record.attributes.clone(),
            extents: Vec::new(),
            known_to: to,
        };
        if from >= to || record.attributes.allocated_bytes == 0 {
            return Ok(page);
        }
        let of_inode = || KeyRange::prefix(&inode.0.to_be_bytes());
        let below = of_inode().before(&Extents::key(&(inode, from)));
        let before = self.layers.scan::<Extents>(below, Direction::Down)?.next();
        let within = of_inode()
            .starting_at(&Extents::key(&(inode, from)))
            .before(&Extents::key(&(inode, to)));
        let mut passed_over = 0;
        for row in before
            .into_iter()
            .chain(self.layers.scan::<Extents>(within, Direction::Up)?)
        {
            let ((_, offset), row) = row?;
            let extent = Extent {
                file_offset: offset,
                length: row.length,
                chunk: row.chunk,
                chunk_offset: row.chunk_offset,
            };
            if extent.file_end() <= from {
                continue;
            }
            if page.extents.len() == extents_max || passed_over == CUT_OFF_EXTENTS_PASSED_MAX {
                page.known_to = offset;
                break;
            }
            match record.is_cut_off(offset, &row) {
                true => passed_over += 1,
                false => page.extents.push(extent),
            }
        }
        Ok(page)
    }

    /// Returns the record of a chunk that files refer to.
    pub fn chunk(&self, id: ChunkId) -> Result<Option<ChunkRecord>, Failure> {
        Ok(self.layers.get::<Chunks>(&id)?)
    }

    /// Returns the chunks that files refer to, in order, after a given one.
    pub fn chunks_after(
        &self,
        after: Option<ChunkId>,
        max: usize,
    ) -> Result<Vec<(ChunkId, ChunkRecord)>, Failure> {
        let range = match after {
            Some(chunk) => KeyRange::prefix(&[]).after(&Chunks::key(&chunk)),
            None => KeyRange::prefix(&[]),
        };
        let rows = self.layers.scan::<Chunks>(range, Direction::Up)?;
        Ok(rows.take(max).collect::<Result<Vec<_>, _>>()?)
    }

    /// Returns a known session, alive or ended.
    pub fn session(&self, session: SessionId) -> Result<Option<SessionRecord>, Failure> {
        Ok(self.layers.get::<Sessions>(&session)?)
    }

    /// Returns all known sessions.
    pub fn sessions(&self) -> Result<Vec<(SessionId, SessionRecord)>, Failure> {
        let rows = self
            .layers
            .scan::<Sessions>(KeyRange::prefix(&[]), Direction::Up)?;
        Ok(rows.collect::<Result<Vec<_>, _>>()?)
    }

    /// Returns unlinked inodes that are kept until the session states that it does not have them open.
    pub fn unlinked_waiting_for(&self, session: SessionId, max: usize) -> Result<Vec<InodeNumber>, Failure> {
        let range = KeyRange::prefix(&session.0.to_be_bytes());
        let rows = self.layers.scan::<Pins>(range, Direction::Up)?;
        let inodes = rows.take(max).map(|row| row.map(|((_, inode), ())| inode));
        Ok(inodes.collect::<Result<Vec<_>, _>>()?)
    }

    /// Returns inodes for which a [`super::LogBody::ReclaimUnlinked`] has work to do.
    pub fn reclaimable(&self, max: usize) -> Result<Vec<InodeNumber>, Failure> {
        let rows = self
            .layers
            .scan::<Reclaimable>(KeyRange::prefix(&[]), Direction::Up)?;
        let mut inodes = rows
            .take(max)
            .map(|row| row.map(|(inode, ())| inode))
            .collect::<Result<Vec<_>, _>>()?;
        // Pins that were too many to drop when their session ended.
        for (session, record) in self.sessions()? {
            if inodes.len() >= max {
                break;
            }
            if record.ended.is_some() {
                inodes.extend(self.unlinked_waiting_for(session, max - inodes.len())?);
            }
        }
        inodes.sort_unstable();
        inodes.dedup();
        Ok(inodes)
    }

    /// Returns the log position of this view.
    pub fn position(&self) -> &Position {
        &self.summary.position
    }

    /// Returns the log index of this view.
    pub fn index(&self) -> u64 {
        self.summary.position.index
    }

    /// Returns the effective time of the last command.
    pub fn last_stamp(&self) -> Timestamp {
        self.summary.last_stamp
    }

    /// Returns the feature level: it determines what `apply` does and is raised once all members know it.
    pub fn feature_level(&self) -> u32 {
        self.summary.feature_level
    }

    /// Returns the parts of `meta` that follow from the log: time, feature level, copies, inode numbers.
    pub(super) fn counters(&self) -> (Timestamp, u32, Replicas, u64, u64) {
        let summary = &self.summary;
        (
            summary.last_stamp,
            summary.feature_level,
            summary.replicas,
            summary.next_inode,
            summary.inode_count,
        )
    }

    /// Returns the number of inodes in use, including those without a name.
    pub fn inode_count(&self) -> u64 {
        self.summary.inode_count
    }

    /// Returns the change of the number of chunks that files refer to; see [`NamedChange`].
    pub fn named_change(&self) -> NamedChange {
        self.summary.named_change
    }

    pub(super) fn directory(&self, inode: InodeNumber) -> Result<(), Failure> {
        match self.attributes(inode)?.kind {
            FileKind::Directory => Ok(()),
            _ => Err(FsError::NotDirectory.into()),
        }
    }

    /// Returns the attributes of an inode that an entry refers to, so it must exist.
    pub(super) fn named(&self, inode: InodeNumber) -> Result<Attributes, Failure> {
        match self.layers.get::<Inodes>(&inode)? {
            Some(record) => Ok(record.attributes),
            None => Err(inconsistent(format!("an entry names inode {inode}, which is missing")).into()),
        }
    }

    pub(super) fn inode(&self, inode: InodeNumber) -> Result<InodeRecord, Failure> {
        Ok(self.layers.get::<Inodes>(&inode)?.ok_or(FsError::Stale)?)
    }
}

fn inconsistent(what: String) -> super::fault::StorageFault {
    super::fault::StorageFault::inconsistent(what)
}
