//! One long stream to the current leader for one kind of request: a multiplexer of calls that follows the leader.
//!
//! Every submitted request is sent until it is answered. When the stream breaks, the leader changes or the leader does
//! not answer, all outstanding requests are sent again in the order of submission; a request with a single lost answer
//! is sent again on the same stream. Requests must therefore be idempotent (a mutation carries its request id, a chunk
//! its id).
//!
//! The callers bound the number of outstanding requests (lanes, permits). The queue to the stream has room for twice
//! this number; what does not fit is sent by the resend timer.
//!
//! Does not know the meaning of requests.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quorumfs_wire::calls::{CallError, Limits, Multiplexer, Numbered, OnSend, Resend, describe, next_answer};
use quorumfs_wire::file_system_client::FileSystemClient;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::cluster::{Cluster, LeaderView};
use crate::connector::{Backoff, Purpose};
use crate::lease::BootTime;

/// Interval at which outstanding requests are checked: a quarter of [`SILENCE_MS_MAX`].
const CHECK_INTERVAL_MS: u64 = 150;
/// Silence after which the other nodes are asked for the leader; less than the time of an election. This costs little,
/// and the client only switches when a majority names another leader.
const SILENCE_MS_MAX: u64 = 600;
/// Silence after which a new stream is opened even if no node names another leader.
const SILENCE_BREAK_MS: u64 = 10_000;
/// Time for a node to accept a stream; a stopped process still accepts TCP connections.
const OPEN_TIMEOUT_MS: u64 = 1_500;
/// A stream that ends sooner counts as failed, even if calls were answered on it.
const STREAM_LIFETIME_MS_MIN: u64 = 100;
/// Longest time between two sendings of a request on one stream.
const RESEND_AFTER_MS_MAX: u64 = 30_000;

/// A kind of request and the stream that carries it.
pub(crate) trait Protocol: Send + Sync + 'static {
    /// Name in the log.
    const NAME: &'static str;
    /// Use of the connection.
    const PURPOSE: Purpose;
    /// Most outstanding requests.
    const OUTSTANDING_MAX: usize;
    /// Time after which an answer is considered lost while other answers arrive.
    const RESEND_AFTER_MS: u64;
    type Request: Numbered + Clone + Send + 'static;
    type Response: Numbered + Send + 'static;

    fn open(
        client: &mut FileSystemClient<Channel>,
        requests: ReceiverStream<Self::Request>,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Response>>, Status>> + Send;

    /// Completes `request` just before it is sent. `announced` is the session that the stream knows, 0 for none; it is
    /// updated if `request` announces another.
    fn prepare(_request: &mut Self::Request, _cluster: &Cluster, _greeted: &mut u64) {}

    /// Whether the response is not an answer but a request for a keep-alive.
    fn is_keep_alive_request(_response: &Self::Response) -> bool {
        false
    }

    /// Takes lease and clock from the answer to a request that was sent at `sent_at`.
    fn learn(_response: &Self::Response, _cluster: &Cluster, _sent_at: BootTime) {}

    /// Returns whether the leader decided.
    fn verdict(response: &Self::Response) -> Verdict;
}

/// The part of an answer that concerns the link.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The leader decided; the answer goes to the caller.
    Decided,
    /// The leader could not decide: the request is submitted again after a delay.
    Unavailable {
        /// Why it could not decide.
        reason: String,
    },
    /// The node is not the leader: all outstanding requests move to the leader.
    NotLeader {
        /// Address of the leader, if known.
        hint: Option<String>,
    },
}

/// The calls of one protocol. Each holds the time at which it was first sent on the current stream, for the lease.
type Calls<P> = Multiplexer<<P as Protocol>::Request, <P as Protocol>::Response, BootTime, Preparer<P>>;

/// Completes requests according to their protocol.
struct Preparer<P> {
    cluster: Arc<Cluster>,
    /// The session that the current stream knows; 0 means none.
    announced: u64,
    protocol: PhantomData<fn() -> P>,
}

