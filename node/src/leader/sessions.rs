//! The sessions of a cluster, tracked by the leader: which were active recently, which have expired, which must be
//! asked about unlinked inodes, and what can be freed.
//!
//! Only the leader knows, in memory, when a session last called. It records silences in the log from time to time, and
//! the next leader continues from there; a session without a recorded silence has the full time-out from the start of
//! the term. Sessions are ended by a command, so all nodes agree.
//!
//! A session is ended sooner if its process is known to have ended: its connection was closed by its own machine
//! (without a proxy in between), and it did not reconnect in [`RECONNECT_MS_MAX`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::limits::{HELD_ASKED_MAX, SESSION_TIMEOUT_MS};
use quorumfs_proto::{InodeNumber, Refusal, SessionId};
use quorumfs_wire as wire;
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::{info, warn};

use crate::call_stream::CallStream;
use crate::consensus::{Consensus, ProposeError};
use crate::incoming::Connection;
use crate::observe::clock::StampClock;
use quorumfs_metadata::{Failure, LogBody, LogCommand, MetadataStore, UnlinkedAnswer, View};
use quorumfs_tasks::Tasks;

/// From this feature level on sessions answer for unlinked inodes in the order of their unlinking.
pub const UNLINKED_QUEUE_LEVEL: u32 = 3;

/// Interval at which the leader checks sessions.
const CHECK_INTERVAL_MS: u64 = 500;
/// Ended sessions are checked only once in this many checks.
const CHECKS_PER_FORGETTING: u64 = 120;
/// Time for which the results of an ended session are kept, in seconds: a day.
const RESULTS_KEPT_S: i64 = 24 * 3600;
/// Most living sessions; each costs a keep-alive every few seconds.
const SESSIONS_LIVING_MAX: usize = 4096;
/// Time in which a running client reconnects after its connection ended: its own time-outs for a leader that does not
/// answer are shorter.
const RECONNECT_MS_MAX: u64 = 10_000;
/// A silence is recorded from this length on, and again whenever it has grown by as much.
const SILENCE_RECORDED_MS: u64 = 10_000;
/// A new leader ends no session before this time, whatever silence is recorded: three keep-alives.
const NEW_LEADER_GRACE_MS: u64 = 15_000;
/// Most answers of sessions in one command, and most inodes in them.
const ANSWERS_PER_COMMAND_MAX: usize = 256;
const HELD_PER_COMMAND_MAX: usize = 4096;
/// Most questions per second to all sessions together.
const ASKED_PER_S_MAX: u64 = 200;

/// Rows freed by one command: keeps each apply short.
const RECLAIM_WORK_MAX: u32 = 1024;
/// Below [`UNLINKED_QUEUE_LEVEL`]: inodes reclaimed in one check, extents of an inode freed by one command, and
/// concurrent commands.
const RECLAIM_INODES_MAX: usize = 256;
const RECLAIM_EXTENTS_MAX: u32 = 4096;
const RECLAIM_CONCURRENCY: usize = 16;

/// The last contact of a session with this leader.
struct Contact {
    at: Instant,
    connection: Option<Connection>,
    /// Whether the connection ends at the client itself, without a proxy.
    is_direct: bool,
    /// The time at which the connection ended.
    ended_at: Option<Instant>,
    /// Asks the session for a keep-alive.
    nudges: mpsc::WeakSender<()>,
    /// The last held inode about which the session was asked.
    asked: InodeNumber,
}

impl Contact {
    fn now(nudges: mpsc::WeakSender<()>) -> Contact {
        Contact {
            at: Instant::now(),
            connection: None,
            is_direct: false,
            ended_at: None,
            nudges,
            asked: InodeNumber(0),
        }
    }
}

/// An answer, and the channel to its waiting sender.
type PendingAnswer = (UnlinkedAnswer, oneshot::Sender<Result<(), Refusal>>);

/// The session tracker of a node; see the module documentation.
pub struct SessionTracker {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    stamps: Arc<StampClock>,
    /// The living sessions; all are examined in each check.
    contacts: Mutex<HashMap<SessionId, Contact>>,
    answers: mpsc::Sender<PendingAnswer>,
    answers_due: tokio::sync::Mutex<mpsc::Receiver<PendingAnswer>>,
    /// Notified when there may be something to free.
    freeable: Notify,
}

