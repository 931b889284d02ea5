//! The members of the cluster, and how they change during operation.
//!
//! A node is accepted as a learner: it gets the log and new content, and fetches the rest. When it has both, one joint
//! change makes it a voter, in the place of the earlier incarnation of its slot if there is one. Nodes in new slots
//! wait until the number of voters stays odd (an even number tolerates no more failures than the odd one below it), and
//! become voters together.
//!
//! Invariants: a change of voters is proposed only if enough new voters hold everything that they will have to hold, of
//! what was named a moment before, that f + 1 of them have each chunk, or if no chunk has fewer copies after the change
//! than before. openraft allows one change at a time. Only the leader makes changes; the next leader finds in the
//! membership what was begun and continues it.
//!
//! [`removal`] removes nodes, [`renounce`] permits a node to give up its state so that it can be rebuilt.
//!
//! This module does not know how a node finds out what it holds.

mod removal;
mod renounce;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::{Member, NodeId};
use quorumfs_wire as wire;
use tracing::{debug, info, warn};

use self::removal::Aim;
use crate::consensus::{Consensus, MembershipError};
use crate::replication::placement::{Layout, Placement};
use crate::transport::{Peer, Purpose, Transport};
use quorumfs_metadata::MetadataStore;
use quorumfs_tasks::Tasks;

pub use self::removal::{Gone, Removal};

/// Interval at which the leader checks whether learners can become voters.
const LOOK_INTERVAL_MS: u64 = 500;
/// A learner that is further behind than this is not asked what it holds.
const LAG_ENTRIES_MAX: u64 = 1_024;
/// Most time for a node to answer who it is.
const HELLO_TIMEOUT_MS: u64 = 1_500;
/// Most time for a node to answer what it holds: it examines all chunks that it should hold.
const COMPLETE_TIMEOUT_MS: u64 = 60_000;
/// Most members, learners included.
const MEMBERS_MAX: usize = 9;

/// Why a change was not made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Another node leads.
    #[error("this node does not lead")]
    NotLeader(Option<Member>),
    /// The change is not allowed.
    #[error("{0}")]
    Refused(String),
    /// The change is not possible now; it may be later.
    #[error("{0}")]
    Unavailable(String),
    /// The node in question does not answer.
    #[error("{0}")]
    NobodyThere(String),
}

impl From<MembershipError> for ChangeError {
    fn from(error: MembershipError) -> ChangeError {
        match error {
            MembershipError::NotLeader { leader } => ChangeError::NotLeader(leader),
            MembershipError::Refused { reason } => ChangeError::Unavailable(reason),
        }
    }
}

/// The membership changes of a node; see the module documentation.
pub struct MembershipChanges {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    placement: Arc<Placement>,
    transport: Arc<Transport>,
    /// Locked by one change by hand at a time, so that two changes do not rely on nodes that the other removes.
    changing: tokio::sync::Mutex<()>,
    /// The last node that was permitted to give up its state, and the time. Locked during a permission.
    renouncing: tokio::sync::Mutex<Option<(NodeId, Instant)>>,
    // Locked to read or change it, never across an await.
    removal: Mutex<Option<Aim>>,
}

