//! One mutation in progress: the inodes it has loaded, the references to chunks it has changed, its results.
//!
//! Inodes are loaded once, changed in memory and written once by `finish`; the same list becomes the touched inodes of
//! the outcome. Changes of references are summed up, so that a chunk whose extents are only split or moved is never
//! dead in between. All other rows are written at once and rolled back with the writer's journal if the mutation is
//! refused.

use std::collections::BTreeMap;

use quorumfs_proto::call::Mutation;
use quorumfs_proto::chunk::{ChunkBody, NewChunk};
use quorumfs_proto::command::{Operation, Target};
use quorumfs_proto::{
    Attributes, ChunkId, FsError, InodeNumber, OperationResult, Outcome, SessionId, Timestamp,
};

use super::super::command::{Crowded, Effects, InlineChunk};
use super::super::fault::{Failure, StorageFault};
use super::super::limits::{BOUNDED_WORK_LEVEL, COMMAND_FREED_EXTENTS_MAX};
use super::super::tables::{ChunkRecord, Chunks, InodeRecord, Inodes};
use super::writer::RowWriter;

/// Most directories that one command walks on the way to the root: far more than a path of PATH_MAX bytes has names.
const COMMAND_ANCESTORS_MAX: u64 = if cfg!(test) { 40 } else { 16_384 };

/// An inode that the mutation has loaded.
struct Loaded {
    record: InodeRecord,
    state: LoadedState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LoadedState {
    AsStored,
    Changed,
    Gone,
}

/// A mutation in progress; see the module documentation.
pub(super) struct Transaction<'w> {
    pub(super) writer: &'w mut RowWriter,
    /// `None` for the cluster's own maintenance.
    session: Option<SessionId>,
    pub(super) now: Timestamp,
    inodes: BTreeMap<InodeNumber, Loaded>,
    /// For each chunk, the change of the number of extents that refer to it.
    references: BTreeMap<ChunkId, i64>,
    fresh: BTreeMap<ChunkId, &'w NewChunk>,
    results: Vec<OperationResult>,
    /// How many more extents this command may free beyond those it overwrites.
    pub(super) extents_left: u32,
    /// How many more extents this command may overwrite.
    pub(super) replaced_left: usize,
    /// How many more directories this command may walk on the way to the root.
    pub(super) ancestors_left: u64,
}

impl<'w> Transaction<'w> {
    /// Runs the whole mutation. After a verdict the writer must be rolled back.
    pub(super) fn run(
        writer: &'w mut RowWriter,
        index: u64,
        now: Timestamp,
        mutation: &'w Mutation,
        low_water: u64,
    ) -> Result<(Outcome, Effects), Failure> {
        let session = mutation.request.session;
        let command = &mutation.command;
        command.validate(session)?;
        let mut transaction = Transaction::of_the_cluster(writer, now, COMMAND_FREED_EXTENTS_MAX);
        transaction.session = Some(session);
        if transaction.bounded_work() {
            let extents = command
                .operations
                .iter()
                .map(|operation| operation.extents().len());
            // Extents of a command that overlap each other are its own work: it is never refused because of them.
            transaction.replaced_left = COMMAND_FREED_EXTENTS_MAX as usize + 2 * extents.sum::<usize>();
            transaction.ancestors_left = COMMAND_ANCESTORS_MAX;
        }
        for chunk in &command.chunks {
            transaction.bring(chunk, low_water)?;
        }
        for operation in &command.operations {
            let result = transaction.operate(operation)?;
            transaction.results.push(result);
        }
        transaction.finish(index)
    }

