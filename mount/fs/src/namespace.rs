//! Names: looking up, making, linking, moving, removing.
//!
//! Rule: what loses its last name here is asked to be kept (`Held::Open`), and released a moment later if nobody uses it
//! (`unlinked`). The other way round it could be gone under a program that has it open, because what a name names, and
//! who opens it meanwhile, is only known for sure when the command is done.

use quorumfs_proto::command::{Held, IfExists, NewInode, RenameMode, Target};
use quorumfs_proto::{
    Attributes, FileKind, FsError, InodeNumber, Name, Operation, OperationResult, Outcome, Query,
    SymlinkTarget,
};

use super::unlinked::UnlinkedBy;
use super::{Cluster, Filesystem, ThreadId};
use crate::handles::Scope;

/// Directories that a rename moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MovedDirectories {
    /// The one that was named.
    pub renamed: Option<InodeNumber>,
    /// The one it changed places with.
    pub exchanged: Option<InodeNumber>,
}

impl<C: Cluster> Filesystem<C> {
    /// What `name` names in `parent`. Knows "." and "..", of any inode that lives.
    pub async fn lookup(&self, parent: InodeNumber, name: &[u8]) -> Result<Attributes, FsError> {
        match name {
            b"." => self.attributes(parent, None).await,
            b".." => {
                let above = self.parent_of(parent).await?;
                self.attributes(above, None).await
            }
            _ => {
                let name = Name::new(name.to_vec())?;
                let attributes = {
                    // Until it is noted what this is about, it is not given up.
                    let _pending = self.unlinked.begin_call();
                    let attributes = self.ask(Query::lookup(parent, name)).await?;
                    self.recent_lookups.add(attributes.inode);
                    attributes
                };
                Ok(self.present(attributes).await)
            }
        }
    }

    /// What lies at `path` below the mounted directory. Symbolic links on the way are not followed.
    pub async fn resolve(&self, path: &[Name]) -> Result<Attributes, FsError> {
        let attributes = {
            let _pending = self.unlinked.begin_call();
            let attributes = self.ask(Query::resolve(self.options.root, path.to_vec())).await?;
            self.recent_lookups.add(attributes.inode);
            attributes
        };
        Ok(self.present(attributes).await)
    }

    /// As [`Filesystem::lookup`], for a thread whose creation may have found something just now.
    pub async fn lookup_for(
        &self,
        caller: ThreadId,
        parent: InodeNumber,
        name: &[u8],
    ) -> Result<Attributes, FsError> {
        match self.recent_lookups.take_existing(caller, parent, name) {
            Some(found) => Ok(self.present(found).await),
            None => self.lookup(parent, name).await,
        }
    }

    /// The directory above `inode`; above the mounted one there is none but itself.
    pub(super) async fn parent_of(&self, inode: InodeNumber) -> Result<InodeNumber, FsError> {
        if inode == self.options.root {
            return Ok(inode);
        }
        Ok(self.ask(Query::attributes(inode)).await?.parent)
    }

    /// mkdir, mknod, symlink.
    pub async fn make_node(
        &self,
        parent: InodeNumber,
        name: &[u8],
        inode: NewInode,
    ) -> Result<Attributes, FsError> {
        self.writable()?;
        let make = Operation::Create {
            parent: Target::Inode(parent),
            name: Name::new(name.to_vec())?,
            inode,
            existing: IfExists::Refuse,
        };
        let outcome = self.mutate(make).await?;
        let (made, _) = entry_of(&outcome)?;
        self.recent_lookups.add(made.inode);
        Ok(made)
    }

    /// Where a symbolic link points.
    pub async fn read_link(&self, inode: InodeNumber) -> Result<SymlinkTarget, FsError> {
        let target = self.ask(Query::read_link(inode)).await?;
        Ok(target)
    }

    /// link(2); what was written to the file goes with it.
    pub async fn link(
        &self,
        inode: InodeNumber,
        parent: InodeNumber,
        name: &[u8],
    ) -> Result<Attributes, FsError> {
        self.writable()?;
        let link = Operation::Link {
            inode: Target::Inode(inode),
            parent: Target::Inode(parent),
            name: Name::new(name.to_vec())?,
            existing: IfExists::Refuse,
        };
        let outcome = match self.open.find(inode) {
            Some(node) => self.commit_with(&node, link).await?,
            None => self.mutate(link).await?,
        };
        match outcome.attributes_of(inode) {
            Some(attributes) => Ok(self.present(attributes.clone()).await),
            None => self.attributes(inode, None).await,
        }
    }

