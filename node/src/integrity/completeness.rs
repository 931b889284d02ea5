//! Whether this node holds everything that it would have to among certain voters: asked before a node becomes a voter,
//! and before one leaves.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_proto::{ChunkId, NodeId};

use crate::replication::placement::Layout;
use quorumfs_content::ContentStore;
use quorumfs_metadata::{Failure, MetadataStore};

/// With so many missing the node is not whole, and nothing is waited for.
pub const LACKING_CHUNKS_MAX: usize = 4096;
/// How long chunks that are named and not here yet, mostly on their way from the leader, are waited for.
const PATIENCE_MS: u64 = 4_000;
/// How often they are looked for.
const LOOK_INTERVAL_MS: u64 = 100;

/// What of the content that the metadata names is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completeness {
    /// The log index of the metadata that was looked at.
    pub through_index: u64,
    /// Chunks that it names, that live still, and that did not come.
    pub missing: u64,
}

/// What completeness is asked of.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Who holds what.
    pub layout: Layout,
    /// Of whom it is asked.
    pub own: NodeId,
    /// The log index up to which what is named counts at the least.
    pub through_index: u64,
}

/// Asks the books for everything that is named now and that `own` holds by `layout`, and waits a little for what is not
/// here. Under a steady load there always is something on its way, so "nothing is missing at this moment" would never be
/// true; this asks whether all that was named at one index has come.
///
/// `books` answers as [`crate::replication::recovery::Recovery::lacking`] does, with at most [`LACKING_CHUNKS_MAX`] chunks. As long as
/// they cannot say, the node is not known to be whole.
pub async fn completeness(
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    books: impl Fn(&Layout, u64) -> Option<BTreeSet<ChunkId>>,
    asked: Asked,
) -> Result<Completeness, Failure> {
    let Asked {
        layout,
        own,
        through_index,
    } = asked;
    if !layout.voters().contains(&own) {
        // Who should hold nothing lacks nothing, which is not what was asked.
        return Ok(Completeness {
            through_index: metadata.position().index,
            missing: 1,
        });
    }
    let deadline = Instant::now() + Duration::from_millis(PATIENCE_MS);
    while metadata.position().index < through_index {
        if Instant::now() >= deadline {
            // It is not known what is missing, but it is not nothing.
            return Ok(Completeness {
                through_index: metadata.position().index,
                missing: 1,
            });
        }
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
    }
    // What was named by now is to be here; what is named later is another matter.
    let through_index = metadata.position().index;
    let mut missing = loop {
        match books(&layout, through_index) {
            Some(missing) => break missing,
            None if Instant::now() >= deadline => {
                return Ok(Completeness {
                    through_index,
                    missing: 1,
                });
            }
            None => tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await,
        }
    };
    let deadline = Instant::now() + Duration::from_millis(PATIENCE_MS);
    while !missing.is_empty() && missing.len() < LACKING_CHUNKS_MAX && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
        let view = metadata.view()?;
        let mut still = BTreeSet::new();
        for id in missing {
            if !content.holds(id) && view.chunk(id)?.is_some() {
                still.insert(id);
            }
        }
        missing = still;
    }
    let synced = tokio::task::spawn_blocking(move || content.sync()).await;
    if !matches!(synced, Ok(Ok(()))) {
        // What is here is not known to be on disk; the node stops for it.
        return Ok(Completeness {
            through_index,
            missing: 1,
        });
    }
    Ok(Completeness {
        through_index,
        missing: missing.len() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_content::ContentOptions;
    use quorumfs_metadata::MetadataOptions;

    #[tokio::test]
    async fn who_should_hold_nothing_is_not_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metadata.redb");
        let metadata = MetadataStore::open(&path, MetadataOptions::default()).expect("metadata");
        let opened = ContentStore::open(&folder.path().join("content"), ContentOptions::default());
        let (metadata, content) = (Arc::new(metadata), Arc::new(opened.expect("content").0));
        let node = |incarnation| NodeId { slot: 1, incarnation };
        let missing = async |own| {
            let asked = Asked {
                layout: Layout::new([node(7)].into(), 3),
                own,
                through_index: 0,
            };
            let books = |_: &Layout, _| Some(BTreeSet::new());
            let found = completeness(metadata.clone(), content.clone(), books, asked).await;
            found.expect("it is known").missing
        };
        assert_eq!(missing(node(7)).await, 0, "nothing is named");
        assert_ne!(missing(node(8)).await, 0, "another incarnation was asked");
    }

    #[tokio::test]
    async fn who_does_not_know_what_it_lacks_is_not_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metadata.redb");
        let metadata = MetadataStore::open(&path, MetadataOptions::default()).expect("metadata");
        let opened = ContentStore::open(&folder.path().join("content"), ContentOptions::default());
        let (metadata, content) = (Arc::new(metadata), Arc::new(opened.expect("content").0));
        let own = NodeId {
            slot: 1,
            incarnation: 7,
        };
        let asked = Asked {
            layout: Layout::new([own].into(), 3),
            own,
            through_index: 0,
        };
        let found = completeness(metadata, content, |_, _| None, asked).await;
        assert_ne!(found.expect("it is known").missing, 0);
    }
}
