//! Removing members: a goal that the leader pursues.
//!
//! 1. [`MembershipChanges::remove`] sets the goal, and waits a while.
//! 2. [`MembershipChanges::run_removals`] asks the remaining nodes repeatedly whether they hold everything they will
//!    have to hold, which makes them fetch it; when enough do, it changes the voters.
//! 3. Content that was named between that check and the change may lack on a remaining node, and they fetch it from
//!    each other. A caller that still waits is told when that is done too.
//!
//! Invariants: one removal is pursued at a time; a newer one replaces it. It is in memory only and ends with the
//! leadership, so that no node is removed long after the last request; when it is requested again, it continues with
//! what has been fetched ([`Placement::prepare_for`](crate::replication::placement::Placement::prepare_for)).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_proto::{Member, NodeId};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{ChangeError, LOOK_INTERVAL_MS, MembershipChanges, slots_of};

/// Longest wait of a request for a removal.
const REMOVAL_WAIT_MS: u64 = 30_000;
/// Interval at which the remaining nodes are asked while no request waits: they examine everything they should hold.
/// Much shorter than the time after which they forget what to prepare for.
const UNWATCHED_LOOK_INTERVAL_MS: u64 = 10_000;

/// How slots without a member are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// The request is refused.
    Refuse,
    /// They are ignored: the removal has been requested before, and may have taken place.
    PassOver,
}

/// The state of a removal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The nodes are removed, and the remaining ones hold everything.
    Done,
    /// The nodes are removed; the remaining ones do not hold everything yet, for this reason.
    Out(String),
    /// The nodes are not removed yet, for this reason. The leader continues.
    Pending(String),
}

/// The removal that is being pursued.
#[derive(Clone)]
pub(super) struct Aim {
    leaving: BTreeSet<NodeId>,
    /// Whether it has already changed the voters.
    voters_changed: bool,
    looked: Option<Instant>,
    stage: watch::Sender<Stage>,
}

#[derive(Clone, Debug)]
enum Stage {
    Pending(String),
    Out { voters_changed: bool },
    Ended(ChangeError),
}

impl MembershipChanges {
    /// Removes the members in `slots`. After [`Removal::Done`] or [`Removal::Out`] they may be stopped.
    ///
    /// # Errors
    /// [`ChangeError`].
    pub async fn remove(&self, slots: &BTreeSet<u16>, gone: Gone) -> Result<Removal, ChangeError> {
        self.must_lead()?;
        let deadline = tokio::time::Instant::now() + Duration::from_millis(REMOVAL_WAIT_MS);
        let members = self.consensus.members();
        let known = |slot: &u16| members.iter().any(|member| member.id.slot == *slot);
        if let Some(unknown) = slots.iter().find(|slot| !known(slot))
            && gone == Gone::Refuse
        {
            return Err(ChangeError::Refused(format!(
                "there is no member in slot {unknown}: it has left, or never was one"
            )));
        }
        let ids = members.iter().map(|member| member.id);
        let leaving: BTreeSet<NodeId> = ids.filter(|id| slots.contains(&id.slot)).collect();
        if leaving.is_empty() {
            return Ok(self.settled(deadline).await);
        }
        // An impossible removal must not replace the one that is being pursued.
        self.remaining_without(&leaving)?;
        let mut stage = self.aim_at(leaving);
        let ended = tokio::time::timeout_at(
            deadline,
            stage.wait_for(|stage| !matches!(stage, Stage::Pending(_))),
        );
        if ended.await.is_ok_and(|told| told.is_err()) {
            return Err(ChangeError::Refused(
                "another removal was requested and replaces this one".to_string(),
            ));
        }
        let stage = stage.borrow().clone();
        match stage {
            Stage::Out {
                voters_changed: false,
            } => Ok(Removal::Done),
            Stage::Out { voters_changed: true } => Ok(self.settled(deadline).await),
            Stage::Pending(reason) => Ok(Removal::Pending(reason)),
            Stage::Ended(error) => Err(error),
        }
    }

