//! The holders of each chunk, as far as the leader knows, between a chunk's put and the command that names it. Pure.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use quorumfs_proto::{ChunkId, NodeId};

use crate::consensus::VoterSets;

/// Most chunks whose holders are remembered between put and command; beyond it the oldest are forgotten and the peers
/// are asked. 64 Ki chunks are up to 64 GiB in progress.
const HOLDERS_REMEMBERED_MAX: usize = 64 << 10;

/// Time for which a node counts as a holder after it has confirmed the chunk; then it is asked again.
const HOLDERS_AGE_MS_MAX: u64 = 30_000;

/// The holders of a chunk.
struct Held {
    term: u64,
    /// Time of the first confirmation.
    since: Instant,
    nodes: BTreeSet<NodeId>,
}

impl Held {
    fn counts(&self, term: u64, now: Instant) -> bool {
        let age = now.saturating_duration_since(self.since);
        self.term == term && age <= Duration::from_millis(HOLDERS_AGE_MS_MAX)
    }
}

/// The holders of each chunk between its put and the command that names it. They are valid only in the term in which
/// they were learned: a node that led, was deposed and leads again may have missed that a holder was replaced. They are
/// not valid for long: a node can lose chunks.
#[derive(Default)]
pub(super) struct Holders {
    by_chunk: HashMap<ChunkId, Held>,
    /// The chunks in the order in which they were remembered; may contain chunks that were forgotten since.
    order: VecDeque<ChunkId>,
}

impl Holders {
    pub(super) fn remember(&mut self, id: ChunkId, term: u64, nodes: BTreeSet<NodeId>) {
        let since = Instant::now();
        match self.by_chunk.get_mut(&id) {
            Some(known) if known.counts(term, since) => known.nodes.extend(nodes),
            Some(known) => *known = Held { term, since, nodes },
            None => {
                self.by_chunk.insert(id, Held { term, since, nodes });
                self.order.push_back(id);
            }
        }
        while self.order.len() > HOLDERS_REMEMBERED_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.by_chunk.remove(&oldest);
            }
        }
    }

    pub(super) fn forget(&mut self, ids: &[ChunkId]) {
        for id in ids {
            self.by_chunk.remove(id);
        }
        // The oldest usually go first; chunks that were forgotten in another order are removed when they reach the
        // front.
        while self
            .order
            .front()
            .is_some_and(|oldest| !self.by_chunk.contains_key(oldest))
        {
            self.order.pop_front();
        }
    }

    pub(super) fn not_on_quorum(
        &self,
        ids: &[ChunkId],
        term: u64,
        voter_sets: &VoterSets,
        now: Instant,
    ) -> Vec<ChunkId> {
        let confirmed = |id: &ChunkId| {
            self.by_chunk.get(id).is_some_and(|known| {
                known.counts(term, now) && voter_sets.is_quorum(|voter| known.nodes.contains(voter))
            })
        };
        ids.iter().filter(|id| !confirmed(id)).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use quorumfs_proto::SessionId;

    use super::*;
    use crate::consensus::nodes;

    #[test]
    fn holders_of_another_term_do_not_count() {
        let id = |counter| ChunkId {
            session: SessionId(1),
            counter,
        };
        let voters = VoterSets::from_iter([nodes(&[1, 2, 3])]);
        let mut holders = Holders::default();
        holders.remember(id(1), 7, nodes(&[1, 2]));
        holders.remember(id(2), 7, nodes(&[1]));
        let now = Instant::now();
        assert_eq!(
            holders.not_on_quorum(&[id(1), id(2), id(3)], 7, &voters, now),
            [id(2), id(3)]
        );
        assert_eq!(holders.not_on_quorum(&[id(1)], 8, &voters, now), [id(1)]);
        holders.remember(id(2), 7, nodes(&[3]));
        let now = Instant::now();
        assert!(holders.not_on_quorum(&[id(2)], 7, &voters, now).is_empty());
        // They are not a quorum of other voters, and after a while it is unknown whether they still hold the chunk.
        let others = VoterSets::from_iter([nodes(&[2, 4, 5])]);
        assert_eq!(holders.not_on_quorum(&[id(1)], 7, &others, now), [id(1)]);
        let later = now + Duration::from_millis(HOLDERS_AGE_MS_MAX + 1);
        assert_eq!(holders.not_on_quorum(&[id(1)], 7, &voters, later), [id(1)]);
        holders.forget(&[id(1), id(2)]);
        assert!(holders.by_chunk.is_empty() && holders.order.is_empty());
    }
}
