//! The current leader, updated from the reports of its users.
//!
//! Provides the address of the leader soon after there is one, the addresses of all nodes, and one log line for each
//! change of leader with the length of the pause.
//!
//! Invariants: every view of the leader has a version; a report names the version that it is about, and a report about
//! an older version is ignored, so that many users of one failed leader start one search. A search ends only when a
//! leader is found (P6), and pauses between rounds according to [`Backoff`].
//!
//! Does not know calls, sessions or chunks.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use quorumfs_proto::{ClusterId, Member, NodeId, SessionId, SessionSecret};
use quorumfs_wire::calls::describe;
use quorumfs_wire::file_system_client::FileSystemClient;
use quorumfs_wire::{DiscoverRequest, DiscoverResponse, SessionHello};
use tokio::sync::{Notify, watch};
use tonic::transport::Channel;

use crate::clock::LeaderClock;
use crate::connector::{Backoff, Connector, Purpose};
use crate::discovery::{Answers, Search, Suspect};
use crate::lease::Lease;
use crate::node_addresses::NodeAddresses;

/// Time for a node to answer who leads; a node that takes longer is ignored in this round.
const DISCOVER_TIMEOUT_MS: u64 = 1_000;
/// Time for the remaining nodes after a majority has answered, so that a stopped node does not delay every round.
const ROUND_GRACE_MS: u64 = 150;
/// Time after which a search without result is logged for the first time.
const SEARCH_NOTICE_MS: u64 = 5_000;

/// The leader as currently known.
#[derive(Clone, Debug, Default)]
pub(crate) struct LeaderView {
    /// Incremented each time a leader is found or lost.
    pub(crate) version: u64,
    /// `host:port`; `None` during a search.
    pub(crate) address: Option<Arc<str>>,
}

/// The nodes of the cluster and the leader.
pub(crate) struct Cluster {
    connector: Connector,
    state: Mutex<State>,
    /// Wakes [`Cluster::follow_leader`].
    search_wanted: Notify,
    leader: watch::Sender<LeaderView>,
    lease: Lease,
    /// The session of this client.
    hello: Mutex<Option<SessionHello>>,
    /// A keep-alive is to be sent before its time: the leader asks for one, or may not know that this client is alive.
    keep_alive_wanted: Notify,
    clock: LeaderClock,
}

#[derive(Debug)]
enum Phase {
    /// There is a leader, and no problem was reported.
    Stable,
    /// The leader does not answer; the other nodes are asked about it while calls still wait for it.
    Suspected,
    /// There is no leader, or users reported that it is lost.
    Searching { hint: Option<String> },
}

struct State {
    nodes: NodeAddresses,
    phase: Phase,
    suspect: Suspect,
    /// Reports of a lost leader since a leader last answered a call.
    failures: u32,
    /// Start of the current pause, during which calls wait.
    pause_began: Option<Instant>,
    /// A change of leader is to be logged when the length of the pause is known.
    is_unlogged: bool,
    /// Why the leader is suspected.
    suspicion: Option<String>,
    /// The problem of each node by address, as of the last round.
    problems: BTreeMap<String, String>,
}

impl Cluster {
    /// Creates the state without contacting a node; `addresses` must not be empty.
    pub(crate) fn new(addresses: Vec<String>, connector: Connector) -> Arc<Cluster> {
        let state = State {
            nodes: NodeAddresses::new(addresses),
            phase: Phase::Searching { hint: None },
            suspect: Suspect::default(),
            failures: 0,
            pause_began: None,
            is_unlogged: false,
            suspicion: None,
            problems: BTreeMap::new(),
        };
        Arc::new(Cluster {
            connector,
            state: Mutex::new(state),
            search_wanted: Notify::new(),
            leader: watch::Sender::new(LeaderView::default()),
            lease: Lease::default(),
            hello: Mutex::new(None),
            keep_alive_wanted: Notify::new(),
            clock: LeaderClock::default(),
        })
    }

    /// Returns the lease on exclusive use of the cluster.
    pub(crate) fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Sets the session of this client and its secret; the session starts without a lease.
    pub(crate) fn set_session(&self, session: SessionId, secret: SessionSecret) {
        *self.hello.lock() = Some(SessionHello {
            session: session.0,
            secret: Bytes::copy_from_slice(&secret.0),
        });
        self.lease.begin(session);
    }

    /// Returns the session and secret that are sent first on each stream.
    pub(crate) fn hello(&self) -> Option<SessionHello> {
        self.hello.lock().clone()
    }

    /// Requests a keep-alive before its time.
    pub(crate) fn request_keep_alive(&self) {
        self.keep_alive_wanted.notify_one();
    }

    /// Waits until a keep-alive is requested.
    pub(crate) async fn keep_alive_requested(&self) {
        self.keep_alive_wanted.notified().await;
    }

    /// Returns the local addresses of the newest connections for calls.
    pub(crate) fn local_addresses(&self) -> Vec<String> {
        self.connector.local_addresses()
    }

    /// Returns the estimate of the leader's clock.
    pub(crate) fn clock(&self) -> &LeaderClock {
        &self.clock
    }

