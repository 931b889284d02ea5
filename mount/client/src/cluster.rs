//! Which node leads, kept up to date by the complaints of those who use it.
//!
//! Owes: the address of the leader to whoever waits for it, soon after there is one; the addresses of all nodes;
//! one line in the log for each change, with the length of the pause.
//!
//! Invariants: every finding has a number; a complaint names the number it is about, and one about an older finding
//! is passed over, so that many users of one broken leader start one search. A search never ends but with a
//! finding (P6), and pauses between rounds as [`Backoff`] says.
//!
//! Knows nothing of calls, sessions or chunks.

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

use crate::address_book::AddressBook;
use crate::clock::LeaderClock;
use crate::connector::{Backoff, Connector, Purpose};
use crate::discovery::{Answers, Search, Suspect};
use crate::lease::Lease;

/// A node that does not say in this time who leads is passed over in this round.
const DISCOVER_TIMEOUT_MS: u64 = 1_000;
/// Once a majority has answered, how much longer the others may take: a stopped node must not slow down every round.
const ROUND_GRACE_MS: u64 = 150;
/// How long a search goes on before the log says so, and then says so again.
const SEARCH_NOTICE_MS: u64 = 5_000;

/// The leader as last found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Finding {
    /// Counts up with every finding and every loss.
    pub(crate) number: u64,
    /// `host:port`; `None` while it is looked for.
    pub(crate) address: Option<Arc<str>>,
}

/// Nodes and their leader.
pub(crate) struct Cluster {
    connector: Connector,
    state: Mutex<State>,
    /// Something to do for [`Cluster::follow_leader`].
    wanted: Notify,
    finding: watch::Sender<Finding>,
    lease: Lease,
    /// For whom this client speaks.
    hello: Mutex<Option<SessionHello>>,
    /// The cluster asks for a keep-alive, or may not know that this client is still there.
    nudged: Notify,
    clock: LeaderClock,
}

#[derive(Debug)]
enum Phase {
    /// Nobody complains.
    Settled,
    /// The leader is silent; others are asked about it while calls still wait for it.
    Doubted,
    /// No leader, or one of which users know that it is none.
    Searching { hint: Option<String> },
}

struct State {
    book: AddressBook,
    phase: Phase,
    suspect: Suspect,
    /// Complaints since a leader last answered a call.
    complaints: u32,
    /// Since when calls wait.
    pause_began: Option<Instant>,
    /// A change of leader that the log has not heard of, for nobody knows yet how long the pause is.
    unannounced: bool,
    /// Why the leader is in doubt.
    doubt: Option<String>,
    /// Why nodes are of no use, as of the last round.
    problems: BTreeMap<String, String>,
}

impl Cluster {
    /// Nothing is asked yet; `addresses` must not be empty.
    pub(crate) fn new(addresses: Vec<String>, connector: Connector) -> Arc<Cluster> {
        let state = State {
            book: AddressBook::new(addresses),
            phase: Phase::Searching { hint: None },
            suspect: Suspect::default(),
            complaints: 0,
            pause_began: None,
            unannounced: false,
            doubt: None,
            problems: BTreeMap::new(),
        };
        Arc::new(Cluster {
            connector,
            state: Mutex::new(state),
            wanted: Notify::new(),
            finding: watch::Sender::new(Finding::default()),
            lease: Lease::default(),
            hello: Mutex::new(None),
            nudged: Notify::new(),
            clock: LeaderClock::default(),
        })
    }

    /// Whether this client alone uses the cluster.
    pub(crate) fn lease(&self) -> &Lease {
        &self.lease
    }

    /// From now on this client speaks for `session`, which `secret` proves.
    pub(crate) fn speak_for(&self, session: SessionId, secret: SessionSecret) {
        *self.hello.lock() = Some(SessionHello {
            session: session.0,
            secret: Bytes::copy_from_slice(&secret.0),
        });
        self.lease.begin(session);
    }

    /// What a stream is told first.
    pub(crate) fn hello(&self) -> Option<SessionHello> {
        self.hello.lock().clone()
    }

    /// Has a keep-alive sent.
    pub(crate) fn nudge(&self) {
        self.nudged.notify_one();
    }

    /// Returns when a keep-alive is due before its time.
    pub(crate) async fn nudged(&self) {
        self.nudged.notified().await;
    }

    /// This machine's ends of the newest connections for calls.
    pub(crate) fn local_addresses(&self) -> Vec<String> {
        self.connector.local_addresses()
    }

