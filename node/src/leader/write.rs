//! The write path: content to f + 1 voters, then the command to the log.
//!
//! 1. [`WritePath::put_chunk`] copies a chunk to all nodes that should hold it at once, which may include this one. It
//!    returns when a majority of every active configuration has it on disk, and remembers the holders. If a node that
//!    should hold it fails or is slow, another takes a copy instead.
//! 2. [`WritePath::mutate`] takes a command that names such chunks. It proposes the command only if this node, in its
//!    present term, knows a quorum of holders for each chunk (P2). If it does not (it has just become leader), it asks
//!    the peers, and the client puts again the chunks that they do not confirm. That the holders are a quorum of the
//!    voters is checked again when the command is admitted.
//!
//! Every verdict comes from the log, ENOSPC too: a command that cannot be taken for lack of space is proposed as its
//! refusal, so that the retry of a command that was applied gets its result (P4).

mod holders;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_measure::Ending;
use quorumfs_proto::call::{Mutation, SessionState};
use quorumfs_proto::limits::SESSION_DESCRIPTION_BYTES_MAX;
use quorumfs_proto::{
    Chunk, ChunkBody, ChunkId, ClientResponse, FsError, Member, NodeId, Refusal, SessionId, Timestamp,
};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use self::holders::Holders;
use crate::consensus::{Consensus, ProposeError};
use crate::observe::clock::StampClock;
use crate::observe::metrics::Metrics;
use crate::observe::metrics::replication::{CopyPlace, ReplicationSpan};
use crate::replication::placement::Placement;
use crate::replication::space::SpaceMonitor;
use crate::replication::{PeerChunks, PushError};
use quorumfs_content::{ContentError, ContentStore};
use quorumfs_metadata::{ApplyResult, Crowded, LogBody, LogCommand, SessionKey};

/// Longest time for a chunk to reach a quorum before the client is told to put it again.
const QUORUM_TIMEOUT_MS: u64 = 10_000;
/// Time without a quorum after which all remaining nodes take a copy.
const SUBSTITUTE_AFTER_MS: u64 = 500;
/// Time for which a node that failed or was slow is not used, if others can take its copies.
const SUSPECT_MS: u64 = 5_000;
/// From this feature level on sessions have keys.
const SESSION_KEY_LEVEL: u32 = 3;

/// The write path of a node; see the module documentation.
pub struct WritePath {
    consensus: Consensus,
    content: Arc<ContentStore>,
    peers: Arc<PeerChunks>,
    placement: Arc<Placement>,
    space: Arc<SpaceMonitor>,
    stamps: Arc<StampClock>,
    metrics: Arc<Metrics>,
    holders: Mutex<Holders>,
    /// Nodes that did not take a copy in time, and the time.
    suspects: Mutex<HashMap<NodeId, Instant>>,
}

/// Why a chunk is not on a quorum.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// This node does not lead.
    #[error("this node does not lead")]
    NotLeader(Option<Member>),
    /// Fewer than f + 1 voters have space.
    #[error("no space left on a quorum of nodes")]
    NoSpace,
    /// Too few voters stored it in time.
    #[error("{0}")]
    Unavailable(String),
}

impl WritePath {
    /// Connects the parts.
    pub fn new(
        consensus: Consensus,
        content: Arc<ContentStore>,
        peers: Arc<PeerChunks>,
        placement: Arc<Placement>,
        space: Arc<SpaceMonitor>,
        stamps: Arc<StampClock>,
        metrics: Arc<Metrics>,
    ) -> Arc<WritePath> {
        Arc::new(WritePath {
            consensus,
            content,
            peers,
            placement,
            space,
            stamps,
            metrics,
            holders: Mutex::new(Holders::default()),
            suspects: Mutex::default(),
        })
    }

    /// Stores a chunk whose blocks match their checksums. It is durable on f + 1 voters when this returns; the
    /// remaining copies are completed in the background.
    ///
    /// # Errors
    /// [`PutError`].
    pub async fn put_chunk(&self, chunk: Chunk) -> Result<(), PutError> {
        if !self.consensus.is_leader() {
            return Err(PutError::NotLeader(self.consensus.leader()));
        }
        if !self.space.quorum_has_room() {
            return Err(PutError::NoSpace);
        }
        let id = chunk.id();
        let term = self.consensus.term();
        let (targets, substitutes) = self.copy_targets(id);
        let span = self
            .metrics
            .replication
            .begin(chunk.payload().len() as u64, targets.len());
        let enough = self.copy_to_quorum(chunk, targets, substitutes, &span);
        let holders = tokio::time::timeout(Duration::from_millis(QUORUM_TIMEOUT_MS), enough)
            .await
            .unwrap_or_else(|_| {
                Err(PutError::Unavailable(format!(
                    "no quorum stored the chunk in {QUORUM_TIMEOUT_MS} ms"
                )))
            });
        span.answered(Ending::of(&holders));
        self.holders.lock().remember(id, term, holders?);
        Ok(())
    }

