//! Whole nodes in one process with real connections: elections, proposals, death and return, snapshots, members.

mod aside;
mod node;
mod rates;
mod slow;

use crate::consensus::VoterSets;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorumfs_proto::call::Mutation;
use quorumfs_proto::command::{IfExists, NewInode, NewKind, Privileges, Target};
use quorumfs_proto::limits::INLINE_BYTES_MAX;
use quorumfs_proto::{
    ChunkBody, ChunkId, Command, Extent, InodeNumber, Lane, Name, NewChunk, Operation, RequestId, SessionId,
    Sha256, Timestamp,
};

use self::node::{Cluster, TestNode, eventually};
use super::open_session;
use crate::consensus::network::{Addressed, to_wire};
use crate::consensus::types::{TypeConfig, VoterId};
use crate::consensus::{AppliedEffects, BarrierError, ConsensusError, ProposeError};
use quorumfs_metadata::{ApplyResult, LogBody, LogCommand};

fn sessions(node: &TestNode) -> BTreeMap<u64, String> {
    let view = node.metadata().view().unwrap();
    let sessions = view.sessions().unwrap().into_iter();
    sessions.map(|(id, record)| (id.0, record.description)).collect()
}

/// Returns the sessions that [`Cluster::open_sessions`] has opened up to `end`.
fn opened(end: u64) -> BTreeMap<u64, String> {
    (1..end)
        .map(|number| (number, format!("session {number}")))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_agree_and_survive_the_loss_of_any_one() {
    let mut cluster = Cluster::start(3, |_| {}).await;
    let leader = cluster.leader().await;
    cluster.open_sessions(1..51).await;

    let consensus = cluster.node(leader).consensus();
    consensus.barrier().await.unwrap();
    assert_eq!(sessions(cluster.node(leader)), opened(51));
    let status = consensus.status();
    assert!(status.writable, "{:?}", status.reason);
    assert_eq!(status.leader.unwrap().id, leader);
    assert_eq!(consensus.voter_sets(), VoterSets::from_iter([consensus.voters()]));
    assert_eq!(consensus.members().len(), 3);

    let follower = cluster.others(leader)[0];
    let elsewhere = cluster.node(follower).consensus();
    let refused = elsewhere.propose(open_session(99, "nowhere")).await;
    let named = Some(cluster.node(leader).member());
    assert_eq!(
        refused,
        Err(ProposeError::NotLeader {
            leader: named.clone()
        })
    );
    assert_eq!(
        elsewhere.barrier().await,
        Err(BarrierError::NotLeader { leader: named })
    );

    let term = consensus.term();
    drop((consensus, elsewhere));
    cluster.kill(leader);
    let second = cluster.leader().await;
    assert_ne!(second, leader);
    assert!(cluster.node(second).consensus().term() > term);
    cluster.open_sessions(51..101).await;
    cluster.restart(leader).await;
    eventually("the returned node has caught up", || {
        sessions(cluster.node(leader)) == opened(101)
    })
    .await;

    // All nodes, killed at once, come back with all entries.
    for id in cluster.ids() {
        cluster.kill(id);
    }
    for id in cluster.ids() {
        cluster.restart(id).await;
    }
    let third = cluster.leader().await;
    cluster.barrier().await;
    assert_eq!(sessions(cluster.node(third)), opened(101));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_too_long_gets_a_snapshot() {
    let mut cluster = Cluster::start(3, |options| {
        options.wal.file_bytes = 32 << 10;
        options.snapshot_entries = 100;
        options.keep_log_bytes = 32 << 10;
        options.flush_age_ms = 100;
    })
    .await;
    let leader = cluster.leader().await;
    cluster.open_sessions(1..11).await;
    let others = cluster.others(leader);
    let (away, stays) = (others[0], others[1]);
    let last_seen = cluster.node(away).consensus().status().last_log.unwrap();
    cluster.kill(away);
    // openraft purges when something is acknowledged, so writes are needed. Both nodes purge, since either may lead
    // when the third comes back.
    let mut next = 11;
    let purged = |cluster: &Cluster, node| cluster.node(node).consensus().status().purged;
    while purged(&cluster, leader).min(purged(&cluster, stays)) <= Some(last_seen + 1) {
        assert!(next < 40_000, "the log is purged beyond what the absent node has");
        cluster.open_sessions(next..next + 100).await;
        next += 100;
    }
    cluster.restart(away).await;
    eventually("the returned node has caught up", || {
        sessions(cluster.node(away)) == opened(next)
    })
    .await;
    let told = cluster.node_mut(away).take_effects();
    assert!(
        told.iter()
            .any(|effects| matches!(effects, AppliedEffects::Installed { .. })),
        "it was by a snapshot"
    );
    // The installed state outlives the node, and the log continues after it.
    cluster.open_sessions(next..next + 10).await;
    cluster.kill(away);
    cluster.restart(away).await;
    eventually("the node has everything again", || {
        sessions(cluster.node(away)) == opened(next + 10)
    })
    .await;
    let bytes = cluster.node(away).consensus().status().log.bytes;
    assert!(bytes < 600 << 10, "the log is kept short: {bytes} bytes");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_node_is_replaced_by_its_next_incarnation() {
    let mut cluster = Cluster::start(3, |_| {}).await;
    cluster.open_sessions(1..21).await;
    let leader = cluster.leader().await;
    let gone = cluster.others(leader)[0];
    cluster.kill(gone);
    let fresh = cluster.start_wiped(gone).await;

    // At the old address: messages for the former incarnation are refused.
    let request = openraft::raft::VoteRequest::<TypeConfig>::new(super::vote(99, 1), None);
    let message = to_wire(&Addressed {
        to: VoterId(gone),
        body: request,
    });
    let consensus = cluster.node(fresh).consensus();
    assert!(consensus.is_empty());
    let refused = consensus.vote(message).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(consensus.is_empty());
    drop(consensus);

    let leader = cluster.leader().await;
    let consensus = cluster.node(leader).consensus();
    consensus.add_learner(cluster.node(fresh).member()).await.unwrap();
    eventually("the learner has caught up", || {
        sessions(cluster.node(fresh)) == opened(21)
    })
    .await;
    let voters: BTreeSet<_> = cluster.ids().into_iter().filter(|id| *id != gone).collect();
    consensus.change_voters(voters.clone()).await.unwrap();
    assert_eq!(consensus.voter_sets(), VoterSets::from_iter([voters]));
    drop(consensus);
    cluster.open_sessions(21..31).await;
    eventually("the new voter has everything", || {
        sessions(cluster.node(fresh)) == opened(31)
    })
    .await;
    cluster.shutdown().await;
}

/// Makes the command for a new file with `payload` inside.
pub fn create_inline(session: u64, sequence: u64, name: &str, payload: Bytes) -> (LogCommand, ChunkId) {
    let id = ChunkId {
        session: SessionId(session),
        counter: sequence,
    };
    let length = payload.len() as u32;
    let chunk = NewChunk {
        id,
        length,
        sha256: Sha256::of(&payload),
        body: ChunkBody::Inline(payload),
    };
    let create = Operation::Create {
        parent: Target::Inode(InodeNumber::ROOT),
        name: Name::new(name.as_bytes().to_vec()).unwrap(),
        inode: NewInode {
            kind: NewKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
        },
        existing: IfExists::Refuse,
    };
    let extent = Extent {
        file_offset: 0,
        length,
        chunk: id,
        chunk_offset: 0,
    };
    let write = Operation::Write {
        inode: Target::Created(0),
        extents: vec![extent],
        mtime: None,
        privileges: Privileges::Keep,
    };
    let mutation = Mutation {
        request: RequestId {
            session: SessionId(session),
            lane: Lane(0),
            sequence,
        },
        chunk_low_water: 0,
        command: Command {
            chunks: vec![chunk],
            operations: vec![create, write],
        },
    };
    let command = LogCommand {
        stamp: Timestamp::default(),
        body: LogBody::Call(mutation),
    };
    (command, id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_not_proposed_when_what_it_relies_on_has_changed_while_it_waited() {
    let mut cluster = Cluster::start(3, |_| {}).await;
    cluster.open_sessions(1..2).await;
    let (command, _) = create_inline(1, 1, "file", Bytes::from_static(b"x"));
    let refused = loop {
        let leader = cluster.leader().await;
        let consensus = cluster.node(leader).consensus();
        match consensus.propose_if(command.clone(), || false).await {
            Err(ProposeError::NotLeader { .. } | ProposeError::Unavailable { .. }) => {}
            other => break other,
        }
    };
    assert!(matches!(refused, Err(ProposeError::Overtaken)), "{refused:?}");
    // The lane has not seen the command: it is decided now.
    let result = cluster.propose(command).await;
    assert!(matches!(result, ApplyResult::Outcome(Ok(_))), "{result:?}");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_inside_commands_reaches_every_content_store_and_outlives_a_kill() {
    let mut cluster = Cluster::start(3, |options| options.flush_age_ms = 600_000).await;
    cluster.open_sessions(1..2).await;
    let payload = Bytes::from(vec![7; INLINE_BYTES_MAX as usize]);
    let mut chunks = Vec::new();
    for sequence in 1..21 {
        let (command, id) = create_inline(1, sequence, &format!("file {sequence}"), payload.clone());
        let result = cluster.propose(command.clone()).await;
        assert!(matches!(result, ApplyResult::Outcome(Ok(_))), "{result:?}");
        // Sent again, the command gets the same answer and takes effect only once (P4).
        assert_eq!(cluster.propose(command).await, result);
        chunks.push(id);
    }
    for id in cluster.ids() {
        cluster.kill(id);
    }
    for id in cluster.ids() {
        cluster.restart(id).await;
    }
    cluster.leader().await;
    cluster.barrier().await;
    for node in cluster.ids() {
        eventually("every node holds every chunk", || {
            chunks.iter().all(|id| {
                let held = cluster.node(node).content().read_whole(*id);
                held.is_ok_and(|chunk| *chunk.payload() == payload)
            })
        })
        .await;
    }
    cluster.shutdown().await;
}

/// Most time for a log to be purged.
const PURGED_WITHIN: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_leaves_the_content_that_the_log_alone_had() {
    let mut cluster = Cluster::start(3, |options| {
        options.wal.file_bytes = 32 << 10;
        options.snapshot_entries = 100;
        options.keep_log_bytes = 32 << 10;
        options.flush_age_ms = 600_000;
    })
    .await;
    cluster.open_sessions(1..2).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    let (holder, next_leader) = (others[0], others[1]);
    cluster.kill(next_leader);
    let payload = Bytes::from(vec![7; 3000]);
    let (command, chunk) = create_inline(1, 1, "file", payload.clone());
    let result = cluster.propose(command).await;
    assert!(matches!(result, ApplyResult::Outcome(Ok(_))), "{result:?}");
    let acknowledged = cluster.node(leader).consensus().status().last_log.unwrap();
    // It has acknowledged the entry, and a loss of power loses what was not flushed: only the log is left.
    cluster.kill(holder);
    std::fs::remove_dir_all(cluster.node(holder).content_directory()).unwrap();
    cluster.restart(next_leader).await;
    cluster.open_sessions(2..3).await;
    // A leader that did not write the entry itself does not report to the holder that it is committed.
    let consensus = cluster.node(leader).consensus();
    consensus.transfer_leadership(next_leader).await.unwrap();
    drop(consensus);
    eventually("the other leads", || {
        cluster.node(next_leader).consensus().is_leader()
    })
    .await;
    let mut next = 3;
    let purged = |cluster: &Cluster, node| cluster.node(node).consensus().status().purged;
    let begun = Instant::now();
    while purged(&cluster, leader).min(purged(&cluster, next_leader)) <= Some(acknowledged + 1) {
        // Logs are purged behind flushed entries, which a busy disk or processor delays.
        assert!(
            begun.elapsed() < PURGED_WITHIN,
            "the log is purged beyond what the absent node has"
        );
        cluster.open_sessions(next..next + 100).await;
        next += 100;
    }
    cluster.restart(holder).await;
    let installed = |effects: &AppliedEffects| matches!(effects, AppliedEffects::Installed { .. });
    let mut told = Vec::new();
    eventually("the returned node has caught up by a snapshot", || {
        told.extend(cluster.node_mut(holder).take_effects());
        told.iter().any(installed) && sessions(cluster.node(holder)) == opened(next)
    })
    .await;
    let applied = |effects: &AppliedEffects| matches!(effects, AppliedEffects::Entries { named, .. } if named.contains(&chunk));
    assert!(!told.iter().any(applied), "the entry itself was not applied");
    let held = cluster.node(holder).content().read_whole(chunk).unwrap();
    assert_eq!(*held.payload(), payload);
    assert!(cluster.node(holder).content().holds(chunk), "on disk");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_readers_share_few_rounds_and_see_what_was_acknowledged() {
    let mut cluster = Cluster::start(3, |_| {}).await;
    let leader = cluster.leader().await;
    let consensus = cluster.node(leader).consensus();
    for number in 1..20 {
        cluster.open_sessions(number..number + 1).await;
        let readers = (0..50).map(|_| {
            let consensus = consensus.clone();
            tokio::spawn(async move { consensus.barrier().await })
        });
        for reader in futures::future::join_all(readers).await {
            reader.unwrap().unwrap();
        }
        assert_eq!(sessions(cluster.node(leader)), opened(number + 1));
    }
    let rounds = consensus.0.barrier.rounds();
    assert!(rounds < 19 * 50 / 2, "{rounds} rounds for 950 readers");
    drop(consensus);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_a_quorum_says_so_and_serves_no_reads() {
    let mut cluster = Cluster::start(3, |_| {}).await;
    let leader = cluster.leader().await;
    cluster.open_sessions(1..2).await;
    for id in cluster.others(leader) {
        cluster.kill(id);
    }
    let consensus = cluster.node(leader).consensus();
    let read = tokio::time::timeout(Duration::from_secs(20), consensus.barrier()).await;
    assert!(matches!(read, Ok(Err(_))), "{read:?}");
    eventually("it says that no quorum answers", || !consensus.status().writable).await;
    eventually("it does not take itself for the leader", || {
        !consensus.is_leader() && consensus.leader().is_none()
    })
    .await;
    drop(consensus);
    let back = cluster.others(leader)[0];
    cluster.restart(back).await;
    cluster.open_sessions(2..3).await;
    cluster.barrier().await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_to_who_is_asked() {
    let mut cluster = Cluster::start(3, |_| {}).await;
    let leader = cluster.leader().await;
    cluster.open_sessions(1..5).await;
    let to = cluster.others(leader)[0];
    cluster
        .node(leader)
        .consensus()
        .transfer_leadership(to)
        .await
        .unwrap();
    eventually("the other leads", || cluster.node(to).consensus().is_leader()).await;
    cluster.open_sessions(5..9).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_slow_hands_leadership_on() {
    // Every flush counts as slow, so the first leader hands on leadership at once.
    let mut cluster = Cluster::start(3, |options| options.slow_flush_ms = 0).await;
    eventually("leadership was handed on", || {
        let mut terms = cluster.running().map(|node| node.consensus().term());
        terms.any(|term| term > 1)
    })
    .await;
    cluster.open_sessions(1..5).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_its_log_does_not_start_under_its_old_name() {
    let mut cluster = Cluster::start(1, |options| options.flush_age_ms = 50).await;
    cluster.open_sessions(1..5).await;
    let only = cluster.ids()[0];
    eventually("the metadata is on disk", || {
        cluster.node(only).consensus().status().durable > 0
    })
    .await;
    cluster.kill(only);
    std::fs::remove_dir_all(cluster.node(only).log_directory()).unwrap();
    let started = cluster.try_restart(only).await;
    assert!(matches!(started, Err(ConsensusError::LogLost { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_takes_more_than_may_be_under_way_waits_its_turn() {
    let mut cluster = Cluster::start(3, |options| options.admission_bytes_max = 64 << 10).await;
    let leader = cluster.leader().await;
    cluster.open_sessions(1..2).await;
    let consensus = cluster.node(leader).consensus();
    let proposals = (0..64u64).map(|number| {
        let consensus = consensus.clone();
        tokio::spawn(async move {
            let command = open_session(1000 + number, "d".repeat(30 << 10));
            consensus.propose(command).await
        })
    });
    for decided in futures::future::join_all(proposals).await {
        decided.unwrap().unwrap();
    }
    // It is larger than the bound of admission, so it is admitted alone.
    consensus
        .propose(open_session(5000, "d".repeat(200 << 10)))
        .await
        .unwrap();
    drop(consensus);
    cluster.shutdown().await;
}
