//! Lookup, create, link, rename and unlink.
//!
//! Invariant: when this mount removes the last name of an inode, the same command asks the cluster to keep the inode
//! (`Held::Open`); it is released soon after if it is not in use (`unlinked`). Deciding before the command would be too
//! early: which inode the name refers to, and who opens it meanwhile, is only certain after the command.

use quorumfs_proto::command::{Held, IfExists, NewInode, RenameMode, Target};
use quorumfs_proto::{
    Attributes, FileKind, FsError, InodeNumber, Name, Operation, OperationResult, Outcome, Query,
    SymlinkTarget,
};

use super::unlinked::UnlinkedBy;
use super::{Cluster, Filesystem, ThreadId};
use crate::handles::Scope;

/// The directories that a rename moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MovedDirectories {
    /// The renamed directory.
    pub renamed: Option<InodeNumber>,
    /// The directory that it was exchanged with.
    pub exchanged: Option<InodeNumber>,
}

impl<C: Cluster> Filesystem<C> {
    /// Looks up `name` in `parent`. Supports "." and ".." in every existing directory.
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
                    // Must live until the inode is recorded; before that, its use here is not reported.
                    let _pending = self.unlinked.begin_call();
                    let attributes = self.ask(Query::lookup(parent, name)).await?;
                    self.recent_lookups.add(attributes.inode);
                    attributes
                };
                Ok(self.present(attributes).await)
            }
        }
    }

    /// Looks up `path` below the mounted directory. Does not follow symbolic links.
    pub async fn resolve(&self, path: &[Name]) -> Result<Attributes, FsError> {
        let attributes = {
            let _pending = self.unlinked.begin_call();
            let attributes = self.ask(Query::resolve(self.options.root, path.to_vec())).await?;
            self.recent_lookups.add(attributes.inode);
            attributes
        };
        Ok(self.present(attributes).await)
    }

    /// Like [`Filesystem::lookup`], for a thread whose creation may just have failed because the file exists.
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

    /// Returns the parent directory of `inode`; the mounted directory is its own parent.
    pub(super) async fn parent_of(&self, inode: InodeNumber) -> Result<InodeNumber, FsError> {
        if inode == self.options.root {
            return Ok(inode);
        }
        Ok(self.ask(Query::attributes(inode)).await?.parent)
    }

    /// Creates a directory, a special file or a symbolic link.
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

    /// Returns the target of a symbolic link.
    pub async fn read_link(&self, inode: InodeNumber) -> Result<SymlinkTarget, FsError> {
        let target = self.ask(Query::read_link(inode)).await?;
        Ok(target)
    }

    /// Makes a hard link. Bytes written to the file are committed with it.
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

    /// Removes the name of a file.
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

    /// Removes an empty directory.
    pub async fn remove_directory(&self, parent: InodeNumber, name: &[u8]) -> Result<(), FsError> {
        self.writable()?;
        let name = Name::new(name.to_vec())?;
        let parent = Target::Inode(parent);
        let _pending = self.unlinked.begin_call();
        let outcome = self.mutate(Operation::RemoveDirectory { parent, name }).await?;
        self.record_removal(&outcome);
        Ok(())
    }

    /// Renames (renameat2(2)). Bytes written to the renamed files are committed first: a replaced name never refers to
    /// a file without its bytes.
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

    /// Commits bytes written to the file of this name. A failure is recorded for its handles.
    async fn commit_named(&self, parent: InodeNumber, name: &Name) {
        if self.dirty.is_empty() {
            return;
        }
        let name = name.clone();
        let Ok(attributes) = self.ask(Query::lookup(parent, name)).await else {
            return; // The rename reports the error.
        };
        if let Some(node) = self.open.find(attributes.inode) {
            let _recorded = self.commit(&node, Scope::Everything).await;
        }
    }

    /// Records the inode whose last name was removed, if any.
    fn record_removal(&self, outcome: &Outcome) {
        if let Some(OperationResult::Removed { inode, last: true }) = outcome.results.first() {
            self.record_unlinked(*inode);
        }
    }

    /// Records that `inode` has no name and is kept by the cluster for this mount.
    fn record_unlinked(&self, inode: InodeNumber) {
        // Before the answer is sent: it may let the last user of the inode go on and release it.
        self.unlinked.add(inode, UnlinkedBy::ThisMount);
        if let Some(node) = self.open.find(inode)
            && let Some(committed) = &mut node.state.lock().committed
        {
            committed.links = 0;
        }
    }
}

/// Returns the attributes of the inode of the last entry of `outcome`, and whether it was created.
pub(super) fn entry_of(outcome: &Outcome) -> Result<(Attributes, bool), FsError> {
    let entry = outcome.results.iter().rev().find_map(|result| match result {
        OperationResult::Entry { inode, created } => Some((*inode, *created)),
        _ => None,
    });
    let found = entry.and_then(|(inode, created)| Some((outcome.attributes_of(inode)?.clone(), created)));
    found.ok_or_else(|| {
        tracing::error!(?outcome, "the outcome of a creation has no entry");
        FsError::Io
    })
}