    /// Returns the nodes that should hold a new chunk, and those that can replace them, best first.
    fn copy_targets(&self, id: ChunkId) -> (Vec<Member>, VecDeque<Member>) {
        let members = self.consensus.members();
        let snapshot = self.placement.snapshot();
        let Some(layout) = snapshot.newest().filter(|_| !snapshot.is_everywhere()) else {
            return (members, VecDeque::new());
        };
        let mut expected = snapshot.holders(id);
        let suspects = {
            let mut suspects = self.suspects.lock();
            suspects.retain(|_, since| since.elapsed() < Duration::from_millis(SUSPECT_MS));
            suspects.clone()
        };
        let (sound, suspected): (Vec<NodeId>, Vec<NodeId>) = layout
            .ranked(id)
            .into_iter()
            .partition(|node| !suspects.contains_key(node));
        // Recovery gives a skipped node its copy when the node is back.
        expected.retain(|node| !suspects.contains_key(node));
        expected.extend(sound.iter().take(layout.copies()));
        let substitutes = sound
            .into_iter()
            .chain(suspected)
            .filter(|node| !expected.contains(node));
        let member = |node: NodeId| members.iter().find(|member| member.id == node).cloned();
        let substitutes = substitutes.filter_map(member).collect();
        (expected.into_iter().filter_map(member).collect(), substitutes)
    }

    /// Copies the chunk to `targets`, and to `substitutes` as necessary; returns the holders when they are a quorum. The
    /// other copies continue without being awaited; recovery replaces those that fail.
    async fn copy_to_quorum(
        &self,
        chunk: Chunk,
        targets: Vec<Member>,
        mut substitutes: VecDeque<Member>,
        span: &Arc<ReplicationSpan>,
    ) -> Result<BTreeSet<NodeId>, PutError> {
        let voter_sets = self.consensus.voter_sets();
        // Capacity for every answer: no copy waits for the receiver.
        let (results, mut copies) = mpsc::channel((targets.len() + substitutes.len()).max(1));
        let mut open = BTreeSet::new();
        let copy_to = |member: Member, open: &mut BTreeSet<NodeId>| {
            open.insert(member.id);
            self.make_copy(chunk.clone(), member, span, results.clone());
        };
        targets.into_iter().for_each(|member| copy_to(member, &mut open));
        let slow = tokio::time::sleep(Duration::from_millis(SUBSTITUTE_AFTER_MS));
        tokio::pin!(slow);
        let mut holders = BTreeSet::new();
        let mut refusals = Vec::new();
        while !open.is_empty() {
            let copied = tokio::select! {
                copied = copies.recv() => copied,
                () = &mut slow, if !substitutes.is_empty() => {
                    let now = Instant::now();
                    self.suspects.lock().extend(open.iter().map(|node| (*node, now)));
                    for member in substitutes.drain(..) {
                        span.goes_on_to_another();
                        copy_to(member, &mut open);
                    }
                    continue;
                }
            };
            // Cannot happen: `results` is alive, so the channel is open.
            let Some((node, result)) = copied else { break };
            open.remove(&node);
            match result {
                Ok(()) => {
                    holders.insert(node);
                    if voter_sets.is_quorum(|voter| holders.contains(voter)) {
                        return Ok(holders);
                    }
                }
                Err(refusal) => {
                    refusals.push((node, refusal));
                    if let Some(member) = substitutes.pop_front() {
                        self.suspects.lock().insert(node, Instant::now());
                        span.goes_on_to_another();
                        copy_to(member, &mut open);
                    }
                }
            }
        }
        Err(self.put_error(&refusals))
    }

    /// Applies a mutation once, however often it arrives.
    ///
    /// # Errors
    /// [`Crowded`] if too many extents are in its way: nothing was done, and it may be repeated when they have been
    /// combined.
    pub async fn mutate(&self, mutation: Mutation) -> Result<ClientResponse, Crowded> {
        let session = mutation.request.session;
        let within_bounds = mutation
            .command
            .validate(session)
            .and_then(|()| mutation.command.validate_bytes());
        if let Err(error) = within_bounds {
            return Ok(ClientResponse::Refused(Refusal::Invalid {
                reason: format!("the command is out of bounds: {error}"),
            }));
        }
        let stored = stored_chunks(&mutation);
        let refusal = LogBody::Refuse {
            request: mutation.request,
            verdict: FsError::NoSpace,
        };
        let result = if mutation.command.frees_space() || self.space.quorum_has_room() {
            let unconfirmed = self.unconfirmed(&stored).await;
            if !unconfirmed.is_empty() {
                return Ok(ClientResponse::Refused(Refusal::PutAgain { chunks: unconfirmed }));
            }
            match self.decide(LogBody::Call(mutation), &stored).await {
                Ok(ApplyResult::Crowded(crowded)) => return Err(crowded),
                Err(ProposeError::Overtaken) => ClientResponse::Refused(Refusal::PutAgain {
                    chunks: stored.clone(),
                }),
                // Leadership is being handed to a node with space.
                Err(ProposeError::NoSpace) if self.space.quorum_has_room() => Refusal::unavailable(
                    "the disk of the leader is full and others have space: leadership is being transferred",
                )
                .into(),
                Err(ProposeError::NoSpace) => self.propose(refusal).await,
                decided => reply_to(decided),
            }
        } else {
            self.propose(refusal).await
        };
        if matches!(result, ClientResponse::Outcome(_)) {
            self.holders.lock().forget(&stored);
        }
        Ok(result)
    }

