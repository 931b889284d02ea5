//! What is answered from memory under a lease, and when it is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quorumfs_proto::command::{AttributeChanges, Target};
use quorumfs_proto::query::Answer;
use quorumfs_proto::{ChunkId, Command, FsError, InodeNumber, Operation, Outcome, Query};

use crate::Leased;
use quorumfs_client::{Cluster, UnlinkedHandler};
use quorumfs_memory::{Connection, MemoryChunk, MemoryCluster};

const ROOT: InodeNumber = InodeNumber::ROOT;

/// A connection of the only session of a cluster. Its next change times out on demand.
#[derive(Clone)]
struct TimingOut {
    connection: Connection,
    times_out: Arc<AtomicBool>,
    unsettled: Arc<AtomicBool>,
}

impl Cluster for TimingOut {
    type Chunk = MemoryChunk;

    async fn mutate(&self, command: Command, stored: &[MemoryChunk]) -> Result<Outcome, FsError> {
        if self.times_out.swap(false, Ordering::SeqCst) {
            self.unsettled.store(true, Ordering::SeqCst);
            return Err(FsError::TimedOut);
        }
        self.connection.mutate(command, stored).await
    }

    async fn query(&self, query: Query) -> Result<Answer, FsError> {
        self.connection.query(query).await
    }

    fn new_chunk(&self, payload: Bytes) -> MemoryChunk {
        self.connection.new_chunk(payload)
    }

    async fn put_chunk(&self, chunk: &MemoryChunk) -> Result<(), FsError> {
        self.connection.put_chunk(chunk).await
    }

    async fn get_chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        self.connection.get_chunk(id, offset, length).await
    }

    fn lease(&self) -> Option<(Duration, u64)> {
        Some((Duration::from_secs(10), 1))
    }

    fn has_unsettled_changes(&self) -> bool {
        self.unsettled.load(Ordering::SeqCst)
    }

    fn set_unlinked_handler(&self, handler: UnlinkedHandler) {
        self.connection.set_unlinked_handler(handler);
    }
}

fn chmod(mode: u16) -> Command {
    Command::single(Operation::SetAttributes {
        inode: Target::Inode(ROOT),
        changes: AttributeChanges {
            mode: Some(mode),
            ..AttributeChanges::default()
        },
    })
}

/// Returns the root's mode and the number of queries that took.
async fn mode(leased: &Leased<TimingOut>, cluster: &MemoryCluster) -> (u16, u64) {
    let before = cluster.queries.load(Ordering::SeqCst);
    let answer = leased.query(Query::Attributes { inode: ROOT }).await;
    let Ok(Answer::Attributes(attributes)) = answer else {
        panic!("{answer:?}");
    };
    (attributes.mode, cluster.queries.load(Ordering::SeqCst) - before)
}

#[tokio::test]
async fn nothing_is_cached_from_a_timed_out_change_until_it_is_settled() {
    let cluster = MemoryCluster::new();
    let timing_out = TimingOut {
        connection: cluster.connect(1),
        times_out: Arc::default(),
        unsettled: Arc::default(),
    };
    let leased = Leased::new(timing_out.clone());
    assert_eq!(mode(&leased, &cluster).await, (0o755, 1));
    assert_eq!(mode(&leased, &cluster).await, (0o755, 0));

    timing_out.times_out.store(true, Ordering::SeqCst);
    assert_eq!(leased.mutate(chmod(0o700), &[]).await, Err(FsError::TimedOut));
    for _ in 0..3 {
        assert_eq!(
            mode(&leased, &cluster).await,
            (0o755, 1),
            "it may take effect at any time"
        );
    }
    timing_out.connection.mutate(chmod(0o700), &[]).await.unwrap();
    assert_eq!(mode(&leased, &cluster).await, (0o700, 1));
    timing_out.unsettled.store(false, Ordering::SeqCst);
    assert_eq!(mode(&leased, &cluster).await, (0o700, 1));
    for _ in 0..3 {
        assert_eq!(mode(&leased, &cluster).await, (0o700, 0), "cached again");
    }
}
