//! Free disk space of the nodes. The leader answers ENOSPC before it proposes if fewer than f + 1 voters have space.
//!
//! Each node checks its own disk, for content and for the log. The leader also asks the other nodes; if its own disk
//! is full while a quorum has space, it transfers leadership, because it could not log what the others can store. A
//! follower relies on its leader's report for the cluster.
//!
//! Reports expire. A voter without a recent report counts as full: with one node down and another full there is no
//! quorum of copies, which is ENOSPC. This applies only while a quorum answers; too few live voters is not a lack of
//! space, and calls wait (P6). In the first seconds of a leader, voters without a report count as having space.

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

/// Interval at which the disk is checked and nodes are asked.
const CHECK_INTERVAL_MS: u64 = 500;
/// Time for which a report is valid, and for which a new leader waits for reports.
const ANSWER_AGE_MS_MAX: u64 = 5_000;
/// Free space for content, above the reserve for deletes, below which a node is full.
const SPACE_BYTES_MIN: u64 = 4 << 20;
/// Free space above which a full node accepts content again; larger, so that the state does not flap.
const RESUME_BYTES: u64 = 16 << 20;

/// Disk space of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeSpace {
    /// Size of the filesystem with the data folder.
    pub capacity_bytes: u64,
    /// Bytes available for content.
    pub available_bytes: u64,
    /// Whether the node accepts content and log entries.
    pub has_room: bool,
}

/// Whether f + 1 voters have space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QuorumSpace {
    /// A quorum has space.
    Available,
    /// A quorum answers, and too few of its nodes have space.
    Full,
    /// Too few nodes answer.
    Unknown,
}

/// Evaluates the recent reports of whether nodes have space: a majority of each active configuration must have space.
fn quorum_space(voter_sets: &VoterSets, reports: &BTreeMap<NodeId, bool>) -> QuorumSpace {
    if voter_sets.is_quorum(|voter| reports.get(voter) == Some(&true)) {
        QuorumSpace::Available
    } else if voter_sets.is_quorum(|voter| reports.contains_key(voter)) {
        QuorumSpace::Full
    } else {
        QuorumSpace::Unknown
    }
}

/// A report of a leader.
#[derive(Clone, Copy, Debug)]
struct LeaderReport {
    leader: NodeId,
    at: Instant,
    is_full: bool,
}

/// Tracks the free space of this node and the cluster.
pub struct SpaceMonitor {
    consensus: Consensus,
    content: Arc<ContentStore>,
    placement: Arc<Placement>,
    transport: Arc<Transport>,
    own: Mutex<NodeSpace>,
    peers: Mutex<HashMap<NodeId, (Instant, NodeSpace)>>,
    /// When this node began to ask the others as leader.
    leading_since: Mutex<Option<Instant>>,
    /// The last report of a leader, on a follower.
    leader_report: Mutex<Option<LeaderReport>>,
}

