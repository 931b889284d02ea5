//! Keeps the session: says that it lives (and what the client has done so far), opens a new one when it was lost, and lets go of unlinked inodes that
//! nobody here has open.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::call::SessionState;
use quorumfs_proto::limits::KEEP_ALIVE_INTERVAL_MS;
use quorumfs_proto::statistics::ClientStatistics;
use quorumfs_proto::{Call, CallReply, Command, InodeNumber, Operation, Refusal};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::connector::Backoff;
use crate::mutation::Mutator;

/// Tells which of these inodes are not open here.
type UnlinkedHandler = dyn Fn(&[InodeNumber]) -> Vec<InodeNumber> + Send + Sync;

/// Tells what this client has done so far.
type StatisticsSource = dyn Fn() -> ClientStatistics + Send + Sync;

/// The background life of a session.
pub(crate) struct Keeper {
    mutator: Arc<Mutator>,
    unlinked: Mutex<Option<Arc<UnlinkedHandler>>>,
    statistics: Mutex<Option<Arc<StatisticsSource>>>,
}

impl Keeper {
    pub(crate) fn new(mutator: Arc<Mutator>) -> Keeper {
        Keeper {
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
                    let epoch = self.mutator.sessions.current();
                    let call = Call::KeepAlive { session: epoch.session };
                    let source = self.statistics.lock().clone();
                    let statistics = source.map(|source| (&source()).into());
                    match self.mutator.calls.ask_telling(&call, statistics).await {
                        None => return,
                        Some(CallReply::Session(state)) => {
                            if release.as_ref().is_none_or(JoinHandle::is_finished) {
                                release = self.release_unlinked(state);
                            }
                        }
                        Some(CallReply::Refused(Refusal::UnknownSession)) => {
                            self.mutator.sessions.lose(&epoch, "it expired");
                        }
                        Some(reply) => tracing::warn!(?reply, "not an answer to a keep-alive"),
                    }
                }
            }
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

    fn release_unlinked(&self, state: SessionState) -> Option<JoinHandle<()>> {
        if state.unlinked.is_empty() {
            return None;
        }
        let handler = self.unlinked.lock().clone()?;
        let inodes = handler(&state.unlinked);
        if inodes.is_empty() {
            return None;
        }
        let mutator = self.mutator.clone();
        Some(tokio::spawn(async move {
            let command = Command::single(Operation::ReleaseUnlinked { inodes });
            if let Err(error) = mutator.mutate(command, &[]).await {
                // The next keep-alive names them again.
                tracing::warn!(%error, "could not release unlinked inodes");
            }
        }))
    }
}
