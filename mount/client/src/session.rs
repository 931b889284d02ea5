//! The session: who this client is to the cluster, and what it does when the cluster has forgotten it.
//!
//! Invariants: lanes, sequence numbers and chunk counters belong to one [`Epoch`] and end with it; nothing is ever
//! sent again under another one. There is one current epoch, and the next begins only when the keeper has opened it.
//!
//! Knows the calls; nothing of mutations.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use quorumfs_proto::{ClientRequest, ClientResponse, Refusal, SessionId, SessionSecret};
use tokio::sync::{Notify, watch};

use crate::calls::Calls;
use crate::chunk::ChunkLedger;
use crate::lanes::Lanes;
use crate::leader_link::LeaderLink;

/// One session from its opening to its end.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) session: SessionId,
    /// Proves it.
    pub(crate) secret: SessionSecret,
    /// 1 for the first session of a client, 2 for the next…
    pub(crate) generation: u64,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) chunks: Arc<ChunkLedger>,
    lost: AtomicBool,
}

impl Epoch {
    fn new((session, secret): (SessionId, SessionSecret), generation: u64) -> Arc<Epoch> {
        Arc::new(Epoch {
            session,
            secret,
            generation,
            lanes: Lanes::new(session),
            chunks: ChunkLedger::new(session),
            lost: AtomicBool::new(false),
        })
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

/// The sessions of one client, one after the other.
#[derive(Debug)]
pub(crate) struct Sessions {
    description: String,
    current: watch::Sender<Arc<Epoch>>,
    lost: Notify,
}

impl Sessions {
    /// Opens the first session. Fails with the cluster's words, or `None` when the client is being closed.
    pub(crate) async fn open(
        calls: &LeaderLink<Calls>,
        description: String,
    ) -> Result<Sessions, Option<String>> {
        let session = open_new(calls, &description).await?;
        tracing::info!(session = %session.0, "opened a session");
        Ok(Sessions {
            description,
            current: watch::Sender::new(Epoch::new(session, 1)),
            lost: Notify::new(),
        })
    }

    pub(crate) fn current(&self) -> Arc<Epoch> {
        self.current.borrow().clone()
    }

    /// The current epoch; waits while it is lost and the next one is not open yet.
    pub(crate) async fn alive(&self) -> Arc<Epoch> {
        let mut epochs = self.current.subscribe();
        let epoch = epochs.wait_for(|epoch| !epoch.is_lost()).await;
        epoch.expect("the sender lives as long as self").clone()
    }

    /// The cluster does not know this session (any more), or the client has lost count in it.
    pub(crate) fn lose(&self, epoch: &Epoch, reason: &str) {
        if !epoch.lost.swap(true, Ordering::AcqRel) {
            tracing::warn!(session = %epoch.session, reason, "the session is lost; what it held is gone");
            epoch.lanes.close();
            self.lost.notify_one();
        }
    }

    /// Returns when a session was lost that has not been replaced.
    pub(crate) async fn wait_for_loss(&self) {
        while !self.current.borrow().is_lost() {
            self.lost.notified().await;
        }
    }

    /// Opens the next session in place of the lost one.
    pub(crate) async fn replace(&self, calls: &LeaderLink<Calls>) -> Result<(), Option<String>> {
        let session = open_new(calls, &self.description).await?;
        let generation = self.current.borrow().generation + 1;
        tracing::warn!(session = %session.0, generation, "opened a new session");
        self.current.send_replace(Epoch::new(session, generation));
        Ok(())
    }
}

/// Draws an id and a secret, and makes the session known.
async fn open_new(
    calls: &LeaderLink<Calls>,
    description: &str,
) -> Result<(SessionId, SessionSecret), Option<String>> {
    let session = SessionId(rand::random_range(1..=u64::MAX));
    let secret = SessionSecret(rand::random());
    let mut call = ClientRequest::OpenSessionWithKey {
        session,
        description: description.to_string(),
        secret,
    };
    loop {
        return match calls.ask(&call).await {
            Some(ClientResponse::Session(_)) => {
                calls.cluster().speak_for(session, secret);
                Ok((session, secret))
            }
            // An older program leads, which does not know this call.
            Some(ClientResponse::Refused(Refusal::Invalid { reason }))
                if matches!(call, ClientRequest::OpenSessionWithKey { .. })
                    && reason.starts_with("malformed") =>
            {
                call = ClientRequest::OpenSession {
                    session,
                    description: description.to_string(),
                };
                continue;
            }
            Some(ClientResponse::Refused(Refusal::Invalid { reason })) => Err(Some(reason)),
            Some(reply) => Err(Some(format!("the leader answers {reply:?}"))),
            None => Err(None),
        };
    }
}