impl SessionTracker {
    /// Creates a tracker without sessions.
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        stamps: Arc<StampClock>,
    ) -> Arc<SessionTracker> {
        let (answers, answers_due) = mpsc::channel(ANSWERS_PER_COMMAND_MAX);
        Arc::new(SessionTracker {
            consensus,
            metadata,
            stamps,
            contacts: Mutex::new(HashMap::new()),
            answers,
            answers_due: tokio::sync::Mutex::new(answers_due),
            freeable: Notify::new(),
        })
    }

    /// Records a call of `session` on a stream that acts for it.
    pub fn note_call(&self, session: SessionId, stream: &CallStream) {
        self.note(session, stream, |_| {});
    }

    /// Records that a session of this node, which has no stream, is in use.
    pub fn in_use(&self, session: SessionId) {
        let (nobody, _) = mpsc::channel(1);
        let mut contacts = self.contacts.lock();
        let contact = contacts
            .entry(session)
            .or_insert_with(|| Contact::now(nobody.downgrade()));
        contact.at = Instant::now();
    }

    fn note(&self, session: SessionId, stream: &CallStream, update: impl FnOnce(&mut Contact)) {
        let mut contacts = self.contacts.lock();
        let contact = contacts
            .entry(session)
            .or_insert_with(|| Contact::now(stream.nudges()));
        contact.at = Instant::now();
        contact.ended_at = None;
        let is_same = match (&contact.connection, stream.connection()) {
            (Some(one), Some(other)) => one.is(other),
            _ => false,
        };
        if !is_same {
            contact.connection = stream.connection().cloned();
        }
        contact.is_direct = stream.is_direct();
        update(contact);
    }

    /// Records a keep-alive of `session`. After the answer the next leader does not regard the session as silent.
    pub async fn note_keep_alive(
        &self,
        session: SessionId,
        stream: &CallStream,
        request: &wire::CallRequest,
    ) -> Result<(), Refusal> {
        self.note(session, stream, |contact| {
            contact.nudges = stream.nudges();
            stream.comes_from(&request.local_addresses);
            contact.is_direct = stream.is_direct();
        });
        let view = self.metadata.view().map_err(Refusal::unavailable)?;
        self.give_key(&view, session, stream)
            .await
            .map_err(Refusal::unavailable)?;
        if view.silence_ms(session) > 0 {
            let silences = vec![(session, 0)];
            self.propose(LogBody::NoteSilences { silences })
                .await
                .map_err(Refusal::from)?;
        }
        Ok(())
    }

    /// Gives a key to a session that was opened before all nodes knew keys, on the stream that opened it.
    async fn give_key(&self, view: &View, session: SessionId, stream: &CallStream) -> Result<(), Failure> {
        if view.feature_level() < UNLINKED_QUEUE_LEVEL || view.session_key(session)?.is_some() {
            return Ok(());
        }
        let (Some(key), Some(record)) = (stream.key_of_opened(session), view.session(session)?) else {
            return Ok(());
        };
        let description = record.description;
        self.propose_some(LogBody::OpenSessionWithKey {
            session,
            description,
            key,
        })
        .await;
        Ok(())
    }

    /// Checks whether one more session may be opened.
    ///
    /// # Errors
    /// [`Refusal`] if there are too many.
    pub fn admit_new(&self, session: SessionId) -> Result<(), Refusal> {
        let view = self.metadata.view().map_err(Refusal::unavailable)?;
        let is_known = view.session(session).map_err(Refusal::unavailable)?.is_some();
        match is_known || view.living_count() < SESSIONS_LIVING_MAX {
            true => Ok(()),
            false => Err(Refusal::Invalid {
                reason: format!(
                    "the cluster has the maximum of {SESSIONS_LIVING_MAX} sessions of mounts and nodes: unmount some, or \
                     wait a minute if some have ended"
                ),
            }),
        }
    }

    /// Returns inodes that the state keeps for `session`, about which it is asked now; each call returns the next ones.
    pub fn held_to_ask(&self, view: &View, session: SessionId) -> Result<Vec<InodeNumber>, Failure> {
        let after = self
            .contacts
            .lock()
            .get(&session)
            .map_or(InodeNumber(0), |contact| contact.asked);
        let mut inodes = view.unlinked_held_by(session, after, HELD_ASKED_MAX)?;
        if inodes.len() < HELD_ASKED_MAX && after != InodeNumber(0) {
            // Start again from the first.
            let others = view.unlinked_held_by(session, InodeNumber(0), HELD_ASKED_MAX - inodes.len())?;
            inodes.extend(others.into_iter().take_while(|inode| *inode <= after));
        }
        if let Some(contact) = self.contacts.lock().get_mut(&session) {
            contact.asked = match inodes.len() < HELD_ASKED_MAX {
                true => InodeNumber(0),
                false => inodes[inodes.len() - 1],
            };
        }
        Ok(inodes)
    }

    /// Takes a session's answer; returns when it is in the state. Answers that arrive together share one command.
    ///
    /// # Errors
    /// [`Refusal`] if it was not decided.
    pub async fn answer_unlinked(&self, answer: UnlinkedAnswer) -> Result<(), Refusal> {
        let (sender, decided) = oneshot::channel();
        let stopped = || Refusal::unavailable("the node is stopping");
        self.answers.send((answer, sender)).await.map_err(|_| stopped())?;
        decided.await.map_err(|_| stopped())?
    }

    /// Starts the tasks that check sessions while this node leads.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("sessions-expiry", self.clone(), Self::run_expiry);
        tasks.supervise("sessions-answers", self.clone(), Self::run_answers);
        tasks.supervise("sessions-reclaiming", self.clone(), Self::run_reclaiming);
    }

    async fn run_expiry(self: Arc<Self>) {
        let mut term: Option<Term> = None;
        let mut asked_at = Instant::now();
        for check in 0u64.. {
            tokio::time::sleep(Duration::from_millis(CHECK_INTERVAL_MS)).await;
            if !self.consensus.is_leader() {
                term = None;
                self.contacts.lock().clear();
                continue;
            }
            let done = async {
                let term = match &mut term {
                    Some(term) => term,
                    none => none.insert(Term {
                        since: Instant::now(),
                        silences: self.metadata.view()?.silences(),
                    }),
                };
                self.end_silent_sessions(term).await?;
                if check.is_multiple_of(CHECKS_PER_FORGETTING) {
                    self.forget_ended_sessions().await?;
                }
                self.request_keep_alives(&mut asked_at)
            };
            if let Err(error) = done.await {
                warn!(%error, "cannot check the sessions; the next check tries again");
            }
        }
    }

    async fn end_silent_sessions(&self, term: &Term) -> Result<(), Failure> {
        let view = self.metadata.view()?;
        let mut silences = Vec::new();
        let mut over = Vec::new();
        {
            let mut contacts = self.contacts.lock();
            // An ended session is not kept; one that was just opened may be missing in this view.
            let limit = Duration::from_millis(SESSION_TIMEOUT_MS);
            contacts.retain(|_, contact| contact.at.elapsed() <= 2 * limit);
            for session in view.living_sessions() {
                let silence = RecordedSilence {
                    now_ms: view.silence_ms(session),
                    carried_ms: term.silences.get(&session).copied().unwrap_or(0),
                };
                let action = silence_action(contacts.get_mut(&session), silence, term.since.elapsed());
                match action {
                    SilenceAction::End(reason) => over.push((session, reason)),
                    SilenceAction::Record(silent_ms) => silences.push((session, silent_ms)),
                    SilenceAction::Ignore => {}
                }
            }
        }
        for (session, reason) in over {
            let record = view.session(session)?;
            let description = record.map(|record| record.description).unwrap_or_default();
            if self.propose_some(LogBody::EndSession { session }).await {
                info!(%session, description, reason, "session ended");
                self.contacts.lock().remove(&session);
                self.freeable.notify_one();
            }
        }
        if !silences.is_empty() && view.feature_level() >= UNLINKED_QUEUE_LEVEL {
            self.propose_some(LogBody::NoteSilences { silences }).await;
        }
        Ok(())
    }

    async fn forget_ended_sessions(&self) -> Result<(), Failure> {
        let now = self.stamps.now();
        for (session, record) in self.metadata.view()?.sessions()? {
            if record
                .ended
                .is_some_and(|ended| now.seconds - ended.seconds > RESULTS_KEPT_S)
            {
                self.propose_some(LogBody::ForgetSession { session }).await;
            }
        }
        Ok(())
    }

    /// Asks for a keep-alive from sessions that have not answered about all unlinked inodes.
    fn request_keep_alives(&self, asked_at: &mut Instant) -> Result<(), Failure> {
        let view = self.metadata.view()?;
        let pause = Duration::from_millis(view.living_count() as u64 * 1_000 / ASKED_PER_S_MAX);
        if view.feature_level() < UNLINKED_QUEUE_LEVEL || asked_at.elapsed() < pause {
            return Ok(());
        }
        *asked_at = Instant::now();
        let behind = view.sessions_to_ask()?;
        let contacts = self.contacts.lock();
        for session in behind {
            if let Some(nudges) = contacts
                .get(&session)
                .and_then(|contact| contact.nudges.upgrade())
            {
                // If the channel is full, a request is already on its way.
                let _ = nudges.try_send(());
            }
        }
        Ok(())
    }

    async fn run_answers(self: Arc<Self>) {
        let mut due = self.answers_due.lock().await;
        while let Some(first) = due.recv().await {
            let mut named = first.0.held.len();
            let mut some = vec![first];
            while some.len() < ANSWERS_PER_COMMAND_MAX && named < HELD_PER_COMMAND_MAX {
                let Ok(next) = due.try_recv() else { break };
                named += next.0.held.len();
                some.push(next);
            }
            let (answers, waiting): (Vec<_>, Vec<_>) = some.into_iter().unzip();
            let decided = self.propose(LogBody::AnswerUnlinked { answers }).await;
            let decided = decided.map_err(Refusal::from);
            for sender in waiting {
                // A client that has disconnected sends the answer again.
                let _ = sender.send(decided.clone());
            }
            self.freeable.notify_one();
        }
    }

    /// Frees unreachable data: repeatedly while there is some, using half of the time.
    async fn run_reclaiming(self: Arc<Self>) {
        loop {
            let began = Instant::now();
            let freed = match self.consensus.is_leader() {
                true => self.reclaim_some().await,
                false => Ok(Freed::Everything),
            };
            match freed {
                Ok(Freed::Some) => tokio::time::sleep(began.elapsed()).await,
                Ok(Freed::Everything) => {
                    let interval = Duration::from_millis(CHECK_INTERVAL_MS);
                    // Both outcomes are a reason to look again.
                    let _ = tokio::time::timeout(interval, self.freeable.notified()).await;
                }
                Err(error) => {
                    warn!(%error, "cannot look for data to free; the next check tries again");
                    tokio::time::sleep(Duration::from_millis(CHECK_INTERVAL_MS)).await;
                }
            }
        }
    }

    async fn reclaim_some(&self) -> Result<Freed, Failure> {
        use futures::StreamExt as _;
        let view = self.metadata.view()?;
        if view.feature_level() >= UNLINKED_QUEUE_LEVEL {
            if view.has_reclaimable()? {
                let work_max = RECLAIM_WORK_MAX;
                return Ok(match self.propose(LogBody::Reclaim { work_max }).await {
                    Ok(()) => Freed::Some,
                    // The next check, on this node or the next leader, tries again.
                    Err(_) => Freed::Everything,
                });
            }
            if !view.has_orphans()? {
                return Ok(Freed::Everything);
            }
        }
        let commands = view.reclaimable(RECLAIM_INODES_MAX)?.into_iter().map(|inode| {
            self.propose_some(LogBody::ReclaimUnlinked {
                inode,
                extents_max: RECLAIM_EXTENTS_MAX,
            })
        });
        futures::stream::iter(commands)
            .buffer_unordered(RECLAIM_CONCURRENCY)
            .for_each(|_| std::future::ready(()))
            .await;
        Ok(Freed::Everything)
    }

    /// Proposes a command that the next check, on this node or the next leader, repeats if necessary. Returns whether
    /// it was committed.
    async fn propose_some(&self, body: LogBody) -> bool {
        let committed = self.propose(body).await;
        if let Err(error) = &committed {
            tracing::debug!(%error, "a maintenance command was not committed; it is proposed again later");
        }
        committed.is_ok()
    }

    async fn propose(&self, body: LogBody) -> Result<(), ProposeError> {
        let command = LogCommand {
            stamp: self.stamps.stamp().await,
            body,
        };
        self.consensus.propose(command).await.map(drop)
    }
}

