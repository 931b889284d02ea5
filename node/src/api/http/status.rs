//! What `/status` tells: collected here, encoded by the edge.

use quorumfs_proto::Member;
use serde::Serialize;
use utoipa::ToSchema;

use crate::consensus::Role;
use crate::node::{Node, Parts};
use crate::observe::clock::ClockReport;
use quorumfs_tasks::TaskReport;
use quorumfs_metadata::Failure;

/// A node: who it is and where.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatusNode {
    /// Its number in the cluster.
    slot: u16,
    /// The random id of its data folder, in hexadecimal.
    incarnation: String,
    /// Where nodes and mounts reach it.
    grpc_address: String,
    /// Where it serves HTTP.
    http_address: String,
}

/// What a node is in its cluster.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StatusRole {
    /// It does not know its cluster yet, or opens its state.
    Starting,
    /// Gets the log, does not vote.
    Learner,
    /// Votes and follows.
    Follower,
    /// Stands for election.
    Candidate,
    /// Leads.
    Leader,
    /// Has stopped.
    Stopped,
}

/// The content here.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusChunks {
    /// Chunks on this node's disk.
    held: u64,
    /// Bytes of them.
    bytes: u64,
    /// Chunks that should be and are not.
    missing: u64,
    /// Chunks that files name, wherever they lie.
    named: u64,
}

/// The log on disk.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusLog {
    /// Its bytes.
    bytes: u64,
    /// Times it was flushed since the node started.
    flushes: u64,
    /// Entries that became durable by it.
    entries_flushed: u64,
}

/// What was done to the content store since the node started.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusContent {
    /// Times it was flushed.
    flushes: u64,
    /// Chunks that became durable by it.
    puts: u64,
}

/// The disk of the data folder.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct StatusSpace {
    /// Its bytes.
    capacity_bytes: u64,
    /// Those that content may still take.
    available_bytes: u64,
    /// Whether the node takes more.
    has_room: bool,
}

/// The way from HTTP requests to the files.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatusClient {
    /// Whether the node has a session with its cluster; until then no request about files can be served.
    connected: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl StatusClient {
    /// Connected, or why not.
    pub fn new(obstacle: Option<String>) -> StatusClient {
        StatusClient {
            connected: obstacle.is_none(),
            reason: obstacle,
        }
    }
}

/// Who this node is, what it believes, and whether writes can be acknowledged now. What a node that is still starting
/// cannot know is null.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatusReport {
    /// The cluster's name, in hexadecimal.
    cluster_id: Option<String>,
    /// The version of the program.
    version: &'static str,
    /// Who answers.
    node: StatusNode,
    /// What it is.
    role: StatusRole,
    /// Whom it believes to lead.
    leader: Option<StatusNode>,
    /// All members, voters and learners.
    members: Vec<StatusNode>,
    /// Whether writes can be acknowledged now, as far as this node can tell.
    writable: bool,
    /// Why not, or what an administrator should know.
    reason: Option<String>,
    /// Its term; in each there is at most one leader.
    term: Option<u64>,
    /// The last log entry that took effect here.
    applied_index: Option<u64>,
    /// The last log entry known to be committed.
    committed_index: Option<u64>,
    /// The log entry that the last snapshot goes up to.
    snapshot_index: Option<u64>,
    /// The log entry up to which the log was purged.
    purged_index: Option<u64>,
    /// The content here.
    chunks: Option<StatusChunks>,
    /// The log on disk.
    wal: Option<StatusLog>,
    /// The content store's flushes.
    content: Option<StatusContent>,
    /// The disk.
    space: Option<StatusSpace>,
    /// Clients that are alive: mounts, and nodes on behalf of HTTP.
    sessions: Option<usize>,
    /// The time.
    clock: Option<ClockReport>,
    /// Whether requests about files can be served.
    #[schema(required)]
    client: Option<StatusClient>,
    /// The loops that heal, watch and tidy up. One that fails is started again.
    tasks: Vec<TaskReport>,
}

/// See [`StatusReport`].
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
            "{reason}; this node does not reach {}",
            unreached.join(" and ")
        )),
        None if full => Some("fewer than a quorum of nodes have room on their disks".to_string()),
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
