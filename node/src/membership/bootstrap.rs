//! The creation of a cluster, and how a node finds the cluster it belongs to.
//!
//! A node whose folder belongs to no cluster asks every configured member for its identity, repeatedly:
//!
//! - All answer and all are empty: they create the cluster. Its id is a digest of all their ids, so each computes it
//!   alone and all agree; the first members are the ones seen.
//! - One answers that it belongs to a cluster that has this very incarnation among its founders: this node was there
//!   when it was created, and belongs to it.
//! - One answers that it belongs to a cluster that does not have it: this folder is empty although its cluster is
//!   alive. It may be a wiped disk that has lost its vote, so it never votes as its former incarnation. It asks the
//!   leader to accept it as a new incarnation (`membership`), and reports why if it is refused.
//! - A node that was told to join, or whose folder belonged to another incarnation, never creates a cluster.
//! - A leader invites it.
//!
//! Why two nodes that see different empty members cannot create two working clusters: a founder binds its folder to one
//! cluster before it says so, and answers for no other from then on.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::{ClusterId, Member};
use quorumfs_wire as wire;
use sha2::Digest as _;
use tracing::{error, info, warn};

use super::identity::{DataFolder, IdentityError, Membership};
use crate::config::Config;
use crate::logging::RecentMessages;
use crate::transport::{Purpose, Transport};
use quorumfs_metadata::FEATURE_LEVEL;

/// Interval at which the members are asked.
const ASK_INTERVAL_MS: u64 = 300;
/// Interval at which the members are asked whether they still belong to the same cluster.
const STRANGER_INTERVAL_MS: u64 = 5_000;
/// Most time for the leader to accept a node: an entry of the log.
const JOIN_TIMEOUT_MS: u64 = 10_000;
/// Most nodes asked for acceptance in one round: all members, and those that they name.
const JOIN_ASKED_MAX: usize = 16;
/// Most time for a member to answer.
const ANSWER_TIMEOUT_MS: u64 = 1_000;

/// What this node is waiting for, for `/status`.
pub type WaitReason = Arc<Mutex<Option<String>>>;

/// The message of a leader that this node was accepted.
pub type Invitation = Arc<Mutex<Option<Membership>>>;

/// Finds the cluster that this node belongs to; asks the members until it is known. Durable when it returns.
pub async fn find_membership(
    config: &Config,
    folder: &DataFolder,
    own: &Member,
    transport: &Transport,
    waiting_for: &WaitReason,
    invitation: &Invitation,
) -> Result<Membership, IdentityError> {
    if let Some(membership) = folder.membership() {
        return Ok(membership);
    }
    info!(members = ?config.members, "data folder is new; looking for the other members");
    let mut recent = RecentMessages::default();
    loop {
        let answers = ask_all(config, own, transport).await;
        let invited = invitation.lock().take();
        let decision = match invited {
            Some(membership) => Decision::Bind(membership),
            None => decide(&answers, own, config, folder.is_fresh()),
        };
        let decision = match decision {
            Decision::Join { cluster, at, reason } => match join(own, cluster, at, transport).await {
                Ok(membership) => Decision::Bind(membership),
                Err(refusal) => Decision::Wait(format!("{reason}; it asks to be accepted: {refusal}")),
            },
            decided => decided,
        };
        match decision {
            // `join` was tried above.
            Decision::Join { reason, .. } => *waiting_for.lock() = Some(reason),
            Decision::Bind(membership) => {
                folder.bind(membership.clone())?;
                info!(cluster = %membership.cluster, "this node belongs to a cluster");
                *waiting_for.lock() = None;
                return Ok(membership);
            }
            Decision::Wait(reason) => {
                if recent.is_new(&reason) {
                    warn!("not serving yet: {reason}");
                }
                *waiting_for.lock() = Some(reason);
            }
        }
        tokio::time::sleep(Duration::from_millis(ASK_INTERVAL_MS)).await;
    }
}

