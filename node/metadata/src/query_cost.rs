//! The cost of a query: whether it may run on a thread for which other calls wait.
//!
//! This module does not know threads; it counts rows.

use quorumfs_proto::Query;

use super::view::View;

/// Most rows that a short query may read: a few hundred microseconds of work.
const SHORT_QUERY_ROWS_MAX: u64 = 256;

impl View {
    /// Whether [`View::answer`] may read more than a few hundred rows for `query`, so that it must run on a thread that
    /// may block: a megabyte of a directory takes 40 ms.
    pub fn is_long(&self, query: &Query) -> bool {
        let attributes = |inode| self.attributes(inode).ok();
        match query {
            Query::ReadDirectory { inode, .. } => {
                attributes(*inode).is_some_and(|directory| directory.size > SHORT_QUERY_ROWS_MAX)
            }
            // Each version of the content brings the extents of one command, mostly one.
            Query::Extents { inode, .. } => {
                attributes(*inode).is_some_and(|file| file.content_version > SHORT_QUERY_ROWS_MAX)
            }
            Query::ListXattrs { inode } => {
                attributes(*inode).is_some_and(|inode| u64::from(inode.xattr_count) > SHORT_QUERY_ROWS_MAX)
            }
            Query::Lookup { .. }
            | Query::Attributes { .. }
            | Query::Resolve { .. }
            | Query::ReadLink { .. }
            | Query::GetXattr { .. }
            | Query::Space => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use quorumfs_proto::command::{Command, NewKind, Target};
    use quorumfs_proto::query::EntryDetail;
    use quorumfs_proto::{InodeNumber, Name};

    use super::*;
    use crate::tests::support::{Node, create, write_chunks};

    #[test]
    fn only_a_query_that_reads_many_rows_is_long() {
        let mut node = Node::with_sessions(1);
        let root = InodeNumber::ROOT;
        let list = Query::ReadDirectory {
            inode: root,
            after: 0,
            bytes_max: u32::MAX,
            detail: EntryDetail::Attributes,
        };
        let file = node.entry(create(root, "file", NewKind::File));
        let extents = Query::Extents {
            inode: file,
            from: 0,
            to: u64::MAX,
            extents_max: u32::MAX,
        };
        assert!(!node.view().is_long(&list) && !node.view().is_long(&extents));
        for number in 0..=SHORT_QUERY_ROWS_MAX {
            node.call(
                1,
                Command::single(create(root, &format!("{number}"), NewKind::File)),
            )
            .0
            .unwrap();
            node.call(1, write_chunks(Target::Inode(file), 1, number + 1, &[number], 1))
                .0
                .unwrap();
        }
        assert!(node.view().is_long(&list) && node.view().is_long(&extents));
        let parent = root;
        let name = Name::new(&b"file"[..]).unwrap();
        assert!(!node.view().is_long(&Query::Lookup { parent, name }));
    }
}
