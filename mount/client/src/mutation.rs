//! One mutation from its lane to its verdict (P4).
//!
//! Owes: the command takes effect once, and its verdict is the cluster's; a caller that stops waiting leaves the
//! resolution to the background, and the lane stays taken until then.
//!
//! Invariants: every sending of a mutation carries the same request id and the same bytes. A request id that was ever
//! sent is used for nothing else, except to void it: a command that does nothing, under the same id, takes effect
//! only if the other has not and never will; its answer tells which. A mutation whose outcome is unknown is never
//! sent under another session.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::{BoxFuture, try_join_all};
use quorumfs_proto::call::Mutation;
use quorumfs_proto::{
    Call, CallReply, ChunkId, Command, FsError, Operation, OperationResult, Outcome, Refusal, codec,
};
use tokio::runtime::Handle;

use crate::calls::{Calls, Decided};
use crate::chunk::{Claim, FreshChunk};
use crate::connector::Backoff;
use crate::lanes::TakenLane;
use crate::leader_link::LeaderLink;
use crate::put::Putter;
use crate::session::{Epoch, Sessions};

/// What a mutation needs of the client.
pub(crate) struct Mutator {
    pub(crate) calls: LeaderLink<Calls>,
    pub(crate) putter: Putter,
    pub(crate) sessions: Sessions,
    /// Finishes what callers do not wait for.
    pub(crate) runtime: Handle,
}

/// What became of a mutation.
enum Settled {
    /// The cluster's word, or why the command was given up before it could take effect.
    Verdict(Result<Outcome, FsError>),
    /// It was sent once and the cluster did not know the session: it did not and will not take effect.
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
        loop {
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
            let resolution = Resolution::new(self.clone(), epoch, lane, command.clone(), stored.to_vec());
            let settled = Completing {
                work: Some(Box::pin(resolution.run())),
                runtime: self.runtime.clone(),
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
        let call = Call::Mutate(Mutation {
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

    async fn run(self) -> Settled {
        let sessions = &self.mutator.sessions;
        let mut call = self.call.clone();
        let mut given_up: Option<FsError> = None;
        let mut sends = 0;
        let mut backoff = Backoff::new();
        loop {
            let Some(Decided { reply, sends: more }) = self.mutator.calls.decide(call.clone()).await else {
                return Settled::Unknown;
            };
            sends += more;
            let reason = match (reply, given_up) {
                // No state machine says so: the leader may have looked at its disks first, and then nobody
                // remembers it.
                (CallReply::Outcome(Err(FsError::NoSpace)), None) => FsError::NoSpace,
                (CallReply::Outcome(verdict), given_up) => {
                    self.lane.decided();
                    return Settled::Verdict(match given_up {
                        Some(error) if is_void(&verdict) => Err(error),
                        _ => verdict,
                    });
                }
                (CallReply::Refused(Refusal::PutAgain { chunks }), None) => {
                    match self.put_again(&chunks).await {
                        Ok(()) => {
                            backoff.pause().await;
                            continue;
                        }
                        Err(error) => error,
                    }
                }
                (CallReply::Refused(Refusal::Invalid { reason }), None) => {
                    tracing::error!(request = ?self.lane.request(), reason, "the cluster refuses a command");
                    FsError::InvalidArgument
                }
                (CallReply::Refused(Refusal::UnknownSession), _) => {
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
        codec::encode(&Call::Mutate(Mutation {
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
    runtime: Handle,
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
            self.runtime.spawn(async move { drop(work.await) });
        }
    }
}
