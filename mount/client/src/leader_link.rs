//! One long stream to the current leader, for one kind of request: a multiplexer of calls, and the choice of
//! the node that it is attached to.
//!
//! Owes: every request that is submitted is sent until it is answered. When the stream breaks, the leader changes or
//! says nothing, all that is outstanding is sent again, in the order in which it was submitted; a lone lost answer is
//! asked for again on the same stream. So a request may arrive several times: it must be one that does no harm then
//! (a mutation carries its request id, a chunk its identity).
//!
//! The callers bound how many requests are outstanding (lanes, permits); the queue to the stream takes twice as many,
//! and what does not fit is sent by the resend timer.
//!
//! Knows nothing of what a request means.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_wire::calls::{Limits, Lost, Multiplexer, Numbered, OnSend, Resend, describe, next_answer};
use quorumfs_wire::file_system_client::FileSystemClient;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::cluster::{Cluster, Finding};
use crate::connector::{Backoff, Purpose};
use crate::lease::BootTime;

/// How often outstanding requests are looked over. A quarter of what a leader may be silent.
const TICK_MS: u64 = 150;
/// After this silence the other nodes are asked who leads: less than they take to elect another. To ask costs little,
/// and nothing moves before a majority names another.
const SILENCE_MS_MAX: u64 = 600;
/// After this silence a new stream is opened, even if no node names another leader.
const SILENCE_BREAK_MS: u64 = 10_000;
/// A stream that is not accepted in this time (a stopped process still takes connections) is given up.
const OPEN_TIMEOUT_MS: u64 = 1_500;
/// A stream that ends sooner was of no use, whatever was answered on it.
const FRUITFUL_MS_MIN: u64 = 100;
/// A request is never sent again on one stream less often than this.
const RESEND_AFTER_MS_MAX: u64 = 30_000;

/// A kind of request and the stream that carries it.
pub(crate) trait Protocol: Send + Sync + 'static {
    /// For the log.
    const NAME: &'static str;
    /// What its connection is for.
    const PURPOSE: Purpose;
    /// Most requests that are outstanding at once.
    const OUTSTANDING_MAX: usize;
    /// An answer that takes longer than this, while others come, is taken for lost.
    const RESEND_AFTER_MS: u64;
    type Request: Numbered + Clone + Send + 'static;
    type Response: Numbered + Send + 'static;

    fn open(
        client: &mut FileSystemClient<Channel>,
        requests: ReceiverStream<Self::Request>,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Response>>, Status>> + Send;

    /// Completes `request` when it is sent. `greeted` is the session that the stream knows of, before and after; 0: none.
    fn prepare(_request: &mut Self::Request, _cluster: &Cluster, _greeted: &mut u64) {}

    /// Whether this answers nothing, and asks for a keep-alive.
    fn is_nudge(_response: &Self::Response) -> bool {
        false
    }

    /// Takes what the answer to a request that was sent at `sent_at` shows of the leader.
    fn learn(_response: &Self::Response, _cluster: &Cluster, _sent_at: BootTime) {}

    /// Whether the leader has decided.
    fn verdict(response: &Self::Response) -> Verdict;
}

/// What the link must understand of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The answer is the caller's.
    Decided,
    /// The leader could not decide: the request is submitted again a little later.
    Unavailable {
        /// Why, in words.
        reason: String,
    },
    /// Not the leader: everything moves.
    NotLeader {
        /// Who is, where known.
        hint: Option<String>,
    },
}

/// The calls of one protocol. Each holds when it was first sent on the current stream, by the clock of leases.
type Calls<P> = Multiplexer<<P as Protocol>::Request, <P as Protocol>::Response, BootTime, Greeting<P>>;

/// Completes requests as their protocol says.
struct Greeting<P> {
    cluster: Arc<Cluster>,
    /// The session that the current stream knows of; 0: none.
    greeted: u64,
    protocol: PhantomData<fn() -> P>,
}

impl<P: Protocol> OnSend<P::Request, BootTime> for Greeting<P> {
    fn begin_stream(&mut self) {
        self.greeted = 0;
    }

