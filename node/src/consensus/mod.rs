//! Consensus: one log on which all nodes agree, stored durably and applied to the metadata in the same order on every
//! node.
//!
//! The path of a command: [`Consensus::propose`] admits it by its bytes → openraft → [`log::LogStore`] (memory at once,
//! the [`wal`] thread's next flush) and, at the same time, [`network::PeerNetwork`] to the followers → a quorum has
//! flushed it → [`state_machine::StateMachine`] applies it together with others as one batch and publishes them → the
//! proposer is answered. After that the [`flusher`] moves applied changes to disk; [`snapshot`] and purge keep the log
//! short.
//!
//! The path of a linearizable read: [`Consensus::barrier`], then a view of the metadata. One round of ReadIndex serves
//! all callers that came before it began.
//!
//! Contract: nothing acknowledged is lost (see [`wal`]). A node that cannot keep that promise stops
//! ([`Consensus::fatal`]) or does not start ([`ConsensusError`]). Every queue is bounded in bytes: admission here, the
//! log's unflushed bytes, the overlay.
//!
//! This layer does not know files or names, of chunks only those inside commands, nor who proposes what and why.

#[doc = include_str!("FORMAT.md")]
pub mod format {}

mod aside;
mod barrier;
mod commit_only;
mod cutoff;
mod error;
mod fatal;
mod fit;
mod flusher;
mod intake;
mod log;
mod maintenance;
mod meters;
mod network;
mod options;
mod position;
mod recover;
mod rescue;
mod revocable;
mod service;
mod snapshot;
mod standing;
mod state_machine;
mod status;
#[cfg(test)]
mod tests;
mod types;
mod unstored;
mod voters;
mod wal;

/// The bytes of the log, for `benches/wal.rs` alone.
#[doc(hidden)]
pub use self::wal::frame as wal_frame;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, Fatal, ForwardToLeader, RaftError};
use openraft::{Raft, RaftMetrics};
use parking_lot::Mutex;
use quorumfs_proto::{ChunkId, ClusterId, Member, NodeId, codec};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use self::barrier::Barrier;
use self::cutoff::Cutoff;
use self::fatal::FatalSignal;
use self::flusher::Flusher;
use self::intake::Intake;
use self::log::LogStore;
use self::meters::Meters;
use self::network::NetworkFactory;
use self::rescue::RoomRefusals;
use self::snapshot::SnapshotTraffic;
use self::state_machine::{Outlets, StateMachine};
use self::types::{TypeConfig, VoterId, member};
use crate::to_end::ToEnd;
use crate::transport::Transport;
use quorumfs_content::ContentStore;
use quorumfs_metadata::{ApplyResult, LogBody, LogCommand, MetadataStore, StorageFault, View};

pub use self::aside::SteppedAside;
pub use self::error::{BarrierError, ConsensusError, MembershipError, ProposeError};
pub use self::fatal::FatalError;
pub use self::log::LogStatus;
pub use self::meters::ConsensusMeasured;
pub use self::options::{ConsensusOptions, Timings};
pub use self::position::voters_at;
pub use self::recover::Remains;
pub use self::state_machine::AppliedEffects;
pub use self::status::{ConsensusStatus, Role};
pub use self::voters::VoterSets;
#[cfg(test)]
pub(crate) use self::voters::tests::{node, nodes};
pub use self::wal::{WalError, WalOptions};

/// Interval at which openraft's task is checked.
const ALIVE_INTERVAL: Duration = Duration::from_millis(250);
/// Longest time that a command waits for admission before it is refused as busy.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(2);
/// The unit of admission; the smallest command takes one.
const ADMISSION_UNIT_BYTES: usize = 1 << 10;

/// This node's part in the consensus. Clones share it.
#[derive(Clone)]
pub struct Consensus(Arc<Inner>);

