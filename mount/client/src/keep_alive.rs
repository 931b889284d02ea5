//! Keeps the session: says that it lives (and what the client has done so far), opens a new one when it was lost, and lets go of unlinked inodes that
//! nobody here has open.

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

use crate::connector::Backoff;
use crate::mutation::Mutator;

/// Tells which of these inodes are not open here.
type UnlinkedHandler = dyn Fn(&[InodeNumber]) -> Vec<InodeNumber> + Send + Sync;

/// Tells what this client has done so far.
type StatisticsSource = dyn Fn() -> ClientStatistics + Send + Sync;

/// The background life of a session.
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
        // One at a time; keep-alives go on while it waits for a lane.
        let mut release: Option<JoinHandle<()>> = None;
        loop {
            tokio::select! {
                () = self.mutator.sessions.wait_for_loss() => {
                    if !self.replace().await {
                        return;
                    }
                }
                _ = ticks.tick() => {
                    if self.keep_alive(&mut release).await == Kept::Closed {
                        return;
                    }
                }
                () = self.mutator.calls.cluster().nudged() => {
                    if self.keep_alive(&mut release).await == Kept::Closed {
                        return;
                    }
                    ticks.reset();
                }
            }
        }
    }

    /// Says that the session lives, and answers what the cluster asks, as long as it asks.
    async fn keep_alive(&self, release: &mut Option<JoinHandle<()>>) -> Kept {
        let epoch = self.mutator.sessions.current();
        let session = epoch.session;
        let mut call = ClientRequest::KeepAlive { session };
        // What is released after the handler has looked waits until the answer is decided.
        let _answering = self.mutator.answering.lock().await;
        loop {
            let source = self.statistics.lock().clone();
            let statistics = source.map(|source| (&source()).into());
            let (state, question) = match self.mutator.calls.keep_alive(&call, statistics).await {
                None => return Kept::Closed,
                Some((ClientResponse::Session(state), question)) => (state, question),
                Some((ClientResponse::Refused(Refusal::UnknownSession), _)) => {
                    self.mutator.sessions.lose(&epoch, "it expired");
                    return Kept::Alive;
                }
                Some((reply, _)) => {
                    tracing::warn!(?reply, "not an answer to a keep-alive");
                    return Kept::Alive;
                }
            };
            let Some(handler) = self.unlinked.lock().clone() else {
                return Kept::Alive;
            };
            let asked = question
                .as_ref()
                .map(|question| &question.inodes[..])
                .unwrap_or_default();
            let asked = asked.iter().map(|inode| InodeNumber(*inode));
            // Asked in one go: the handler compares with what it was asked the last time.
            let inodes: Vec<InodeNumber> = state.unlinked.iter().copied().chain(asked).collect();
            let free: HashSet<InodeNumber> = match inodes.is_empty() {
                true => HashSet::new(),
                false => handler(&inodes).into_iter().collect(),
            };
            if release.as_ref().is_none_or(JoinHandle::is_finished) {
                let others_are_left = state.unlinked.len() >= HELD_ASKED_MAX;
                let released: Vec<InodeNumber> = state
                    .unlinked
                    .into_iter()
                    .filter(|inode| free.contains(inode))
                    .collect();
                if !released.is_empty() {
                    *release = Some(self.release_unlinked(released, others_are_left));
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
                None => return Kept::Alive,
            };
        }
    }

    /// Opens a new session in place of the lost one; `false` when the client is being closed.
    async fn replace(&self) -> bool {
        let mut backoff = Backoff::new();
        loop {
            match self.mutator.sessions.replace(&self.mutator.calls).await {
                Ok(()) => return true,
                Err(None) => return false,
                Err(Some(reason)) => {
                    tracing::error!(reason, "cannot open a new session");
                    backoff.pause().await;
                }
            }
        }
    }

    fn release_unlinked(&self, inodes: Vec<InodeNumber>, others_are_left: bool) -> JoinHandle<()> {
        let mutator = self.mutator.clone();
        tokio::spawn(async move {
            let command = Command::single(Operation::ReleaseUnlinked { inodes });
            match mutator.mutate(command, &[]).await {
                Ok(_) if others_are_left => mutator.calls.cluster().nudge(),
                Ok(_) => {}
                // A later keep-alive names them again.
                Err(error) => tracing::warn!(%error, "could not release unlinked inodes"),
            }
        })
    }
}

/// What became of a keep-alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// There will be others.
    Alive,
    /// The client is being closed.
    Closed,
}