/// Logs repeatedly if the configured members belong to another cluster than this node's folder. Such a node cannot talk
/// to them (every request between nodes names its cluster), and its administrator should know why. It does not stop:
/// from the view of the others this node may be the wrong one.
pub async fn watch_for_strangers(
    config: Config,
    own: Member,
    cluster: ClusterId,
    transport: std::sync::Arc<Transport>,
    waiting_for: WaitReason,
) {
    loop {
        let answers = ask_all(&config, &own, &transport).await;
        let strange = stranger(&answers, &own, cluster);
        let previous = std::mem::replace(&mut *waiting_for.lock(), strange.clone());
        if let Some(reason) = strange.filter(|reason| previous.as_ref() != Some(reason)) {
            error!("{reason}");
        }
        tokio::time::sleep(Duration::from_millis(STRANGER_INTERVAL_MS)).await;
    }
}

/// Returns the problem if, of the other members that answer, more belong to one other cluster than to this one.
fn stranger(answers: &[Result<Answer, String>], own: &Member, cluster: ClusterId) -> Option<String> {
    let others = || answers.iter().flatten().filter(|answer| answer.node.id != own.id);
    let same = others().filter(|answer| answer.cluster == Some(cluster)).count();
    let strange: Vec<&Answer> = others()
        .filter(|answer| answer.cluster.is_some_and(|other| other != cluster))
        .collect();
    let first = strange.first().filter(|_| strange.len() > same)?;
    let other = first.cluster?;
    Some(format!(
        "this node's data folder belongs to cluster {cluster}, but {} belongs to cluster {other}: give this node the \
         folder it had in that cluster, or an empty one",
        first.node.addresses.grpc
    ))
}

/// A member's answer about itself.
#[derive(Clone, Debug)]
struct Answer {
    node: Member,
    cluster: Option<ClusterId>,
    empty: bool,
    founders: Vec<Member>,
}

async fn ask_all(config: &Config, own: &Member, transport: &Transport) -> Vec<Result<Answer, String>> {
    let asked = config.members.iter().map(|address| async move {
        if address == &config.grpc {
            return Ok(Answer {
                node: own.clone(),
                cluster: None,
                empty: true,
                founders: Vec::new(),
            });
        }
        let ask = async {
            let mut peer = transport
                .peer_at(address, Purpose::Control)
                .map_err(|e| e.to_string())?;
            let request = wire::HelloRequest {
                from: Some(own.clone().into()),
                cluster_id: bytes::Bytes::new(),
            };
            let answer = peer
                .hello(request)
                .await
                .map_err(|status| status.message().to_string())?
                .into_inner();
            let node = answer.node.ok_or("answered without saying who it is")?;
            Ok(Answer {
                node: Member::try_from(node).map_err(|e| e.to_string())?,
                cluster: ClusterId::from_bytes(&answer.cluster_id),
                empty: answer.empty,
                founders: answer
                    .members
                    .into_iter()
                    .filter_map(|m| Member::try_from(m).ok())
                    .collect(),
            })
        };
        tokio::time::timeout(Duration::from_millis(ANSWER_TIMEOUT_MS), ask)
            .await
            .unwrap_or_else(|_| Err("does not answer".to_string()))
            .map_err(|reason| format!("{address}: {reason}"))
    });
    futures::future::join_all(asked).await
}

