//! Who holds what: each chunk lies on `replicas` of the voters, or on a majority of them where that is more; with so few
//! voters, on all.
//!
//! Which ones is decided by rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit
//! rates", 1998): every node weighs every chunk, the heaviest hold it. So everyone knows without asking, and a change of
//! members moves no more than it must. [`Layout`] is that function; it is pure.
//!
//! [`Placement`] knows the layout of the voters that this node has applied, and those that it has been told will come
//! ([`Placement::prepare_for`]): what it should hold under any of them it fetches and keeps.
//!
//! What a node holds beyond that it lets go ([`Placement::let_go`]) once everyone who should hold it does. Invariant: at
//! any moment there is one layout all of whose places hold the chunk, on disk. It holds because a place answers under an
//! epoch, the index of the log entry that its layout comes from; because it lets nothing go for a reason that is older
//! than its answer; and because epochs only rise.

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

/// The fixed key of the weights: every node must weigh alike.
const WEIGHT_KEY: [u8; 16] = *b"QuorumFS chunks.";
/// How long what will come is prepared for, after it was last spoken of. The leader speaks of it every few seconds until
/// it has come, or does not lead.
const PREPARATION_MS: u64 = 600_000;
/// Intentions kept in mind: those of a leader (two for its learners, one for a removal) and of the one before it.
const INTENTIONS_MAX: usize = 6;
/// How often it is seen whether anything has changed.
const LOOK_INTERVAL_MS: u64 = 250;

/// The places of chunks among some voters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Layout {
    voters: BTreeSet<NodeId>,
    copies: usize,
}

impl Layout {
    /// Where each chunk lies on `replicas` of `voters`, or on as many as must survive together: a majority.
    pub fn new(voters: BTreeSet<NodeId>, replicas: u8) -> Layout {
        let majority = voters.len() / 2 + 1;
        let copies = usize::from(replicas).max(majority).min(voters.len());
        Layout { voters, copies }
    }

    /// On how many nodes each chunk lies.
    pub fn copies(&self) -> usize {
        self.copies
    }

    /// Who they are chosen from.
    pub fn voters(&self) -> &BTreeSet<NodeId> {
        &self.voters
    }

    /// Whether each holds everything.
    pub fn is_everywhere(&self) -> bool {
        self.copies == self.voters.len()
    }

    /// How many of the voters may lack some of what they should hold, so that of each chunk a majority's worth of copies
    /// is there all the same.
    pub fn incomplete_max(&self) -> usize {
        self.copies.saturating_sub(self.voters.len() / 2 + 1)
    }

    /// All voters, those first that should hold `chunk` more than the others.
    pub fn ranked(&self, chunk: ChunkId) -> Vec<NodeId> {
        let mut ranked: Vec<NodeId> = self.voters.iter().copied().collect();
        ranked.sort_by_key(|node| Reverse(weight(chunk, *node)));
        ranked
    }

    /// Who holds `chunk`.
    pub fn places(&self, chunk: ChunkId) -> BTreeSet<NodeId> {
        if self.is_everywhere() {
            return self.voters.clone();
        }
        self.ranked(chunk).into_iter().take(self.copies).collect()
    }

    /// Whether `node` holds `chunk`.
    pub fn is_place(&self, chunk: ChunkId, node: NodeId) -> bool {
        if !self.voters.contains(&node) {
            return false;
        }
        let own = weight(chunk, node);
        let heavier = |other: &&NodeId| weight(chunk, **other) > own;
        self.is_everywhere() || self.voters.iter().filter(heavier).count() < self.copies
    }
}

/// How much `node` should hold `chunk`. By slot, so that a new incarnation takes its forerunner's place; two of one slot
/// never vote together.
fn weight(chunk: ChunkId, node: NodeId) -> (u64, u16) {
    let mut hasher = siphasher::sip::SipHasher13::new_with_key(&WEIGHT_KEY);
    hasher.write_u64(chunk.session.0.to_le());
    hasher.write_u64(chunk.counter.to_le());
    hasher.write_u16(node.slot.to_le());
    (hasher.finish(), node.slot)
}

/// What a node knows of placement at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementSnapshot {
    /// The index of the log entry that the layouts in force come from.
    pub epoch: u64,
    /// Of the voters: one, or two while they change; none before there is a cluster.
    in_force: Vec<Layout>,
    /// What this node prepares for beyond that, in an order of its own: of two pictures that say the same none is news.
    to_come: Vec<Layout>,
}

