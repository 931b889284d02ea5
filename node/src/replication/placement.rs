//! The assignment of chunks to nodes. Each chunk has `replicas` copies: at least as many as a majority of the
//! voters, and at most one on each voter.
//!
//! The holders of a chunk are chosen by rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to
//! increase hit rates", 1998): each pair of chunk and node has a weight, and the nodes with the largest weights hold
//! the chunk. Every node computes this without communication, and a change of members moves no more copies than
//! necessary. [`Layout`] is this function; it is pure.
//!
//! [`Placement`] knows the layouts of the voters that this node has applied, and of planned voters
//! ([`Placement::prepare_for`]). The node fetches and keeps what it should hold under any of them.
//!
//! A copy that no layout assigns to this node is deleted ([`Placement::drop_copies_at`]) when all holders have the
//! chunk. Invariant: at any moment there is a layout all of whose holders have the chunk on disk. It is kept because
//! an answer about held chunks carries an epoch, the index of the log entry of the layout; because a node deletes
//! nothing for a reason that is older than its answer; and because epochs only increase.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::hash::Hasher as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::{ChunkId, Member, NodeId};
use tokio::sync::watch;
use tracing::error;

use crate::consensus::{Consensus, voters_at};
use quorumfs_metadata::{MetadataStore, Position, Replicas};

/// The key of the weights, which must be equal on all nodes.
const WEIGHT_KEY: [u8; 16] = *b"QuorumFS chunks.";
/// Time for which planned voters are prepared for after the last request. The leader repeats the request every few
/// seconds until the change is applied or it loses leadership.
const PREPARATION_MS: u64 = 600_000;
/// Most planned sets of voters: those of a leader (two for its learners, one for a removal) and of the one before it.
const PLANS_MAX: usize = 6;
/// Interval at which the placement is checked for changes.
const CHECK_INTERVAL_MS: u64 = 250;

/// The assignment of chunks to a set of voters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Layout {
    voters: BTreeSet<NodeId>,
    copies: usize,
}

impl Layout {
    /// Creates a layout with `replicas` copies of each chunk, at least a majority of `voters` and at most all.
    pub fn new(voters: BTreeSet<NodeId>, replicas: u8) -> Layout {
        let majority = voters.len() / 2 + 1;
        let copies = usize::from(replicas).max(majority).min(voters.len());
        Layout { voters, copies }
    }

    /// Returns the number of copies of each chunk.
    pub fn copies(&self) -> usize {
        self.copies
    }

    /// Returns the voters.
    pub fn voters(&self) -> &BTreeSet<NodeId> {
        &self.voters
    }

    /// Whether every voter holds every chunk.
    pub fn is_everywhere(&self) -> bool {
        self.copies == self.voters.len()
    }

    /// Returns the number of voters that may be incomplete while every chunk still has copies on as many nodes as a
    /// majority.
    pub fn incomplete_max(&self) -> usize {
        self.copies.saturating_sub(self.voters.len() / 2 + 1)
    }

    /// Returns all voters, ordered by decreasing weight for `chunk`.
    pub fn ranked(&self, chunk: ChunkId) -> Vec<NodeId> {
        let mut ranked: Vec<NodeId> = self.voters.iter().copied().collect();
        ranked.sort_by_key(|node| Reverse(weight(chunk, *node)));
        ranked
    }

    /// Returns the nodes that should hold `chunk`.
    pub fn holders(&self, chunk: ChunkId) -> BTreeSet<NodeId> {
        if self.is_everywhere() {
            return self.voters.clone();
        }
        self.ranked(chunk).into_iter().take(self.copies).collect()
    }

    /// Whether `node` should hold `chunk`.
    pub fn is_holder(&self, chunk: ChunkId, node: NodeId) -> bool {
        if !self.voters.contains(&node) {
            return false;
        }
        let own = weight(chunk, node);
        let heavier = |other: &&NodeId| weight(chunk, **other) > own;
        self.is_everywhere() || self.voters.iter().filter(heavier).count() < self.copies
    }
}