    /// What the leader's clock shows.
    pub(crate) fn clock(&self) -> &LeaderClock {
        &self.clock
    }

    pub(crate) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Which cluster answers; `None` before any of its nodes has.
    pub(crate) fn id(&self) -> Option<ClusterId> {
        self.state.lock().book.cluster()
    }

    /// The addresses of all nodes, the user's first.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.state.lock().book.addresses()
    }

    /// Why calls are not answered, for people: one clause for each node that has a part in it.
    pub(crate) fn problems(&self) -> String {
        let state = self.state.lock();
        let doubt = state.doubt.as_ref().map(|reason| {
            let leader = state.suspect.address.as_deref().unwrap_or("somewhere");
            format!("the leader {leader}: {reason}")
        });
        let problems = state.problems.iter();
        let clauses: Vec<String> = doubt
            .into_iter()
            .chain(problems.map(|(address, problem)| format!("{address}: {problem}")))
            .collect();
        match clauses.is_empty() {
            true => String::from("no node has answered yet"),
            false => clauses.join("; "),
        }
    }

    /// The leader as last found, and every later finding.
    pub(crate) fn findings(&self) -> watch::Receiver<Finding> {
        self.finding.subscribe()
    }

    /// The number of the current finding.
    pub(crate) fn number(&self) -> u64 {
        self.finding.borrow().number
    }

    /// The leader of finding `number` is none (any more), or its connection broke: calls have waited since `since`.
    /// `hint` is the address of the leader as another node believes.
    pub(crate) fn complain(&self, number: u64, hint: Option<String>, since: Instant) {
        let mut state = self.state.lock();
        if number != self.number() || matches!(state.phase, Phase::Searching { .. }) {
            return;
        }
        state.begin_pause(since);
        state.complaints = state.complaints.saturating_add(1);
        state.phase = Phase::Searching { hint };
        self.finding.send_modify(|finding| {
            finding.number += 1;
            finding.address = None;
        });
        drop(state);
        self.wanted.notify_one();
    }

    /// The leader of finding `number` has decided nothing since `since`, for a `reason` in words: is there another?
    pub(crate) fn doubt(&self, number: u64, since: Instant, reason: &str) {
        let mut state = self.state.lock();
        if number != self.number() || matches!(state.phase, Phase::Searching { .. }) {
            return;
        }
        if state.doubt.as_deref() != Some(reason) {
            state.doubt = Some(reason.to_string());
        }
        if matches!(state.phase, Phase::Settled) {
            state.begin_pause(since);
            state.phase = Phase::Doubted;
            drop(state);
            self.wanted.notify_one();
        }
    }

    /// Nobody waits for the leader of finding `number` any more: it is not asked about. What was wrong with it is known
    /// until it answers a call.
    pub(crate) fn leave_be(&self, number: u64) {
        let mut state = self.state.lock();
        if number == self.number() && matches!(state.phase, Phase::Doubted) {
            state.phase = Phase::Settled;
            state.pause_began = None;
        }
    }

    /// The leader of finding `number` has answered a call.
    pub(crate) fn confirm(&self, number: u64) {
        let mut state = self.state.lock();
        if number != self.number() || matches!(state.phase, Phase::Searching { .. }) {
            return;
        }
        state.phase = Phase::Settled;
        state.complaints = 0;
        state.doubt = None;
        let pause = state.pause_began.take();
        if std::mem::take(&mut state.unannounced) {
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

    /// Looks for the leader whenever there is none or it is in doubt; never returns.
    pub(crate) async fn follow_leader(&self) {
        let mut clients = HashMap::new();
        let mut backoff = Backoff::new();
        let mut search_began = Instant::now();
        let mut notice_due = search_began + Duration::from_millis(SEARCH_NOTICE_MS);
        loop {
            let (search, complaints, hint) = {
                let mut state = self.state.lock();
                let complaints = state.complaints;
                match &mut state.phase {
                    Phase::Settled => (None, complaints, None),
                    Phase::Doubted => (Some(Search::Another), complaints, None),
                    Phase::Searching { hint } => (Some(Search::Anyone), complaints, hint.take()),
                }
            };
            let Some(search) = search else {
                if complaints == 0 {
                    backoff = Backoff::new();
                }
                self.wanted.notified().await;
                search_began = Instant::now();
                notice_due = search_began + Duration::from_millis(SEARCH_NOTICE_MS);
                continue;
            };
            // One hint is followed; after that, two nodes that name each other must not send us to and fro.
            if let Some(address) = hint.filter(|_| complaints <= 1)
                && self.adopt_hint(&address)
            {
                continue;
            }
            let found = self.ask_all(search, &mut clients).await;
            if let Some((member, address)) = found {
                self.adopt(search, Some(member.id), address);
                continue;
            }
            if Instant::now() >= notice_due {
                notice_due = Instant::now() + Duration::from_millis(6 * SEARCH_NOTICE_MS);
                tracing::warn!(
                    waited_ms = search_began.elapsed().as_millis() as u64,
                    nodes = self.problems(),
                    "no leader answers; calls wait"
                );
            }
            backoff.pause().await;
        }
    }

    /// Takes a node's word for who leads, unless it names the one in question.
    fn adopt_hint(&self, address: &str) -> bool {
        let (id, address) = {
            let state = self.state.lock();
            let member = state.book.member_at(address);
            let reached = member.map_or_else(|| address.to_string(), |m| state.book.address_of(m));
            if state.suspect.address.as_deref() == Some(reached.as_str()) {
                return false;
            }
            (member.map(|m| m.id), reached)
        };
        self.adopt(Search::Anyone, id, address);
        true
    }

    fn adopt(&self, search: Search, id: Option<NodeId>, address: String) {
        let mut state = self.state.lock();
        let still_wanted = match state.phase {
            Phase::Settled => false,
            Phase::Doubted => search == Search::Another,
            Phase::Searching { .. } => search == Search::Anyone,
        };
        if !still_wanted {
            return;
        }
        state.phase = Phase::Settled;
        // One that was found again is in doubt until it answers: who gives up meanwhile should hear why.
        if state.suspect.address.as_deref() != Some(address.as_str()) {
            state.doubt = None;
        }
        state.unannounced = true;
        state.suspect = Suspect {
            id,
            address: Some(address.clone()),
        };
        self.finding.send_modify(|finding| {
            finding.number += 1;
            finding.address = Some(Arc::from(address.as_str()));
        });
    }

    /// One round: asks every node who leads, and judges as the answers come.
    async fn ask_all(
        &self,
        search: Search,
        clients: &mut HashMap<String, FileSystemClient<Channel>>,
    ) -> Option<(Member, String)> {
        let (addresses, mut tally) = {
            let state = self.state.lock();
            let tally = Answers::new(search, state.suspect.clone(), state.book.nodes());
            (state.book.addresses(), tally)
        };
        clients.retain(|address, _| addresses.contains(address));
        // Until a node answers, what was wrong with it the last time is what is known of it.
        self.state
            .lock()
            .problems
            .retain(|address, _| addresses.contains(address));
        let mut answers: FuturesUnordered<_> = addresses
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
                Some(ask(client, address))
            })
            .collect();
        let mut grace = Duration::from_millis(DISCOVER_TIMEOUT_MS);
        while let Ok(Some((address, answer))) = tokio::time::timeout(grace, answers.next()).await {
            match answer {
                Err(problem) => {
                    // A connection that hangs must not be asked again.
                    clients.remove(&address);
                    self.state.lock().book.lost(&address);
                    self.note_problem(&address, problem);
                }
                Ok(answer) => match self.learn(&address, answer) {
                    Err(problem) => self.note_problem(&address, problem),
                    Ok((node, leader)) => {
                        match leader {
                            None => self.note_problem(&address, String::from("answers, but knows no leader")),
                            Some(_) => drop(self.state.lock().problems.remove(&address)),
                        }
                        tally.add(node, leader);
                        if let Some(leader) = tally.early() {
                            return Some(self.with_address(leader));
                        }
                        if tally.has_majority() {
                            grace = Duration::from_millis(ROUND_GRACE_MS);
                        }
                    }
                },
            }
        }
        tally.last().map(|leader| self.with_address(leader))
    }

    fn with_address(&self, leader: Member) -> (Member, String) {
        let address = self.state.lock().book.address_of(&leader);
        (leader, address)
    }

    fn learn(&self, address: &str, answer: DiscoverResponse) -> Result<(NodeId, Option<Member>), String> {
        self.state.lock().book.learn(address, answer)
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

async fn ask(
    mut client: FileSystemClient<Channel>,
    address: String,
) -> (String, Result<DiscoverResponse, String>) {
    let limit = Duration::from_millis(DISCOVER_TIMEOUT_MS);
    let answer = match tokio::time::timeout(limit, client.discover(DiscoverRequest {})).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(describe(&status)),
        Err(_) => Err(format!("no answer within {DISCOVER_TIMEOUT_MS} ms")),
    };
    (address, answer)
}
