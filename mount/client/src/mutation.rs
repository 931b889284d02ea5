//! One mutation from its lane to its verdict (P4).
//!
//! The command takes effect once, and its verdict is the cluster's. If the caller stops waiting, the mutation is
//! *abandoned*: it is voided in the background, its lane stays taken, and no other mutation is sent before it has a
//! verdict. So a mutation that was reported as failed never takes effect after a later acknowledged one (P1).
//!
//! Invariants: every sending of a mutation has the same request id and the same bytes. A request id that was sent is
//! reused only to void the mutation: a command without effect under the same id, which is applied only if the mutation
//! has not been and never will be; its answer shows which. A mutation with unknown outcome is never sent under another
//! session. A mutation that the cluster reports as never decided may be: its session has ended in the log, so a copy
//! that arrives later is refused.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::{BoxFuture, try_join_all};
use quorumfs_proto::call::Mutation;
use quorumfs_proto::{
    ChunkId, ClientRequest, ClientResponse, Command, FsError, Operation, OperationResult, Outcome, Refusal,
    RequestId, codec,
};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::calls::{Calls, describe_reply};
use crate::chunk::{Claim, FreshChunk};
use crate::chunk_writer::ChunkWriter;
use crate::connector::Backoff;
use crate::lanes::TakenLane;
use crate::leader_link::LeaderLink;
use crate::session::{Epoch, Sessions};

/// The parts of the client that mutations use.
pub(crate) struct Mutator {
    pub(crate) calls: LeaderLink<Calls>,
    pub(crate) chunk_writer: ChunkWriter,
    pub(crate) sessions: Sessions,
    /// Runs abandoned mutations to their verdict.
    pub(crate) runtime: Handle,
    pub(crate) abandoned: Abandoned,
    /// Held while a question about unlinked inodes is answered. Invariant: an answer that reports an inode as held is
    /// decided before the release of the same inode, which would otherwise have no effect.
    pub(crate) unlinked_answer: tokio::sync::Mutex<()>,
}

/// The number of abandoned mutations without a verdict: at most one for each lane.
#[derive(Clone, Debug, Default)]
pub(crate) struct Abandoned(Arc<watch::Sender<usize>>);

impl Abandoned {
    /// Waits until there is none.
    async fn all_settled(&self) {
        if *self.0.borrow() > 0 {
            // The sender lives as long as self.
            let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
        }
    }

    /// Whether there is one.
    pub(crate) fn any(&self) -> bool {
        *self.0.borrow() > 0
    }

    /// Counts one more until the returned guard is dropped.
    fn add(&self) -> AbandonedGuard {
        self.0.send_modify(|count| *count += 1);
        AbandonedGuard(self.clone())
    }
}

/// Counts one abandoned mutation until it is dropped.
struct AbandonedGuard(Abandoned);

impl Drop for AbandonedGuard {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

/// The end of a mutation.
enum Settled {
    /// The verdict of the cluster, or why the command was voided before it took effect.
    Verdict(Result<Outcome, FsError>),
    /// Its session has ended, and the mutation did not and will not take effect: the lanes of the session prove it, or
    /// it was sent once and the cluster did not know the session at that time.
    NotApplied,
    /// It may or may not have taken effect.
    Unknown,
}

impl Mutator {
    /// Applies `command`; `stored` are the chunks that it names and that were put before.
    ///
    /// # Errors
    /// As [`crate::Client::mutate`].
    pub(crate) async fn mutate(
        self: &Arc<Self>,
        command: Command,
        stored: &[FreshChunk],
    ) -> Result<Outcome, FsError> {
        let releases = |operation: &Operation| matches!(operation, Operation::ReleaseUnlinked { .. });
        if command.operations.iter().any(releases) {
            drop(self.unlinked_answer.lock().await);
        }
        loop {
            self.abandoned.all_settled().await;
            let epoch = self.sessions.wait_until_open().await;
            if command
                .chunks
                .iter()
                .any(|chunk| chunk.id.session != epoch.session)
            {
                // The chunks ended with their session.
                return Err(FsError::ChunkDead);
            }
            command.validate(epoch.session)?;
            let Some(lane) = epoch.lanes.take().await else {
                continue;
            };
            if self.abandoned.any() {
                // Another mutation was abandoned while this one waited for its lane; it is decided first.
                lane.unused();
                continue;
            }
            let given_up = CancellationToken::new();
            let pending = PendingMutation::new(self.clone(), epoch, lane, command.clone(), stored.to_vec());
            let settled = RunToCompletion {
                work: Some(Box::pin(pending.run(given_up.clone()))),
                given_up,
                runtime: self.runtime.clone(),
                abandoned: self.abandoned.clone(),
            };
            match settled.await {
                Settled::Verdict(verdict) => return verdict,
                Settled::NotApplied => {}
                Settled::Unknown => return Err(FsError::Io),
            }
        }
    }
}

/// A mutation in flight and what it holds.
struct PendingMutation {
    mutator: Arc<Mutator>,
    epoch: Arc<Epoch>,
    lane: TakenLane,
    call: Bytes,
    low_water: u64,
    stored: Vec<FreshChunk>,
    /// Claims on all chunks of the command, inline ones too: the low-water mark must not pass them before the verdict.
    _claims: Vec<Claim>,
}

impl PendingMutation {
    fn new(
        mutator: Arc<Mutator>,
        epoch: Arc<Epoch>,
        lane: TakenLane,
        command: Command,
        stored: Vec<FreshChunk>,
    ) -> PendingMutation {
        let named = command.chunks.iter();
        let claims = named.filter_map(|chunk| epoch.chunks.claim(chunk.id)).collect();
        let low_water = epoch.chunks.low_water();
        let call = ClientRequest::Mutate(Mutation {
            request: lane.request(),
            chunk_low_water: low_water,
            command,
        });
        PendingMutation {
            mutator,
            epoch,
            lane,
            call: codec::encode(&call),
            low_water,
            stored,
            _claims: claims,
        }
    }