struct Inner {
    id: VoterId,
    cluster: ClusterId,
    raft: Raft<TypeConfig, StateMachine>,
    log: LogStore,
    /// The connections to the other members.
    network: NetworkFactory,
    /// The term in which, and the time at which, leadership was last handed on.
    handed_on: Mutex<Option<(u64, Instant)>>,
    intake: Intake,
    metadata: Arc<MetadataStore>,
    flusher: Arc<Flusher>,
    /// Ends streams for which the log was kept too long.
    cutoff: Cutoff,
    fatal: FatalSignal,
    admission: Arc<Semaphore>,
    admission_units: u32,
    barrier: Barrier,
    /// Whether the state is at least as new as when the node was stopped.
    recovered: AtomicBool,
    /// Whether this node is about to set its state aside, and serves nothing more.
    stood_down: Arc<AtomicBool>,
    /// The time at which this node last accepted a message, even one without news, from the leader it follows.
    heard_of_leader: Arc<Mutex<Option<Instant>>>,
    /// Whether commands that take space are admitted.
    has_room: AtomicBool,
    meters: Arc<Meters>,
    /// Whether rows of this node contradict each other.
    suspects: AtomicBool,
    /// The state at the last entry that asked for a comparison, until it is taken.
    audited: Arc<Mutex<Option<View>>>,
    /// Locked while one snapshot is received; the times of refusals for lack of space.
    receiving: tokio::sync::Mutex<RoomRefusals>,
    options: ConsensusOptions,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Consensus {
    /// Opens the log, brings the state up to the entries that the log proves committed, and takes part.
    ///
    /// `effects` receives the work for the content store; messages are dropped while it is full (see
    /// [`AppliedEffects`]).
    ///
    /// # Errors
    /// [`ConsensusError`].
    pub async fn start(
        options: ConsensusOptions,
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
        transport: Arc<Transport>,
        effects: mpsc::Sender<AppliedEffects>,
    ) -> Result<Consensus, ConsensusError> {
        let fatal = FatalSignal::default();
        let raised = fatal.clone();
        metadata.on_damage(move |fault| drop(raised.raise("read the metadata", fault)));
        let started = Consensus::start_with(options, metadata, content, transport, effects, fatal.clone());
        started.await.map_err(|error| match fatal.raised() {
            Some(raised) if raised.costs_state() => ConsensusError::Metadata(raised),
            _ => error,
        })
    }

    async fn start_with(
        options: ConsensusOptions,
        metadata: Arc<MetadataStore>,
        content: Arc<ContentStore>,
        transport: Arc<Transport>,
        effects: mpsc::Sender<AppliedEffects>,
        fatal: FatalSignal,
    ) -> Result<Consensus, ConsensusError> {
        let log = {
            let (directory, wal, fatal) = (options.directory.clone(), options.wal.clone(), fatal.clone());
            let open = tokio::task::spawn_blocking(move || LogStore::open(&directory, &wal, fatal));
            open.await.map_err(std::io::Error::other)??
        };
        let durable = metadata.durable_position();
        if durable.log_id.is_some() && log.is_empty() {
            return Err(ConsensusError::LogLost { index: durable.index });
        }
        if options.had_log && log.is_empty() {
            return Err(ConsensusError::AllLost);
        }
        if let Some(known) = &options.log_only {
            fit::stand_in(&metadata, &log, known)?;
        }
        fit::fit_log(&log, &metadata.durable_position()).await?;
        let age_max = Duration::from_millis(options.flush_age_ms);
        let flusher = {
            let (metadata, log, fatal) = (metadata.clone(), log.clone(), fatal.clone());
            let directory = options.directory.clone();
            let start = move || Flusher::start(metadata, content, log, fatal, age_max, &directory);
            let started = tokio::task::spawn_blocking(start).await;
            started.map_err(std::io::Error::other)??
        };
        let started = Consensus::take_part(
            options,
            metadata,
            log.clone(),
            flusher.clone(),
            transport,
            effects,
            fatal,
        );
        let started = started.await;
        if started.is_err() {
            // The caller may start again in another way, and opens the log again then.
            let stop = move || {
                flusher.stop();
                log.close();
            };
            tokio::task::spawn_blocking(stop)
                .await
                .map_err(std::io::Error::other)?;
        }
        started
    }

    /// Brings the state up to the entries that the log proves committed, and takes part.
    async fn take_part(
        options: ConsensusOptions,
        metadata: Arc<MetadataStore>,
        log: LogStore,
        flusher: Arc<Flusher>,
        transport: Arc<Transport>,
        effects: mpsc::Sender<AppliedEffects>,
        fatal: FatalSignal,
    ) -> Result<Consensus, ConsensusError> {
        let config = Arc::new(options.raft_config().validate()?);
        let traffic = SnapshotTraffic::new(options.hold_log_bytes_max);
        let meters = Arc::new(Meters::default());
        let (audited, takes_part) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let outlets = Outlets {
            effects,
            audited: Arc::clone(&audited),
            takes_part: Arc::clone(&takes_part),
            log_only: options.log_only.is_some(),
        };
        let machine = StateMachine::new(
            metadata.clone(),
            flusher.clone(),
            log.clone(),
            traffic.clone(),
            outlets,
            meters.clone(),
            fatal.clone(),
        )?;
        let id = VoterId(options.id);
        let cutoff = Cutoff::default();
        let stood_down = Arc::new(AtomicBool::new(options.log_only.is_some()));
        let network = NetworkFactory::new(
            id,
            transport,
            traffic,
            cutoff.clone(),
            fatal.clone(),
            stood_down.clone(),
        );
        let raft = Raft::new(id, config, network.clone(), log.clone(), machine)
            .await
            .map_err(|error| ConsensusError::Raft(Box::new(error)))?;
        takes_part.store(true, Ordering::Release);
        let admission_units = u32::try_from(options.admission_bytes_max / ADMISSION_UNIT_BYTES)
            .unwrap_or(u32::MAX)
            .clamp(1, Semaphore::MAX_PERMITS as u32);
        let consensus = Consensus(Arc::new(Inner {
            id,
            cluster: options.cluster,
            raft,
            intake: Intake::new(log.clone(), options.wal.file_bytes),
            log,
            network: network.clone(),
            handed_on: Mutex::default(),
            metadata,
            flusher,
            cutoff,
            fatal,
            admission: Arc::new(Semaphore::new(admission_units as usize)),
            admission_units,
            barrier: Barrier::default(),
            recovered: AtomicBool::new(false),
            stood_down,
            heard_of_leader: Arc::default(),
            has_room: AtomicBool::new(true),
            meters,
            suspects: AtomicBool::new(false),
            audited,
            receiving: tokio::sync::Mutex::default(),
            options,
            tasks: Mutex::new(Vec::new()),
        }));
        consensus.spawn_tasks(network);
        Ok(consensus)
    }

    fn spawn_tasks(&self, network: NetworkFactory) {
        let tasks = &self.0.options.tasks;
        let tasks = [
            tasks.supervise_until_done("consensus-recovery", self.clone(), Self::note_recovery),
            tasks.supervise_until_done("consensus-stop", self.clone(), Self::note_stop),
            tasks.supervise(
                "consensus-barrier",
                (self.clone(), network),
                |(consensus, network)| consensus.run_barrier(network),
            ),
            tasks.supervise("consensus-maintenance", self.clone(), Self::run_maintenance),
        ];
        self.0.tasks.lock().extend(tasks);
    }

    async fn note_recovery(self) {
        if self.0.raft.wait_for_recovery(None).await.is_ok() {
            self.0.recovered.store(true, Ordering::Release);
        }
    }

    /// openraft stops by itself when storage fails or it panics; that must be noticed. It is polled, because waiting
    /// for every change of its metrics would add work to each call, and a panic does not change them.
    async fn note_stop(self) {
        loop {
            match self.0.raft.with_raft_state(|_| ()).await {
                Ok(()) => tokio::time::sleep(ALIVE_INTERVAL).await,
                Err(Fatal::Stopped) => return,
                Err(fatal) => {
                    self.0.fatal.raise("run the consensus", fatal);
                    return;
                }
            }
        }
    }

    /// Creates the cluster. All `members` must be empty; can be done once.
    ///
    /// # Errors
    /// [`ConsensusError::Initialize`] if this node's log is not empty.
    pub async fn initialize(&self, members: Vec<Member>) -> Result<(), ConsensusError> {
        let nodes: BTreeMap<VoterId, _> = members
            .into_iter()
            .map(|member| (VoterId(member.id), member.addresses))
            .collect();
        self.0.raft.initialize(nodes).await.map_err(|error| match error {
            RaftError::APIError(refused) => ConsensusError::Initialize(Box::new(refused)),
            RaftError::Fatal(fatal) => ConsensusError::Raft(Box::new(fatal)),
        })
    }

    /// Whether this node has never had an entry or a vote.
    pub fn is_empty(&self) -> bool {
        self.0.log.is_empty()
    }

    /// Has `command` decided and applied; returns the result of applying it.
    ///
    /// Dropping the future does not cancel the command.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub async fn propose(&self, command: LogCommand) -> Result<ApplyResult, ProposeError> {
        self.propose_if(command, || true).await
    }