impl PlacementSnapshot {
    /// Whether `node`, which is this one, should hold `chunk`.
    pub fn should_hold(&self, chunk: ChunkId, node: NodeId) -> bool {
        self.in_force.is_empty() || self.layouts().any(|layout| layout.is_place(chunk, node))
    }

    /// Everyone who should hold `chunk` or is known to prepare for it.
    pub fn places(&self, chunk: ChunkId) -> BTreeSet<NodeId> {
        self.layouts().flat_map(|layout| layout.places(chunk)).collect()
    }

    /// The layout in force, where nothing is changing.
    pub fn settled(&self) -> Option<&Layout> {
        match self.in_force.as_slice() {
            [layout] if self.to_come.is_empty() => Some(layout),
            _ => None,
        }
    }

    /// The newest layout in force.
    pub fn newest(&self) -> Option<&Layout> {
        self.in_force.last()
    }

    /// Whether everyone holds everything, now and for all that is known.
    pub fn is_everywhere(&self) -> bool {
        self.layouts().all(Layout::is_everywhere)
    }

    /// Whether what `layout` asks for is in force or prepared for.
    pub fn prepares_for(&self, layout: &Layout) -> bool {
        self.layouts().any(|known| known == layout)
    }

    fn layouts(&self) -> impl Iterator<Item = &Layout> {
        self.in_force.iter().chain(&self.to_come)
    }
}

/// What the state says, kept so that it need not be decoded again and again.
struct Known {
    membership: Option<bytes::Bytes>,
    replicas: Replicas,
    /// As the state alone has it.
    stated: PlacementSnapshot,
    /// The voters that this node was told will come, and until when it prepares for them.
    intended: Vec<(BTreeSet<NodeId>, Instant)>,
    picture: Arc<PlacementSnapshot>,
}

impl Known {
    /// These voters are intended until `expires`.
    fn prepare_for(&mut self, voters: BTreeSet<NodeId>, expires: Instant) {
        match self.intended.iter_mut().find(|(known, _)| *known == voters) {
            Some((_, until)) => *until = expires,
            None => {
                if self.intended.len() == INTENTIONS_MAX {
                    // The one that was spoken of longest ago.
                    self.intended.sort_by_key(|(_, until)| *until);
                    self.intended.remove(0);
                }
                self.intended.push((voters, expires));
            }
        }
        self.compose();
    }

    /// Puts together what is stated and what is intended.
    fn compose(&mut self) {
        let mut picture = self.stated.clone();
        let replicas = self.replicas.count;
        let layout = |(voters, _): &(BTreeSet<NodeId>, Instant)| Layout::new(voters.clone(), replicas);
        let PlacementSnapshot {
            in_force, to_come, ..
        } = &mut picture;
        to_come.extend(self.intended.iter().map(layout));
        to_come.retain(|layout| !in_force.contains(layout));
        to_come.sort();
        to_come.dedup();
        if *self.picture != picture {
            self.picture = Arc::new(picture);
        }
    }
}

/// See the module.
pub struct Placement {
    own: NodeId,
    metadata: Arc<MetadataStore>,
    consensus: Consensus,
    // Locked for a comparison, and for what a change takes to be decoded.
    known: Mutex<Known>,
    changes: watch::Sender<Arc<PlacementSnapshot>>,
    /// Held while it is answered what is held, and while something is let go.
    answering: Mutex<()>,
}

impl Placement {
    /// As the state says now.
    pub fn new(consensus: Consensus, metadata: Arc<MetadataStore>) -> Arc<Placement> {
        let (position, replicas) = metadata.position_and_replicas();
        let own = consensus.id();
        let stated = stated(own, &position, replicas);
        let picture = Arc::new(stated.clone());
        Arc::new(Placement {
            own,
            metadata,
            consensus,
            known: Mutex::new(Known {
                membership: position.membership,
                replicas,
                stated,
                intended: Vec::new(),
                picture: Arc::clone(&picture),
            }),
            changes: watch::Sender::new(picture),
            answering: Mutex::new(()),
        })
    }

