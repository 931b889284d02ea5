//! Who has room: the leader answers ENOSPC before it proposes when fewer than f + 1 voters do.
//!
//! Each node looks at its own disk, for content and for the log; a leader also asks the others, and one whose own disk
//! is full while a quorum has room hands leadership on, since it cannot log what they could store. A follower takes its
//! leader's word for the whole.
//!
//! What was heard ages. A voter that has not answered lately has no room that anyone knows of: with one node dead and
//! another full there is no quorum of copies, and that is ENOSPC. But it is so only where a quorum answers; too few
//! voters alive is no matter of room, and calls wait (P6). In a leader's first seconds the silent have the benefit of
//! the doubt.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::{Member, NodeId};
use quorumfs_wire as wire;
use tracing::{info, warn};

use super::placement::Placement;
use crate::consensus::{Consensus, VoterSets};
use crate::transport::{Purpose, Transport};
use quorumfs_content::ContentStore;

/// How often disks are looked at and peers are asked.
const LOOK_INTERVAL_MS: u64 = 500;
/// How long what a peer said counts, and how long a new leader waits for it.
const ANSWER_AGE_MS_MAX: u64 = 5_000;
/// A node whose disk has less than this left for content, over what is kept free for deletes, takes no more.
const ROOM_BYTES_MIN: u64 = 4 << 20;
/// Once full, a node has room again only above this: it does not flap.
const RESUME_BYTES: u64 = 16 << 20;

/// Room on one node's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of the filesystem of the data folder.
    pub capacity_bytes: u64,
    /// Bytes that content may still take.
    pub available_bytes: u64,
    /// Whether the node takes more.
    pub has_room: bool,
}

/// Whether there is room for what f + 1 voters must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judgement {
    /// A quorum has it.
    Room,
    /// A quorum answers, and too few of it have room.
    Full,
    /// Too few answer to tell.
    Unknown,
}

/// Of every active configuration a majority must hold what is written; `said` is whether they have room, of those that
/// said so lately.
fn judge(voter_sets: &VoterSets, said: &BTreeMap<NodeId, bool>) -> Judgement {
    if voter_sets.is_quorum(|voter| said.get(voter) == Some(&true)) {
        Judgement::Room
    } else if voter_sets.is_quorum(|voter| said.contains_key(voter)) {
        Judgement::Full
    } else {
        Judgement::Unknown
    }
}

/// What a leader said, when.
#[derive(Clone, Copy, Debug)]
struct LeaderWord {
    leader: NodeId,
    at: Instant,
    is_full: bool,
}

/// What this node knows of everybody's room.
pub struct SpaceMonitor {
    consensus: Consensus,
    content: Arc<ContentStore>,
    placement: Arc<Placement>,
    transport: Arc<Transport>,
    own: Mutex<Room>,
    peers: Mutex<HashMap<NodeId, (Instant, Room)>>,
    /// Since when this node, as leader, has asked the others.
    asking_since: Mutex<Option<Instant>>,
    /// As a follower.
    leader_word: Mutex<Option<LeaderWord>>,
}

impl SpaceMonitor {
    /// Looks once at the own disk.
    pub fn new(
        consensus: Consensus,
        content: Arc<ContentStore>,
        placement: Arc<Placement>,
        transport: Arc<Transport>,
    ) -> Arc<SpaceMonitor> {
        let own = Mutex::new(Room {
            capacity_bytes: 0,
            available_bytes: 0,
            has_room: true,
        });
        let monitor = SpaceMonitor {
            consensus,
            content,
            placement,
            transport,
            own,
            peers: Mutex::new(HashMap::new()),
            asking_since: Mutex::new(None),
            leader_word: Mutex::new(None),
        };
        monitor.look();
        Arc::new(monitor)
    }

    /// Looks again and again, for ever.
    pub async fn run(self: Arc<Self>) {
        loop {
            self.look();
            if self.consensus.is_leader() {
                self.asking_since.lock().get_or_insert_with(Instant::now);
                self.ask_peers().await;
                self.hand_on_if_full().await;
            } else {
                *self.asking_since.lock() = None;
                self.ask_leader().await;
            }
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
        }
    }

    /// Room on this node's disk.
    pub fn own(&self) -> Room {
        *self.own.lock()
    }