/// Returns the weight of `node` for `chunk`. It depends on the slot only, so that a new incarnation holds the same
/// chunks; two incarnations of a slot are never voters together.
fn weight(chunk: ChunkId, node: NodeId) -> (u64, u16) {
    let mut hasher = siphasher::sip::SipHasher13::new_with_key(&WEIGHT_KEY);
    hasher.write_u64(chunk.session.0.to_le());
    hasher.write_u64(chunk.counter.to_le());
    hasher.write_u16(node.slot.to_le());
    (hasher.finish(), node.slot)
}

/// The placement at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementSnapshot {
    /// Index of the log entry from which the active layouts come.
    pub epoch: u64,
    /// The layouts of the voters: one, or two during a change of voters; none before the cluster exists.
    active: Vec<Layout>,
    /// Layouts that this node prepares for, sorted, so that equal placements compare as equal.
    planned: Vec<Layout>,
}

impl PlacementSnapshot {
    /// Whether `node`, which must be this node, should hold `chunk`.
    pub fn should_hold(&self, chunk: ChunkId, node: NodeId) -> bool {
        self.active.is_empty() || self.layouts().any(|layout| layout.is_holder(chunk, node))
    }

    /// Returns all nodes that should hold `chunk` under an active or planned layout.
    pub fn holders(&self, chunk: ChunkId) -> BTreeSet<NodeId> {
        self.layouts().flat_map(|layout| layout.holders(chunk)).collect()
    }

    /// Returns the active layout if no change is in progress or planned.
    pub fn stable(&self) -> Option<&Layout> {
        match self.active.as_slice() {
            [layout] if self.planned.is_empty() => Some(layout),
            _ => None,
        }
    }

    /// Returns the newest active layout.
    pub fn newest(&self) -> Option<&Layout> {
        self.active.last()
    }

    /// Whether every voter holds every chunk under all active and planned layouts.
    pub fn is_everywhere(&self) -> bool {
        self.layouts().all(Layout::is_everywhere)
    }

    /// Whether `layout` is active or planned.
    pub fn includes(&self, layout: &Layout) -> bool {
        self.layouts().any(|known| known == layout)
    }

    fn layouts(&self) -> impl Iterator<Item = &Layout> {
        self.active.iter().chain(&self.planned)
    }
}

/// The placement decoded from the metadata, cached.
struct State {
    membership: Option<bytes::Bytes>,
    replicas: Replicas,
    /// The placement of the applied state, without plans.
    applied: PlacementSnapshot,
    /// Planned voters, with the time until which this node prepares for them.
    planned_voters: Vec<(BTreeSet<NodeId>, Instant)>,
    snapshot: Arc<PlacementSnapshot>,
}

impl State {
    /// Adds or renews a plan.
    fn prepare_for(&mut self, voters: BTreeSet<NodeId>, expires: Instant) {
        match self.planned_voters.iter_mut().find(|(known, _)| *known == voters) {
            Some((_, until)) => *until = expires,
            None => {
                if self.planned_voters.len() == PLANS_MAX {
                    // The plan that expires first is dropped.
                    self.planned_voters.sort_by_key(|(_, until)| *until);
                    self.planned_voters.remove(0);
                }
                self.planned_voters.push((voters, expires));
            }
        }
        self.compose();
    }

    /// Combines the applied placement and the plans.
    fn compose(&mut self) {
        let mut snapshot = self.applied.clone();
        let replicas = self.replicas.count;
        let layout = |(voters, _): &(BTreeSet<NodeId>, Instant)| Layout::new(voters.clone(), replicas);
        let PlacementSnapshot { active, planned, .. } = &mut snapshot;
        planned.extend(self.planned_voters.iter().map(layout));
        planned.retain(|layout| !active.contains(layout));
        planned.sort();
        planned.dedup();
        if *self.snapshot != snapshot {
            self.snapshot = Arc::new(snapshot);
        }
    }
}