impl<P: Protocol> OnSend<P::Request, BootTime> for Preparer<P> {
    fn begin_stream(&mut self) {
        self.announced = 0;
    }

    fn prepare(&mut self, request: &mut P::Request, sent_at: &mut BootTime, is_first: bool) {
        if is_first {
            *sent_at = BootTime::now();
        }
        P::prepare(request, &self.cluster, &mut self.announced);
    }
}

/// A stream to the leader and its outstanding requests. Clones share it.
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
    /// It broke, or could not be opened.
    Broken(String),
    /// The node is not the leader.
    NotLeader { hint: Option<String> },
    /// Another node is the leader.
    Moved,
}

impl<P: Protocol> LeaderLink<P> {
    /// Creates a link. It connects after the first request was submitted, while [`LeaderLink::run`] runs.
    pub(crate) fn new(cluster: Arc<Cluster>) -> LeaderLink<P> {
        let limits = Limits {
            queue_max: 2 * P::OUTSTANDING_MAX,
            streams_max: u32::MAX,
            resend: Some(Resend {
                after: Duration::from_millis(P::RESEND_AFTER_MS),
                after_max: Duration::from_millis(RESEND_AFTER_MS_MAX),
            }),
        };
        let preparer = Preparer {
            cluster: cluster.clone(),
            announced: 0,
            protocol: PhantomData,
        };
        LeaderLink {
            cluster,
            calls: Arc::new(Multiplexer::new(limits, preparer)),
        }
    }

    /// Submits `request` until the leader decides; returns the answer and the number of times the request was sent.
    /// `None` if the client is being closed. Dropping the future withdraws the request if it has not been sent yet.
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
            tracing::debug!(
                link = P::NAME,
                reason,
                "the leader cannot decide now; trying again"
            );
            backoff.pause().await;
        }
    }

    pub(crate) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Ends all outstanding and later requests.
    pub(crate) fn close(&self) {
        self.calls.close();
    }

    /// Maintains the stream; never returns.
    pub(crate) async fn run(self) {
        let mut leader_views = self.cluster.watch_leader();
        let mut backoff = Backoff::new();
        // Consecutive streams that ended early or without an answer.
        let mut failed_streams = 0u32;
        // An earlier run that panicked left its stream attached.
        self.calls.detach(&CallError::Ended);
        loop {
            self.calls.calls_outstanding().await;
            let found = leader_views.wait_for(|view| view.address.is_some()).await;
            let Ok(view) = found.map(|view| view.clone()) else {
                return;
            };
            let Some(address) = view.address.clone() else {
                continue;
            };
            let mut stream = Stream {
                link: &self,
                view,
                confirmed: false,
                is_suspected: false,
                answered: false,
            };
            let began = Instant::now();
            let end = stream.serve(&address, &mut leader_views).await;
            let (version, answered) = (stream.view.version, stream.answered);
            let waiting_since = self.calls.detach(&CallError::Ended);
            // An idle client too must show the next leader that it is alive.
            self.cluster.request_keep_alive();
            // Without this condition, a node that answers one call and refuses the next would be called without a
            // delay.
            if answered && began.elapsed() >= Duration::from_millis(STREAM_LIFETIME_MS_MIN) {
                failed_streams = 0;
                backoff = Backoff::new();
            }
            let since = waiting_since.unwrap_or_else(Instant::now);
            match end {
                End::Moved => continue,
                End::Broken(reason) => {
                    if failed_streams == 0 && waiting_since.is_some() {
                        tracing::info!(link = P::NAME, node = %address, reason, "lost the connection to the leader");
                    } else {
                        tracing::debug!(link = P::NAME, node = %address, reason, "no stream to the leader");
                    }
                    self.cluster.report_lost(version, None, since);
                }
                End::NotLeader { hint } => {
                    tracing::debug!(link = P::NAME, node = %address, hint, "the node is not the leader");
                    self.cluster.report_lost(version, hint, since);
                }
            }
            failed_streams += 1;
            if failed_streams > 1 {
                backoff.pause().await;
            }
        }
    }
}

