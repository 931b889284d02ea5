//! The session of this client, and its replacement after the cluster has ended it.
//!
//! Invariants: lanes, sequence numbers and chunk counters belong to one [`Epoch`] and end with it; nothing of it is
//! sent under another session. There is one current epoch; the next begins when `keep_alive` has opened its session.
//!
//! Knows the stream of calls; does not know mutations.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use quorumfs_proto::{ClientRequest, ClientResponse, Refusal, SessionId, SessionSecret};
use tokio::sync::{Notify, watch};

use crate::calls::{Calls, describe_reply};
use crate::chunk::SessionChunks;
use crate::lanes::Lanes;
use crate::leader_link::LeaderLink;

/// One session of the client, from its opening to its end.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) session: SessionId,
    /// Authenticates the session.
    pub(crate) secret: SessionSecret,
    /// Number of the session among those of this client, starting at 1.
    pub(crate) generation: u64,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) chunks: Arc<SessionChunks>,
    lost: AtomicBool,
}

impl Epoch {
    fn new((session, secret): (SessionId, SessionSecret), generation: u64) -> Arc<Epoch> {
        Arc::new(Epoch {
            session,
            secret,
            generation,
            lanes: Lanes::new(session),
            chunks: SessionChunks::new(session),
            lost: AtomicBool::new(false),
        })
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

/// The consecutive sessions of one client.
#[derive(Debug)]
pub(crate) struct Sessions {
    description: String,
    current: watch::Sender<Arc<Epoch>>,
    lost: Notify,
}

impl Sessions {
    /// Opens the first session.
    ///
    /// # Errors
    /// The reason that the leader gave, or `None` if the client is being closed.
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

    /// Returns the current epoch; while it is lost, waits for the next.
    pub(crate) async fn wait_until_open(&self) -> Arc<Epoch> {
        let mut epochs = self.current.subscribe();
        let epoch = epochs.wait_for(|epoch| !epoch.is_lost()).await;
        epoch.expect("the sender lives as long as self").clone()
    }

    /// Marks `epoch` as lost: the cluster does not know its session (any more), or a mutation of it has no verdict.
    pub(crate) fn mark_lost(&self, epoch: &Epoch, reason: &str) {
        if !epoch.lost.swap(true, Ordering::AcqRel) {
            tracing::warn!(session = %epoch.session, reason, "the session was lost; unlinked files and chunks that it held are released");
            epoch.lanes.close();
            self.lost.notify_one();
        }
    }

    /// Waits until a session is lost and not replaced.
    pub(crate) async fn wait_for_loss(&self) {
        while !self.current.borrow().is_lost() {
            self.lost.notified().await;
        }
    }

    /// Opens the next session in place of the lost one.
    ///
    /// # Errors
    /// As [`Sessions::open`].
    pub(crate) async fn replace(&self, calls: &LeaderLink<Calls>) -> Result<(), Option<String>> {
        let session = open_new(calls, &self.description).await?;
        let generation = self.current.borrow().generation + 1;
        tracing::warn!(session = %session.0, generation, "opened a new session");
        self.current.send_replace(Epoch::new(session, generation));
        Ok(())
    }
}

/// Opens a session with a random id and secret.
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
        return match calls.execute(&call).await {
            Some(ClientResponse::Session(_)) => {
                calls.cluster().set_session(session, secret);
                Ok((session, secret))
            }
            // The leader runs an older program without this call.
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
            Some(reply) => Err(Some(format!("unexpected reply: {}", describe_reply(&reply)))),
            None => Err(None),
        };
    }
}