/// The placement as known to this node; the module documentation has its invariants.
pub struct Placement {
    own: NodeId,
    metadata: Arc<MetadataStore>,
    consensus: Consensus,
    // Locked only for comparisons and to decode a change.
    state: Mutex<State>,
    changes: watch::Sender<Arc<PlacementSnapshot>>,
    /// Held while held chunks are reported and while copies are deleted.
    held_lock: Mutex<()>,
}

impl Placement {
    /// Creates the placement from the current metadata.
    pub fn new(consensus: Consensus, metadata: Arc<MetadataStore>) -> Arc<Placement> {
        let (position, replicas) = metadata.position_and_replicas();
        let own = consensus.id();
        let applied = applied(own, &position, replicas);
        let snapshot = Arc::new(applied.clone());
        Arc::new(Placement {
            own,
            metadata,
            consensus,
            state: Mutex::new(State {
                membership: position.membership,
                replicas,
                applied,
                planned_voters: Vec::new(),
                snapshot: Arc::clone(&snapshot),
            }),
            changes: watch::Sender::new(snapshot),
            held_lock: Mutex::new(()),
        })
    }

    /// Returns the current placement.
    pub fn snapshot(&self) -> Arc<PlacementSnapshot> {
        let (position, replicas) = self.metadata.position_and_replicas();
        let mut state = self.state.lock();
        if state.membership != position.membership || state.replicas != replicas {
            let now = applied(self.own, &position, replicas);
            // Concurrent callers may arrive here in any order.
            if now.epoch >= state.applied.epoch {
                state.membership = position.membership;
                state.replicas = replicas;
                state.applied = now;
                state.compose();
            }
        }
        Arc::clone(&state.snapshot)
    }

    /// Returns the configured number of copies of each chunk.
    pub fn replicas(&self) -> u8 {
        self.metadata.position_and_replicas().1.count
    }

    /// Returns the feature level of the cluster; 0 if it cannot be read.
    pub fn feature_level(&self) -> u32 {
        self.metadata.view().map_or(0, |view| view.feature_level())
    }

    /// Returns the number of copies of each chunk with the current voters.
    pub fn copies(&self) -> usize {
        self.snapshot().newest().map_or(1, Layout::copies)
    }

    /// Whether this node should hold `chunk`.
    pub fn should_hold(&self, chunk: ChunkId) -> bool {
        self.snapshot().should_hold(chunk, self.own)
    }

    /// Prepares for `voters` for [`PREPARATION_MS`]: this node fetches and keeps what it would hold. Returns their
    /// layout.
    pub fn prepare_for(&self, voters: BTreeSet<NodeId>) -> Layout {
        let expires = Instant::now() + Duration::from_millis(PREPARATION_MS);
        self.state.lock().prepare_for(voters.clone(), expires);
        self.publish();
        Layout::new(voters, self.replicas())
    }

    /// Returns the other members in the order in which to fetch `chunk` from them: its holders first.
    pub fn fetch_order(&self, chunk: ChunkId) -> Vec<Member> {
        let snapshot = self.snapshot();
        let mut others = self.consensus.members();
        others.retain(|member| member.id != self.own);
        if !others.is_empty() {
            let first = (chunk.counter % others.len() as u64) as usize;
            others.rotate_left(first);
        }
        if !snapshot.is_everywhere() {
            let places = snapshot.holders(chunk);
            others.sort_by_key(|member| !places.contains(&member.id));
        }
        others
    }

    /// Calls `read_held`, which reads what this node holds, and returns its result with the epoch under which it is
    /// valid. No copy is deleted in between.
    pub fn with_epoch<T>(&self, read_held: impl FnOnce() -> T) -> (u64, T) {
        let _guard = self.held_lock.lock();
        (self.snapshot().epoch, read_held())
    }

    /// Calls `drop_copies`, which was decided under `epoch`, if the placement has not changed since; returns `None`
    /// otherwise.
    pub fn drop_copies_at<T>(&self, epoch: u64, drop_copies: impl FnOnce() -> T) -> Option<T> {
        let _guard = self.held_lock.lock();
        let snapshot = self.snapshot();
        (snapshot.epoch == epoch && snapshot.stable().is_some()).then(drop_copies)
    }

