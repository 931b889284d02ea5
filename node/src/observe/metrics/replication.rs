//! The replication of chunks: time to a quorum, time to all nodes, bytes copied for each byte received.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use quorumfs_measure::{CallCounter, Distribution, Ending};

/// The place of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyPlace {
    /// On this node's disk.
    Own,
    /// On another node, over the network.
    Peer,
}

/// Counters of the replication of chunks.
#[derive(Debug, Default)]
pub struct Replication {
    /// Chunks sent by clients; bytes of those that reached a quorum; time to the quorum.
    pub to_quorum: CallCounter,
    /// Time until all nodes that should hold a chunk had it, in nanoseconds; only chunks that all of them took.
    pub to_all: Distribution,
    /// Copies made on this node.
    pub own_copies: CallCounter,
    /// Copies made on other nodes, from the first byte to their answer that the chunk is on disk.
    pub peer_copies: CallCounter,
    /// Bytes of content inside commands (they are in every node's log, then in its content store).
    pub inline_bytes: AtomicU64,
}

impl Replication {
    /// Begins the replication of a chunk to `places` nodes.
    pub fn begin(self: &Arc<Self>, bytes: u64, places: usize) -> Arc<ReplicationSpan> {
        Arc::new(ReplicationSpan {
            replication: Arc::clone(self),
            began: Instant::now(),
            bytes,
            left: AtomicU64::new(places as u64),
            failed: AtomicU64::new(0),
        })
    }
}

/// The replication of one chunk. If it is dropped early, it counts what has happened so far.
#[derive(Debug)]
pub struct ReplicationSpan {
    replication: Arc<Replication>,
    began: Instant,
    bytes: u64,
    left: AtomicU64,
    failed: AtomicU64,
}

impl ReplicationSpan {
    /// Records the result of one copy.
    pub fn copied(&self, place: CopyPlace, ending: Ending) {
        let took = self.began.elapsed();
        let copies = match place {
            CopyPlace::Own => &self.replication.own_copies,
            CopyPlace::Peer => &self.replication.peer_copies,
        };
        copies.record(ending, self.bytes, took);
        if ending == Ending::Failed {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        let is_last = self.left.fetch_sub(1, Ordering::AcqRel) == 1;
        if is_last && self.failed.load(Ordering::Relaxed) == 0 {
            self.replication.to_all.record_duration(took);
        }
    }

    /// Records that one more node takes a copy instead of another.
    pub fn goes_on_to_another(&self) {
        self.left.fetch_add(1, Ordering::AcqRel);
    }

    /// Records that the client was answered: the chunk is on a quorum, or could not be replicated.
    pub fn answered(&self, ending: Ending) {
        self.replication
            .to_quorum
            .record(ending, self.bytes, self.began.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_when_the_last_copy_is_there_and_none_failed() {
        let replication = Arc::new(Replication::default());
        let span = replication.begin(1000, 3);
        span.copied(CopyPlace::Own, Ending::Done);
        span.copied(CopyPlace::Peer, Ending::Done);
        span.answered(Ending::Done);
        assert_eq!(replication.to_all.count(), 0);
        span.copied(CopyPlace::Peer, Ending::Done);
        assert_eq!(replication.to_all.count(), 1);
        assert_eq!(replication.to_quorum.bytes(), 1000);
        assert_eq!(
            replication.own_copies.bytes() + replication.peer_copies.bytes(),
            3000
        );
        let span = replication.begin(1000, 2);
        span.copied(CopyPlace::Peer, Ending::Failed);
        span.copied(CopyPlace::Own, Ending::Done);
        assert_eq!(replication.to_all.count(), 1, "one copy failed: never on all");
        assert_eq!(replication.peer_copies.failures(), 1);
    }
}