    /// This node's disk refused a write: it is full until a look says otherwise.
    pub fn disk_refused(&self, node: NodeId) {
        if node == self.consensus.id() {
            self.own.lock().has_room = false;
        } else if let Some((_, room)) = self.peers.lock().get_mut(&node) {
            room.has_room = false;
        }
    }

    /// Whether nothing speaks against taking more: false where a quorum answers and too few of it have room.
    pub fn quorum_has_room(&self) -> bool {
        self.judgement() != Judgement::Full
    }

    fn judgement(&self) -> Judgement {
        if !self.consensus.is_leader() {
            let leader = self.consensus.leader().map(|member| member.id);
            let word = *self.leader_word.lock();
            return match word.filter(|word| Some(word.leader) == leader && is_fresh(word.at)) {
                Some(word) if word.is_full => Judgement::Full,
                _ => Judgement::Unknown,
            };
        }
        let voter_sets = self.consensus.voter_sets();
        let mut said: BTreeMap<NodeId, bool> = self
            .heard_lately()
            .map(|(id, room)| (id, room.has_room))
            .collect();
        said.insert(self.consensus.id(), self.own().has_room);
        if self.asking_since.lock().is_none_or(is_fresh) {
            for voter in voter_sets.iter() {
                said.entry(*voter).or_insert(true);
            }
        }
        judge(&voter_sets, &said)
    }

    /// What the others said, without what is old.
    fn heard_lately(&self) -> impl Iterator<Item = (NodeId, Room)> {
        let peers = self.peers.lock();
        let fresh = peers.iter().filter(|(_, (at, _))| is_fresh(*at));
        let fresh: Vec<(NodeId, Room)> = fresh.map(|(id, (_, room))| (*id, *room)).collect();
        fresh.into_iter()
    }

    /// Bytes the cluster can hold, and those still free: what the smallest node can take, times the nodes for each copy.
    pub fn cluster_bytes(&self) -> (u64, u64) {
        let own = self.own();
        let picture = self.placement.picture();
        let (nodes, copies) = picture.newest().map_or((1, 1), |layout| {
            (layout.voters().len() as u64, layout.copies() as u64)
        });
        let of_cluster = |bytes: u64| (u128::from(bytes) * u128::from(nodes) / u128::from(copies)) as u64;
        let mut rooms: Vec<Room> = self.heard_lately().map(|(_, room)| room).collect();
        rooms.push(own);
        let capacity = rooms
            .iter()
            .map(|room| room.capacity_bytes)
            .min()
            .unwrap_or(own.capacity_bytes);
        let available = rooms
            .iter()
            .map(|room| room.available_bytes)
            .min()
            .unwrap_or(own.available_bytes);
        (of_cluster(capacity), of_cluster(available))
    }

    fn look(&self) {
        match self.content.space() {
            Ok(space) => {
                let mut own = self.own.lock();
                let needed = if own.has_room {
                    ROOM_BYTES_MIN
                } else {
                    RESUME_BYTES
                };
                let has_room = space.room_bytes >= needed && self.consensus.has_room();
                if own.has_room && !has_room {
                    warn!(
                        available_bytes = space.room_bytes,
                        "the disk is full: only what frees space is taken"
                    );
                } else if !own.has_room && has_room {
                    info!(available_bytes = space.room_bytes, "the disk has room again");
                }
                *own = Room {
                    capacity_bytes: space.capacity_bytes,
                    available_bytes: space.room_bytes,
                    has_room,
                };
            }
            Err(error) => warn!(%error, "cannot tell how full the disk is"),
        }
    }

    async fn hand_on_if_full(&self) {
        if self.own().has_room || self.judgement() != Judgement::Room {
            return;
        }
        let voters = self.consensus.voter_sets();
        let mut with_room: Vec<(NodeId, Room)> = self
            .heard_lately()
            .filter(|(id, room)| room.has_room && voters.contains(id))
            .collect();
        with_room.sort_by_key(|(_, room)| std::cmp::Reverse(room.available_bytes));
        if with_room.is_empty() {
            return;
        }
        match self
            .consensus
            .hand_on(with_room.into_iter().map(|(id, _)| id))
            .await
        {
            Ok(to) => info!(to = to.slot, "this node's disk is full: handing leadership on"),
            Err(error) => warn!(%error, "this node's disk is full; the next look tries again"),
        }
    }