impl SpaceMonitor {
    /// Creates the monitor and checks the disk of this node once.
    pub fn new(
        consensus: Consensus,
        content: Arc<ContentStore>,
        placement: Arc<Placement>,
        transport: Arc<Transport>,
    ) -> Arc<SpaceMonitor> {
        let own = Mutex::new(NodeSpace {
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
            leading_since: Mutex::new(None),
            leader_report: Mutex::new(None),
        };
        monitor.check_own_disk();
        Arc::new(monitor)
    }

    /// Checks periodically; never returns.
    pub async fn run(self: Arc<Self>) {
        loop {
            self.check_own_disk();
            if self.consensus.is_leader() {
                self.leading_since.lock().get_or_insert_with(Instant::now);
                self.ask_peers().await;
                self.transfer_leadership_if_full().await;
            } else {
                *self.leading_since.lock() = None;
                self.ask_leader().await;
            }
            tokio::time::sleep(Duration::from_millis(CHECK_INTERVAL_MS)).await;
        }
    }

    /// Returns the disk space of this node.
    pub fn own(&self) -> NodeSpace {
        *self.own.lock()
    }

    /// Notes that the disk of `node` refused a write: it counts as full until the next report.
    pub fn note_disk_full(&self, node: NodeId) {
        if node == self.consensus.id() {
            self.own.lock().has_room = false;
        } else if let Some((_, room)) = self.peers.lock().get_mut(&node) {
            room.has_room = false;
        }
    }

    /// Returns `false` if a quorum answers and too few of its nodes have space.
    pub fn quorum_has_room(&self) -> bool {
        self.quorum_space_now() != QuorumSpace::Full
    }

    fn quorum_space_now(&self) -> QuorumSpace {
        if !self.consensus.is_leader() {
            let leader = self.consensus.leader().map(|member| member.id);
            let report = *self.leader_report.lock();
            return match report.filter(|report| Some(report.leader) == leader && is_fresh(report.at)) {
                Some(report) if report.is_full => QuorumSpace::Full,
                _ => QuorumSpace::Unknown,
            };
        }
        let voter_sets = self.consensus.voter_sets();
        let mut reports: BTreeMap<NodeId, bool> = self
            .recent_reports()
            .map(|(id, room)| (id, room.has_room))
            .collect();
        reports.insert(self.consensus.id(), self.own().has_room);
        if self.leading_since.lock().is_none_or(is_fresh) {
            for voter in voter_sets.iter() {
                reports.entry(*voter).or_insert(true);
            }
        }
        quorum_space(&voter_sets, &reports)
    }

    /// Returns the reports of other nodes that have not expired.
    fn recent_reports(&self) -> impl Iterator<Item = (NodeId, NodeSpace)> {
        let peers = self.peers.lock();
        let fresh = peers.iter().filter(|(_, (at, _))| is_fresh(*at));
        let fresh: Vec<(NodeId, NodeSpace)> = fresh.map(|(id, (_, room))| (*id, *room)).collect();
        fresh.into_iter()
    }

    /// Returns the capacity and the free space of the cluster for content, in bytes: those of the smallest node, times
    /// the number of nodes, divided by the number of copies.
    pub fn cluster_bytes(&self) -> (u64, u64) {
        let own = self.own();
        let snapshot = self.placement.snapshot();
        let (nodes, copies) = snapshot.newest().map_or((1, 1), |layout| {
            (layout.voters().len() as u64, layout.copies() as u64)
        });
        let of_cluster = |bytes: u64| (u128::from(bytes) * u128::from(nodes) / u128::from(copies)) as u64;
        let mut rooms: Vec<NodeSpace> = self.recent_reports().map(|(_, room)| room).collect();
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

    fn check_own_disk(&self) {
        match self.content.space() {
            Ok(space) => {
                let mut own = self.own.lock();
                let needed = if own.has_room {
                    SPACE_BYTES_MIN
                } else {
                    RESUME_BYTES
                };
                let has_room = space.room_bytes >= needed && self.consensus.has_room();
                if own.has_room && !has_room {
                    warn!(
                        available_bytes = space.room_bytes,
                        "the disk is full; only changes that free space are accepted"
                    );
                } else if !own.has_room && has_room {
                    info!(
                        available_bytes = space.room_bytes,
                        "the disk has free space again"
                    );
                }
                *own = NodeSpace {
                    capacity_bytes: space.capacity_bytes,
                    available_bytes: space.room_bytes,
                    has_room,
                };
            }
            Err(error) => warn!(%error, "cannot determine the free disk space"),
        }
    }

    async fn transfer_leadership_if_full(&self) {
        if self.own().has_room || self.quorum_space_now() != QuorumSpace::Available {
            return;
        }
        let voter_sets = self.consensus.voter_sets();
        let mut with_room: Vec<(NodeId, NodeSpace)> = self
            .recent_reports()
            .filter(|(id, room)| room.has_room && voter_sets.contains(id))
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
            Ok(to) => info!(
                to = to.slot,
                "the disk of this node is full; transferring leadership"
            ),
            Err(error) => {
                warn!(%error, "the disk of this node is full, but leadership cannot be transferred; trying again")
            }
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
            let room = NodeSpace {
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
            *self.leader_report.lock() = Some(LeaderReport {
                leader,
                at: Instant::now(),
                is_full: status.cluster_full,
            });
        }
    }

    async fn ask(&self, member: Member) -> Option<(NodeId, wire::NodeStatusResponse)> {
        let mut peer = self.transport.peer(&member.addresses, Purpose::Control).ok()?;
        let ask = peer.node_status(wire::NodeStatusRequest {});
        // The health monitor reports peers that are down.
        let status = tokio::time::timeout(Duration::from_millis(CHECK_INTERVAL_MS), ask)
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

    fn reports(with_room: &[u16], full: &[u16]) -> BTreeMap<NodeId, bool> {
        let with_room = with_room.iter().map(|slot| (node(*slot), true));
        with_room
            .chain(full.iter().map(|slot| (node(*slot), false)))
            .collect()
    }

    #[test]
    fn too_few_nodes_with_space_in_an_answering_quorum_is_full() {
        let three = VoterSets::from_iter([nodes(&[1, 2, 3])]);
        assert_eq!(
            quorum_space(&three, &reports(&[1, 2, 3], &[])),
            QuorumSpace::Available
        );
        assert_eq!(
            quorum_space(&three, &reports(&[1, 2], &[3])),
            QuorumSpace::Available
        );
        assert_eq!(quorum_space(&three, &reports(&[1], &[2, 3])), QuorumSpace::Full);
        assert_eq!(
            quorum_space(&three, &reports(&[1, 3], &[])),
            QuorumSpace::Available,
            "one is down"
        );
        assert_eq!(
            quorum_space(&three, &reports(&[1], &[2])),
            QuorumSpace::Full,
            "one is down, one full: no other node can take the second copy"
        );
        let five = VoterSets::from_iter([nodes(&[1, 2, 3, 4, 5])]);
        assert_eq!(quorum_space(&five, &reports(&[1, 2], &[3])), QuorumSpace::Full);
        assert_eq!(
            quorum_space(&five, &reports(&[1, 2, 3], &[4])),
            QuorumSpace::Available
        );
    }

    #[test]
    fn without_an_answering_quorum_the_space_is_unknown() {
        let three = VoterSets::from_iter([nodes(&[1, 2, 3])]);
        assert_eq!(quorum_space(&three, &reports(&[1], &[])), QuorumSpace::Unknown);
        assert_eq!(quorum_space(&three, &reports(&[], &[1])), QuorumSpace::Unknown);
        let five = VoterSets::from_iter([nodes(&[1, 2, 3, 4, 5])]);
        assert_eq!(quorum_space(&five, &reports(&[1], &[2])), QuorumSpace::Unknown);
    }

    #[test]
    fn every_active_configuration_needs_room() {
        let joint = VoterSets::from_iter([nodes(&[1, 2, 3]), nodes(&[1, 4, 5])]);
        assert_eq!(
            quorum_space(&joint, &reports(&[1, 2, 4], &[])),
            QuorumSpace::Available
        );
        assert_eq!(quorum_space(&joint, &reports(&[1, 2], &[4])), QuorumSpace::Full);
        assert_eq!(
            quorum_space(&joint, &reports(&[1, 2, 3], &[])),
            QuorumSpace::Unknown
        );
    }
}