impl MembershipChanges {
    /// Makes the membership changes; nothing happens by itself before [`MembershipChanges::start`].
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        placement: Arc<Placement>,
        transport: Arc<Transport>,
    ) -> Arc<MembershipChanges> {
        Arc::new(MembershipChanges {
            consensus,
            metadata,
            placement,
            transport,
            changing: tokio::sync::Mutex::new(()),
            renouncing: tokio::sync::Mutex::default(),
            removal: Mutex::default(),
        })
    }

    /// Accepts `member` as a learner; returns all members. Can be repeated. `knows` is the feature level of its
    /// program.
    ///
    /// # Errors
    /// [`ChangeError`].
    pub async fn take_in(&self, member: &Member, knows: u32) -> Result<Vec<Member>, ChangeError> {
        self.must_lead()?;
        let view = self.metadata.view();
        let level = view
            .map_err(|fault| ChangeError::Unavailable(fault.to_string()))?
            .feature_level();
        if knows < level {
            return Err(ChangeError::Refused(format!(
                "the program of node {} knows feature level {knows}, and the cluster is at {level}: use a newer one",
                member.id.slot
            )));
        }
        let _turn = self.changing.lock().await;
        let members = self.consensus.members();
        if members.iter().any(|known| known.id == member.id) {
            return Ok(members);
        }
        let voters = self.consensus.voters();
        for known in &members {
            let same_slot = known.id.slot == member.id.slot;
            if known.addresses.grpc == member.addresses.grpc && !same_slot {
                return Err(ChangeError::Refused(format!(
                    "{} is the address of slot {}; a node in slot {} needs its own",
                    known.addresses.grpc, known.id.slot, member.id.slot
                )));
            }
            if !same_slot {
                continue;
            }
            let found = self.who_is_at(&known.addresses.grpc).await;
            if found.map(|(found, _)| found.id) == Ok(known.id) {
                return Err(ChangeError::Refused(format!(
                    "slot {} is in use by the node at {}, which answers; give the new node a slot of its own",
                    known.id.slot, known.addresses.grpc
                )));
            }
            if !voters.contains(&known.id) {
                self.consensus.remove_learners([known.id].into()).await?;
            }
        }
        if members.len() >= MEMBERS_MAX {
            return Err(ChangeError::Refused(format!(
                "the cluster has {MEMBERS_MAX} members already; remove one first"
            )));
        }
        info!(node = %member.id, address = member.addresses.grpc, "a node joins as a learner");
        self.consensus.add_learner(member.clone()).await?;
        Ok(self.consensus.members())
    }

    /// Accepts the node that waits at `address`, and tells it.
    ///
    /// # Errors
    /// [`ChangeError`].
    pub async fn invite(&self, address: &str) -> Result<Member, ChangeError> {
        self.must_lead()?;
        let (found, knows) = self.who_is_at(address).await.map_err(|reason| {
            ChangeError::NobodyThere(format!("no node could be asked at {address}: {reason}"))
        })?;
        if self.is_leaving(found.id.slot) {
            self.end_removal(&ChangeError::Refused(format!(
                "node {} was invited again meanwhile",
                found.id.slot
            )));
        }
        let members = self.take_in(&found, knows).await?;
        let invitation = wire::InviteRequest {
            node: Some(found.clone().into()),
            cluster_id: bytes::Bytes::copy_from_slice(&self.consensus.cluster().0),
            members: members.into_iter().map(Into::into).collect(),
        };
        let tell = async {
            let mut peer = self
                .transport
                .peer_at(address, Purpose::Control)
                .map_err(|e| e.to_string())?;
            peer.invite(invitation)
                .await
                .map_err(|status| status.message().to_string())
        };
        match tokio::time::timeout(Duration::from_millis(HELLO_TIMEOUT_MS), tell).await {
            Ok(Ok(_)) => Ok(found),
            Ok(Err(reason)) => Err(ChangeError::Unavailable(format!(
                "{address} did not take the invitation: {reason}"
            ))),
            Err(_) => Err(ChangeError::Unavailable(format!(
                "{address} did not answer the invitation"
            ))),
        }
    }

    /// Starts the tasks that make voters of complete learners, and remove nodes on request, while this node leads.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("membership-removals", self.clone(), Self::run_removals);
        tasks.supervise("membership-promotions", self.clone(), Self::run_promotions);
    }

    async fn run_promotions(self: Arc<Self>) {
        let mut told = String::new();
        loop {
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            if !self.consensus.is_leader() {
                continue;
            }
            match self.promote().await {
                Ok(()) => told.clear(),
                Err(ChangeError::NotLeader(_)) => {}
                Err(
                    ChangeError::Refused(reason)
                    | ChangeError::Unavailable(reason)
                    | ChangeError::NobodyThere(reason),
                ) => {
                    if reason != told {
                        warn!(reason, "learners cannot become voters yet");
                        told = reason;
                    }
                }
            }
        }
    }

    async fn promote(&self) -> Result<(), ChangeError> {
        let voters = self.consensus.voters();
        let members = self.consensus.members();
        let learners: Vec<&Member> = members
            .iter()
            .filter(|member| !voters.contains(&member.id) && !self.is_leaving(member.id.slot))
            .collect();
        if learners.is_empty() {
            return Ok(());
        }
        let _turn = self.changing.lock().await;
        let mut near = Vec::new();
        for learner in learners {
            let lag = self.consensus.lag_of(learner.id);
            if lag.is_none_or(|entries| entries > LAG_ENTRIES_MAX) {
                debug!(node = %learner.id, ?lag, "a learner is behind");
            } else {
                near.push(learner);
            }
        }
        // The learners fetch what this set of voters must hold: that all with the whole log join together, as far as
        // the number stays odd.
        let near_ids: Vec<NodeId> = near.iter().map(|learner| learner.id).collect();
        let Some(aim) = next_voters(&voters, &near_ids) else {
            return Ok(());
        };
        let mut whole = Vec::new();
        for learner in near.into_iter().filter(|learner| aim.contains(&learner.id)) {
            match self.missing_on(learner, &aim).await {
                Ok(0) => whole.push(learner.id),
                Ok(missing) => debug!(node = %learner.id, missing, "a learner lacks content"),
                Err(reason) => debug!(node = %learner.id, reason, "cannot ask a learner what it holds"),
            }
        }
        let Some(next) = next_voters(&voters, &whole) else {
            return Ok(());
        };
        if next != aim {
            // A node that is complete for another set of voters is asked again for this one.
            let holders = self.holders(&members, &next).await;
            whole.retain(|learner| holders.contains(learner) || !next.contains(learner));
            if next_voters(&voters, &whole).as_ref() != Some(&next) {
                return Ok(());
            }
        }
        // A complete node in the place of an earlier incarnation only adds copies, so the other voters do not matter.
        // (Another slot may be empty for good, and this one must not have to wait for it.)
        let only_replaces = slots_of(&voters) == slots_of(&next);
        let holders = match only_replaces {
            true => next.clone(),
            false => self.holders(&members, &next).await,
        };
        if holders.len() < self.holders_needed(&next) {
            return Err(ChangeError::Unavailable(format!(
                "of the new voters only {} hold all that they should, and {} must",
                holders.len(),
                self.holders_needed(&next)
            )));
        }
        self.consensus.change_voters(next.clone()).await?;
        info!(voters = ?slots_of(&next), "the cluster has new voters");
        Ok(())
    }

    fn must_lead(&self) -> Result<(), ChangeError> {
        match self.consensus.is_leader() {
            true => Ok(()),
            false => Err(ChangeError::NotLeader(self.consensus.leader())),
        }
    }

    /// Returns how many of `voters` must hold everything they should among these, so that each chunk is on f + 1.
    fn holders_needed(&self, voters: &BTreeSet<NodeId>) -> usize {
        let layout = Layout::new(voters.clone(), self.placement.replicas());
        voters.len() - layout.incomplete_max()
    }

    /// Returns which of `voters` hold everything they should among these.
    async fn holders(&self, members: &[Member], voters: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        let lacking = self.lacking(members, voters).await;
        let whole = voters.iter().filter(|voter| !lacking.contains_key(voter));
        whole.copied().collect()
    }

    /// Returns which of `voters` do not hold everything they should among these, and how much each lacks; or why that
    /// is unknown.
    async fn lacking(
        &self,
        members: &[Member],
        voters: &BTreeSet<NodeId>,
    ) -> BTreeMap<NodeId, Result<u64, String>> {
        let asked = voters.iter().map(|voter| async {
            let missing = match members.iter().find(|member| member.id == *voter) {
                Some(member) => self.missing_on(member, voters).await,
                None => Err("it is no member".to_string()),
            };
            (*voter, missing)
        });
        let answers = futures::future::join_all(asked).await;
        answers
            .into_iter()
            .filter(|(_, missing)| *missing != Ok(0))
            .collect()
    }

    /// Returns the number of chunks that `member` lacks and should hold among `voters`; this node asks itself like any
    /// other. The member fetches them from now on.
    async fn missing_on(&self, member: &Member, voters: &BTreeSet<NodeId>) -> Result<u64, String> {
        let voter = |id: &NodeId| wire::Voter {
            slot: id.slot.into(),
            incarnation: id.incarnation,
        };
        let request = wire::ContentCompleteRequest {
            voters: voters.iter().map(voter).collect(),
            // A node that has not applied the entries that name content does not know what it lacks.
            through_index: self.consensus.status().committed.unwrap_or(0),
        };
        let ask = async {
            let mut peer = self.peer_of(member, Purpose::Control)?;
            let answer = peer.content_complete(request).await;
            let answer = answer
                .map_err(|status| status.message().to_string())?
                .into_inner();
            Ok(if answer.complete { 0 } else { answer.missing.max(1) })
        };
        tokio::time::timeout(Duration::from_millis(COMPLETE_TIMEOUT_MS), ask)
            .await
            .unwrap_or_else(|_| Err("no answer".to_string()))
    }

    /// Asks the node at `address` for its identity and the feature level of its program.
    async fn who_is_at(&self, address: &str) -> Result<(Member, u32), String> {
        let ask = async {
            let mut peer = self
                .transport
                .peer_at(address, Purpose::Control)
                .map_err(|e| e.to_string())?;
            let request = wire::HelloRequest {
                from: None,
                cluster_id: bytes::Bytes::new(),
            };
            let answer = peer
                .hello(request)
                .await
                .map_err(|status| status.message().to_string())?;
            let wire::HelloResponse {
                node, feature_level, ..
            } = answer.into_inner();
            let node = node.ok_or("it does not say who it is")?;
            let member = Member::try_from(node).map_err(|error| error.to_string())?;
            Ok((member, feature_level))
        };
        tokio::time::timeout(Duration::from_millis(HELLO_TIMEOUT_MS), ask)
            .await
            .unwrap_or_else(|_| Err("no answer".to_string()))
    }

    /// Returns a connection to `member`.
    pub fn peer_of(&self, member: &Member, purpose: Purpose) -> Result<Peer, String> {
        self.transport
            .member(member, purpose)
            .map_err(|error| error.to_string())
    }
}

