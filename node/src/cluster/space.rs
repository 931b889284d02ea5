//! Who has room (design, Rule space): the leader answers ENOSPC before it proposes when fewer than f + 1 voters do.
//!
//! Each node looks at its own disk, for content and for the log; a leader also asks the others, and one whose own disk
//! is full while a quorum has room hands leadership on, since it cannot log what they could store. What was heard ages: a node that has not answered
//! lately counts as having room, because it does not count towards a quorum of copies anyway.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::{Member, NodeId, wire};
use tracing::{info, warn};

use super::placement::Placement;
use crate::consensus::Consensus;
use crate::content::ContentStore;
use crate::transport::{Purpose, Transport};

/// How often disks are looked at and peers are asked.
const LOOK_INTERVAL_MS: u64 = 500;
/// How long what a peer said counts.
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

/// What this node knows of everybody's room.
pub struct SpaceMonitor {
    consensus: Consensus,
    content: Arc<ContentStore>,
    placement: Arc<Placement>,
    transport: Arc<Transport>,
    own: Mutex<Room>,
    peers: Mutex<HashMap<NodeId, (Instant, Room)>>,
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
        };
        monitor.look();
        Arc::new(monitor)
    }

    /// Looks again and again, for ever.
    pub async fn run(self: Arc<Self>) {
        loop {
            self.look();
            if self.consensus.is_leader() {
                self.ask_peers().await;
                self.hand_on_if_full().await;
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

    /// Whether a quorum of every active configuration has room for more.
    pub fn quorum_has_room(&self) -> bool {
        let full = self.full_nodes();
        self.consensus.voter_sets().iter().all(|voters| {
            let with_room = voters.iter().filter(|voter| !full.contains(voter)).count();
            with_room > voters.len() / 2
        })
    }

    /// Bytes the cluster can hold, and those still free: what the smallest node can take, times the nodes for each copy.
    pub fn cluster_bytes(&self) -> (u64, u64) {
        let own = self.own();
        let picture = self.placement.picture();
        let (nodes, copies) = picture.newest().map_or((1, 1), |layout| {
            (layout.voters().len() as u64, layout.copies() as u64)
        });
        let of_cluster = |bytes: u64| (u128::from(bytes) * u128::from(nodes) / u128::from(copies)) as u64;
        let mut rooms: Vec<Room> = self.peers.lock().values().map(|(_, room)| *room).collect();
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

    fn full_nodes(&self) -> BTreeSet<NodeId> {
        let mut full = BTreeSet::new();
        if !self.own.lock().has_room {
            full.insert(self.consensus.id());
        }
        let fresh = Duration::from_millis(ANSWER_AGE_MS_MAX);
        let peers = self.peers.lock();
        full.extend(
            peers
                .iter()
                .filter(|(_, (at, room))| at.elapsed() < fresh && !room.has_room)
                .map(|(id, _)| *id),
        );
        full
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
        if self.own().has_room || !self.quorum_has_room() {
            return;
        }
        let voters: BTreeSet<NodeId> = self.consensus.voter_sets().into_iter().flatten().collect();
        let roomiest = {
            let peers = self.peers.lock();
            let with_room = peers
                .iter()
                .filter(|(id, (_, room))| room.has_room && voters.contains(id));
            with_room
                .max_by_key(|(_, (_, room))| room.available_bytes)
                .map(|(id, _)| *id)
        };
        let Some(to) = roomiest else { return };
        info!(to = to.slot, "this node's disk is full: handing leadership on");
        if let Err(error) = self.consensus.transfer_leadership(to).await {
            warn!(%error, "leadership could not be handed on; the next look tries again");
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
        peers.extend(answers.into_iter().flatten());
        peers.retain(|_, (at, _)| at.elapsed() < Duration::from_millis(2 * ANSWER_AGE_MS_MAX));
    }

    async fn ask(&self, member: Member) -> Option<(NodeId, (Instant, Room))> {
        let mut peer = self.transport.peer(&member.addresses, Purpose::Control).ok()?;
        let ask = peer.node_status(wire::NodeStatusRequest {});
        // A peer that is down is the health monitor's business, not worth a line here.
        let status = tokio::time::timeout(Duration::from_millis(LOOK_INTERVAL_MS), ask)
            .await
            .ok()?
            .ok()?
            .into_inner();
        let room = Room {
            capacity_bytes: status.capacity_bytes,
            available_bytes: status.available_bytes,
            has_room: status.has_room,
        };
        Some((member.id, (Instant::now(), room)))
    }
}