    /// unlink(2).
    pub async fn unlink(&self, parent: InodeNumber, name: &[u8]) -> Result<(), FsError> {
        self.writable()?;
        let name = Name::new(name.to_vec())?;
        let _pending = self.unlinked.begin_call();
        let outcome = self
            .mutate(Operation::Unlink {
                parent: Target::Inode(parent),
                name,
                held: Held::Open,
            })
            .await?;
        self.record_removal(&outcome);
        Ok(())
    }

    /// rmdir(2).
    pub async fn remove_directory(&self, parent: InodeNumber, name: &[u8]) -> Result<(), FsError> {
        self.writable()?;
        let name = Name::new(name.to_vec())?;
        let parent = Target::Inode(parent);
        let _pending = self.unlinked.begin_call();
        let outcome = self.mutate(Operation::RemoveDirectory { parent, name }).await?;
        self.record_removal(&outcome);
        Ok(())
    }

    /// renameat2(2). What was written to the files that move is committed first: a replaced name never leads to a file
    /// without its bytes.
    pub async fn rename(
        &self,
        from_parent: InodeNumber,
        from_name: &[u8],
        to_parent: InodeNumber,
        to_name: &[u8],
        mode: RenameMode,
    ) -> Result<MovedDirectories, FsError> {
        self.writable()?;
        let from_name = Name::new(from_name.to_vec())?;
        let to_name = Name::new(to_name.to_vec())?;
        self.commit_named(from_parent, &from_name).await;
        if mode == RenameMode::Exchange {
            self.commit_named(to_parent, &to_name).await;
        }
        let _pending = self.unlinked.begin_call();
        let outcome = self
            .mutate(Operation::Rename {
                from_parent: Target::Inode(from_parent),
                from_name,
                to_parent: Target::Inode(to_parent),
                to_name,
                mode,
                held: Held::Open,
            })
            .await?;
        let Some(OperationResult::Renamed { inode, other }) = outcome.results.first() else {
            return Ok(MovedDirectories::default());
        };
        if let Some(other) = other
            && mode == RenameMode::Replace
            && outcome
                .attributes_of(*other)
                .is_none_or(|attributes| attributes.links == 0)
        {
            self.record_unlinked(*other);
        }
        let directory = |inode: &InodeNumber| {
            let attributes = outcome.attributes_of(*inode)?;
            (attributes.kind == FileKind::Directory).then_some(*inode)
        };
        Ok(MovedDirectories {
            renamed: directory(inode),
            exchanged: other
                .as_ref()
                .filter(|_| mode == RenameMode::Exchange)
                .and_then(directory),
        })
    }

    /// Commits what was written to the file of this name. A failure is kept for its handles.
    async fn commit_named(&self, parent: InodeNumber, name: &Name) {
        if self.dirty.is_empty() {
            return;
        }
        let name = name.clone();
        let Ok(attributes) = self.ask(Query::lookup(parent, name)).await else {
            return; // The rename itself will say why.
        };
        if let Some(node) = self.open.find(attributes.inode) {
            let _recorded = self.commit(&node, Scope::Everything).await;
        }
    }

    /// Takes note of what `outcome` of an unlink or a rmdir says is without a name now.
    fn record_removal(&self, outcome: &Outcome) {
        if let Some(OperationResult::Removed { inode, last: true }) = outcome.results.first() {
            self.record_unlinked(*inode);
        }
    }

    /// `inode` has no name any more; the cluster keeps it for this mount.
    fn record_unlinked(&self, inode: InodeNumber) {
        // Before the answer goes up, and with it whoever is the last to use it may let go.
        self.unlinked.add(inode, UnlinkedBy::ThisMount);
        if let Some(node) = self.open.find(inode)
            && let Some(view) = &mut node.state.lock().view
        {
            view.links = 0;
        }
    }
}

/// The attributes of the inode that the last entry of `outcome` is about, and whether it was made.
pub(super) fn entry_of(outcome: &Outcome) -> Result<(Attributes, bool), FsError> {
    let entry = outcome.results.iter().rev().find_map(|result| match result {
        OperationResult::Entry { inode, created } => Some((*inode, *created)),
        _ => None,
    });
    let found = entry.and_then(|(inode, created)| Some((outcome.attributes_of(inode)?.clone(), created)));
    found.ok_or_else(|| {
        tracing::error!(?outcome, "outcome without the entry it is about");
        FsError::Io
    })
}