    /// What is known now.
    pub fn picture(&self) -> Arc<PlacementSnapshot> {
        let (position, replicas) = self.metadata.position_and_replicas();
        let mut known = self.known.lock();
        if known.membership != position.membership || known.replicas != replicas {
            let now = stated(self.own, &position, replicas);
            // Of two looks the older may come later.
            if now.epoch >= known.stated.epoch {
                known.membership = position.membership;
                known.replicas = replicas;
                known.stated = now;
                known.compose();
            }
        }
        Arc::clone(&known.picture)
    }

    /// On how many nodes each chunk is to be kept, as far as there are so many.
    pub fn replicas(&self) -> u8 {
        self.metadata.position_and_replicas().1.count
    }

    /// What all members' programs know; 0 where it cannot be looked up.
    pub fn feature_level(&self) -> u32 {
        self.metadata.view().map_or(0, |view| view.feature_level())
    }

    /// On how many nodes each chunk is kept.
    pub fn copies(&self) -> usize {
        self.picture().newest().map_or(1, Layout::copies)
    }

    /// Whether this node should hold `chunk`.
    pub fn should_hold(&self, chunk: ChunkId) -> bool {
        self.picture().should_hold(chunk, self.own)
    }

    /// These will probably be the voters: from now on, for some minutes, this node prepares for it.
    pub fn prepare_for(&self, voters: BTreeSet<NodeId>) -> Layout {
        let expires = Instant::now() + Duration::from_millis(PREPARATION_MS);
        self.known.lock().prepare_for(voters.clone(), expires);
        self.tell();
        Layout::new(voters, self.replicas())
    }

    /// The other members in the order in which to ask them for `chunk`: those first that should hold it.
    pub fn sources(&self, chunk: ChunkId) -> Vec<Member> {
        let picture = self.picture();
        let mut others = self.consensus.members();
        others.retain(|member| member.id != self.own);
        if !others.is_empty() {
            let first = (chunk.counter % others.len() as u64) as usize;
            others.rotate_left(first);
        }
        if !picture.is_everywhere() {
            let places = picture.places(chunk);
            others.sort_by_key(|member| !places.contains(&member.id));
        }
        others
    }

    /// Answers what this node holds under the epoch that goes with the answer; nothing is let go in between.
    pub fn answer<T>(&self, look: impl FnOnce() -> T) -> (u64, T) {
        let _answering = self.answering.lock();
        (self.picture().epoch, look())
    }

    /// Does `drop_copies`, which was decided under `epoch`, unless that has passed.
    pub fn let_go<T>(&self, epoch: u64, drop_copies: impl FnOnce() -> T) -> Option<T> {
        let _answering = self.answering.lock();
        let picture = self.picture();
        (picture.epoch == epoch && picture.settled().is_some()).then(drop_copies)
    }

    /// Hears of every change, soon after it.
    pub fn changes(&self) -> watch::Receiver<Arc<PlacementSnapshot>> {
        self.changes.subscribe()
    }

    /// Tells of changes, for ever.
    pub async fn run(self: Arc<Self>) {
        loop {
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            {
                let mut known = self.known.lock();
                let newest = known.stated.newest().map(|layout| layout.voters.clone());
                // What has come is intended no more.
                known
                    .intended
                    .retain(|(voters, expires)| *expires > Instant::now() && Some(voters) != newest.as_ref());
                known.compose();
            }
            self.tell();
        }
    }

    fn tell(&self) {
        let picture = self.picture();
        self.changes.send_if_modified(|told| {
            let differs = *told != picture;
            *told = picture;
            differs
        });
    }
}

