//! Attributes and extended attributes.

use bytes::Bytes;
use quorumfs_proto::command::{AttributeChanges, Target, XattrMode};
use quorumfs_proto::{Attributes, FsError, InodeNumber, Operation, Query, XattrName};

use super::namespace::entry_of;
use super::{Cluster, Filesystem, Handle};

impl<C: Cluster> Filesystem<C> {
    /// Returns the attributes of `inode` (stat(2)), including the effect of uncommitted writes of this mount.
    pub async fn attributes(
        &self,
        inode: InodeNumber,
        _handle: Option<Handle>,
    ) -> Result<Attributes, FsError> {
        let attributes = self.ask(Query::attributes(inode)).await?;
        Ok(self.present(attributes).await)
    }

    /// Changes mode, owner, size or times, in one command with the commit of earlier writes.
    pub async fn set_attributes(
        &self,
        inode: InodeNumber,
        _handle: Option<Handle>,
        changes: AttributeChanges,
    ) -> Result<Attributes, FsError> {
        self.writable()?;
        if changes == AttributeChanges::default() {
            return self.attributes(inode, None).await;
        }
        self.change(
            inode,
            Operation::SetAttributes {
                inode: Target::Inode(inode),
                changes,
            },
        )
        .await
    }

    /// Sends an operation on one inode together with the commit of earlier writes; returns the inode's new attributes.
    async fn change(&self, inode: InodeNumber, operation: Operation) -> Result<Attributes, FsError> {
        let resizes =
            matches!(&operation, Operation::SetAttributes { changes, .. } if changes.size.is_some());
        let outcome = match self.open.find(inode) {
            Some(node) => self.commit_with(&node, operation).await?,
            None => self.mutate(operation).await?,
        };
        let attributes = match outcome.attributes_of(inode) {
            Some(attributes) => attributes.clone(),
            None => entry_of(&outcome)?.0,
        };
        match resizes {
            true => Ok(self.present_resized(attributes)),
            false => Ok(self.present(attributes).await),
        }
    }

    /// Returns the value of an extended attribute.
    pub async fn get_xattr(&self, inode: InodeNumber, name: &[u8]) -> Result<Bytes, FsError> {
        let name = XattrName::new(name.to_vec())?;
        self.ask(Query::xattr(inode, name)).await
    }

    /// Sets an extended attribute.
    pub async fn set_xattr(
        &self,
        inode: InodeNumber,
        name: &[u8],
        value: Bytes,
        mode: XattrMode,
    ) -> Result<(), FsError> {
        self.writable()?;
        let name = XattrName::new(name.to_vec())?;
        let set = Operation::SetXattr {
            inode: Target::Inode(inode),
            name,
            value,
            mode,
        };
        // With the commit of earlier writes: a write removes `security.capability`, and must not remove the one set
        // after it.
        self.change(inode, set).await.map(|_| ())
    }

    /// Returns the names of all extended attributes.
    pub async fn list_xattrs(&self, inode: InodeNumber) -> Result<Vec<XattrName>, FsError> {
        self.ask(Query::xattr_names(inode)).await
    }

    /// Removes an extended attribute.
    pub async fn remove_xattr(&self, inode: InodeNumber, name: &[u8]) -> Result<(), FsError> {
        self.writable()?;
        let name = XattrName::new(name.to_vec())?;
        let inode = Target::Inode(inode);
        self.mutate(Operation::RemoveXattr { inode, name })
            .await
            .map(|_| ())
    }
}