    fn prepare(&mut self, request: &mut P::Request, sent_at: &mut BootTime, is_first: bool) {
        if is_first {
            *sent_at = BootTime::now();
        }
        P::prepare(request, &self.cluster, &mut self.greeted);
    }
}

/// The stream and what is outstanding on it. Cloning shares it.
pub(crate) struct LeaderLink<P: Protocol> {
    cluster: Arc<Cluster>,
    calls: Arc<Calls<P>>,
}

impl<P: Protocol> Clone for LeaderLink<P> {
    fn clone(&self) -> Self {
        LeaderLink {
            cluster: self.cluster.clone(),
            calls: self.calls.clone(),
        }
    }
}

/// Why a stream ended.
enum End {
    /// It broke, or was never made.
    Broken(String),
    /// The node does not lead.
    NotLeader { hint: Option<String> },
    /// Another node leads.
    Moved,
}

impl<P: Protocol> LeaderLink<P> {
    /// Nothing is connected before something is submitted, and nothing at all unless [`LeaderLink::run`] runs.
    pub(crate) fn new(cluster: Arc<Cluster>) -> LeaderLink<P> {
        let limits = Limits {
            queue_max: 2 * P::OUTSTANDING_MAX,
            streams_max: u32::MAX,
            resend: Some(Resend {
                after: Duration::from_millis(P::RESEND_AFTER_MS),
                after_max: Duration::from_millis(RESEND_AFTER_MS_MAX),
            }),
        };
        let greeting = Greeting {
            cluster: cluster.clone(),
            greeted: 0,
            protocol: PhantomData,
        };
        LeaderLink {
            cluster,
            calls: Arc::new(Multiplexer::new(limits, greeting)),
        }
    }

    /// Submits `request` until the leader decides. The answer, and how often the request was sent for it; `None` when
    /// the client is being closed. Dropping the future withdraws the request, as far as it has not been sent.
    pub(crate) async fn call(&self, request: P::Request) -> Option<(P::Response, u32)> {
        let mut backoff = Backoff::new();
        let mut sends = 0;
        loop {
            let submitted = self.calls.submit(request.clone(), BootTime::now());
            let (response, more) = submitted.answer().await.ok()?;
            sends += more;
            let Verdict::Unavailable { reason } = P::verdict(&response) else {
                return Some((response, sends));
            };
            tracing::debug!(link = P::NAME, reason, "the leader cannot decide now");
            backoff.pause().await;
        }
    }

    pub(crate) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// From now on nothing is sent, and everything outstanding ends.
    pub(crate) fn close(&self) {
        self.calls.close();
    }

    /// Keeps the stream; never returns.
    pub(crate) async fn run(self) {
        let mut findings = self.cluster.findings();
        let mut backoff = Backoff::new();
        // Streams in a row that brought no answer, or ended soon.
        let mut fruitless = 0u32;
        // An earlier run that panicked left its stream attached.
        self.calls.detach(&Lost::Ended);
        loop {
            self.calls.wanted().await;
            let found = findings.wait_for(|finding| finding.address.is_some()).await;
            let Ok(finding) = found.map(|finding| finding.clone()) else {
                return;
            };
            let Some(address) = finding.address.clone() else {
                continue;
            };
            let mut stream = Stream {
                link: &self,
                finding,
                confirmed: false,
                doubting: false,
                answered: false,
            };
            let began = Instant::now();
            let end = stream.serve(&address, &mut findings).await;
            let (number, answered) = (stream.finding.number, stream.answered);
            let waiting_since = self.calls.detach(&Lost::Ended);
            // An idle client too shows the next leader, or the same one, that it is still there.
            self.cluster.nudge();
            // A node that answers one call and refuses the next would else be called again without a pause.
            if answered && began.elapsed() >= Duration::from_millis(FRUITFUL_MS_MIN) {
                fruitless = 0;
                backoff = Backoff::new();
            }
            let since = waiting_since.unwrap_or_else(Instant::now);
            match end {
                End::Moved => continue,
                End::Broken(reason) => {
                    let news = fruitless == 0 && waiting_since.is_some();
                    if news {
                        tracing::info!(link = P::NAME, node = %address, reason, "lost the connection to the leader");
                    } else {
                        tracing::debug!(link = P::NAME, node = %address, reason, "no stream");
                    }
                    self.cluster.complain(number, None, since);
                }
                End::NotLeader { hint } => {
                    tracing::debug!(link = P::NAME, node = %address, ?hint, "the node does not lead");
                    self.cluster.complain(number, hint, since);
                }
            }
            fruitless += 1;
            if fruitless > 1 {
                backoff.pause().await;
            }
        }
    }
}