/// What the state alone says. A node that does not vote prepares for it.
fn stated(own: NodeId, position: &Position, replicas: Replicas) -> PlacementSnapshot {
    let (since, sets) = voters_at(position).unwrap_or_else(|error| {
        // Whoever knows no layout holds everything and lets nothing go.
        error!(%error, "the membership cannot be read");
        (0, Vec::new())
    });
    let layout = |voters: BTreeSet<NodeId>| Layout::new(voters, replicas.count);
    let mut to_come = Vec::new();
    if let Some(newest) = sets.last().filter(|voters| !voters.contains(&own)) {
        let mut with_own = newest.clone();
        with_own.retain(|voter| voter.slot != own.slot);
        with_own.insert(own);
        to_come.push(layout(with_own));
    }
    PlacementSnapshot {
        epoch: since.max(replicas.since_index),
        in_force: sets.into_iter().map(layout).collect(),
        to_come,
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
    fn few_nodes_hold_everything_and_more_a_majority_at_least() {
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
            let places = layout.places(chunk);
            assert_eq!(places.len(), 3);
            for node in layout.voters() {
                assert_eq!(layout.is_place(chunk, *node), places.contains(node));
            }
            places
                .iter()
                .for_each(|node| *held.entry(node.slot).or_default() += 1);
        }
        assert!(
            held.values().all(|count| (5_700..6_300).contains(count)),
            "{held:?}"
        );
        assert!(!layout.is_place(chunks(1).next().unwrap(), nodes([9]).pop_first().unwrap()));
    }

    #[test]
    fn a_change_moves_no_more_than_it_must() {
        let before = Layout::new(nodes(1..=5), 4);
        let after = Layout::new(nodes(1..=6), 4);
        let mut moved = 0;
        for chunk in chunks(10_000) {
            let (old, new) = (before.places(chunk), after.places(chunk));
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
        // A new incarnation of a slot stands where its forerunner stood.
        let mut replaced = nodes(1..=4);
        replaced.insert(NodeId {
            slot: 5,
            incarnation: 7,
        });
        let replaced = Layout::new(replaced, 4);
        for chunk in chunks(1_000) {
            let slots = |layout: &Layout| {
                layout
                    .places(chunk)
                    .iter()
                    .map(|node| node.slot)
                    .collect::<Vec<_>>()
            };
            assert_eq!(slots(&before), slots(&replaced));
        }
    }

    #[test]
    fn what_is_intended_again_in_whatever_order_is_no_news() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let stated = PlacementSnapshot {
            epoch: 1,
            in_force: vec![Layout::new(nodes(1..=3), 3)],
            to_come: Vec::new(),
        };
        let mut known = Known {
            membership: None,
            replicas: Replicas {
                count: 3,
                since_index: 0,
            },
            picture: Arc::new(stated.clone()),
            stated,
            intended: Vec::new(),
        };
        let [five, four] = [nodes(1..=5), nodes(1..=4)];
        known.prepare_for(five.clone(), at(1));
        known.prepare_for(four.clone(), at(2));
        let first = Arc::clone(&known.picture);
        assert_eq!(first.to_come.len(), 2);
        for second in 3..9 {
            known.prepare_for(five.clone(), at(second));
            known.prepare_for(four.clone(), at(second));
            assert!(Arc::ptr_eq(&known.picture, &first), "nothing has changed");
        }
        assert!(known.intended.iter().all(|(_, until)| *until == at(8)));
        // What is in force already asks for nothing more.
        known.prepare_for(nodes(1..=3), at(9));
        assert!(Arc::ptr_eq(&known.picture, &first), "nothing has changed");
        // Of too many the one that was spoken of longest ago is forgotten.
        known.prepare_for(five.clone(), at(10));
        (1..)
            .take(INTENTIONS_MAX)
            .for_each(|slot| known.prepare_for(nodes([slot, slot + 1]), at(11)));
        assert_eq!(known.intended.len(), INTENTIONS_MAX);
        assert!(!known.intended.iter().any(|(voters, _)| *voters == four));
    }

    #[test]
    fn nothing_is_settled_while_voters_change() {
        let [three, five] = [nodes(1..=3), nodes(1..=5)].map(|voters| Layout::new(voters, 3));
        let own = nodes([4]).pop_first().expect("one");
        let picture = |in_force: &[&Layout], to_come: &[&Layout]| PlacementSnapshot {
            epoch: 1,
            in_force: in_force.iter().map(|layout| (*layout).clone()).collect(),
            to_come: to_come.iter().map(|layout| (*layout).clone()).collect(),
        };
        assert!(picture(&[&three], &[]).settled().is_some());
        assert!(picture(&[&three, &five], &[]).settled().is_none());
        let preparing = picture(&[&three], &[&five]);
        assert!(preparing.settled().is_none());
        let its: Vec<ChunkId> = chunks(100)
            .filter(|chunk| preparing.should_hold(*chunk, own))
            .collect();
        assert!(its.iter().all(|chunk| five.is_place(*chunk, own)));
        assert!(!its.is_empty() && its.len() < 100);
        assert!(picture(&[], &[]).should_hold(chunks(1).next().expect("one"), own));
    }
}