    /// Returns why the removal that this node pursues, if any, is not done yet.
    pub fn pending_removal(&self) -> Option<String> {
        let aim = self.removal.lock();
        let stage = aim.as_ref()?.stage.borrow().clone();
        match stage {
            Stage::Pending(reason) => Some(reason),
            Stage::Out { .. } | Stage::Ended(_) => None,
        }
    }

    /// Removes members as requested, while this node leads; never returns.
    pub(super) async fn run_removals(self: Arc<Self>) {
        loop {
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            if !self.consensus.is_leader() {
                self.end_removal(&ChangeError::NotLeader(self.consensus.leader()));
                continue;
            }
            let aim = self.removal.lock().clone();
            let Some(aim) = aim.filter(Aim::is_due) else {
                continue;
            };
            let stage = match self.take_out(&aim).await {
                Ok(voters_changed) => {
                    info!(slots = ?slots_of(&aim.leaving), "nodes have left the cluster");
                    Stage::Out { voters_changed }
                }
                Err(ChangeError::Unavailable(reason) | ChangeError::NobodyThere(reason)) => {
                    debug!(reason, "nodes cannot leave the cluster yet");
                    let slots: Vec<String> = slots_of(&aim.leaving).iter().map(u16::to_string).collect();
                    Stage::Pending(format!("slots {}: {reason}", slots.join(", ")))
                }
                Err(error) => {
                    if let ChangeError::Refused(reason) = &error {
                        warn!(reason, "the removal of nodes was given up");
                    }
                    Stage::Ended(error)
                }
            };
            self.reached(&aim, stage);
        }
    }

    /// Gives up the removal for this reason.
    pub(super) fn end_removal(&self, reason: &ChangeError) {
        if let Some(aim) = self.removal.lock().take() {
            aim.stage.send_replace(Stage::Ended(reason.clone()));
        }
    }

    /// Whether the member in `slot` is being removed.
    pub(super) fn is_leaving(&self, slot: u16) -> bool {
        let aim = self.removal.lock();
        aim.as_ref()
            .is_some_and(|aim| aim.leaving.iter().any(|id| id.slot == slot))
    }

    /// Starts to pursue the removal of `leaving`, unless it is already pursued.
    fn aim_at(&self, leaving: BTreeSet<NodeId>) -> watch::Receiver<Stage> {
        let mut removal = self.removal.lock();
        if let Some(aim) = removal.as_mut().filter(|aim| aim.leaving == leaving) {
            // A repeated request does not wait for the interval.
            aim.looked = None;
            return aim.stage.subscribe();
        }
        info!(slots = ?slots_of(&leaving), "the removal of nodes has begun");
        let (stage, told) = watch::channel(Stage::Pending("it has just been requested".to_string()));
        *removal = Some(Aim {
            leaving,
            voters_changed: false,
            looked: None,
            stage,
        });
        told
    }

    /// Records the stage of `aim`, if it is still pursued.
    fn reached(&self, aim: &Aim, stage: Stage) {
        let mut removal = self.removal.lock();
        let Some(pursued) = removal.as_mut().filter(|pursued| pursued.leaving == aim.leaving) else {
            return;
        };
        pursued.looked = Some(Instant::now());
        let goes_on = matches!(stage, Stage::Pending(_));
        pursued.stage.send_replace(stage);
        if !goes_on {
            *removal = None;
        }
    }

    /// Returns the voters without `leaving`; `None` if none of these votes.
    fn remaining_without(&self, leaving: &BTreeSet<NodeId>) -> Result<Option<BTreeSet<NodeId>>, ChangeError> {
        // A change that another leader began and did not complete counts too: it must be completed.
        let sets = self.consensus.voter_sets();
        if !leaving.iter().any(|node| sets.contains(node)) {
            return Ok(None);
        }
        let mut remaining = self.consensus.voters();
        remaining.retain(|voter| !leaving.contains(voter));
        match remaining.len() % 2 {
            1 => Ok(Some(remaining)),
            _ => Err(ChangeError::Refused(format!(
                "that would leave {} voters; choose the slots so that 1, 3, 5 or 7 voters remain",
                remaining.len()
            ))),
        }
    }