    /// Runs until there is a verdict or the outcome can no longer be known; voids the command after `abandoned` is
    /// cancelled.
    async fn run(self, abandoned: CancellationToken) -> Settled {
        let sessions = &self.mutator.sessions;
        let mut call = self.call.clone();
        let mut given_up: Option<FsError> = None;
        let mut sends = 0;
        let mut backoff = Backoff::new();
        loop {
            let execute = self.mutator.calls.execute_encoded(call.clone());
            let decided = match given_up {
                Some(_) => execute.await,
                None => match abandoned.run_until_cancelled(execute).await {
                    Some(decided) => decided,
                    None => {
                        // The number of sendings is unknown, so it counts as more than one.
                        sends += 2;
                        given_up = Some(FsError::TimedOut);
                        call = self.void();
                        continue;
                    }
                },
            };
            let Some((reply, more)) = decided else {
                return Settled::Unknown;
            };
            sends += more;
            let reason = match (reply, given_up) {
                // This verdict may come from the leader's check of free space before the log, and is then not
                // recorded.
                (ClientResponse::Outcome(Err(FsError::NoSpace)), None) => FsError::NoSpace,
                (ClientResponse::Outcome(verdict), given_up) => {
                    self.lane.decided();
                    return Settled::Verdict(match given_up {
                        Some(error) if is_void(&verdict) => Err(error),
                        _ => verdict,
                    });
                }
                (ClientResponse::Refused(Refusal::PutAgain { chunks }), None) => {
                    let put_again = async {
                        self.put_again(&chunks).await?;
                        backoff.pause().await;
                        Ok(())
                    };
                    match abandoned.run_until_cancelled(put_again).await {
                        Some(Ok(())) => continue,
                        Some(Err(error)) => error,
                        None => FsError::TimedOut,
                    }
                }
                (ClientResponse::Refused(Refusal::Invalid { reason }), None) => {
                    let RequestId {
                        session,
                        lane,
                        sequence,
                    } = self.lane.request();
                    tracing::error!(%session, lane = lane.0, sequence, reason, "the cluster refused a command as invalid");
                    FsError::InvalidArgument
                }
                (ClientResponse::Refused(Refusal::NeverDecided), given_up) => {
                    sessions.mark_lost(&self.epoch, "it has ended");
                    return match given_up {
                        Some(error) => Settled::Verdict(Err(error)),
                        None => Settled::NotApplied,
                    };
                }
                (ClientResponse::Refused(Refusal::UnknownSession), _) => {
                    sessions.mark_lost(&self.epoch, "the cluster does not know it");
                    return match sends {
                        1 => Settled::NotApplied,
                        _ => Settled::Unknown,
                    };
                }
                (reply, _) => {
                    let RequestId {
                        session,
                        lane,
                        sequence,
                    } = self.lane.request();
                    let reply = describe_reply(&reply);
                    tracing::error!(%session, lane = lane.0, sequence, reply, "unexpected reply to a mutation");
                    sessions.mark_lost(&self.epoch, "a mutation got an unexpected reply");
                    return Settled::Unknown;
                }
            };
            given_up = Some(reason);
            call = self.void();
        }
    }

    /// Puts the chunks again of which a new leader does not know whether they are durable.
    async fn put_again(&self, chunks: &[ChunkId]) -> Result<(), FsError> {
        let mut puts = Vec::with_capacity(chunks.len());
        for id in chunks {
            let Some(chunk) = self.stored.iter().find(|chunk| chunk.id() == *id) else {
                tracing::error!(chunk = %id, "the leader asked for a chunk that the mutation does not name as stored");
                return Err(FsError::Io);
            };
            puts.push(self.mutator.chunk_writer.put(chunk));
        }
        try_join_all(puts).await.map(drop)
    }

    /// Returns the encoded void: a command without effect under the same request id.
    fn void(&self) -> Bytes {
        codec::encode(&ClientRequest::Mutate(Mutation {
            request: self.lane.request(),
            chunk_low_water: self.low_water,
            command: Command::single(Operation::ReleaseUnlinked { inodes: Vec::new() }),
        }))
    }
}

/// Whether this is the verdict of the void command.
fn is_void(verdict: &Result<Outcome, FsError>) -> bool {
    matches!(verdict, Ok(outcome) if outcome.results == [OperationResult::Done])
}

/// Runs work that is completed in the background if the caller drops the future.
struct RunToCompletion<T: 'static> {
    work: Option<BoxFuture<'static, T>>,
    /// Cancelled when the caller drops the future.
    given_up: CancellationToken,
    runtime: Handle,
    abandoned: Abandoned,
}

impl<T> Future for RunToCompletion<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let work = self.work.as_mut().expect("not polled after it was done");
        let done = work.as_mut().poll(context);
        if done.is_ready() {
            self.work = None;
        }
        done
    }
}

impl<T> Drop for RunToCompletion<T> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            // Counted before the drop returns, so that a later mutation of the caller waits for this one.
            let guard = self.abandoned.add();
            self.given_up.cancel();
            self.runtime.spawn(async move {
                drop(work.await);
                drop(guard);
            });
        }
    }
}
