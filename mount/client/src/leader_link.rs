//! One long stream to the leader, whoever that is, for one kind of request.
//!
//! Owes: every request that is submitted is sent until it is answered. When the stream breaks, the leader changes or
//! says nothing, all that is outstanding is sent again, in the order in which it was submitted; a lone lost answer is
//! asked for again on the same stream. So a request may arrive several times: it must be one that does no harm then
//! (a mutation carries its request id, a chunk its identity).
//!
//! Invariants: a request is outstanding from [`LeaderLink::submit`] until its answer arrives or its [`Waiting`] is
//! dropped. Who submits bounds how many are (lanes, permits); the queue to the stream takes twice as many, and what
//! does not fit is sent by the resend timer. The lock is never held across an await.
//!
//! Knows nothing of what a request means.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_wire::file_system_client::FileSystemClient;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::cluster::{Cluster, Finding, describe};
use crate::connector::{Backoff, Purpose};
use crate::lease::{BootTime, Lease};

/// How often outstanding requests are looked over. A quarter of what a leader may be silent.
const TICK_MS: u64 = 150;
/// A leader that answers nothing for so long is asked about: less than the others take to elect another. To ask costs
/// little, and nothing moves before a majority names another.
const SILENCE_MS_MAX: u64 = 600;
/// After so much silence the stream is made anew even if nobody knows a better leader.
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
    type Request: Clone + Send + 'static;
    type Response: Send + 'static;
    type Reply: Send + 'static;

    fn open(
        client: &mut FileSystemClient<Channel>,
        requests: ReceiverStream<Self::Request>,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Response>>, Status>> + Send;

    /// Writes the number by which the answer will name `request`.
    fn number(request: &mut Self::Request, call_id: u64);

    /// Writes into `request`, as it is sent, whether this client holds the lease.
    fn claim(_request: &mut Self::Request, _lease: &Lease) {}

    /// Has `request`, as it is sent, say for which session this client speaks, unless the stream was told so: of the
    /// session `greeted` it knows. Answers which session it knows then.
    fn greet(_request: &mut Self::Request, _cluster: &Cluster, greeted: u64) -> u64 {
        greeted
    }

    /// Whether this answers nothing, and asks for a keep-alive.
    fn is_nudge(_response: &Self::Response) -> bool {
        false
    }

    /// The lease that an answer carries.
    fn lease_ms(_response: &Self::Response) -> u32 {
        0
    }

    /// The leader's clock that an answer carries; 0: none.
    fn clock_ns(_response: &Self::Response) -> i64 {
        0
    }

    /// Which request is answered, and how.
    fn read(response: Self::Response) -> (u64, Reading<Self::Reply>);
}

/// An answer, as far as the link must understand it.
#[derive(Debug)]
pub(crate) enum Reading<R> {
    /// For whoever asked.
    Reply(R),
    /// The leader could not decide; for whoever asked, who tries again.
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

/// What became of one submission.
#[derive(Debug)]
pub(crate) enum Delivery<R> {
    /// The answer, and how often the request was sent for it.
    Reply(R, u32),
    /// Nothing was decided, after so many sendings. Submit it again a little later.
    Unavailable(String, u32),
    /// The client is being closed.
    Closed,
}

/// The stream and what is outstanding on it. Cloning shares it.
pub(crate) struct LeaderLink<P: Protocol> {
    shared: Arc<Shared<P>>,
}

impl<P: Protocol> Clone for LeaderLink<P> {
    fn clone(&self) -> Self {
        LeaderLink {
            shared: self.shared.clone(),
        }
    }
}

struct Shared<P: Protocol> {
    cluster: Arc<Cluster>,
    state: Mutex<State<P>>,
    /// Something is outstanding and there is no stream.
    wanted: Notify,
}

struct State<P: Protocol> {
    next_call_id: u64,
    outstanding: BTreeMap<u64, Outstanding<P>>,
    /// Into the current stream.
    outbound: Option<mpsc::Sender<P::Request>>,
    /// The session that the current stream knows of; 0: none.
    greeted: u64,
    closed: bool,
}

struct Outstanding<P: Protocol> {
    request: P::Request,
    answer: oneshot::Sender<Delivery<P::Reply>>,
    sends: u32,
    submitted_at: Instant,
    /// On the current stream.
    first_sent_at: Instant,
    /// The same moment, by the clock of leases.
    first_sent_boot: BootTime,
    last_sent_at: Instant,
    resend_after: Duration,
}

impl<P: Protocol> Outstanding<P> {
    /// Whether the stream's queue took it; if not, the resend timer tries again.
    fn send(
        &mut self,
        outbound: &mpsc::Sender<P::Request>,
        cluster: &Cluster,
        greeted: &mut u64,
        now: Instant,
    ) {
        self.last_sent_at = now;
        P::claim(&mut self.request, cluster.lease());
        let known = P::greet(&mut self.request, cluster, *greeted);
        if outbound.try_send(self.request.clone()).is_ok() {
            *greeted = known;
            self.sends = self.sends.saturating_add(1);
        }
    }
}

/// An answer that is waited for. Dropping it withdraws the request, as far as it has not been sent.
pub(crate) struct Waiting<P: Protocol> {
    shared: Arc<Shared<P>>,
    call_id: u64,
    answer: oneshot::Receiver<Delivery<P::Reply>>,
}

impl<P: Protocol> Waiting<P> {
    pub(crate) async fn delivery(mut self) -> Delivery<P::Reply> {
        (&mut self.answer).await.unwrap_or(Delivery::Closed)
    }
}

impl<P: Protocol> Drop for Waiting<P> {
    fn drop(&mut self) {
        self.shared.state.lock().outstanding.remove(&self.call_id);
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
        LeaderLink {
            shared: Arc::new(Shared {
                cluster,
                state: Mutex::new(State {
                    next_call_id: 1,
                    outstanding: BTreeMap::new(),
                    outbound: None,
                    greeted: 0,
                    closed: false,
                }),
                wanted: Notify::new(),
            }),
        }
    }