    /// Removes the nodes if the remaining ones hold what they will have to hold; returns whether that changed the
    /// voters.
    async fn take_out(&self, aim: &Aim) -> Result<bool, ChangeError> {
        let leaving = &aim.leaving;
        let members = self.consensus.members();
        let voters = self.consensus.voters();
        let mut voters_changed = aim.voters_changed;
        if let Some(remaining) = self.remaining_without(leaving)? {
            if leaving.contains(&self.consensus.id()) {
                return Err(self.hand_on(&remaining).await);
            }
            self.must_be_whole(&members, &remaining).await?;
            // Nodes that prepare for a change drop nothing, so the check still holds when the turn has come.
            let _turn = self.changing.lock().await;
            if self.consensus.voters() != voters {
                return Err(ChangeError::Unavailable("the voters have changed".to_string()));
            }
            self.consensus.change_voters(remaining).await?;
            voters_changed = true;
            if let Some(pursued) = self.removal.lock().as_mut() {
                pursued.voters_changed |= pursued.leaving == *leaving;
            }
        }
        let _turn = self.changing.lock().await;
        let voters = self.consensus.voters();
        let ids = self.consensus.members().into_iter().map(|member| member.id);
        let learners: BTreeSet<NodeId> = ids
            .filter(|id| leaving.contains(id) && !voters.contains(id))
            .collect();
        if !learners.is_empty() {
            self.consensus.remove_learners(learners).await?;
        }
        Ok(voters_changed)
    }

    /// A leader that is being removed hands leadership to another.
    async fn hand_on(&self, remaining: &BTreeSet<NodeId>) -> ChangeError {
        if remaining.is_empty() {
            return ChangeError::Refused("the last voter cannot be removed".to_string());
        }
        let mut nearest: Vec<NodeId> = remaining.iter().copied().collect();
        nearest.sort_by_key(|id| self.consensus.lag_of(*id).unwrap_or(u64::MAX));
        match self.consensus.hand_on(nearest).await {
            Ok(_) => ChangeError::Unavailable(
                "the leader is one of them; it hands leadership to another node".to_string(),
            ),
            Err(error) => ChangeError::Unavailable(error.to_string()),
        }
    }

    /// Checks that enough of `voters` hold what they should, so that f + 1 have each chunk; the others fetch it.
    async fn must_be_whole(&self, members: &[Member], voters: &BTreeSet<NodeId>) -> Result<(), ChangeError> {
        let lacking = self.lacking(members, voters).await;
        let needed = self.holders_needed(voters);
        let whole = voters.len() - lacking.len();
        if whole >= needed {
            return Ok(());
        }
        let lacking: Vec<String> = lacking
            .into_iter()
            .map(|(id, lacks)| match lacks {
                Ok(missing) => format!("node {} lacks at least {missing} chunks", id.slot),
                Err(reason) => format!("node {} cannot say what it holds: {reason}", id.slot),
            })
            .collect();
        Err(ChangeError::Unavailable(format!(
            "of the remaining nodes {whole} hold everything they must hold, and {needed} are needed; {}",
            lacking.join("; ")
        )))
    }

    /// Waits until the voters hold what they should, or until `deadline`; the removal has taken place.
    async fn settled(&self, deadline: tokio::time::Instant) -> Removal {
        let mut reason = "it is not known yet what the remaining nodes hold".to_string();
        let settle = async {
            loop {
                match self
                    .must_be_whole(&self.consensus.members(), &self.consensus.voters())
                    .await
                {
                    Ok(()) => return,
                    Err(error) => reason = error.to_string(),
                }
                tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            }
        };
        match tokio::time::timeout_at(deadline, settle).await {
            Ok(()) => Removal::Done,
            Err(_) => Removal::Out(reason),
        }
    }
}

impl Aim {
    fn is_due(&self) -> bool {
        let watched = self.stage.receiver_count() > 0;
        let pause_ms = if watched {
            LOOK_INTERVAL_MS
        } else {
            UNWATCHED_LOOK_INTERVAL_MS
        };
        self.looked
            .is_none_or(|looked| looked.elapsed() >= Duration::from_millis(pause_ms))
    }
}
