//! The leader's care for sessions: who was heard of lately, whose time is over, who is asked about unlinked inodes, and
//! what can be freed.
//!
//! When a session was heard of last only the leader knows, in memory. What it knows of a session's silence it notes in the
//! log, now and then, and the next leader goes on from there; a session of which no silence is noted has a full time-out
//! from when a leader begins to lead. What ends is ended by a command, so all nodes agree.
//!
//! A session is ended sooner where its process is seen to be gone: its connection was closed by its own machine (nothing
//! stood in between), and it did not come back within [`GONE_MS`].

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
use crate::tasks::Tasks;
use quorumfs_metadata::{Failure, LogBody, LogCommand, MetadataStore, UnlinkedAnswer, View};

/// From this feature level on sessions answer for unlinked inodes in the order in which these were unlinked.
pub const UNLINKED_QUEUE_LEVEL: u32 = 3;

/// How often the leader looks.
const LOOK_INTERVAL_MS: u64 = 500;
/// Sessions that have ended are looked over only every so many looks.
const LOOKS_PER_FORGETTING: u64 = 120;
/// How long the results of an ended session are remembered, in seconds: a day.
const RESULTS_KEPT_S: i64 = 24 * 3600;
/// Sessions that live at once; each costs a keep-alive every few seconds.
const SESSIONS_LIVING_MAX: usize = 4096;
/// A client whose connection ended comes back within this time, if it is still there. Its own time-outs for a leader that
/// does not answer are shorter.
const GONE_MS: u64 = 10_000;
/// A silence is noted from this length on, and again whenever it has grown by as much.
const SILENCE_NOTED_MS: u64 = 10_000;
/// A new leader ends no session before, whatever silence is noted: three keep-alives.
const NEW_LEADER_GRACE_MS: u64 = 15_000;
/// Answers of sessions in one command, and inodes that they name.
const ANSWERS_PER_COMMAND_MAX: usize = 256;
const HELD_PER_COMMAND_MAX: usize = 4096;
/// All sessions together are asked for so many answers in a second at most.
const ASKED_PER_S_MAX: u64 = 200;

/// Rows freed by one command: keeps each apply short.
const RECLAIM_WORK_MAX: u32 = 1024;
/// Below [`UNLINKED_QUEUE_LEVEL`]: inodes reclaimed at one look, extents of one freed by one command, and commands under
/// way at once.
const RECLAIM_INODES_MAX: usize = 256;
const RECLAIM_EXTENTS_MAX: u32 = 4096;
const RECLAIM_CONCURRENCY: usize = 16;

/// A session that was heard of by this leader.
struct Heard {
    at: Instant,
    connection: Option<Connection>,
    /// Whether the connection ends at the client itself.
    is_direct: bool,
    /// When the connection was seen to have ended.
    ended_at: Option<Instant>,
    /// Asks it for a keep-alive.
    nudges: mpsc::WeakSender<()>,
    /// The last held inode that it was asked about.
    asked: InodeNumber,
}

impl Heard {
    fn now(nudges: mpsc::WeakSender<()>) -> Heard {
        Heard {
            at: Instant::now(),
            connection: None,
            is_direct: false,
            ended_at: None,
            nudges,
            asked: InodeNumber(0),
        }
    }
}

/// An answer, and where its sender waits.
type Waiting = (UnlinkedAnswer, oneshot::Sender<Result<(), Refusal>>);

/// See the module.
pub struct SessionKeeper {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    stamps: Arc<StampClock>,
    /// By session that lives; looked over at each look.
    heard: Mutex<HashMap<SessionId, Heard>>,
    answers: mpsc::Sender<Waiting>,
    answers_due: tokio::sync::Mutex<mpsc::Receiver<Waiting>>,
    /// There may be something to free.
    freeable: Notify,
}