    /// Sends `request` at once if there is a leader, or else as soon as there is one.
    pub(crate) fn submit(&self, mut request: P::Request) -> Waiting<P> {
        let (sender, receiver) = oneshot::channel();
        let now = Instant::now();
        let mut state = self.shared.state.lock();
        let call_id = state.next_call_id;
        state.next_call_id += 1;
        if !state.closed {
            P::number(&mut request, call_id);
            let mut outstanding = Outstanding {
                request,
                answer: sender,
                sends: 0,
                submitted_at: now,
                first_sent_at: now,
                first_sent_boot: BootTime::now(),
                last_sent_at: now,
                resend_after: Duration::from_millis(P::RESEND_AFTER_MS),
            };
            let State {
                outbound, greeted, ..
            } = &mut *state;
            match outbound {
                Some(outbound) => outstanding.send(outbound, &self.shared.cluster, greeted, now),
                None => self.shared.wanted.notify_one(),
            }
            state.outstanding.insert(call_id, outstanding);
        }
        drop(state);
        Waiting {
            shared: self.shared.clone(),
            call_id,
            answer: receiver,
        }
    }

    /// Submits `request` until the leader decides.
    pub(crate) async fn call(&self, request: P::Request) -> Delivery<P::Reply> {
        let mut backoff = Backoff::new();
        let mut sends_before = 0;
        loop {
            match self.submit(request.clone()).delivery().await {
                Delivery::Unavailable(reason, sends) => {
                    tracing::debug!(link = P::NAME, reason, "the leader cannot decide now");
                    sends_before += sends;
                    backoff.pause().await;
                }
                Delivery::Reply(reply, sends) => return Delivery::Reply(reply, sends_before + sends),
                Delivery::Closed => return Delivery::Closed,
            }
        }
    }

    pub(crate) fn cluster(&self) -> &Cluster {
        &self.shared.cluster
    }

    /// From now on nothing is sent, and everything outstanding ends as [`Delivery::Closed`].
    pub(crate) fn close(&self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        state.outbound = None;
        let dropped = std::mem::take(&mut state.outstanding);
        drop(state);
        drop(dropped);
    }

    /// Keeps the stream; never returns.
    pub(crate) async fn run(self) {
        let mut findings = self.shared.cluster.findings();
        let mut backoff = Backoff::new();
        // Streams in a row that brought no answer, or ended soon.
        let mut fruitless = 0u32;
        loop {
            if self.shared.state.lock().outstanding.is_empty() {
                self.shared.wanted.notified().await;
                continue;
            }
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
                last_answer: Instant::now(),
                answered: false,
            };
            let began = Instant::now();
            let end = stream.serve(&address, &mut findings).await;
            let (number, answered) = (stream.finding.number, stream.answered);
            let waiting_since = self.detach();
            // An idle client too shows the next leader, or the same one, that it is still there.
            self.shared.cluster.nudge();
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
                    self.shared.cluster.complain(number, None, since);
                }
                End::NotLeader { hint } => {
                    tracing::debug!(link = P::NAME, node = %address, ?hint, "the node does not lead");
                    self.shared.cluster.complain(number, hint, since);
                }
            }
            fruitless += 1;
            if fruitless > 1 {
                backoff.pause().await;
            }
        }
    }

    /// The stream is gone. Says since when somebody has waited.
    fn detach(&self) -> Option<Instant> {
        let mut state = self.shared.state.lock();
        state.outbound = None;
        state.outstanding.values().map(|o| o.submitted_at).min()
    }

    /// Everything outstanding goes into a new stream, oldest first.
    fn attach(&self) -> ReceiverStream<P::Request> {
        let (outbound, requests) = mpsc::channel(2 * P::OUTSTANDING_MAX);
        let (now, sent_boot) = (Instant::now(), BootTime::now());
        let mut state = self.shared.state.lock();
        let mut greeted = 0;
        for outstanding in state.outstanding.values_mut() {
            outstanding.first_sent_at = now;
            outstanding.first_sent_boot = sent_boot;
            outstanding.resend_after = Duration::from_millis(P::RESEND_AFTER_MS);
            outstanding.send(&outbound, &self.shared.cluster, &mut greeted, now);
        }
        state.greeted = greeted;
        state.outbound = Some(outbound);
        ReceiverStream::new(requests)
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
    last_answer: Instant,
    answered: bool,
}