    /// Makes a transaction for a step that belongs to no client.
    pub(super) fn of_the_cluster(
        writer: &'w mut RowWriter,
        now: Timestamp,
        extents_left: u32,
    ) -> Transaction<'w> {
        Transaction {
            writer,
            session: None,
            now,
            inodes: BTreeMap::new(),
            references: BTreeMap::new(),
            fresh: BTreeMap::new(),
            results: Vec::new(),
            extents_left,
            replaced_left: usize::MAX,
            ancestors_left: u64::MAX,
        }
    }

    /// Whether the work of every command is bounded.
    pub(super) fn bounded_work(&self) -> bool {
        self.writer.summary.feature_level >= BOUNDED_WORK_LEVEL
    }

    /// Ends a mutation that would replace too many extents: see [`super::super::command::ApplyResult::Crowded`].
    pub(super) fn crowded(&mut self, place: Crowded) -> Failure {
        self.writer.crowded = Some(place);
        // This verdict is not returned to a client.
        FsError::TooBig.into()
    }

    /// Writes the rows that are still in memory. Returns the outcome and the effects.
    pub(super) fn finish(mut self, index: u64) -> Result<(Outcome, Effects), Failure> {
        let mut touched = Vec::with_capacity(self.inodes.len());
        for (inode, loaded) in std::mem::take(&mut self.inodes) {
            match loaded.state {
                LoadedState::AsStored => {}
                LoadedState::Changed => self.writer.put::<Inodes>(&inode, &loaded.record),
                LoadedState::Gone => {
                    self.writer.remove::<Inodes>(&inode);
                    continue;
                }
            }
            touched.push(loaded.record.attributes);
        }
        let mut effects = Effects::default();
        for (chunk, change) in std::mem::take(&mut self.references) {
            self.count(chunk, change, &mut effects)?;
        }
        let outcome = Outcome {
            results: self.results,
            touched,
            index,
        };
        Ok((outcome, effects))
    }

    fn operate(&mut self, operation: &Operation) -> Result<OperationResult, Failure> {
        match operation {
            Operation::Create {
                parent,
                name,
                inode,
                existing,
            } => self.create(*parent, name, inode, *existing),
            Operation::CreateUnlinked { inode } => self.create_unlinked(inode),
            Operation::Link {
                inode,
                parent,
                name,
                existing,
            } => self.link(*inode, *parent, name, *existing),
            Operation::Unlink { parent, name, held } => self.unlink(*parent, name, *held),
            Operation::RemoveDirectory { parent, name } => self.remove_directory(*parent, name),
            Operation::Rename {
                from_parent,
                from_name,
                to_parent,
                to_name,
                mode,
                held,
            } => self.rename((*from_parent, from_name), (*to_parent, to_name), *mode, *held),
            Operation::SetAttributes { inode, changes } => self.set_attributes(*inode, changes),
            Operation::Write {
                inode,
                extents,
                mtime,
                privileges,
            } => self.write(*inode, extents, *mtime, *privileges),
            Operation::Append {
                inode,
                extents,
                privileges,
            } => self.append(*inode, extents, *privileges),
            Operation::SetXattr {
                inode,
                name,
                value,
                mode,
            } => self.set_xattr(*inode, name, value, *mode),
            Operation::RemoveXattr { inode, name } => self.remove_xattr(*inode, name),
            Operation::ReleaseUnlinked { inodes } => self.release_unlinked(inodes),
        }
    }

    /// Returns the session of the mutation. Only a client's operations call this.
    pub(super) fn session(&self) -> Result<SessionId, StorageFault> {
        self.session
            .ok_or_else(|| StorageFault::inconsistent("an operation without a session"))
    }

    /// Returns the inode number of a target.
    pub(super) fn resolve(&self, target: Target) -> Result<InodeNumber, FsError> {
        match target {
            Target::Inode(inode) => Ok(inode),
            Target::Created(operation) => match self.results.get(usize::from(operation)) {
                Some(OperationResult::Entry { inode, .. }) => Ok(*inode),
                _ => Err(FsError::InvalidArgument),
            },
        }
    }

    /// Returns the inode for reading; it counts as touched.
    ///
    /// # Errors
    /// [`FsError::Stale`] if the inode does not exist.
    pub(super) fn inode(&mut self, inode: InodeNumber) -> Result<&InodeRecord, Failure> {
        self.load(inode).map(|loaded| &loaded.record)
    }

    /// Returns the inode for changes.
    pub(super) fn inode_mut(&mut self, inode: InodeNumber) -> Result<&mut InodeRecord, Failure> {
        let loaded = self.load(inode)?;
        loaded.state = LoadedState::Changed;
        Ok(&mut loaded.record)
    }

    /// Returns the inode's attributes for changes, and sets the change time.
    pub(super) fn change(&mut self, inode: InodeNumber) -> Result<&mut Attributes, Failure> {
        let now = self.now;
        let attributes = &mut self.inode_mut(inode)?.attributes;
        attributes.ctime = now;
        Ok(attributes)
    }

    /// Returns the inode in its present state, without counting it as touched.
    pub(super) fn peek(&self, inode: InodeNumber) -> Result<Option<InodeRecord>, StorageFault> {
        match self.inodes.get(&inode) {
            Some(loaded) if loaded.state == LoadedState::Gone => Ok(None),
            Some(loaded) => Ok(Some(loaded.record.clone())),
            None => self.writer.get::<Inodes>(&inode),
        }
    }

    /// Adds an inode with a number that was never used.
    pub(super) fn add_inode(
        &mut self,
        attributes: impl FnOnce(InodeNumber) -> Attributes,
    ) -> Result<InodeNumber, StorageFault> {
        let summary = &mut self.writer.summary;
        let inode = InodeNumber(summary.next_inode);
        summary.next_inode = summary
            .next_inode
            .checked_add(1)
            .ok_or_else(|| StorageFault::inconsistent("inode numbers are used up"))?;
        summary.inode_count += 1;
        let loaded = Loaded {
            record: InodeRecord {
                attributes: attributes(inode),
                cuts: Vec::new(),
                trim_cursor: 0,
            },
            state: LoadedState::Changed,
        };
        self.inodes.insert(inode, loaded);
        Ok(inode)
    }

    /// Removes the inode. It must be loaded, and no rows may belong to it.
    pub(super) fn drop_inode(&mut self, inode: InodeNumber) -> Result<(), Failure> {
        self.load(inode)?.state = LoadedState::Gone;
        self.writer.summary.inode_count -= 1;
        Ok(())
    }

    /// Adds one reference to the chunk.
    pub(super) fn refer(&mut self, chunk: ChunkId) {
        *self.references.entry(chunk).or_insert(0) += 1;
    }

    /// Removes one reference to the chunk.
    pub(super) fn unrefer(&mut self, chunk: ChunkId) {
        *self.references.entry(chunk).or_insert(0) -= 1;
    }

    fn load(&mut self, inode: InodeNumber) -> Result<&mut Loaded, Failure> {
        let loaded = match self.inodes.entry(inode) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let record = self.writer.get::<Inodes>(&inode)?.ok_or(FsError::Stale)?;
                entry.insert(Loaded {
                    record,
                    state: LoadedState::AsStored,
                })
            }
        };
        match loaded.state {
            LoadedState::Gone => Err(FsError::Stale.into()),
            _ => Ok(loaded),
        }
    }

    /// Registers a chunk that the command brings.
    pub(super) fn bring(&mut self, chunk: &'w NewChunk, low_water: u64) -> Result<(), Failure> {
        if chunk.id.counter < low_water {
            return Err(FsError::ChunkDead.into());
        }
        // A chunk is named for the first time only once, and one id has one content.
        let known = self.writer.layers.contains::<Chunks>(&chunk.id)?;
        if known || self.fresh.insert(chunk.id, chunk).is_some() {
            return Err(FsError::InvalidArgument.into());
        }
        Ok(())
    }

    /// Applies the change of a chunk's number of references.
    fn count(&mut self, id: ChunkId, change: i64, effects: &mut Effects) -> Result<(), Failure> {
        let fresh = self.fresh.get(&id).copied();
        let mut record = match (self.writer.get::<Chunks>(&id)?, fresh) {
            (Some(record), _) => record,
            (None, Some(chunk)) => ChunkRecord {
                references: 0,
                length: chunk.length,
                sha256: chunk.sha256,
            },
            (None, None) => {
                return Err(StorageFault::inconsistent(format!("chunk {id} has extents but no row")).into());
            }
        };
        let references = i64::from(record.references) + change;
        record.references = u32::try_from(references).map_err(|_| {
            StorageFault::inconsistent(format!("chunk {id} would have {references} references"))
        })?;
        let change_of_named = &mut self.writer.summary.named_change;
        if record.references == 0 {
            if fresh.is_none() {
                change_of_named.chunks -= 1;
                change_of_named.bytes -= i64::from(record.length);
                self.writer.remove::<Chunks>(&id);
            }
            effects.dead.push(id);
            return Ok(());
        }
        if fresh.is_some() {
            change_of_named.chunks += 1;
            change_of_named.bytes += i64::from(record.length);
        }
        if change != 0 {
            self.writer.put::<Chunks>(&id, &record);
        }
        match fresh.map(|chunk| &chunk.body) {
            Some(ChunkBody::Inline(payload)) => effects.inline.push(InlineChunk {
                id,
                sha256: record.sha256,
                payload: payload.clone(),
            }),
            Some(ChunkBody::Stored) => effects.named.push(id),
            None => {}
        }
        Ok(())
    }
}