/// Asks the leader of `cluster`, which one of the nodes `at` should know, to accept this node.
async fn join(
    own: &Member,
    cluster: ClusterId,
    at: Vec<String>,
    transport: &Transport,
) -> Result<Membership, String> {
    let mut asked = BTreeSet::new();
    let mut to_ask: VecDeque<String> = at.into();
    let mut refusals = Vec::new();
    while let Some(address) = to_ask.pop_front() {
        if asked.len() > JOIN_ASKED_MAX || !asked.insert(address.clone()) {
            continue;
        }
        let ask = async {
            let mut peer = transport
                .peer_at(&address, Purpose::Control)
                .map_err(|error| error.to_string())?;
            let request = wire::JoinRequest {
                node: Some(own.clone().into()),
                cluster_id: bytes::Bytes::copy_from_slice(&cluster.0),
                feature_level: FEATURE_LEVEL,
            };
            let answer = peer.join(request).await;
            answer
                .map(tonic::Response::into_inner)
                .map_err(|status| status.message().to_string())
        };
        let limit = Duration::from_millis(JOIN_TIMEOUT_MS);
        match tokio::time::timeout(limit, ask).await {
            Ok(Ok(answer)) if answer.not_leader => {
                if !answer.leader.is_empty() {
                    to_ask.push_front(answer.leader);
                }
            }
            Ok(Ok(_)) => {
                // No founders: no node may take this node for one of those that created the cluster.
                return Ok(Membership {
                    cluster,
                    founders: Vec::new(),
                });
            }
            Ok(Err(refusal)) => refusals.push(format!("{address}: {refusal}")),
            Err(_) => refusals.push(format!("{address}: no answer within {JOIN_TIMEOUT_MS} ms")),
        }
    }
    match refusals.is_empty() {
        true => Err("no leader is known".to_string()),
        false => Err(refusals.join("; ")),
    }
}

enum Decision {
    Bind(Membership),
    /// `cluster` exists without this node; its nodes `at` know its leader.
    Join {
        cluster: ClusterId,
        at: Vec<String>,
        reason: String,
    },
    Wait(String),
}