impl<P: Protocol> Stream<'_, P> {
    async fn serve(&mut self, address: &str, findings: &mut watch::Receiver<Finding>) -> End {
        let cluster = &self.link.shared.cluster;
        let mut client = match cluster.connector().client(address, P::PURPOSE) {
            Ok(client) => client,
            Err(error) => return End::Broken(error.to_string()),
        };
        let requests = self.link.attach();
        let open = P::open(&mut client, requests);
        let mut answers = match tokio::time::timeout(Duration::from_millis(OPEN_TIMEOUT_MS), open).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return End::Broken(describe(&status)),
            Err(_) => return End::Broken(format!("no stream within {OPEN_TIMEOUT_MS} ms")),
        };
        let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.last_answer = Instant::now();
        loop {
            tokio::select! {
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => {
                        if let Some(end) = self.take(answer) {
                            return end;
                        }
                    }
                    Ok(None) => return End::Broken(String::from("the node ended the stream")),
                    Err(status) => return End::Broken(describe(&status)),
                },
                changed = findings.changed() => {
                    let finding = findings.borrow_and_update().clone();
                    if changed.is_err() || finding.address.as_deref().is_some_and(|new| new != address) {
                        return End::Moved;
                    }
                    // Found again, or in question because of somebody else's connection: this one works.
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

    /// Hands an answer to whoever waits for it.
    fn take(&mut self, answer: P::Response) -> Option<End> {
        if P::is_nudge(&answer) {
            self.link.shared.cluster.nudge();
            return None;
        }
        self.last_answer = Instant::now();
        let (lease_ms, clock_ns) = (P::lease_ms(&answer), P::clock_ns(&answer));
        let (call_id, reading) = P::read(answer);
        let cluster = &self.link.shared.cluster;
        if let Some(asked) = self.link.shared.state.lock().outstanding.get(&call_id) {
            // It may answer the first of several sendings.
            cluster.lease().granted(asked.first_sent_boot, lease_ms);
            cluster.clock().told(asked.first_sent_boot, clock_ns);
        }
        match reading {
            Reading::NotLeader { hint } => return Some(End::NotLeader { hint }),
            Reading::Unavailable { reason } => {
                // It may have lost its quorum to another.
                self.doubting = true;
                cluster.doubt(self.finding.number, self.last_answer, &reason);
                self.deliver(call_id, |sends| Delivery::Unavailable(reason, sends));
            }
            Reading::Reply(reply) => {
                if !self.confirmed || self.doubting {
                    cluster.confirm(self.finding.number);
                    self.confirmed = true;
                    self.doubting = false;
                }
                self.deliver(call_id, |sends| Delivery::Reply(reply, sends));
            }
        }
        self.answered = true;
        None
    }

    fn deliver(&self, call_id: u64, delivery: impl FnOnce(u32) -> Delivery<P::Reply>) {
        let outstanding = self.link.shared.state.lock().outstanding.remove(&call_id);
        if let Some(outstanding) = outstanding {
            // Whoever does not wait any more does not want to know.
            let _ = outstanding.answer.send(delivery(outstanding.sends));
        }
    }

    /// Sends again what seems lost, and says so when the leader says nothing.
    fn look_over(&mut self) -> Option<End> {
        let now = Instant::now();
        let waiting_since = {
            let mut state = self.link.shared.state.lock();
            let State {
                outstanding,
                outbound,
                greeted,
                ..
            } = &mut *state;
            let outbound = outbound.as_ref()?;
            for request in outstanding.values_mut() {
                if now.duration_since(request.last_sent_at) >= request.resend_after {
                    request.send(outbound, &self.link.shared.cluster, greeted, now);
                    request.resend_after =
                        (2 * request.resend_after).min(Duration::from_millis(RESEND_AFTER_MS_MAX));
                }
            }
            outstanding.values().map(|request| request.first_sent_at).min()
        };
        let cluster = &self.link.shared.cluster;
        let silent_since = waiting_since.map(|since| since.max(self.last_answer));
        let silence = silent_since.map_or(Duration::ZERO, |since| now.duration_since(since));
        if silence >= Duration::from_millis(SILENCE_BREAK_MS) {
            return Some(End::Broken(format!("no answer in {} ms", silence.as_millis())));
        }
        if let Some(since) = silent_since.filter(|_| silence >= Duration::from_millis(SILENCE_MS_MAX)) {
            self.doubting = true;
            cluster.doubt(self.finding.number, since, "does not answer calls");
        } else if self.doubting && waiting_since.is_none() {
            self.doubting = false;
            cluster.leave_be(self.finding.number);
        }
        None
    }
}