    pub(crate) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Returns the id of the cluster; `None` before one of its nodes has answered.
    pub(crate) fn id(&self) -> Option<ClusterId> {
        self.state.lock().nodes.cluster()
    }

    /// Returns the addresses of all nodes, the configured ones first.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.state.lock().nodes.addresses()
    }

    /// Describes why calls are not answered, with one clause for each node that has a problem.
    pub(crate) fn problems(&self) -> String {
        let state = self.state.lock();
        let suspicion = state.suspicion.as_ref().map(|reason| {
            let leader = state.suspect.address.as_deref().unwrap_or("somewhere");
            format!("the leader {leader}: {reason}")
        });
        let problems = state.problems.iter();
        let clauses: Vec<String> = suspicion
            .into_iter()
            .chain(problems.map(|(address, problem)| format!("{address}: {problem}")))
            .collect();
        match clauses.is_empty() {
            true => String::from("no node has answered yet"),
            false => clauses.join("; "),
        }
    }

    /// Returns a receiver of the current and all later views of the leader.
    pub(crate) fn watch_leader(&self) -> watch::Receiver<LeaderView> {
        self.leader.subscribe()
    }

    /// Returns the version of the current view.
    pub(crate) fn leader_version(&self) -> u64 {
        self.leader.borrow().version
    }

    /// Reports that the leader of `version` does not lead (any more), or that its connection broke; calls wait since
    /// `since`. `hint` is the leader's address as known to another node. Starts a search.
    pub(crate) fn report_lost(&self, version: u64, hint: Option<String>, since: Instant) {
        let mut state = self.state.lock();
        if version != self.leader_version() || matches!(state.phase, Phase::Searching { .. }) {
            return;
        }
        state.begin_pause(since);
        state.failures = state.failures.saturating_add(1);
        state.phase = Phase::Searching { hint };
        self.leader.send_modify(|view| {
            view.version += 1;
            view.address = None;
        });
        drop(state);
        self.search_wanted.notify_one();
    }

    /// Reports that the leader of `version` has decided nothing since `since`, because of `reason`. The other nodes
    /// are asked whether there is another leader.
    pub(crate) fn report_unresponsive(&self, version: u64, since: Instant, reason: &str) {
        let mut state = self.state.lock();
        if version != self.leader_version() || matches!(state.phase, Phase::Searching { .. }) {
            return;
        }
        if state.suspicion.as_deref() != Some(reason) {
            state.suspicion = Some(reason.to_string());
        }
        if matches!(state.phase, Phase::Stable) {
            state.begin_pause(since);
            state.phase = Phase::Suspected;
            drop(state);
            self.search_wanted.notify_one();
        }
    }

    /// Reports that no call waits for the leader of `version` any more. The reason for the suspicion is kept until the
    /// leader answers a call.
    pub(crate) fn clear_suspicion(&self, version: u64) {
        let mut state = self.state.lock();
        if version == self.leader_version() && matches!(state.phase, Phase::Suspected) {
            state.phase = Phase::Stable;
            state.pause_began = None;
        }
    }

    /// Reports that the leader of `version` has answered a call.
    pub(crate) fn confirm(&self, version: u64) {
        let mut state = self.state.lock();
        if version != self.leader_version() || matches!(state.phase, Phase::Searching { .. }) {
            return;
        }
        state.phase = Phase::Stable;
        state.failures = 0;
        state.suspicion = None;
        let pause = state.pause_began.take();
        if std::mem::take(&mut state.is_unlogged) {
            let leader = state.suspect.address.clone().unwrap_or_default();
            match pause {
                Some(began) => tracing::info!(
                    leader,
                    pause_ms = began.elapsed().as_millis() as u64,
                    "calls are answered again"
                ),
                None => tracing::info!(leader, "found the leader"),
            }
        }
    }

    /// Looks for the leader whenever there is none or it is suspected; never returns.
    pub(crate) async fn follow_leader(&self) {
        let mut clients = HashMap::new();
        let mut backoff = Backoff::new();
        let mut search_began = Instant::now();
        let mut notice_due = search_began + Duration::from_millis(SEARCH_NOTICE_MS);
        loop {
            let (search, failures, hint) = {
                let mut state = self.state.lock();
                let failures = state.failures;
                match &mut state.phase {
                    Phase::Stable => (None, failures, None),
                    Phase::Suspected => (Some(Search::OtherLeader), failures, None),
                    Phase::Searching { hint } => (Some(Search::AnyLeader), failures, hint.take()),
                }
            };
            let Some(search) = search else {
                if failures == 0 {
                    backoff = Backoff::new();
                }
                self.search_wanted.notified().await;
                search_began = Instant::now();
                notice_due = search_began + Duration::from_millis(SEARCH_NOTICE_MS);
                continue;
            };
            // Only one hint is followed, so that two nodes that name each other cannot keep the client switching
            // between them.
            if let Some(address) = hint.filter(|_| failures <= 1)
                && self.adopt_hint(&address)
            {
                continue;
            }
            let found = self.discover_all(search, &mut clients).await;
            if let Some((member, address)) = found {
                self.adopt(search, Some(member.id), address);
                continue;
            }
            if Instant::now() >= notice_due {
                notice_due = Instant::now() + Duration::from_millis(6 * SEARCH_NOTICE_MS);
                tracing::warn!(
                    waited_ms = search_began.elapsed().as_millis() as u64,
                    nodes = self.problems(),
                    "no leader found; calls wait"
                );
            }
            backoff.pause().await;
        }
    }

    /// Adopts the leader that a node named, unless it is the suspected one; returns whether it did.
    fn adopt_hint(&self, address: &str) -> bool {
        let (id, address) = {
            let state = self.state.lock();
            let member = state.nodes.member_at(address);
            let reached = member.map_or_else(|| address.to_string(), |m| state.nodes.address_of(m));
            if state.suspect.address.as_deref() == Some(reached.as_str()) {
                return false;
            }
            (member.map(|m| m.id), reached)
        };
        self.adopt(Search::AnyLeader, id, address);
        true
    }

    fn adopt(&self, search: Search, id: Option<NodeId>, address: String) {
        let mut state = self.state.lock();
        let still_wanted = match state.phase {
            Phase::Stable => false,
            Phase::Suspected => search == Search::OtherLeader,
            Phase::Searching { .. } => search == Search::AnyLeader,
        };
        if !still_wanted {
            return;
        }
        state.phase = Phase::Stable;
        // A leader that was found again stays suspected until it answers, so that errors of calls that time out
        // meanwhile contain the reason.
        if state.suspect.address.as_deref() != Some(address.as_str()) {
            state.suspicion = None;
        }
        state.is_unlogged = true;
        state.suspect = Suspect {
            id,
            address: Some(address.clone()),
        };
        self.leader.send_modify(|view| {
            view.version += 1;
            view.address = Some(Arc::from(address.as_str()));
        });
    }

    /// One round of a search: asks every node for the leader and evaluates the answers as they arrive.
    async fn discover_all(
        &self,
        search: Search,
        clients: &mut HashMap<String, FileSystemClient<Channel>>,
    ) -> Option<(Member, String)> {
        let (addresses, mut answers) = {
            let state = self.state.lock();
            let answers = Answers::new(search, state.suspect.clone(), state.nodes.count());
            (state.nodes.addresses(), answers)
        };
        clients.retain(|address, _| addresses.contains(address));
        // The last problem of a node is kept until the node answers.
        self.state
            .lock()
            .problems
            .retain(|address, _| addresses.contains(address));
        let mut responses: FuturesUnordered<_> = addresses
            .into_iter()
            .filter_map(|address| {
                if !clients.contains_key(&address) {
                    match self.connector.client(&address, Purpose::Calls) {
                        Ok(client) => {
                            clients.insert(address.clone(), client);
                        }
                        Err(error) => self.note_problem(&address, error.to_string()),
                    }
                }
                let client = clients.get(&address)?.clone();
                Some(discover(client, address))
            })
            .collect();
        let mut grace = Duration::from_millis(DISCOVER_TIMEOUT_MS);
        while let Ok(Some((address, answer))) = tokio::time::timeout(grace, responses.next()).await {
            match answer {
                Err(problem) => {
                    // The connection may hang, so the next round uses a new one.
                    clients.remove(&address);
                    self.state.lock().nodes.mark_unreachable(&address);
                    self.note_problem(&address, problem);
                }
                Ok(answer) => match self.learn(&address, answer) {
                    Err(problem) => self.note_problem(&address, problem),
                    Ok((node, leader)) => {
                        match leader {
                            None => self.note_problem(&address, String::from("the node knows no leader")),
                            Some(_) => drop(self.state.lock().problems.remove(&address)),
                        }
                        answers.add(node, leader);
                        if let Some(leader) = answers.early_leader() {
                            return Some(self.with_address(leader));
                        }
                        if answers.has_majority() {
                            grace = Duration::from_millis(ROUND_GRACE_MS);
                        }
                    }
                },
            }
        }
        answers.final_leader().map(|leader| self.with_address(leader))
    }

    fn with_address(&self, leader: Member) -> (Member, String) {
        let address = self.state.lock().nodes.address_of(&leader);
        (leader, address)
    }

    fn learn(&self, address: &str, answer: DiscoverResponse) -> Result<(NodeId, Option<Member>), String> {
        self.state.lock().nodes.learn(address, answer)
    }

    fn note_problem(&self, address: &str, problem: String) {
        self.state.lock().problems.insert(address.to_string(), problem);
    }
}

impl State {
    fn begin_pause(&mut self, since: Instant) {
        let began = self.pause_began.get_or_insert(since);
        *began = since.min(*began);
    }
}

async fn discover(
    mut client: FileSystemClient<Channel>,
    address: String,
) -> (String, Result<DiscoverResponse, String>) {
    let limit = Duration::from_millis(DISCOVER_TIMEOUT_MS);
    let answer = match tokio::time::timeout(limit, client.discover(DiscoverRequest {})).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(describe(&status)),
        Err(_) => Err(format!("no answer in {DISCOVER_TIMEOUT_MS} ms")),
    };
    (address, answer)
}
