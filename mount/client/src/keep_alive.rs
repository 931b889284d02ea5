//! Keeps the session alive: sends keep-alives with statistics, opens a new session when it was lost, and releases
//! unlinked inodes that this client does not have open.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::limits::{HELD_ASKED_MAX, KEEP_ALIVE_INTERVAL_MS};
use quorumfs_proto::statistics::ClientStatistics;
use quorumfs_proto::{ClientRequest, ClientResponse, Command, InodeNumber, Operation, Refusal};
use quorumfs_wire::UnlinkedQuestion;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::calls::describe_reply;
use crate::connector::Backoff;
use crate::mutation::Mutator;

/// Returns those of the given inodes that this client does not have open.
type UnlinkedHandler = dyn Fn(&[InodeNumber]) -> Vec<InodeNumber> + Send + Sync;

/// Returns the statistics of this client since it started.
type StatisticsSource = dyn Fn() -> ClientStatistics + Send + Sync;

/// The background task that keeps the session alive.
pub(crate) struct KeepAlive {
    mutator: Arc<Mutator>,
    unlinked: Mutex<Option<Arc<UnlinkedHandler>>>,
    statistics: Mutex<Option<Arc<StatisticsSource>>>,
}

impl KeepAlive {
    pub(crate) fn new(mutator: Arc<Mutator>) -> KeepAlive {
        KeepAlive {
            mutator,
            unlinked: Mutex::new(None),
            statistics: Mutex::new(None),
        }
    }

    pub(crate) fn set_unlinked_handler(&self, handler: Arc<UnlinkedHandler>) {
        *self.unlinked.lock() = Some(handler);
    }

    pub(crate) fn set_statistics_source(&self, source: Arc<StatisticsSource>) {
        *self.statistics.lock() = Some(source);
    }

    /// Runs until the client is closed.
    pub(crate) async fn run(&self) {
        let interval = Duration::from_millis(KEEP_ALIVE_INTERVAL_MS);
        let mut ticks = interval_at(Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // One release at a time; keep-alives continue while it waits for a lane.
        let mut release: Option<JoinHandle<()>> = None;
        loop {
            tokio::select! {
                () = self.mutator.sessions.wait_for_loss() => {
                    if !self.replace().await {
                        return;
                    }
                }
                _ = ticks.tick() => {
                    if self.keep_alive(&mut release).await == KeepAliveOutcome::Closed {
                        return;
                    }
                }
                () = self.mutator.calls.cluster().keep_alive_requested() => {
                    if self.keep_alive(&mut release).await == KeepAliveOutcome::Closed {
                        return;
                    }
                    ticks.reset();
                }
            }
        }
    }

    /// Sends a keep-alive and answers the questions of the leader until it has no more.
    async fn keep_alive(&self, release: &mut Option<JoinHandle<()>>) -> KeepAliveOutcome {
        let epoch = self.mutator.sessions.current();
        let session = epoch.session;
        let mut call = ClientRequest::KeepAlive { session };
        // A release that the handler enables waits until the answer is decided.
        let _answering = self.mutator.unlinked_answer.lock().await;
        loop {
            let source = self.statistics.lock().clone();
            let statistics = source.map(|source| (&source()).into());
            let (state, question) = match self.mutator.calls.keep_alive(&call, statistics).await {
                None => return KeepAliveOutcome::Closed,
                Some((ClientResponse::Session(state), question)) => (state, question),
                Some((ClientResponse::Refused(Refusal::UnknownSession), _)) => {
                    self.mutator.sessions.mark_lost(&epoch, "it expired");
                    return KeepAliveOutcome::Alive;
                }
                Some((reply, _)) => {
                    tracing::warn!(reply = describe_reply(&reply), "unexpected reply to a keep-alive");
                    return KeepAliveOutcome::Alive;
                }
            };
            let Some(handler) = self.unlinked.lock().clone() else {
                return KeepAliveOutcome::Alive;
            };
            let asked = question
                .as_ref()
                .map(|question| &question.inodes[..])
                .unwrap_or_default();
            let asked = asked.iter().map(|inode| InodeNumber(*inode));
            // One call of the handler, because it compares the inodes with those of the previous call.
            let inodes: Vec<InodeNumber> = state.unlinked.iter().copied().chain(asked).collect();
            let free: HashSet<InodeNumber> = match inodes.is_empty() {
                true => HashSet::new(),
                false => handler(&inodes).into_iter().collect(),
            };
            if release.as_ref().is_none_or(JoinHandle::is_finished) {
                let has_more = state.unlinked.len() >= HELD_ASKED_MAX;
                let released: Vec<InodeNumber> = state
                    .unlinked
                    .into_iter()
                    .filter(|inode| free.contains(inode))
                    .collect();
                if !released.is_empty() {
                    *release = Some(self.release_unlinked(released, has_more));
                }
            }
            call = match question {
                Some(UnlinkedQuestion {
                    from,
                    through,
                    inodes,
                }) => ClientRequest::AnswerUnlinked {
                    session,
                    from,
                    through,
                    held: inodes
                        .into_iter()
                        .map(InodeNumber)
                        .filter(|inode| !free.contains(inode))
                        .collect(),
                },
                None => return KeepAliveOutcome::Alive,
            };
        }
    }

    /// Opens a new session in place of the lost one; returns `false` if the client is being closed.
    async fn replace(&self) -> bool {
        let mut backoff = Backoff::new();
        loop {
            match self.mutator.sessions.replace(&self.mutator.calls).await {
                Ok(()) => return true,
                Err(None) => return false,
                Err(Some(reason)) => {
                    tracing::error!(reason, "cannot open a new session; trying again");
                    backoff.pause().await;
                }
            }
        }
    }

    fn release_unlinked(&self, inodes: Vec<InodeNumber>, has_more: bool) -> JoinHandle<()> {
        let mutator = self.mutator.clone();
        tokio::spawn(async move {
            let command = Command::single(Operation::ReleaseUnlinked { inodes });
            match mutator.mutate(command, &[]).await {
                Ok(_) if has_more => mutator.calls.cluster().request_keep_alive(),
                Ok(_) => {}
                // A later keep-alive names them again.
                Err(error) => {
                    tracing::warn!(%error, "cannot release unlinked inodes; a later keep-alive tries again")
                }
            }
        })
    }
}

/// The result of a keep-alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeepAliveOutcome {
    /// Keep-alives continue.
    Alive,
    /// The client is being closed.
    Closed,
}
