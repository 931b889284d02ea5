//! Checks whether this node holds everything that it would have to hold among certain voters, before a node becomes a
//! voter and before one leaves.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_proto::{ChunkId, NodeId};

use crate::replication::placement::Layout;
use quorumfs_content::ContentStore;
use quorumfs_metadata::{Failure, MetadataStore};

/// With this many missing chunks the node is incomplete, and there is no waiting.
pub const LACKING_CHUNKS_MAX: usize = 4096;
/// Longest wait for chunks that files refer to and that are not here yet, mostly on their way from the leader.
const PATIENCE_MS: u64 = 4_000;
/// Interval at which they are looked for.
const LOOK_INTERVAL_MS: u64 = 100;

/// The chunks of the metadata that are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completeness {
    /// The log index of the metadata that was examined.
    pub through_index: u64,
    /// Number of chunks that files refer to, that are still alive, and that did not arrive.
    pub missing: u64,
}

/// A question about completeness.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The placement of chunks.
    pub layout: Layout,
    /// The node that is asked.
    pub own: NodeId,
    /// Chunks named up to this log index count at least.
    pub through_index: u64,
}

/// Asks the recovery ledger for everything that files refer to now and that `own` holds by `layout`, and waits a little
/// for chunks that are not here. Under a steady load some chunk is always on its way, so "nothing is missing at this
/// moment" would never be true; the question is whether all chunks named up to one index have arrived.
///
/// `lacking` answers like [`crate::replication::recovery::Recovery::lacking`], with at most [`LACKING_CHUNKS_MAX`]
/// chunks. While it has no answer, the node is not known to be complete.
///
/// # Errors
/// A fault of the metadata.
pub async fn completeness(
    metadata: Arc<MetadataStore>,
    content: Arc<ContentStore>,
    lacking: impl Fn(&Layout, u64) -> Option<BTreeSet<ChunkId>>,
    asked: Asked,
) -> Result<Completeness, Failure> {
    let Asked {
        layout,
        own,
        through_index,
    } = asked;
    if !layout.voters().contains(&own) {
        // A node that should hold nothing lacks nothing, but that is not the question.
        return Ok(Completeness {
            through_index: metadata.position().index,
            missing: 1,
        });
    }
    let deadline = Instant::now() + Duration::from_millis(PATIENCE_MS);
    while metadata.position().index < through_index {
        if Instant::now() >= deadline {
            // The missing chunks are unknown, but there may be some.
            return Ok(Completeness {
                through_index: metadata.position().index,
                missing: 1,
            });
        }
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
    }
    // Chunks named up to now must be here; later ones do not matter.
    let through_index = metadata.position().index;
    let mut missing = loop {
        match lacking(&layout, through_index) {
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
        // It is unknown whether the chunks here are on disk; the node stops because of that.
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
            let lacking = |_: &Layout, _| Some(BTreeSet::new());
            let found = completeness(metadata.clone(), content.clone(), lacking, asked).await;
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
