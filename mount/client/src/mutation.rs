//! One mutation from its lane to its verdict (P4).
//!
//! Owes: the command takes effect once, and its verdict is the cluster's; a caller that stops waiting leaves the
//! resolution to the background, and the lane stays taken until then.
//!
//! A mutation that its caller has given up is *abandoned*: it is voided, and until that has a verdict no other is sent.
//! So what a program was told has failed never takes effect after something that was acknowledged later (P1).
//!
//! Invariants: every sending of a mutation carries the same request id and the same bytes. A request id that was ever
//! sent is used for nothing else, except to void it: a command that does nothing, under the same id, takes effect
//! only if the other has not and never will; its answer tells which. A mutation whose outcome is unknown is never
//! sent under another session. One that its session never decided is: the session ended in the log before the cluster
//! said so, and what comes of it later is refused.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::{BoxFuture, try_join_all};
use quorumfs_proto::call::Mutation;
use quorumfs_proto::{
    ChunkId, ClientRequest, ClientResponse, Command, FsError, Operation, OperationResult, Outcome, Refusal,
    codec,
};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::calls::Calls;
use crate::chunk::{Claim, FreshChunk};
use crate::chunk_writer::ChunkWriter;
use crate::connector::Backoff;
use crate::lanes::TakenLane;
use crate::leader_link::LeaderLink;
use crate::session::{Epoch, Sessions};

/// What a mutation needs of the client.
pub(crate) struct Mutator {
    pub(crate) calls: LeaderLink<Calls>,
    pub(crate) putter: ChunkWriter,
    pub(crate) sessions: Sessions,
    /// Finishes what callers do not wait for.
    pub(crate) runtime: Handle,
    pub(crate) abandoned: Abandoned,
    /// Held while the cluster's question about unlinked inodes is answered. Invariant: an answer that says "held" is decided
    /// before the release of the same inode, which would find nothing to release otherwise.
    pub(crate) answering: tokio::sync::Mutex<()>,
}

/// How many mutations were sent, are not waited for any more and have no verdict yet. At most as many as there are
/// lanes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Abandoned(Arc<watch::Sender<usize>>);

impl Abandoned {
    /// Returns when there is none.
    async fn resolved(&self) {
        if *self.0.borrow() > 0 {
            // The sender lives as long as self.
            let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
        }
    }

    /// Whether there is one.
    pub(crate) fn any(&self) -> bool {
        *self.0.borrow() > 0
    }

    /// One more, until the answer is dropped.
    fn one_more(&self) -> Unresolved {
        self.0.send_modify(|count| *count += 1);
        Unresolved(self.clone())
    }
}

/// An abandoned mutation.
struct Unresolved(Abandoned);

impl Drop for Unresolved {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

/// What became of a mutation.
enum Settled {
    /// The cluster's word, or why the command was given up before it could take effect.
    Verdict(Result<Outcome, FsError>),
    /// Its session is over and it did not and will not take effect: the session's lanes say so, or it was sent once and
    /// the cluster did not know the session then.
    NeverHappened,
    /// It may or may not have taken effect.
    Unknown,
}

impl Mutator {
    /// Carries out `command`; `stored` are the chunks it names that were put before.
    pub(crate) async fn mutate(
        self: &Arc<Self>,
        command: Command,
        stored: &[FreshChunk],
    ) -> Result<Outcome, FsError> {
        let releases = |operation: &Operation| matches!(operation, Operation::ReleaseUnlinked { .. });
        if command.operations.iter().any(releases) {
            drop(self.answering.lock().await);
        }
        loop {
            self.abandoned.resolved().await;
            let epoch = self.sessions.alive().await;
            if command
                .chunks
                .iter()
                .any(|chunk| chunk.id.session != epoch.session)
            {
                // They ended with their session.
                return Err(FsError::ChunkDead);
            }
            command.validate(epoch.session)?;
            let Some(lane) = epoch.lanes.take().await else {
                continue;
            };
            if self.abandoned.any() {
                // Given up while this waited for the lane. Whoever gave it up has been told, so it goes first.
                lane.unused();
                continue;
            }
            let given_up = CancellationToken::new();
            let resolution = Resolution::new(self.clone(), epoch, lane, command.clone(), stored.to_vec());
            let settled = Completing {
                work: Some(Box::pin(resolution.run(given_up.clone()))),
                given_up,
                runtime: self.runtime.clone(),
                abandoned: self.abandoned.clone(),
            };
            match settled.await {
                Settled::Verdict(verdict) => return verdict,
                Settled::NeverHappened => {}
                Settled::Unknown => return Err(FsError::Io),
            }
        }
    }
}

/// A mutation under way and everything it holds.
struct Resolution {
    mutator: Arc<Mutator>,
    epoch: Arc<Epoch>,
    lane: TakenLane,
    call: Bytes,
    low_water: u64,
    stored: Vec<FreshChunk>,
    /// Inline chunks too: the low-water mark must not pass what is not decided.
    _claims: Vec<Claim>,
}

impl Resolution {
    fn new(
        mutator: Arc<Mutator>,
        epoch: Arc<Epoch>,
        lane: TakenLane,
        command: Command,
        stored: Vec<FreshChunk>,
    ) -> Resolution {
        let named = command.chunks.iter();
        let claims = named.filter_map(|chunk| epoch.chunks.claim(chunk.id)).collect();
        let low_water = epoch.chunks.low_water();
        let call = ClientRequest::Mutate(Mutation {
            request: lane.request(),
            chunk_low_water: low_water,
            command,
        });
        Resolution {
            mutator,
            epoch,
            lane,
            call: codec::encode(&call),
            low_water,
            stored,
            _claims: claims,
        }
    }