    /// Returns a receiver of changes of the placement.
    pub fn changes(&self) -> watch::Receiver<Arc<PlacementSnapshot>> {
        self.changes.subscribe()
    }

    /// Publishes changes and drops expired plans; never returns.
    pub async fn run(self: Arc<Self>) {
        loop {
            tokio::time::sleep(Duration::from_millis(CHECK_INTERVAL_MS)).await;
            {
                let mut state = self.state.lock();
                let newest = state.applied.newest().map(|layout| layout.voters.clone());
                // A plan ends when its voters are the newest applied ones.
                state
                    .planned_voters
                    .retain(|(voters, expires)| *expires > Instant::now() && Some(voters) != newest.as_ref());
                state.compose();
            }
            self.publish();
        }
    }

    fn publish(&self) {
        let snapshot = self.snapshot();
        self.changes.send_if_modified(|published| {
            let differs = *published != snapshot;
            *published = snapshot;
            differs
        });
    }
}

/// Returns the placement of the applied state. A node that is not a voter prepares to become one.
fn applied(own: NodeId, position: &Position, replicas: Replicas) -> PlacementSnapshot {
    let (since, sets) = voters_at(position).unwrap_or_else(|error| {
        // A node without a layout holds everything and deletes nothing.
        error!(%error, "cannot decode the membership; this node keeps all content");
        (0, Vec::new())
    });
    let layout = |voters: BTreeSet<NodeId>| Layout::new(voters, replicas.count);
    let mut planned = Vec::new();
    if let Some(newest) = sets.last().filter(|voters| !voters.contains(&own)) {
        let mut with_own = newest.clone();
        with_own.retain(|voter| voter.slot != own.slot);
        with_own.insert(own);
        planned.push(layout(with_own));
    }
    PlacementSnapshot {
        epoch: since.max(replicas.since_index),
        active: sets.into_iter().map(layout).collect(),
        planned,
    }
}

#[cfg(test)]
mod tests {
    use quorumfs_proto::SessionId;

    use super::*;

    fn nodes(slots: impl IntoIterator<Item = u16>) -> BTreeSet<NodeId> {
        let node = |slot| NodeId {
            slot,
            incarnation: 1000 + u64::from(slot),
        };
        slots.into_iter().map(node).collect()
    }

    fn chunks(count: u64) -> impl Iterator<Item = ChunkId> {
        (0..count).map(|counter| ChunkId {
            session: SessionId(counter % 3 + 1),
            counter,
        })
    }

    #[test]
    fn few_nodes_hold_everything_and_more_hold_a_majority() {
        let copies = |voters: u16, replicas| Layout::new(nodes(1..=voters), replicas).copies();
        assert_eq!([1, 2, 3].map(|voters| copies(voters, 3)), [1, 2, 3]);
        assert_eq!([copies(5, 3), copies(7, 3), copies(9, 3)], [3, 4, 5]);
        assert_eq!([copies(3, 1), copies(5, 4), copies(5, 9)], [2, 4, 5]);
        assert_eq!(Layout::new(nodes(1..=3), 3).incomplete_max(), 1);
        assert_eq!(Layout::new(nodes(1..=5), 3).incomplete_max(), 0);
        assert_eq!(Layout::new(nodes(1..=5), 5).incomplete_max(), 2);
    }

    #[test]
    fn chunks_are_spread_evenly_and_everyone_agrees() {
        let layout = Layout::new(nodes(1..=5), 3);
        let mut held = std::collections::BTreeMap::<u16, u64>::new();
        for chunk in chunks(10_000) {
            let places = layout.holders(chunk);
            assert_eq!(places.len(), 3);
            for node in layout.voters() {
                assert_eq!(layout.is_holder(chunk, *node), places.contains(node));
            }
            places
                .iter()
                .for_each(|node| *held.entry(node.slot).or_default() += 1);
        }
        assert!(
            held.values().all(|count| (5_700..6_300).contains(count)),
            "{held:?}"
        );
        assert!(!layout.is_holder(chunks(1).next().unwrap(), nodes([9]).pop_first().unwrap()));
    }