impl SessionKeeper {
    /// Knows of no session yet.
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        stamps: Arc<StampClock>,
    ) -> Arc<SessionKeeper> {
        let (answers, answers_due) = mpsc::channel(ANSWERS_PER_COMMAND_MAX);
        Arc::new(SessionKeeper {
            consensus,
            metadata,
            stamps,
            heard: Mutex::new(HashMap::new()),
            answers,
            answers_due: tokio::sync::Mutex::new(answers_due),
            freeable: Notify::new(),
        })
    }

    /// A call of `session` arrived on a stream that speaks for it.
    pub fn heard_of(&self, session: SessionId, stream: &CallStream) {
        self.hear(session, stream, |_| {});
    }

    /// A session of this node's own, which has no stream, is in use.
    pub fn in_use(&self, session: SessionId) {
        let (nobody, _) = mpsc::channel(1);
        let mut heard = self.heard.lock();
        let heard = heard
            .entry(session)
            .or_insert_with(|| Heard::now(nobody.downgrade()));
        heard.at = Instant::now();
    }

    fn hear(&self, session: SessionId, stream: &CallStream, note: impl FnOnce(&mut Heard)) {
        let mut heard = self.heard.lock();
        let heard = heard
            .entry(session)
            .or_insert_with(|| Heard::now(stream.nudges()));
        heard.at = Instant::now();
        heard.ended_at = None;
        let is_same = match (&heard.connection, stream.connection()) {
            (Some(one), Some(other)) => one.is(other),
            _ => false,
        };
        if !is_same {
            heard.connection = stream.connection().cloned();
        }
        heard.is_direct = stream.is_direct();
        note(heard);
    }

    /// A keep-alive of `session`. When it is answered, the next leader does not take the session for silent.
    pub async fn kept_alive(
        &self,
        session: SessionId,
        stream: &CallStream,
        request: &wire::CallRequest,
    ) -> Result<(), Refusal> {
        self.hear(session, stream, |heard| {
            heard.nudges = stream.nudges();
            stream.comes_from(&request.local_addresses);
            heard.is_direct = stream.is_direct();
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

    /// A session that was opened before all nodes knew of keys gets one, on the stream that opened it.
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

    /// Whether one more session may be opened.
    pub fn admit_new(&self, session: SessionId) -> Result<(), Refusal> {
        let view = self.metadata.view().map_err(Refusal::unavailable)?;
        let is_known = view.session(session).map_err(Refusal::unavailable)?.is_some();
        match is_known || view.living_count() < SESSIONS_LIVING_MAX {
            true => Ok(()),
            false => Err(Refusal::Invalid {
                reason: format!(
                    "the cluster has {SESSIONS_LIVING_MAX} mounts and nodes at work, as many as it may: end some, or \
                     wait a minute where they are gone already"
                ),
            }),
        }
    }

    /// Inodes that the state keeps for `session`, about which it is asked now: others each time, as far as there are.
    pub fn held_to_ask(&self, view: &View, session: SessionId) -> Result<Vec<InodeNumber>, Failure> {
        let after = self
            .heard
            .lock()
            .get(&session)
            .map_or(InodeNumber(0), |heard| heard.asked);
        let mut inodes = view.unlinked_held_by(session, after, HELD_ASKED_MAX)?;
        if inodes.len() < HELD_ASKED_MAX && after != InodeNumber(0) {
            // From the beginning again.
            let others = view.unlinked_held_by(session, InodeNumber(0), HELD_ASKED_MAX - inodes.len())?;
            inodes.extend(others.into_iter().take_while(|inode| *inode <= after));
        }
        if let Some(heard) = self.heard.lock().get_mut(&session) {
            heard.asked = match inodes.len() < HELD_ASKED_MAX {
                true => InodeNumber(0),
                false => inodes[inodes.len() - 1],
            };
        }
        Ok(inodes)
    }

    /// Takes a session's answer; returns when it is in the state. Answers that arrive together make one command.
    pub async fn answer_unlinked(&self, answer: UnlinkedAnswer) -> Result<(), Refusal> {
        let (tell, decided) = oneshot::channel();
        let stopped = || Refusal::unavailable("the node is stopping");
        self.answers.send((answer, tell)).await.map_err(|_| stopped())?;
        decided.await.map_err(|_| stopped())?
    }

    /// Looks after sessions as long as this node leads, for ever.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise("sessions-expiry", self.clone(), Self::run_expiry);
        tasks.supervise("sessions-answers", self.clone(), Self::take_answers);
        tasks.supervise("sessions-reclaiming", self.clone(), Self::free);
    }

    async fn run_expiry(self: Arc<Self>) {
        let mut term: Option<Term> = None;
        let mut asked_at = Instant::now();
        for look in 0u64.. {
            tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
            if !self.consensus.is_leader() {
                term = None;
                self.heard.lock().clear();
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
                if look.is_multiple_of(LOOKS_PER_FORGETTING) {
                    self.forget_ended_sessions().await?;
                }
                self.ask(&mut asked_at)
            };
            if let Err(error) = done.await {
                warn!(%error, "cannot look after sessions");
            }
        }
    }

    async fn end_silent_sessions(&self, term: &Term) -> Result<(), Failure> {
        let view = self.metadata.view()?;
        let mut silences = Vec::new();
        let mut over = Vec::new();
        {
            let mut heard = self.heard.lock();
            // One that has ended is not remembered; one that was just opened may not be in this view.
            let limit = Duration::from_millis(SESSION_TIMEOUT_MS);
            heard.retain(|_, heard| heard.at.elapsed() <= 2 * limit);
            for session in view.living_sessions() {
                let silence = Noted {
                    now_ms: view.silence_ms(session),
                    carried_ms: term.silences.get(&session).copied().unwrap_or(0),
                };
                let judged = judge(heard.get_mut(&session), silence, term.since.elapsed());
                match judged {
                    Silence::Over(reason) => over.push((session, reason)),
                    Silence::Note(silent_ms) => silences.push((session, silent_ms)),
                    Silence::Bearable => {}
                }
            }
        }
        for (session, reason) in over {
            let record = view.session(session)?;
            let description = record.map(|record| record.description).unwrap_or_default();
            if self.propose_some(LogBody::EndSession { session }).await {
                info!(%session, description, reason, "session ended");
                self.heard.lock().remove(&session);
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

    /// Asks those sessions for a keep-alive that have not answered for all that is unlinked.
    fn ask(&self, asked_at: &mut Instant) -> Result<(), Failure> {
        let view = self.metadata.view()?;
        let pause = Duration::from_millis(view.living_count() as u64 * 1_000 / ASKED_PER_S_MAX);
        if view.feature_level() < UNLINKED_QUEUE_LEVEL || asked_at.elapsed() < pause {
            return Ok(());
        }
        *asked_at = Instant::now();
        let behind = view.sessions_to_ask()?;
        let heard = self.heard.lock();
        for session in behind {
            if let Some(nudges) = heard.get(&session).and_then(|heard| heard.nudges.upgrade()) {
                // Where one is on its way already, that will do.
                let _ = nudges.try_send(());
            }
        }
        Ok(())
    }

    async fn take_answers(self: Arc<Self>) {
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
            for tell in waiting {
                // Who went away asks again.
                let _ = tell.send(decided.clone());
            }
            self.freeable.notify_one();
        }
    }

    /// Frees what nobody can reach: without a pause as long as there is some, for half of the time.
    async fn free(self: Arc<Self>) {
        loop {
            let began = Instant::now();
            let freed = match self.consensus.is_leader() {
                true => self.free_some().await,
                false => Ok(Freed::Everything),
            };
            match freed {
                Ok(Freed::Some) => tokio::time::sleep(began.elapsed()).await,
                Ok(Freed::Everything) => {
                    let look = Duration::from_millis(LOOK_INTERVAL_MS);
                    // Either is a reason to look again.
                    let _ = tokio::time::timeout(look, self.freeable.notified()).await;
                }
                Err(error) => {
                    warn!(%error, "cannot look for what can be freed");
                    tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
                }
            }
        }
    }

    async fn free_some(&self) -> Result<Freed, Failure> {
        use futures::StreamExt as _;
        let view = self.metadata.view()?;
        if view.feature_level() >= UNLINKED_QUEUE_LEVEL {
            if view.has_reclaimable()? {
                let work_max = RECLAIM_WORK_MAX;
                return Ok(match self.propose(LogBody::Reclaim { work_max }).await {
                    Ok(()) => Freed::Some,
                    // The next look, here or on the next leader, tries again.
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

    /// Proposes what the next look, here or on the next leader, tries again; whether it was committed.
    async fn propose_some(&self, body: LogBody) -> bool {
        let committed = self.propose(body).await;
        if let Err(error) = &committed {
            tracing::debug!(%error, "housekeeping command was not committed");
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

/// While this node leads.
struct Term {
    since: Instant,
    /// What was noted of sessions' silence at that time, in milliseconds.
    silences: imbl::OrdMap<SessionId, u64>,
}

/// What the log knows of a session's silence.
#[derive(Clone, Copy)]
struct Noted {
    now_ms: u64,
    /// When this node began to lead.
    carried_ms: u64,
}

/// Whether there may be more to free.
enum Freed {
    Some,
    Everything,
}

/// What is done about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// Nothing.
    Bearable,
    /// The silence has this length in milliseconds, which the log should know.
    Note(u64),
    /// It is ended, for this reason.
    Over(&'static str),
}

/// Judges a living session, which this leader has heard of or not.
fn judge(heard: Option<&mut Heard>, noted: Noted, leading: Duration) -> Silence {
    let leading_ms = leading.as_millis() as u64;
    let silent_ms = match heard {
        Some(heard) => {
            let has_ended = heard.is_direct
                && heard
                    .connection
                    .as_ref()
                    .is_some_and(Connection::was_ended_by_peer);
            if has_ended {
                let since = heard.ended_at.get_or_insert_with(Instant::now);
                if since.elapsed() > Duration::from_millis(GONE_MS) {
                    return Silence::Over("its process is gone");
                }
            }
            heard.at.elapsed().as_millis() as u64
        }
        None => noted.carried_ms.saturating_add(leading_ms),
    };
    if silent_ms > SESSION_TIMEOUT_MS && leading_ms >= NEW_LEADER_GRACE_MS {
        return Silence::Over("nothing was heard of it for too long");
    }
    let has_grown = silent_ms >= noted.now_ms.saturating_add(SILENCE_NOTED_MS);
    match has_grown {
        true => Silence::Note(silent_ms),
        false if silent_ms < noted.now_ms && silent_ms < SILENCE_NOTED_MS => Silence::Note(0),
        false => Silence::Bearable,
    }
}

#[cfg(test)]
mod tests;