/// The state of one term of leadership.
struct Term {
    since: Instant,
    /// The silences recorded at that time, in milliseconds.
    silences: imbl::OrdMap<SessionId, u64>,
}

/// The log's knowledge of a session's silence.
#[derive(Clone, Copy)]
struct RecordedSilence {
    now_ms: u64,
    /// The recorded silence when this node began to lead.
    carried_ms: u64,
}

/// Whether there may be more to free.
enum Freed {
    Some,
    Everything,
}

/// The action for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SilenceAction {
    /// No action is needed.
    Ignore,
    /// Record this silence, in milliseconds, in the log.
    Record(u64),
    /// End the session, for this reason.
    End(&'static str),
}

/// Returns the action for a live session; `contact` is `None` if it has not called this leader.
fn silence_action(contact: Option<&mut Contact>, noted: RecordedSilence, leading: Duration) -> SilenceAction {
    let leading_ms = leading.as_millis() as u64;
    let silent_ms = match contact {
        Some(contact) => {
            let has_ended = contact.is_direct
                && contact
                    .connection
                    .as_ref()
                    .is_some_and(Connection::was_ended_by_peer);
            if has_ended {
                let since = contact.ended_at.get_or_insert_with(Instant::now);
                if since.elapsed() > Duration::from_millis(RECONNECT_MS_MAX) {
                    return SilenceAction::End("its process has ended");
                }
            }
            contact.at.elapsed().as_millis() as u64
        }
        None => noted.carried_ms.saturating_add(leading_ms),
    };
    if silent_ms > SESSION_TIMEOUT_MS && leading_ms >= NEW_LEADER_GRACE_MS {
        return SilenceAction::End("it sent no keep-alive in time");
    }
    let has_grown = silent_ms >= noted.now_ms.saturating_add(SILENCE_RECORDED_MS);
    match has_grown {
        true => SilenceAction::Record(silent_ms),
        false if silent_ms < noted.now_ms && silent_ms < SILENCE_RECORDED_MS => SilenceAction::Record(0),
        false => SilenceAction::Ignore,
    }
}

#[cfg(test)]
mod tests;