    #[test]
    fn a_change_moves_no_more_copies_than_necessary() {
        let before = Layout::new(nodes(1..=5), 4);
        let after = Layout::new(nodes(1..=6), 4);
        let mut moved = 0;
        for chunk in chunks(10_000) {
            let (old, new) = (before.holders(chunk), after.holders(chunk));
            let gained: Vec<&NodeId> = new.difference(&old).collect();
            assert!(
                gained.iter().all(|node| node.slot == 6),
                "only the new node gains"
            );
            moved += gained.len();
        }
        assert!(
            (6_400..6_950).contains(&moved),
            "two of three chunks get one of four copies on the sixth: {moved}"
        );
        // A new incarnation of a slot holds what the earlier one held.
        let mut replaced = nodes(1..=4);
        replaced.insert(NodeId {
            slot: 5,
            incarnation: 7,
        });
        let replaced = Layout::new(replaced, 4);
        for chunk in chunks(1_000) {
            let slots = |layout: &Layout| {
                layout
                    .holders(chunk)
                    .iter()
                    .map(|node| node.slot)
                    .collect::<Vec<_>>()
            };
            assert_eq!(slots(&before), slots(&replaced));
        }
    }

    #[test]
    fn repeated_plans_in_any_order_are_no_change() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let applied = PlacementSnapshot {
            epoch: 1,
            active: vec![Layout::new(nodes(1..=3), 3)],
            planned: Vec::new(),
        };
        let mut state = State {
            membership: None,
            replicas: Replicas {
                count: 3,
                since_index: 0,
            },
            snapshot: Arc::new(applied.clone()),
            applied,
            planned_voters: Vec::new(),
        };
        let [five, four] = [nodes(1..=5), nodes(1..=4)];
        state.prepare_for(five.clone(), at(1));
        state.prepare_for(four.clone(), at(2));
        let first = Arc::clone(&state.snapshot);
        assert_eq!(first.planned.len(), 2);
        for second in 3..9 {
            state.prepare_for(five.clone(), at(second));
            state.prepare_for(four.clone(), at(second));
            assert!(Arc::ptr_eq(&state.snapshot, &first), "nothing has changed");
        }
        assert!(state.planned_voters.iter().all(|(_, until)| *until == at(8)));
        // Voters that are already active add nothing.
        state.prepare_for(nodes(1..=3), at(9));
        assert!(Arc::ptr_eq(&state.snapshot, &first), "nothing has changed");
        // With too many plans, the one that expires first is dropped.
        state.prepare_for(five.clone(), at(10));
        (1..)
            .take(PLANS_MAX)
            .for_each(|slot| state.prepare_for(nodes([slot, slot + 1]), at(11)));
        assert_eq!(state.planned_voters.len(), PLANS_MAX);
        assert!(!state.planned_voters.iter().any(|(voters, _)| *voters == four));
    }

    #[test]
    fn nothing_is_settled_while_voters_change() {
        let [three, five] = [nodes(1..=3), nodes(1..=5)].map(|voters| Layout::new(voters, 3));
        let own = nodes([4]).pop_first().expect("one");
        let snapshot = |active: &[&Layout], planned: &[&Layout]| PlacementSnapshot {
            epoch: 1,
            active: active.iter().map(|layout| (*layout).clone()).collect(),
            planned: planned.iter().map(|layout| (*layout).clone()).collect(),
        };
        assert!(snapshot(&[&three], &[]).stable().is_some());
        assert!(snapshot(&[&three, &five], &[]).stable().is_none());
        let preparing = snapshot(&[&three], &[&five]);
        assert!(preparing.stable().is_none());
        let held: Vec<ChunkId> = chunks(100)
            .filter(|chunk| preparing.should_hold(*chunk, own))
            .collect();
        assert!(held.iter().all(|chunk| five.is_holder(*chunk, own)));
        assert!(!held.is_empty() && held.len() < 100);
        assert!(snapshot(&[], &[]).should_hold(chunks(1).next().expect("one"), own));
    }
}