    /// Proposes a command if `holds` returns true after admission: a condition of the command may have changed while it
    /// waited.
    pub async fn propose_if(
        &self,
        command: LogCommand,
        holds: impl FnOnce() -> bool + Send,
    ) -> Result<ApplyResult, ProposeError> {
        if !self.is_leader() {
            return Err(ProposeError::NotLeader {
                leader: self.leader(),
            });
        }
        self.recovered()
            .map_err(|reason| ProposeError::Unavailable { reason })?;
        if !self.has_room() && takes_space(&command) {
            return Err(ProposeError::NoSpace);
        }
        let units =
            (codec::encoded_bytes(&command) / ADMISSION_UNIT_BYTES + 1).min(self.0.admission_units as usize);
        let admitted = self.0.admission.clone().acquire_many_owned(units as u32);
        let Ok(Ok(admitted)) = tokio::time::timeout(ADMISSION_TIMEOUT, admitted).await else {
            return Err(ProposeError::Busy);
        };
        if !holds() {
            return Err(ProposeError::Overtaken);
        }
        let raft = self.0.raft.clone();
        // What is admitted counts until it is decided, whatever becomes of the caller.
        let decided = ToEnd::new(async move {
            let written = raft.client_write(command).await;
            drop(admitted);
            written
        });
        let decided = tokio::select! {
            decided = decided => decided,
            // The command may be decided, but is not applied here: a retry gets the result from another leader.
            fatal = self.0.fatal.wait() => {
                return Err(ProposeError::Unavailable {
                    reason: format!("this node must stop: {fatal}"),
                });
            }
        };
        match decided {
            Ok(response) => Ok(response.data),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                Err(ProposeError::NotLeader {
                    leader: named_leader(&forward),
                })
            }
            Err(error) => Err(ProposeError::Unavailable {
                reason: error.to_string(),
            }),
        }
    }

    /// Returns when this node has applied everything that had been acknowledged by any node before the call. Only the
    /// leader can do this.
    ///
    /// # Errors
    /// [`BarrierError`].
    pub async fn barrier(&self) -> Result<(), BarrierError> {
        if !self.is_leader() {
            return Err(BarrierError::NotLeader {
                leader: self.leader(),
            });
        }
        self.0.barrier.wait().await
    }

    /// Adds a node that gets the log but does not vote. Returns when the node is a learner, not when it has caught up.
    pub async fn add_learner(&self, member: Member) -> Result<(), MembershipError> {
        let added = self
            .0
            .raft
            .add_learner(VoterId(member.id), member.addresses, false);
        added.await.map(|_| ()).map_err(membership_error)
    }

    /// Makes exactly these nodes the voters, by a joint change. Each must be a learner or voter. A voter that is not in
    /// the set leaves the cluster.
    pub async fn change_voters(&self, voters: BTreeSet<NodeId>) -> Result<(), MembershipError> {
        let voters: BTreeSet<VoterId> = voters.into_iter().map(VoterId).collect();
        let changed = self.0.raft.change_membership(voters, false);
        changed.await.map(|_| ()).map_err(membership_error)
    }

    /// Removes these learners.
    pub async fn remove_learners(&self, learners: BTreeSet<NodeId>) -> Result<(), MembershipError> {
        let learners: BTreeSet<VoterId> = learners.into_iter().map(VoterId).collect();
        let change = openraft::ChangeMembers::RemoveNodes(learners);
        let changed = self.0.raft.change_membership(change, true);
        changed.await.map(|_| ()).map_err(membership_error)
    }

    /// Returns the numbers of [`AppliedEffects`] that were sent, and that were dropped because their receiver was slow.
    pub fn effects_sent_and_dropped(&self) -> (u64, u64) {
        let counts = &self.0.meters.effects;
        (
            counts.told.load(Ordering::Acquire),
            counts.dropped.load(Ordering::Acquire),
        )
    }

    /// Returns the entry up to which [`AppliedEffects`] were sent or counted as dropped.
    pub fn effects_through(&self) -> u64 {
        self.0.meters.effects.through_index.load(Ordering::Acquire)
    }

    /// Takes the state at the last [`LogBody::Audit`]. The caller should drop it soon, since it keeps old pages in use.
    pub fn take_audited(&self) -> Option<View> {
        self.0.audited.lock().take()
    }

    /// Whether there is an audited state to take.
    pub fn has_audited(&self) -> bool {
        self.0.audited.lock().is_some()
    }

    /// Returns up to `max` chunks after `after` that came inside commands and did not fit on this node's disk, with the
    /// entries that brought them. Only the log has them on this node, and it cannot be purged beyond them.
    pub fn kept_by_log(&self, after: Option<(u64, ChunkId)>, max: usize) -> Vec<(u64, ChunkId)> {
        self.0.flusher.unstored_after(after, max)
    }

    /// Releases these chunks from the log: f + 1 other voters have them on disk.
    pub fn release_from_log(&self, ids: &[ChunkId]) {
        self.0.flusher.settle_unstored(ids);
    }

    /// Whether the log has space for commands that take space.
    pub fn has_room(&self) -> bool {
        self.0.has_room.load(Ordering::Relaxed)
    }

    /// Resolves with the reason when this node must stop.
    pub fn fatal(&self) -> impl Future<Output = FatalError> + Send + 'static {
        let fatal = self.0.fatal.clone();
        async move { fatal.wait().await }
    }

    /// Reports that the metadata could not be read, because of `fault`. After damage the node must stop; the store
    /// reports that itself. If rows contradict each other, all nodes must be compared: an error of the program is the
    /// same on all nodes, and then none may discard its state.
    pub fn unreadable(&self, fault: &StorageFault) {
        if matches!(fault, StorageFault::Inconsistent { .. }) {
            self.0.suspects.store(true, Ordering::Release);
        }
    }

    /// Returns once whether the nodes must be compared, after [`Consensus::unreadable`] was called.
    pub fn take_suspicion(&self) -> bool {
        self.0.suspects.swap(false, Ordering::AcqRel)
    }

    /// Stops taking part. Operations queued for the log are written first.
    pub async fn shutdown(&self) {
        if let Err(error) = self.0.raft.shutdown().await {
            tracing::warn!(%error, "consensus did not stop in order");
        }
        for task in self.0.tasks.lock().drain(..) {
            task.abort();
        }
        self.0.barrier.close();
        let (flusher, log) = (self.0.flusher.clone(), self.0.log.clone());
        let stopped = tokio::task::spawn_blocking(move || {
            flusher.stop();
            log.close();
        });
        if let Err(error) = stopped.await {
            tracing::warn!(%error, "the log did not stop in order");
        }
    }

    /// Returns a copy: a borrow that is held would block openraft.
    fn metrics(&self) -> RaftMetrics<TypeConfig> {
        self.0.raft.metrics().borrow_watched().clone()
    }

    fn recovered(&self) -> Result<(), String> {
        if self.0.stood_down.load(Ordering::Acquire) {
            return Err(status::STOOD_DOWN.to_string());
        }
        match self.0.recovered.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err("the state is being recovered from the log".to_string()),
        }
    }
}