    /// Until there is a verdict, or nobody can tell any more; from `abandoned` on by voiding the command.
    async fn run(self, abandoned: CancellationToken) -> Settled {
        let sessions = &self.mutator.sessions;
        let mut call = self.call.clone();
        let mut given_up: Option<FsError> = None;
        let mut sends = 0;
        let mut backoff = Backoff::new();
        loop {
            let decide = self.mutator.calls.decide(call.clone());
            let decided = match given_up {
                Some(_) => decide.await,
                None => match abandoned.run_until_cancelled(decide).await {
                    Some(decided) => decided,
                    None => {
                        // It may have been sent any number of times.
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
                // No state machine says so: the leader may have looked at its disks first, and then nobody
                // remembers it.
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
                    tracing::error!(request = ?self.lane.request(), reason, "the cluster refuses a command");
                    FsError::InvalidArgument
                }
                (ClientResponse::Refused(Refusal::NeverDecided), given_up) => {
                    sessions.lose(&self.epoch, "it has ended");
                    return match given_up {
                        Some(error) => Settled::Verdict(Err(error)),
                        None => Settled::NeverHappened,
                    };
                }
                (ClientResponse::Refused(Refusal::UnknownSession), _) => {
                    sessions.lose(&self.epoch, "the cluster does not know it");
                    return match sends {
                        1 => Settled::NeverHappened,
                        _ => Settled::Unknown,
                    };
                }
                (reply, _) => {
                    tracing::error!(request = ?self.lane.request(), ?reply, "not an answer to a mutation");
                    sessions.lose(&self.epoch, "a mutation has no verdict");
                    return Settled::Unknown;
                }
            };
            given_up = Some(reason);
            call = self.void();
        }
    }

    /// Puts chunks again that a new leader is not sure of.
    async fn put_again(&self, chunks: &[ChunkId]) -> Result<(), FsError> {
        let mut puts = Vec::with_capacity(chunks.len());
        for id in chunks {
            let Some(chunk) = self.stored.iter().find(|chunk| chunk.id() == *id) else {
                tracing::error!(chunk = %id, "asked to put a chunk again that the caller did not hand over");
                return Err(FsError::Io);
            };
            puts.push(self.mutator.putter.put(chunk));
        }
        try_join_all(puts).await.map(drop)
    }

    /// A command that does nothing, under the same request id.
    fn void(&self) -> Bytes {
        codec::encode(&ClientRequest::Mutate(Mutation {
            request: self.lane.request(),
            chunk_low_water: self.low_water,
            command: Command::single(Operation::ReleaseUnlinked { inodes: Vec::new() }),
        }))
    }
}

/// Whether this is what the void command answers.
fn is_void(verdict: &Result<Outcome, FsError>) -> bool {
    matches!(verdict, Ok(outcome) if outcome.results == [OperationResult::Done])
}

/// Work that its caller may stop waiting for, but that is finished all the same.
struct Completing<T: 'static> {
    work: Option<BoxFuture<'static, T>>,
    /// Tells the work that its caller has.
    given_up: CancellationToken,
    runtime: Handle,
    abandoned: Abandoned,
}

impl<T> Future for Completing<T> {
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

impl<T> Drop for Completing<T> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            // Counted before the caller hears that it waits no more, so that nothing it does then comes first.
            let unresolved = self.abandoned.one_more();
            self.given_up.cancel();
            self.runtime.spawn(async move {
                drop(work.await);
                drop(unresolved);
            });
        }
    }
}