    /// Commits a command of the cluster that refers to `chunk`, which was put through this node.
    ///
    /// # Errors
    /// A [`ProposeError`] if it was not decided.
    pub async fn name_chunk(&self, body: LogBody, chunk: ChunkId) -> Result<ApplyResult, ProposeError> {
        if !self.unconfirmed(&[chunk]).await.is_empty() {
            return Err(ProposeError::Overtaken);
        }
        let decided = self.decide(body, &[chunk]).await;
        self.holders.lock().forget(&[chunk]);
        decided
    }

    /// Commits a maintenance command of the cluster that refers to no content.
    ///
    /// # Errors
    /// A [`ProposeError`] if it was not decided.
    pub async fn housekeep(&self, body: LogBody) -> Result<ApplyResult, ProposeError> {
        self.decide(body, &[]).await
    }

    /// Returns the time with which a change would be stamped now; no earlier change has a later one. `None` if it is
    /// not certain.
    pub fn time(&self) -> Option<Timestamp> {
        self.stamps.told()
    }

    /// Opens a session; `key` is its key, if it has one.
    pub async fn open_session(
        &self,
        session: SessionId,
        mut description: String,
        key: Option<SessionKey>,
    ) -> ClientResponse {
        // The description is for people, and is stored on a full disk too.
        description.truncate(description.floor_char_boundary(SESSION_DESCRIPTION_BYTES_MAX));
        let body = match key.filter(|_| self.placement.feature_level() >= SESSION_KEY_LEVEL) {
            Some(key) => LogBody::OpenSessionWithKey {
                session,
                description,
                key,
            },
            None => LogBody::OpenSession { session, description },
        };
        self.propose(body).await
    }

    /// Sets the number of nodes that hold each chunk, as far as there are as many nodes.
    pub async fn set_replicas(&self, replicas: u8) -> ClientResponse {
        // Below this level the command has no effect.
        const FEATURE_LEVEL_MIN: u32 = 2;
        if self.placement.feature_level() < FEATURE_LEVEL_MIN {
            return Refusal::unavailable("not all members are known to support the placement of content yet")
                .into();
        }
        self.propose(LogBody::SetReplicas { replicas }).await
    }

    /// Ends a session.
    pub async fn end_session(&self, session: SessionId) -> ClientResponse {
        self.propose(LogBody::EndSession { session }).await
    }

    async fn propose(&self, body: LogBody) -> ClientResponse {
        reply_to(self.decide(body, &[]).await)
    }

    /// Decides a command. `stored`: the chunks that must be on a quorum when the command is proposed.
    async fn decide(&self, body: LogBody, stored: &[ChunkId]) -> Result<ApplyResult, ProposeError> {
        let stamp = self.stamps.stamp().await;
        let inline_bytes = match &body {
            LogBody::Call(mutation) => mutation.command.inline_bytes() as u64,
            _ => 0,
        };
        let began = Instant::now();
        let command = LogCommand { stamp, body };
        // The holders may have been replaced while the command waited for admission.
        let still_held = || stored.is_empty() || self.not_on_quorum(stored).is_empty();
        let decided = self.consensus.propose_if(command, still_held).await;
        let ending = Ending::of(&decided);
        self.metrics.commits.record(ending, 0, began.elapsed());
        if inline_bytes > 0 && ending == Ending::Done {
            let counted = &self.metrics.replication.inline_bytes;
            counted.fetch_add(inline_bytes, Ordering::Relaxed);
        }
        decided
    }