fn decide(
    answers: &[Result<Answer, String>],
    own: &Member,
    config: &Config,
    folder_is_fresh: bool,
) -> Decision {
    let heard: Vec<&Answer> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    for answer in &heard {
        if let Some(cluster) = answer.cluster
            && answer.founders.iter().any(|founder| founder.id == own.id)
        {
            return Decision::Bind(Membership {
                cluster,
                founders: answer.founders.clone(),
            });
        }
    }
    if let Some((cluster, answer)) = heard.iter().find_map(|answer| Some((answer.cluster?, answer))) {
        let of_it = heard.iter().filter(|answer| answer.cluster == Some(cluster));
        let reason = match config.founds && folder_is_fresh {
            true => format!(
                "this node's data folder is empty although its cluster {cluster} exists (node {} belongs to it); \
                 it does not vote with what it may have forgotten",
                answer.node.addresses.grpc
            ),
            false => format!("this node does not belong to cluster {cluster} yet"),
        };
        return Decision::Join {
            cluster,
            at: of_it.map(|answer| answer.node.addresses.grpc.clone()).collect(),
            reason,
        };
    }
    if !config.founds || !folder_is_fresh {
        let silent = answers.iter().find_map(|answer| answer.as_ref().err());
        return Decision::Wait(match silent {
            Some(silent) => {
                format!("this node joins a running cluster, and none of its nodes answers; {silent}")
            }
            None => "this node joins a running cluster, but no node that answers belongs to one".to_string(),
        });
    }
    if let Some(silent) = answers.iter().find_map(|answer| answer.as_ref().err()) {
        return Decision::Wait(format!("the cluster is made once all members answer; {silent}"));
    }
    for (at, answer) in heard.iter().enumerate() {
        if usize::from(answer.node.id.slot) != at + 1 {
            return Decision::Wait(format!(
                "{} says it is slot {}, but is number {} in --members; give all nodes the same list",
                config.members[at],
                answer.node.id.slot,
                at + 1
            ));
        }
        if !answer.empty {
            return Decision::Wait(format!(
                "{} is not empty, though it belongs to no cluster",
                config.members[at]
            ));
        }
    }
    let founders: Vec<Member> = heard.iter().map(|answer| answer.node.clone()).collect();
    let mut digest = sha2::Sha256::new();
    for founder in &founders {
        digest.update(founder.id.slot.to_be_bytes());
        digest.update(founder.id.incarnation.to_be_bytes());
    }
    let mut cluster = [0; 16];
    cluster.copy_from_slice(&digest.finalize()[..16]);
    Decision::Bind(Membership {
        cluster: ClusterId(cluster),
        founders,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_proto::{Addresses, NodeId};

    fn member(slot: u16, incarnation: u64) -> Member {
        let addresses = Addresses {
            grpc: format!("127.0.0.1:{}", 3029 + slot),
            http: "127.0.0.1:1".into(),
        };
        Member {
            id: NodeId { slot, incarnation },
            addresses,
        }
    }

    fn empty(slot: u16) -> Result<Answer, String> {
        Ok(Answer {
            node: member(slot, 10 + u64::from(slot)),
            cluster: None,
            empty: true,
            founders: vec![],
        })
    }

    fn config() -> Config {
        use clap::Parser as _;
        let members = "127.0.0.1:3030,127.0.0.1:3031,127.0.0.1:3032";
        let args = [
            "n",
            "--slot",
            "1",
            "--members",
            members,
            "--http",
            "127.0.0.1:1",
            "--data",
            "/d",
        ];
        crate::config::Settings::try_parse_from(args)
            .unwrap()
            .resolve()
            .unwrap()
    }

    #[test]
    fn a_cluster_is_made_only_when_all_answer_and_all_are_empty() {
        let own = member(1, 11);
        let Decision::Bind(made) = decide(&[empty(1), empty(2), empty(3)], &own, &config(), true) else {
            panic!("waits")
        };
        assert_eq!(made.founders.len(), 3);
        // Every member computes the same cluster.
        let Decision::Bind(same) = decide(&[empty(1), empty(2), empty(3)], &member(3, 13), &config(), true)
        else {
            panic!("waits")
        };
        assert_eq!(made, same);
        let silent = Err("127.0.0.1:3032: does not answer".to_string());
        assert!(
            matches!(decide(&[empty(1), empty(2), silent], &own, &config(), true), Decision::Wait(r) if r.contains("3032"))
        );
        assert!(
            matches!(decide(&[empty(1), empty(3), empty(2)], &own, &config(), true), Decision::Wait(r) if r.contains("slot"))
        );
    }

    #[test]
    fn a_foreign_folder_is_told_from_a_foreign_neighbour() {
        let of = |slot, cluster| {
            let cluster = Some(ClusterId([cluster; 16]));
            let node = member(slot, 10 + u64::from(slot));
            Ok(Answer {
                node,
                cluster,
                empty: false,
                founders: vec![],
            })
        };
        let own = member(3, 13);
        let strange = stranger(&[of(1, 7), of(2, 7), empty(3)], &own, ClusterId([8; 16]));
        assert!(strange.is_some_and(|reason| reason.contains("belongs to cluster")));
        assert_eq!(
            stranger(&[of(1, 8), of(2, 7), empty(3)], &own, ClusterId([8; 16])),
            None
        );
        assert_eq!(
            stranger(&[of(1, 8), of(2, 8), empty(3)], &own, ClusterId([8; 16])),
            None
        );
    }

    #[test]
    fn a_wiped_node_asks_and_a_founder_belongs() {
        let founders = vec![member(1, 11), member(2, 12), member(3, 13)];
        let made = Ok(Answer {
            node: member(2, 12),
            cluster: Some(ClusterId([1; 16])),
            empty: false,
            founders,
        });
        let answers = [empty(1), made, empty(3)];
        assert!(matches!(
            decide(&answers, &member(1, 11), &config(), true),
            Decision::Bind(_)
        ));
        let wiped = decide(&answers, &member(1, 99), &config(), true);
        assert!(matches!(wiped, Decision::Join { reason, at, .. }
            if reason.contains("does not vote") && at == ["127.0.0.1:3031"]));
        // With content of an earlier incarnation a node creates no cluster, even if all others would.
        let all_empty = [empty(1), empty(2), empty(3)];
        assert!(matches!(
            decide(&all_empty, &member(1, 11), &config(), false),
            Decision::Wait(_)
        ));
    }
}
