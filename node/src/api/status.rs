//! What `/status` tells: collected here, encoded by the edge.

use serde_json::{Value, json};

use crate::metadata::Failure;
use crate::node::{Node, Parts};

/// Who this node is, what it believes, and whether writes can be acknowledged now, and if not, why not.
pub fn status(node: &Node) -> Value {
    let own = node.own();
    let about_node = json!({
        "slot": own.id.slot,
        "incarnation": format!("{:016x}", own.id.incarnation),
        "grpc_address": own.addresses.grpc,
        "http_address": own.addresses.http,
    });
    let Some(parts) = node.parts() else {
        return json!({
            "cluster_id": node.membership().map(|known| known.cluster.to_string()),
            "node": about_node,
            "role": "starting",
            "leader": null,
            "writable": false,
            "reason": node.not_ready(),
        });
    };
    let consensus = parts.consensus.status();
    let room = parts.space.own();
    let recovery = parts.recovery.status();
    let content = parts.content.flush_counts();
    let living = living_sessions(parts).ok();
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
    let member = |member: &quorumfs_proto::Member| {
        json!({
            "slot": member.id.slot,
            "incarnation": format!("{:016x}", member.id.incarnation),
            "grpc_address": member.addresses.grpc,
            "http_address": member.addresses.http,
        })
    };
    json!({
        "cluster_id": parts.cluster.to_string(),
        "version": env!("CARGO_PKG_VERSION"),
        "node": about_node,
        "role": consensus.role,
        "leader": parts.consensus.leader().as_ref().map(member),
        "members": parts.consensus.members().iter().map(member).collect::<Vec<_>>(),
        "writable": consensus.writable && !full,
        "reason": reason,
        "term": consensus.term,
        "applied_index": consensus.applied,
        "committed_index": consensus.committed,
        "snapshot_index": consensus.snapshot,
        "purged_index": consensus.purged,
        "chunks": {
            "held": recovery.held_chunks,
            "bytes": recovery.held_bytes,
            "missing": recovery.missing_chunks,
            "named": recovery.named_chunks,
        },
        "wal": {
            "bytes": consensus.log.bytes,
            "flushes": consensus.log.flushes,
            "entries_flushed": consensus.log.entries_flushed,
        },
        "content": { "flushes": content.flushes, "puts": content.puts },
        "space": {
            "capacity_bytes": room.capacity_bytes,
            "available_bytes": room.available_bytes,
            "has_room": room.has_room,
        },
        "sessions": living,
        "clock": parts.health.clock().report(),
    })
}

fn living_sessions(parts: &Parts) -> Result<usize, Failure> {
    let sessions = parts.metadata.view()?.sessions()?;
    Ok(sessions
        .iter()
        .filter(|(_, record)| record.ended.is_none())
        .count())
}