fn slots_of(ids: &BTreeSet<NodeId>) -> Vec<u16> {
    ids.iter().map(|id| id.slot).collect()
}

/// Returns the voters after the learners in `whole` have joined: each takes the place of its slot's earlier
/// incarnation, and those in new slots join as far as the number of voters stays odd. `None` if nothing changes.
fn next_voters(voters: &BTreeSet<NodeId>, whole: &[NodeId]) -> Option<BTreeSet<NodeId>> {
    let mut next = voters.clone();
    let mut added = Vec::new();
    for learner in whole {
        match voters.iter().find(|voter| voter.slot == learner.slot) {
            Some(earlier) => {
                next.remove(earlier);
                next.insert(*learner);
            }
            None => added.push(*learner),
        }
    }
    added.sort_unstable();
    if (next.len() + added.len()).is_multiple_of(2) {
        added.pop();
    }
    next.extend(added);
    (next != *voters).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(slot: u16, incarnation: u64) -> NodeId {
        NodeId { slot, incarnation }
    }

    fn next(voters: &[NodeId], whole: &[NodeId]) -> Option<Vec<NodeId>> {
        next_voters(&voters.iter().copied().collect(), whole).map(|next| next.into_iter().collect())
    }

    #[test]
    fn a_new_incarnation_takes_the_old_ones_place() {
        let voters = [id(1, 1), id(2, 2), id(3, 3)];
        assert_eq!(next(&voters, &[]), None);
        assert_eq!(
            next(&voters, &[id(2, 9)]),
            Some(vec![id(1, 1), id(2, 9), id(3, 3)])
        );
        // An even number of voters (made by hand, or one was lost for ever) is no reason to leave a slot empty.
        assert_eq!(next(&voters[..2], &[id(2, 9)]), Some(vec![id(1, 1), id(2, 9)]));
    }

    #[test]
    fn new_slots_come_in_by_twos() {
        let one = [id(1, 1)];
        assert_eq!(next(&one, &[id(2, 2)]), None);
        assert_eq!(
            next(&one, &[id(3, 3), id(2, 2)]),
            Some(vec![id(1, 1), id(2, 2), id(3, 3)])
        );
        let three = [id(1, 1), id(2, 2), id(3, 3)];
        assert_eq!(next(&three, &[id(4, 4)]), None);
        assert_eq!(
            next(&three, &[id(4, 4), id(3, 9)]),
            Some(vec![id(1, 1), id(2, 2), id(3, 9)])
        );
        assert_eq!(
            next(&three, &[id(5, 5), id(4, 4)]).map(|next| next.len()),
            Some(5)
        );
    }
}