/// One stream from its opening to its end.
struct Stream<'a, P: Protocol> {
    link: &'a LeaderLink<P>,
    view: LeaderView,
    /// Whether [`Cluster::confirm`] was called for this view.
    confirmed: bool,
    /// Whether [`Cluster::report_unresponsive`] was called since.
    is_suspected: bool,
    answered: bool,
}

impl<P: Protocol> Stream<'_, P> {
    async fn serve(&mut self, address: &str, leader_views: &mut watch::Receiver<LeaderView>) -> End {
        let (cluster, calls) = (&self.link.cluster, &self.link.calls);
        let mut client = match cluster.connector().client(address, P::PURPOSE) {
            Ok(client) => client,
            Err(error) => return End::Broken(error.to_string()),
        };
        let open = P::open(&mut client, calls.attach());
        let mut answers = match tokio::time::timeout(Duration::from_millis(OPEN_TIMEOUT_MS), open).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return End::Broken(describe(&status)),
            Err(_) => {
                return End::Broken(format!(
                    "the node did not accept a stream in {OPEN_TIMEOUT_MS} ms"
                ));
            }
        };
        let mut ticks = tokio::time::interval(Duration::from_millis(CHECK_INTERVAL_MS));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        calls.opened();
        loop {
            tokio::select! {
                answer = next_answer(&mut answers) => match answer {
                    Ok(answer) => {
                        if let Some(end) = self.handle_answer(answer) {
                            return end;
                        }
                    }
                    Err(error) => return End::Broken(error.to_string()),
                },
                changed = leader_views.changed() => {
                    let view = leader_views.borrow_and_update().clone();
                    if changed.is_err() || view.address.as_deref().is_some_and(|new| new != address) {
                        return End::Moved;
                    }
                    // The same leader was found again, or was reported over another connection; this stream works.
                    self.view.version = view.version;
                    self.confirmed = false;
                },
                _ = ticks.tick() => {
                    if let Some(end) = self.check_silence() {
                        return end;
                    }
                }
            }
        }
    }

    /// Processes an answer and delivers it to its caller.
    fn handle_answer(&mut self, answer: P::Response) -> Option<End> {
        let (cluster, calls) = (&self.link.cluster, &self.link.calls);
        if P::is_keep_alive_request(&answer) {
            cluster.request_keep_alive();
            return None;
        }
        let call_id = answer.call_id();
        // If the request was sent several times, this may be the answer to the first.
        if let Some(sent_at) = calls.note_answer(call_id) {
            P::learn(&answer, cluster, sent_at);
        }
        match P::verdict(&answer) {
            Verdict::NotLeader { hint } => return Some(End::NotLeader { hint }),
            Verdict::Unavailable { reason } => {
                // Another node may lead its quorum now.
                self.is_suspected = true;
                cluster.report_unresponsive(self.view.version, Instant::now(), &reason);
            }
            Verdict::Decided if !self.confirmed || self.is_suspected => {
                cluster.confirm(self.view.version);
                self.confirmed = true;
                self.is_suspected = false;
            }
            Verdict::Decided => {}
        }
        calls.answer(call_id, answer);
        self.answered = true;
        None
    }

    /// Resends requests whose answers seem lost, and reports a leader that does not answer.
    fn check_silence(&mut self) -> Option<End> {
        let (cluster, calls) = (&self.link.cluster, &self.link.calls);
        calls.resend_due();
        let silent_since = calls.silent_since();
        let silence = silent_since.map_or(Duration::ZERO, |since| since.elapsed());
        if silence >= Duration::from_millis(SILENCE_BREAK_MS) {
            return Some(End::Broken(CallError::Timeout(silence).to_string()));
        }
        if let Some(since) = silent_since.filter(|_| silence >= Duration::from_millis(SILENCE_MS_MAX)) {
            self.is_suspected = true;
            cluster.report_unresponsive(self.view.version, since, "does not answer calls");
        } else if self.is_suspected && silent_since.is_none() {
            self.is_suspected = false;
            cluster.clear_suspicion(self.view.version);
        }
        None
    }
}