/// Whether `command` can increase the space in use, except for the few hundred bytes of a session: a new client needs a
/// session to delete files.
fn takes_space(command: &LogCommand) -> bool {
    match &command.body {
        LogBody::Call(mutation) => !mutation.command.frees_space(),
        LogBody::Rewrite { .. } => true,
        LogBody::OpenSession { .. }
        | LogBody::EndSession { .. }
        | LogBody::ForgetSession { .. }
        | LogBody::ReclaimUnlinked { .. }
        | LogBody::Refuse { .. }
        | LogBody::SetReplicas { .. }
        | LogBody::RaiseFeatureLevel { .. }
        | LogBody::Audit
        | LogBody::Settle { .. }
        | LogBody::OpenSessionWithKey { .. }
        | LogBody::OpenContentSession { .. }
        | LogBody::AnswerUnlinked { .. }
        | LogBody::Reclaim { .. }
        | LogBody::NoteSilences { .. } => false,
    }
}

fn named_leader(forward: &ForwardToLeader<TypeConfig>) -> Option<Member> {
    Some(member(forward.leader_id?, forward.leader_node.as_ref()?))
}

fn membership_error(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> MembershipError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => MembershipError::NotLeader {
            leader: named_leader(&forward),
        },
        error => MembershipError::Refused {
            reason: error.to_string(),
        },
    }
}
