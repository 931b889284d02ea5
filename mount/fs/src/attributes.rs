//! Attributes and extended attributes.

use bytes::Bytes;
use quorumfs_proto::command::{AttributeChanges, Target, XattrMode};
use quorumfs_proto::query::Answer;
use quorumfs_proto::{Attributes, FsError, InodeNumber, Operation, Query, XattrName};

use super::namespace::entry_of;
use super::{Cluster, Filesystem, Handle, unexpected};

impl<C: Cluster> Filesystem<C> {
    /// What stat(2) tells; of a file that programs of this mount wrote to, with what they wrote.
    pub async fn attributes(
        &self,
        inode: InodeNumber,
        _handle: Option<Handle>,
    ) -> Result<Attributes, FsError> {
        let told = self.told_attributes(Query::Attributes { inode }).await?;
        Ok(self.present(told).await)
    }

    /// The attributes that `query` asks for, as the cluster tells them.
    pub(super) async fn told_attributes(&self, query: Query) -> Result<Attributes, FsError> {
        match self.ask(query).await? {
            Answer::Attributes(attributes) => Ok(attributes),
            other => Err(unexpected("Attributes", &other)),
        }
    }

    /// chmod, chown, truncate, utimens; after everything that was written before, in the same command.
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

    /// Does what changes one inode, after what was written to it, and answers its attributes.
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

    /// getxattr(2).
    pub async fn get_xattr(&self, inode: InodeNumber, name: &[u8]) -> Result<Bytes, FsError> {
        let name = XattrName::new(name.to_vec())?;
        match self.ask(Query::GetXattr { inode, name }).await? {
            Answer::XattrValue(value) => Ok(value),
            other => Err(unexpected("GetXattr", &other)),
        }
    }

    /// setxattr(2).
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
        // After what was written: a write drops `security.capability`, and must not drop the one set after it.
        self.change(inode, set).await.map(|_| ())
    }

    /// listxattr(2).
    pub async fn list_xattrs(&self, inode: InodeNumber) -> Result<Vec<XattrName>, FsError> {
        match self.ask(Query::ListXattrs { inode }).await? {
            Answer::XattrNames(names) => Ok(names),
            other => Err(unexpected("ListXattrs", &other)),
        }
    }

    /// removexattr(2).
    pub async fn remove_xattr(&self, inode: InodeNumber, name: &[u8]) -> Result<(), FsError> {
        self.writable()?;
        let name = XattrName::new(name.to_vec())?;
        let inode = Target::Inode(inode);
        self.mutate(Operation::RemoveXattr { inode, name })
            .await
            .map(|_| ())
    }
}
