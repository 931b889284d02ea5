//! Who holds which chunk, as far as the leader has heard, between a chunk's put and the command that names it. Pure.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use quorumfs_proto::{ChunkId, NodeId};

use crate::consensus::VoterSets;

/// Chunks whose holders are remembered between their put and their command; beyond it the oldest are forgotten and
/// the peers are asked instead. 64 Ki chunks are 64 GiB under way.
const HOLDERS_REMEMBERED_MAX: usize = 64 << 10;

/// For how long a node counts as a holder after it has said so; then it is asked again.
const HOLDERS_AGE_MS_MAX: u64 = 30_000;

/// Who was said to hold a chunk.
struct Held {
    term: u64,
    /// When the first of them was.
    since: Instant,
    nodes: BTreeSet<NodeId>,
}

impl Held {
    fn counts(&self, term: u64, now: Instant) -> bool {
        let age = now.saturating_duration_since(self.since);
        self.term == term && age <= Duration::from_millis(HOLDERS_AGE_MS_MAX)
    }
}

/// Who holds which chunk, between the put and the command that names it. Counts only in the term it was learned in:
/// a node that led, was deposed and leads again may have missed that a holder was replaced. Nor does it count for long: a
/// node can lose what it held.
#[derive(Default)]
pub(super) struct Holders {
    by_chunk: HashMap<ChunkId, Held>,
    /// In the order they were remembered; may name chunks that were forgotten since.
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
        // Mostly the oldest go first; what is forgotten in another order goes when it comes to the front.
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
    fn what_was_learned_in_another_term_does_not_count() {
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
        // Of other voters they are not a quorum, and after a while nobody knows whether they hold it still.
        let others = VoterSets::from_iter([nodes(&[2, 4, 5])]);
        assert_eq!(holders.not_on_quorum(&[id(1)], 7, &others, now), [id(1)]);
        let later = now + Duration::from_millis(HOLDERS_AGE_MS_MAX + 1);
        assert_eq!(holders.not_on_quorum(&[id(1)], 7, &voters, later), [id(1)]);
        holders.forget(&[id(1), id(2)]);
        assert!(holders.by_chunk.is_empty() && holders.order.is_empty());
    }
}