    async fn ask_peers(&self) {
        let own = self.consensus.id();
        let others = self
            .consensus
            .members()
            .into_iter()
            .filter(|member| member.id != own);
        let answers = futures::future::join_all(others.map(|member| self.ask(member))).await;
        let mut peers = self.peers.lock();
        for (id, status) in answers.into_iter().flatten() {
            let room = Room {
                capacity_bytes: status.capacity_bytes,
                available_bytes: status.available_bytes,
                has_room: status.has_room,
            };
            peers.insert(id, (Instant::now(), room));
        }
        peers.retain(|_, (at, _)| is_fresh(*at));
    }

    async fn ask_leader(&self) {
        self.peers.lock().retain(|_, (at, _)| is_fresh(*at));
        let Some(leader) = self.consensus.leader() else {
            return;
        };
        if let Some((leader, status)) = self.ask(leader).await {
            *self.leader_word.lock() = Some(LeaderWord {
                leader,
                at: Instant::now(),
                is_full: status.cluster_full,
            });
        }
    }

    async fn ask(&self, member: Member) -> Option<(NodeId, wire::NodeStatusResponse)> {
        let mut peer = self.transport.peer(&member.addresses, Purpose::Control).ok()?;
        let ask = peer.node_status(wire::NodeStatusRequest {});
        // A peer that is down is the health monitor's business, not worth a line here.
        let status = tokio::time::timeout(Duration::from_millis(LOOK_INTERVAL_MS), ask)
            .await
            .ok()?
            .ok()?
            .into_inner();
        Some((member.id, status))
    }
}

fn is_fresh(at: Instant) -> bool {
    at.elapsed() < Duration::from_millis(ANSWER_AGE_MS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::{node, nodes};

    fn said(with_room: &[u16], full: &[u16]) -> BTreeMap<NodeId, bool> {
        let with_room = with_room.iter().map(|slot| (node(*slot), true));
        with_room
            .chain(full.iter().map(|slot| (node(*slot), false)))
            .collect()
    }

    #[test]
    fn too_few_with_room_among_a_quorum_that_answers_is_full() {
        let three = VoterSets::from_iter([nodes(&[1, 2, 3])]);
        assert_eq!(judge(&three, &said(&[1, 2, 3], &[])), Judgement::Room);
        assert_eq!(judge(&three, &said(&[1, 2], &[3])), Judgement::Room);
        assert_eq!(judge(&three, &said(&[1], &[2, 3])), Judgement::Full);
        assert_eq!(judge(&three, &said(&[1, 3], &[])), Judgement::Room, "one is dead");
        assert_eq!(
            judge(&three, &said(&[1], &[2])),
            Judgement::Full,
            "one is dead, one full: nobody else can take the second copy"
        );
        let five = VoterSets::from_iter([nodes(&[1, 2, 3, 4, 5])]);
        assert_eq!(judge(&five, &said(&[1, 2], &[3])), Judgement::Full);
        assert_eq!(judge(&five, &said(&[1, 2, 3], &[4])), Judgement::Room);
    }

    #[test]
    fn without_a_quorum_that_answers_nobody_is_said_to_be_full() {
        let three = VoterSets::from_iter([nodes(&[1, 2, 3])]);
        assert_eq!(judge(&three, &said(&[1], &[])), Judgement::Unknown);
        assert_eq!(judge(&three, &said(&[], &[1])), Judgement::Unknown);
        let five = VoterSets::from_iter([nodes(&[1, 2, 3, 4, 5])]);
        assert_eq!(judge(&five, &said(&[1], &[2])), Judgement::Unknown);
    }

    #[test]
    fn every_active_configuration_needs_room() {
        let joint = VoterSets::from_iter([nodes(&[1, 2, 3]), nodes(&[1, 4, 5])]);
        assert_eq!(judge(&joint, &said(&[1, 2, 4], &[])), Judgement::Room);
        assert_eq!(judge(&joint, &said(&[1, 2], &[4])), Judgement::Full);
        assert_eq!(judge(&joint, &said(&[1, 2, 3], &[])), Judgement::Unknown);
    }
}
