//! How chunks reach their nodes: time to a quorum, time to all, bytes copied for each byte brought.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use quorumfs_measure::{CallCounter, Distribution, Ending};

/// Where a copy is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyPlace {
    /// On this node's disk.
    Own,
    /// On another node, over the network.
    Peer,
}

/// The counters.
#[derive(Debug, Default)]
pub struct Replication {
    /// Chunks brought by clients; bytes of those that reached a quorum; time to the quorum.
    pub to_quorum: CallCounter,
    /// Time until every member had it, of chunks that all of them took, in nanoseconds.
    pub to_all: Distribution,
    /// Copies made here.
    pub own_copies: CallCounter,
    /// Copies made on others, from the first byte to their answer that it is on disk.
    pub peer_copies: CallCounter,
    /// Bytes of content that rode inside commands (they are in every node's log, then in its content).
    pub inline_bytes: AtomicU64,
}

impl Replication {
    /// A chunk sets out to `places` nodes.
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

/// One chunk on its way to all its nodes. Dropped early it counts what it has seen.
#[derive(Debug)]
pub struct ReplicationSpan {
    replication: Arc<Replication>,
    began: Instant,
    bytes: u64,
    left: AtomicU64,
    failed: AtomicU64,
}

impl ReplicationSpan {
    /// One node has answered.
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

    /// One node more is to have it: it stands in for another.
    pub fn goes_on_to_another(&self) {
        self.left.fetch_add(1, Ordering::AcqRel);
    }

    /// The client is answered: it is on a quorum, or could not be brought there.
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
        let journey = replication.begin(1000, 3);
        journey.copied(CopyPlace::Own, Ending::Done);
        journey.copied(CopyPlace::Peer, Ending::Done);
        journey.answered(Ending::Done);
        assert_eq!(replication.to_all.count(), 0);
        journey.copied(CopyPlace::Peer, Ending::Done);
        assert_eq!(replication.to_all.count(), 1);
        assert_eq!(replication.to_quorum.bytes(), 1000);
        assert_eq!(
            replication.own_copies.bytes() + replication.peer_copies.bytes(),
            3000
        );
        let journey = replication.begin(1000, 2);
        journey.copied(CopyPlace::Peer, Ending::Failed);
        journey.copied(CopyPlace::Own, Ending::Done);
        assert_eq!(replication.to_all.count(), 1, "one copy failed: never on all");
        assert_eq!(replication.peer_copies.failures(), 1);
    }
}