    /// Begins to copy the chunk to `member`; sends the result to `results`.
    fn make_copy(
        &self,
        chunk: Chunk,
        member: Member,
        span: &Arc<ReplicationSpan>,
        results: mpsc::Sender<(NodeId, Result<(), CopyError>)>,
    ) {
        let span = Arc::clone(span);
        if member.id == self.consensus.id() {
            let content = self.content.clone();
            tokio::spawn(async move {
                let result = content.put(chunk).await.map_err(CopyError::Own);
                span.copied(CopyPlace::Own, Ending::of(&result));
                let _ = results.send((member.id, result)).await;
            });
        } else {
            let peers = self.peers.clone();
            tokio::spawn(async move {
                let result = peers.push(&member, &chunk).await.map_err(CopyError::Peer);
                span.copied(CopyPlace::Peer, Ending::of(&result));
                let _ = results.send((member.id, result)).await;
            });
        }
    }

    /// Returns the error for the client when too few copies were made.
    fn put_error(&self, refusals: &[(NodeId, CopyError)]) -> PutError {
        for (node, refusal) in refusals {
            if refusal.is_full() {
                self.space.note_disk_full(*node);
            }
        }
        if !self.space.quorum_has_room() {
            return PutError::NoSpace;
        }
        let reasons: Vec<String> = refusals
            .iter()
            .map(|(node, refusal)| format!("node {}: {refusal}", node.slot))
            .collect();
        warn!(reasons = reasons.join("; "), "a chunk did not reach a quorum");
        PutError::Unavailable(reasons.join("; "))
    }

    /// Returns the chunks that are not known to be on a quorum; asks the peers about chunks that this node does not
    /// know.
    async fn unconfirmed(&self, stored: &[ChunkId]) -> Vec<ChunkId> {
        if stored.is_empty() {
            return Vec::new();
        }
        let term = self.consensus.term();
        let unknown = self.not_on_quorum(stored);
        if unknown.is_empty() {
            return unknown;
        }
        debug!(
            chunks = unknown.len(),
            "asking the peers which chunks of another term they hold"
        );
        let own = self.consensus.id();
        let mut holders: HashMap<ChunkId, BTreeSet<NodeId>> = HashMap::new();
        for id in &unknown {
            let here = self.content.holds(*id).then_some(own);
            holders.insert(*id, here.into_iter().collect());
        }
        let others: Vec<Member> = self
            .consensus
            .members()
            .into_iter()
            .filter(|member| member.id != own)
            .collect();
        let queries = others.iter().map(|member| self.peers.held(member, &unknown));
        for (member, answer) in others.iter().zip(futures::future::join_all(queries).await) {
            let Ok(held) = answer else { continue };
            for (id, _) in unknown.iter().zip(held).filter(|(_, held)| *held) {
                holders.entry(*id).or_default().insert(member.id);
            }
        }
        {
            let mut known = self.holders.lock();
            for (id, nodes) in holders {
                known.remember(id, term, nodes);
            }
        }
        self.not_on_quorum(&unknown)
    }

    /// Returns the chunks that are not known to be on a quorum of the active configurations.
    fn not_on_quorum(&self, stored: &[ChunkId]) -> Vec<ChunkId> {
        let (term, voter_sets) = (self.consensus.term(), self.consensus.voter_sets());
        let known = self.holders.lock();
        known.not_on_quorum(stored, term, &voter_sets, Instant::now())
    }
}

/// Converts a decision, or the reason why there is none, for the client.
fn reply_to(decided: Result<ApplyResult, ProposeError>) -> ClientResponse {
    match decided {
        Ok(ApplyResult::Outcome(outcome)) => ClientResponse::Outcome(outcome),
        Ok(ApplyResult::Done) => ClientResponse::Session(SessionState::default()),
        Ok(ApplyResult::UnknownSession) => ClientResponse::Refused(Refusal::UnknownSession),
        Ok(ApplyResult::WrongKey) => ClientResponse::Refused(Refusal::Invalid {
            reason: String::from("another client has opened a session with this id"),
        }),
        Ok(ApplyResult::StaleSequence) => ClientResponse::Refused(Refusal::StaleSequence),
        Ok(ApplyResult::Crowded(crowded)) => {
            let inode = crowded.inode;
            Refusal::unavailable(format!(
                "inode {inode} has too many extents to be overwritten by one command"
            ))
            .into()
        }
        Ok(ApplyResult::NeverDecided) => ClientResponse::Refused(Refusal::NeverDecided),
        Err(error) => Refusal::from(error).into(),
    }
}

/// Why a copy was not made.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("{0}")]
    Own(ContentError),
    #[error("{0}")]
    Peer(PushError),
}

impl CopyError {
    fn is_full(&self) -> bool {
        matches!(
            self,
            CopyError::Own(ContentError::NoSpace) | CopyError::Peer(PushError::NoSpace { .. })
        )
    }
}

fn stored_chunks(mutation: &Mutation) -> Vec<ChunkId> {
    let stored = mutation
        .command
        .chunks
        .iter()
        .filter(|chunk| matches!(chunk.body, ChunkBody::Stored));
    stored.map(|chunk| chunk.id).collect()
}