/// One stream while it lasts.
struct Stream<'a, P: Protocol> {
    link: &'a LeaderLink<P>,
    finding: Finding,
    /// Whether the cluster was told that this finding answers.
    confirmed: bool,
    /// Whether the cluster was told that it does not.
    doubting: bool,
    answered: bool,
}

impl<P: Protocol> Stream<'_, P> {
    async fn serve(&mut self, address: &str, findings: &mut watch::Receiver<Finding>) -> End {
        let (cluster, calls) = (&self.link.cluster, &self.link.calls);
        let mut client = match cluster.connector().client(address, P::PURPOSE) {
            Ok(client) => client,
            Err(error) => return End::Broken(error.to_string()),
        };
        let open = P::open(&mut client, calls.attach());
        let mut answers = match tokio::time::timeout(Duration::from_millis(OPEN_TIMEOUT_MS), open).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return End::Broken(describe(&status)),
            Err(_) => return End::Broken(format!("no stream within {OPEN_TIMEOUT_MS} ms")),
        };
        let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        calls.opened();
        loop {
            tokio::select! {
                answer = next_answer(&mut answers) => match answer {
                    Ok(answer) => {
                        if let Some(end) = self.take(answer) {
                            return end;
                        }
                    }
                    Err(lost) => return End::Broken(lost.to_string()),
                },
                changed = findings.changed() => {
                    let finding = findings.borrow_and_update().clone();
                    if changed.is_err() || finding.address.as_deref().is_some_and(|new| new != address) {
                        return End::Moved;
                    }
                    // Found again, or in question because of another connection: this one works.
                    self.finding.number = finding.number;
                    self.confirmed = false;
                },
                _ = ticks.tick() => {
                    if let Some(end) = self.look_over() {
                        return end;
                    }
                }
            }
        }
    }

    /// Hands an answer to its caller.
    fn take(&mut self, answer: P::Response) -> Option<End> {
        let (cluster, calls) = (&self.link.cluster, &self.link.calls);
        if P::is_nudge(&answer) {
            cluster.nudge();
            return None;
        }
        let call_id = answer.call_id();
        // It may answer the first of several sendings.
        if let Some(sent_at) = calls.heard(call_id) {
            P::learn(&answer, cluster, sent_at);
        }
        match P::verdict(&answer) {
            Verdict::NotLeader { hint } => return Some(End::NotLeader { hint }),
            Verdict::Unavailable { reason } => {
                // It may have lost its quorum to another.
                self.doubting = true;
                cluster.doubt(self.finding.number, Instant::now(), &reason);
            }
            Verdict::Decided if !self.confirmed || self.doubting => {
                cluster.confirm(self.finding.number);
                self.confirmed = true;
                self.doubting = false;
            }
            Verdict::Decided => {}
        }
        calls.answer(call_id, answer);
        self.answered = true;
        None
    }

    /// Sends again what seems lost, and says so when the leader says nothing.
    fn look_over(&mut self) -> Option<End> {
        let (cluster, calls) = (&self.link.cluster, &self.link.calls);
        calls.resend_due();
        let silent_since = calls.silent_since();
        let silence = silent_since.map_or(Duration::ZERO, |since| since.elapsed());
        if silence >= Duration::from_millis(SILENCE_BREAK_MS) {
            return Some(End::Broken(Lost::Silent(silence).to_string()));
        }
        if let Some(since) = silent_since.filter(|_| silence >= Duration::from_millis(SILENCE_MS_MAX)) {
            self.doubting = true;
            cluster.doubt(self.finding.number, since, "does not answer calls");
        } else if self.doubting && silent_since.is_none() {
            self.doubting = false;
            cluster.leave_be(self.finding.number);
        }
        None
    }
}
