//! The report of `GET /status`.

use quorumfs_proto::Member;
use serde::Serialize;
use utoipa::ToSchema;

use crate::consensus::Role;
use crate::node::{Node, Parts};
use crate::observe::clock::ClockReport;
use quorumfs_metadata::Failure;
use quorumfs_tasks::TaskReport;

/// The identity and the addresses of a node.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatusNode {
    /// Its number in the cluster.
    slot: u16,
    /// The random id of its data folder, in hexadecimal.
    incarnation: String,
    /// The `host:port` of its gRPC service, for nodes and mounts.
    grpc_address: String,
    /// The `host:port` of its HTTP service.
    http_address: String,
}

/// The role of a node in its cluster.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StatusRole {
    /// The node has not found its cluster yet, or is opening its state.
    Starting,
    /// It receives the log and does not vote.
    Learner,
    /// It votes and follows a leader.
    Follower,
    /// It is a candidate in an election.
    Candidate,
    /// It is the leader.
    Leader,
    /// Its consensus has stopped.
    Stopped,
}

/// The content of a node.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusChunks {
    /// Chunks on this node's disk.
    held: u64,
    /// Their bytes.
    bytes: u64,
    /// Chunks that this node should hold and does not.
    missing: u64,
    /// Chunks that files refer to, on any node.
    named: u64,
}

/// The log on disk.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusLog {
    /// Its size, in bytes.
    bytes: u64,
    /// Number of flushes since the node started.
    flushes: u64,
    /// Number of entries that these flushes made durable.
    entries_flushed: u64,
}

/// The content store since the node started.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusContent {
    /// Number of flushes.
    flushes: u64,
    /// Number of chunks that these flushes made durable.
    puts: u64,
}

/// The disk of the data folder.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusSpace {
    /// Its capacity, in bytes.
    capacity_bytes: u64,
    /// Bytes available for content.
    available_bytes: u64,
    /// Whether the node accepts content and log entries.
    has_room: bool,
}

/// The session that serves HTTP requests about files.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatusClient {
    /// Whether the node has a session with its cluster; without one, requests about files fail with 503.
    connected: bool,
    /// Why there is no session.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl StatusClient {
    /// Creates the status; `obstacle` is the reason if there is no session.
    pub fn new(obstacle: Option<String>) -> StatusClient {
        StatusClient {
            connected: obstacle.is_none(),
            reason: obstacle,
        }
    }
}

/// The status of a node. A node that is still starting reports null for what it does not know.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatusReport {
    /// The id of the cluster, in hexadecimal.
    cluster_id: Option<String>,
    /// The version of the program.
    version: &'static str,
    /// This node.
    node: StatusNode,
    /// Its role.
    role: StatusRole,
    /// The leader as known to this node.
    leader: Option<StatusNode>,
    /// All members, voters and learners.
    members: Vec<StatusNode>,
    /// Whether writes can be acknowledged now, as far as this node knows.
    writable: bool,
    /// Why not, or a warning for the administrator.
    reason: Option<String>,
    /// Its Raft term; each term has at most one leader.
    term: Option<u64>,
    /// Index of the last log entry applied on this node.
    applied_index: Option<u64>,
    /// Index of the last log entry known to be committed.
    committed_index: Option<u64>,
    /// Index of the last log entry in the last snapshot.
    snapshot_index: Option<u64>,
    /// Index of the last purged log entry.
    purged_index: Option<u64>,
    /// The content of this node.
    chunks: Option<StatusChunks>,
    /// The log on disk.
    wal: Option<StatusLog>,
    /// The content store of this node.
    content: Option<StatusContent>,
    /// The disk of the data folder.
    space: Option<StatusSpace>,
    /// Number of live sessions: mounts, and nodes that serve HTTP.
    sessions: Option<usize>,
    /// The clock of this node.
    clock: Option<ClockReport>,
    /// The session that serves requests about files.
    #[schema(required)]
    client: Option<StatusClient>,
    /// The background tasks. A task that fails is restarted.
    tasks: Vec<TaskReport>,
}

/// Returns the status of `node`.
pub fn status(node: &Node) -> StatusReport {
    let nothing = StatusReport {
        cluster_id: node.membership().map(|known| known.cluster.to_string()),
        version: env!("CARGO_PKG_VERSION"),
        node: about(node.own()),
        role: StatusRole::Starting,
        leader: None,
        members: Vec::new(),
        writable: false,
        reason: None,
        term: None,
        applied_index: None,
        committed_index: None,
        snapshot_index: None,
        purged_index: None,
        chunks: None,
        wal: None,
        content: None,
        space: None,
        sessions: None,
        clock: None,
        client: None,
        tasks: node.tasks().report(),
    };
    let Some(parts) = node.parts() else {
        return StatusReport {
            reason: Some(node.not_ready()),
            ..nothing
        };
    };
    let consensus = parts.consensus.status();
    let room = parts.space.own();
    let recovery = parts.recovery.status();
    let content = parts.content.flush_counts();
    let full = consensus.writable && !parts.space.quorum_has_room();
    let unreached = match consensus.writable {
        true => Vec::new(),
        false => parts.health.unreached(),
    };
    let reason = match &node.warning().or(consensus.reason) {
        Some(reason) if unreached.is_empty() => Some(reason.clone()),
        Some(reason) => Some(format!(
            "{reason}; this node cannot reach {}",
            unreached.join(" and ")
        )),
        None if full => Some("the disks of too many nodes are full: no quorum has free space".to_string()),
        None => None,
    };
    StatusReport {
        cluster_id: Some(parts.cluster.to_string()),
        role: consensus.role.into(),
        leader: parts.consensus.leader().as_ref().map(about),
        members: parts.consensus.members().iter().map(about).collect(),
        writable: consensus.writable && !full,
        reason,
        term: Some(consensus.term),
        applied_index: consensus.applied,
        committed_index: consensus.committed,
        snapshot_index: consensus.snapshot,
        purged_index: consensus.purged,
        chunks: Some(StatusChunks {
            held: recovery.held_chunks,
            bytes: recovery.held_bytes,
            missing: recovery.missing_chunks,
            named: recovery.named_chunks,
        }),
        wal: Some(StatusLog {
            bytes: consensus.log.bytes,
            flushes: consensus.log.flushes,
            entries_flushed: consensus.log.entries_flushed,
        }),
        content: Some(StatusContent {
            flushes: content.flushes,
            puts: content.puts,
        }),
        space: Some(StatusSpace {
            capacity_bytes: room.capacity_bytes,
            available_bytes: room.available_bytes,
            has_room: room.has_room,
        }),
        sessions: living_sessions(parts).ok(),
        clock: Some(parts.health.clock().report()),
        ..nothing
    }
}

impl From<Role> for StatusRole {
    fn from(role: Role) -> StatusRole {
        match role {
            Role::Learner => StatusRole::Learner,
            Role::Follower => StatusRole::Follower,
            Role::Candidate => StatusRole::Candidate,
            Role::Leader => StatusRole::Leader,
            Role::Stopped => StatusRole::Stopped,
        }
    }
}

fn about(member: &Member) -> StatusNode {
    StatusNode {
        slot: member.id.slot,
        incarnation: format!("{:016x}", member.id.incarnation),
        grpc_address: member.addresses.grpc.clone(),
        http_address: member.addresses.http.clone(),
    }
}

fn living_sessions(parts: &Parts) -> Result<usize, Failure> {
    let sessions = parts.metadata.view()?.sessions()?;
    Ok(sessions
        .iter()
        .filter(|(_, record)| record.ended.is_none())
        .count())
}
