//! The leader's care for sessions: who was heard of lately, whose time is over, which unlinked inodes can go.
//!
//! When a client was last heard of is known to the leader alone, in memory, so a new leader grants every session a
//! full time-out from when it began to lead. What ends is ended by a command, so all nodes agree.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::SessionId;
use quorumfs_proto::limits::SESSION_TIMEOUT_MS;
use tracing::{info, warn};

use crate::cluster::clock::StampClock;
use crate::consensus::Consensus;
use crate::metadata::{Failure, LogBody, LogCommand, MetadataStore};

/// How often the leader looks.
const LOOK_INTERVAL_MS: u64 = 500;
/// Sessions are looked over only every so many looks.
const LOOKS_PER_SESSION_CHECK: u64 = 10;
/// How long the results of an ended session are remembered, in seconds: a day.
const RESULTS_KEPT_S: i64 = 24 * 3600;
/// Unlinked inodes reclaimed at one look, and extents of one freed by one command: keeps each apply short.
const RECLAIM_INODES_MAX: usize = 256;
const RECLAIM_EXTENTS_MAX: u32 = 4096;
/// Reclaiming commands under way at once.
const RECLAIM_CONCURRENCY: usize = 16;

/// See the module.
pub struct SessionKeeper {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    stamps: Arc<StampClock>,
    heard: Mutex<HashMap<SessionId, Instant>>,
}

impl SessionKeeper {
    /// Knows of no session yet.
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        stamps: Arc<StampClock>,
    ) -> Arc<SessionKeeper> {
        Arc::new(SessionKeeper {
            consensus,
            metadata,
            stamps,
            heard: Mutex::new(HashMap::new()),
        })
    }

    /// A call of `session` arrived.
    pub fn heard_of(&self, session: SessionId) {
        self.heard.lock().insert(session, Instant::now());
    }

    /// Looks after sessions as long as this node leads, for ever.
    pub async fn run(self: Arc<Self>) {
        let mut leading_since: Option<Instant> = None;
        for look in 0u64.. {
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            if !self.consensus.is_leader() {
                leading_since = None;
                self.heard.lock().clear();
                continue;
            }
            let since = *leading_since.get_or_insert_with(Instant::now);
            let done = async {
                if look.is_multiple_of(LOOKS_PER_SESSION_CHECK) {
                    self.end_silent_sessions(since).await?;
                }
                self.reclaim().await
            };
            if let Err(error) = done.await {
                warn!(%error, "cannot look after sessions");
            }
        }
    }

    async fn end_silent_sessions(&self, leading_since: Instant) -> Result<(), Failure> {
        let sessions = self.metadata.view()?.sessions()?;
        let now = self.stamps.now();
        let timeout = Duration::from_millis(SESSION_TIMEOUT_MS);
        for (session, record) in sessions {
            if let Some(ended) = record.ended {
                if now.seconds - ended.seconds > RESULTS_KEPT_S {
                    self.propose(LogBody::ForgetSession { session }).await;
                }
                continue;
            }
            let heard = self.heard.lock().get(&session).copied().unwrap_or(leading_since);
            if heard.elapsed() > timeout {
                info!(%session, description = record.description, "session ended: nothing heard of it for too long");
                self.propose(LogBody::EndSession { session }).await;
                self.heard.lock().remove(&session);
            }
        }
        Ok(())
    }

    async fn reclaim(&self) -> Result<(), Failure> {
        use futures::StreamExt as _;
        let inodes = self.metadata.view()?.reclaimable(RECLAIM_INODES_MAX)?;
        let commands = inodes.into_iter().map(|inode| {
            self.propose(LogBody::ReclaimUnlinked {
                inode,
                extents_max: RECLAIM_EXTENTS_MAX,
            })
        });
        futures::stream::iter(commands)
            .buffer_unordered(RECLAIM_CONCURRENCY)
            .collect::<()>()
            .await;
        Ok(())
    }

    async fn propose(&self, body: LogBody) {
        let command = LogCommand {
            stamp: self.stamps.stamp().await,
            body,
        };
        if let Err(error) = self.consensus.propose(command).await {
            // The next look, here or on the next leader, tries again.
            tracing::debug!(%error, "housekeeping command was not committed");
        }
    }
}
