//! Health: each node probes every other, and all exchange their results.
//!
//! A probe is one small call over the connection that carries the consensus, because its health is decisive: a node
//! that answers on another connection while this one is stuck cannot follow. The probe waits in that connection's queue
//! like a heartbeat, so its duration is that of a heartbeat. A probe that is refused because the node has not started
//! yet, or that another incarnation answers, has failed.
//!
//! Views travel with probes in both directions ([`merged`]), clocks with the answers ([`StampClock`]). [`judgement`]
//! judges the peers. Nothing here decides anything for the cluster: the consensus decides who leads.

mod encoding;
pub mod judgement;
pub mod merged;
mod report;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use quorumfs_proto::{Member, NodeId};
use quorumfs_wire as wire;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use self::encoding::{VIEWS_MAX, node_from_wire, node_to_wire, view_from_wire, view_to_wire};
use self::judgement::{Change, PeerHealth};
use self::merged::{AgedView, Belief, Merged, View};
use crate::consensus::Consensus;
use crate::observe::clock::{ClockMonitor, StampClock};
use crate::transport::{Purpose, Transport};
use quorumfs_tasks::Tasks;

pub use self::report::HealthReport;

/// Most time for an answer: between the time-out of elections (1 s) and that of calls (5 s).
const PROBE_TIMEOUT_MS: u64 = 2_000;
/// Most time for the leader to confirm that it leads: shorter, so that its own reason arrives.
const CONFIRM_TIMEOUT_MS: u64 = 1_500;
/// Interval at which a node whose clock has not been compared checks whether it leads.
const FIRST_COMPARISON_INTERVAL_MS: u64 = 50;
/// Number of rounds of probes for which a received view is fresh.
const FRESH_ROUNDS: u32 = 3;

/// The health monitor of a node; see the module documentation.
pub struct HealthMonitor {
    own: NodeId,
    interval: Duration,
    consensus: Consensus,
    transport: Arc<Transport>,
    clock: Arc<ClockMonitor>,
    stamps: Arc<StampClock>,
    // Locked for look-ups and small copies, never across an await.
    known: Mutex<Known>,
}

/// The results and received views. At most one entry for each member: others are ignored or dropped.
#[derive(Default)]
struct Known {
    peers: BTreeMap<NodeId, Peer>,
    /// Received views, and their time by this node's monotonic clock.
    heard: BTreeMap<NodeId, (View, Instant)>,
}

struct Peer {
    member: Member,
    health: PeerHealth,
    /// The peer's clock, and the time at which it was read.
    wall: Option<(SystemTime, Instant)>,
    /// Time of its last probe of this node.
    probed_us: Option<Instant>,
}

impl HealthMonitor {
    /// Makes a monitor that probes every `interval`, once it [starts](HealthMonitor::start).
    pub fn new(
        interval: Duration,
        consensus: Consensus,
        transport: Arc<Transport>,
        clock: Arc<ClockMonitor>,
        stamps: Arc<StampClock>,
    ) -> Arc<HealthMonitor> {
        Arc::new(HealthMonitor {
            own: consensus.id(),
            interval,
            consensus,
            transport,
            clock,
            stamps,
            known: Mutex::default(),
        })
    }

    /// Starts the task that probes repeatedly.
    pub fn start(self: &Arc<Self>, tasks: &Arc<Tasks>) {
        tasks.supervise_until_done(
            "health-clocks",
            self.clone(),
            Self::compare_clocks_before_stamping,
        );
        tasks.supervise("health-probes", self.clone(), Self::run_probes);
    }

    async fn run_probes(self: Arc<Self>) {
        let mut rounds = tokio::time::interval(self.interval);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            rounds.tick().await;
            let members = self.others();
            self.keep_only(&members);
            let probes = members.into_iter().map(|member| self.probe_and_record(member));
            futures::future::join_all(probes).await;
            self.compare_clocks();
        }
    }

    /// Returns the monitor of this node's clock.
    pub fn clock(&self) -> &ClockMonitor {
        &self.clock
    }

    fn others(&self) -> Vec<Member> {
        let members = self.consensus.members().into_iter();
        members.filter(|member| member.id != self.own).collect()
    }

    fn keep_only(&self, members: &[Member]) {
        let mut known = self.known.lock();
        let is_member = |id: &NodeId| members.iter().any(|member| member.id == *id);
        known.peers.retain(|id, _| is_member(id));
        known.heard.retain(|id, _| is_member(id));
    }

    /// A node that leads before its probes have reached a majority asks for clocks at once, because commands wait for
    /// that. This does not affect the health of peers.
    async fn compare_clocks_before_stamping(self: Arc<Self>) {
        while !self.stamps.is_compared() {
            if self.consensus.is_leader() {
                let asked = self.others().into_iter().map(|member| {
                    let monitor = self.clone();
                    async move {
                        let answer = monitor.ask_for_clock(&member).await.ok()?;
                        Some((member, answer.1))
                    }
                });
                let mut asked: FuturesUnordered<_> = asked.collect();
                while !self.compare_clocks()
                    && let Some(answer) = asked.next().await
                {
                    if let Some((member, wall)) = answer {
                        let mut known = self.known.lock();
                        let peer = known.peers.entry(member.id).or_insert_with(|| Peer::new(&member));
                        peer.wall = Some(wall);
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(FIRST_COMPARISON_INTERVAL_MS)).await;
        }
    }

    /// Sends one probe; returns its duration, the peer's clock, and the time at which that was read.
    async fn ask_for_clock(&self, member: &Member) -> Result<(Duration, (SystemTime, Instant)), String> {
        let begun = Instant::now();
        let answer = self.ask(member, Leadership::DoNotConfirm).await?;
        let now = Instant::now();
        self.learn(&answer.views);
        // The clock was read about halfway.
        let halfway = begun + (now - begun) / 2;
        let wall = u64::try_from(answer.wall_clock_ns).unwrap_or_default();
        Ok((now - begun, (UNIX_EPOCH + Duration::from_nanos(wall), halfway)))
    }

    async fn probe_and_record(&self, member: Member) {
        let outcome = self.ask_for_clock(&member).await;
        let now = Instant::now();
        let change = {
            let mut known = self.known.lock();
            let peer = known.peers.entry(member.id).or_insert_with(|| Peer::new(&member));
            peer.member = member.clone();
            if let Ok((_, wall)) = &outcome {
                peer.wall = Some(*wall);
            }
            peer.health.record(now, outcome.map(|(time, _)| time))
        };
        let slot = member.id.slot;
        match change {
            None | Some(Change::BecameHealthy(None)) => {}
            Some(Change::BecameHealthy(Some(after))) => {
                info!(node = slot, after_s = after.as_secs(), "node is healthy again");
            }
            Some(Change::BecameUnhealthy(reason)) => {
                warn!(
                    node = slot,
                    reason, "node is unhealthy: three probes in a row failed"
                );
            }
        }
    }

    /// Sends one probe.
    async fn ask(&self, member: &Member, leadership: Leadership) -> Result<wire::ProbeResponse, String> {
        let mut peer = self
            .transport
            .peer(&member.addresses, Purpose::Raft)
            .map_err(|error| format!("its address is not valid: {error}"))?;
        let request = wire::ProbeRequest {
            from: Some(node_to_wire(self.own)),
            views: self.views_to_tell(),
            confirm_leader: leadership == Leadership::Confirm,
        };
        let timeout = Duration::from_millis(PROBE_TIMEOUT_MS);
        let answer = tokio::time::timeout(timeout, peer.probe(request))
            .await
            .map_err(|_| format!("no answer in {PROBE_TIMEOUT_MS} ms"))?
            .map_err(|status| described(&status))?
            .into_inner();
        match node_from_wire(answer.node.as_ref()) {
            Some(id) if id == member.id => Ok(answer),
            Some(id) => Err(format!("{id} answers at its address")),
            None => Err("its answer does not say who it is".to_string()),
        }
    }

    /// Answers the probe of another node.
    pub async fn answer(&self, request: wire::ProbeRequest) -> wire::ProbeResponse {
        if let Some(from) = node_from_wire(request.from.as_ref())
            && let Some(peer) = self.known.lock().peers.get_mut(&from)
        {
            peer.probed_us = Some(Instant::now());
        }
        self.learn(&request.views);
        let not_leading = match request.confirm_leader {
            true => self.confirm_leadership().await.err().unwrap_or_default(),
            false => String::new(),
        };
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        wire::ProbeResponse {
            node: Some(node_to_wire(self.own)),
            wall_clock_ns: i64::try_from(since_1970.as_nanos()).unwrap_or(i64::MAX),
            views: self.views_to_tell(),
            not_leading,
        }
    }

    /// Checks whether calls sent to this node can be decided now: this node leads and a quorum confirms it, or it
    /// reaches a leader for which that is true. Answers within 2 s.
    ///
    /// # Errors
    /// The reason why not.
    pub async fn can_serve(&self) -> Result<(), String> {
        if let Some(reason) = self.consensus.status().reason {
            return Err(match self.unreached() {
                unreached if unreached.is_empty() => reason,
                unreached => format!("{reason}; this node does not reach {}", unreached.join(" and ")),
            });
        }
        if self.consensus.is_leader() {
            return self.confirm_leadership().await;
        }
        let leader = self.consensus.leader().ok_or("no leader is known")?;
        let slot = leader.id.slot;
        match self.ask(&leader, Leadership::Confirm).await {
            Err(reason) => Err(format!("the leader, node {slot}, does not answer: {reason}")),
            Ok(answer) if answer.not_leading.is_empty() => Ok(()),
            Ok(answer) => Err(format!("node {slot} cannot lead: {}", answer.not_leading)),
        }
    }

    async fn confirm_leadership(&self) -> Result<(), String> {
        let timeout = Duration::from_millis(CONFIRM_TIMEOUT_MS);
        match tokio::time::timeout(timeout, self.consensus.barrier()).await {
            Err(_) => Err(format!(
                "no quorum confirmed in {CONFIRM_TIMEOUT_MS} ms that it leads"
            )),
            Ok(Err(error)) => Err(error.to_string()),
            Ok(Ok(())) => Ok(()),
        }
    }

    /// Returns descriptions of the other nodes whose last probe failed.
    pub fn unreached(&self) -> Vec<String> {
        let known = self.known.lock();
        let silent = known
            .peers
            .values()
            .filter(|peer| peer.health.failures_in_row() > 0);
        silent
            .map(|peer| {
                let reason = peer.health.last_error().unwrap_or("it does not answer");
                format!("node {} ({reason})", peer.member.id.slot)
            })
            .collect()
    }

    /// Stores received views that are newer than the known ones, of members only.
    fn learn(&self, views: &[wire::HealthView]) {
        let now = Instant::now();
        let members = self.others();
        let heard = views.iter().take(VIEWS_MAX).filter_map(view_from_wire);
        let mut known = self.known.lock();
        for (observer, aged) in heard {
            let Some(made_at) = now.checked_sub(aged.age) else {
                continue;
            };
            let newer = known.heard.get(&observer).is_none_or(|(_, at)| *at < made_at);
            if newer && members.iter().any(|member| member.id == observer) {
                known.heard.insert(observer, (aged.view, made_at));
            }
        }
    }

    /// Returns this node's own view at `now`.
    fn own_view(&self, now: Instant) -> View {
        let clock = self.clock.belief();
        let known = self.known.lock();
        let beliefs = known.peers.values().map(|peer| Belief {
            subject: peer.member.id,
            state: peer.health.state(),
            state_age: now.saturating_duration_since(peer.health.since()),
            last_error: peer.health.last_error().map(ToString::to_string),
            mean_us: peer.health.times().mean_us(),
        });
        View {
            beliefs: beliefs.collect(),
            clock,
        }
    }

    /// Returns this node's view and all received views.
    fn views(&self, now: Instant) -> BTreeMap<NodeId, AgedView> {
        let own = AgedView {
            view: self.own_view(now),
            age: Duration::ZERO,
        };
        let known = self.known.lock();
        let heard = known.heard.iter().map(|(observer, (view, made_at))| {
            let aged = AgedView {
                view: view.clone(),
                age: now.saturating_duration_since(*made_at),
            };
            (*observer, aged)
        });
        heard.chain([(self.own, own)]).collect()
    }

    fn views_to_tell(&self) -> Vec<wire::HealthView> {
        let mut views: Vec<_> = self.views(Instant::now()).into_iter().collect();
        views.retain(|(_, aged)| aged.age <= self.fresh());
        // The own view is the youngest.
        views.sort_by_key(|(_, aged)| aged.age);
        views
            .iter()
            .take(VIEWS_MAX)
            .map(|(observer, aged)| view_to_wire(*observer, aged))
            .collect()
    }

    /// Returns the age up to which a received view is fresh.
    fn fresh(&self) -> Duration {
        self.interval * FRESH_ROUNDS + 2 * Duration::from_millis(PROBE_TIMEOUT_MS)
    }

    fn merged(&self, now: Instant) -> Merged {
        let mut members: Vec<NodeId> = self.others().iter().map(|member| member.id).collect();
        members.push(self.own);
        let round = self.interval + Duration::from_millis(PROBE_TIMEOUT_MS);
        Merged::new(members, self.views(now), self.fresh(), round)
    }

    /// Returns the others' clocks, advanced to `now`.
    fn clocks_of_others(&self, now: Instant) -> BTreeMap<NodeId, SystemTime> {
        let known = self.known.lock();
        let fresh = self.fresh();
        let clocks = known.peers.iter().filter_map(|(id, peer)| {
            let (wall, at) = peer.wall?;
            let age = now.saturating_duration_since(at);
            (age <= fresh).then_some((*id, wall + age))
        });
        clocks.collect()
    }

    /// Compares the clocks; returns whether there was ever a comparison with a majority.
    fn compare_clocks(&self) -> bool {
        let (wall, now) = (SystemTime::now(), Instant::now());
        let others: Vec<SystemTime> = self.clocks_of_others(now).into_values().collect();
        // Half of the others and this node are a majority.
        let members = self.consensus.members().len();
        let is_majority = members > 0 && others.len() * 2 + 1 >= members;
        if self.stamps.compare(wall, now, others) {
            match self.stamps.ahead() {
                Some(ahead) => warn!(
                    ahead_ms = ahead.as_millis() as u64,
                    "the clock of this node is ahead of the others': commands are not stamped with it"
                ),
                None => info!(
                    "the clock of this node agrees with the others' again: commands are stamped with it"
                ),
            }
        }
        if is_majority {
            self.stamps.note_compared();
        }
        self.stamps.is_compared()
    }
}

/// Whether the probed node must confirm that it leads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leadership {
    Confirm,
    DoNotConfirm,
}

impl Peer {
    fn new(member: &Member) -> Peer {
        Peer {
            member: member.clone(),
            health: PeerHealth::new(Instant::now()),
            wall: None,
            probed_us: None,
        }
    }
}

/// Returns the innermost cause: tonic's own message is "transport error".
fn described(status: &tonic::Status) -> String {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(status);
    let mut innermost = None;
    while let Some(error) = cause {
        innermost = Some(error.to_string());
        cause = error.source();
    }
    match (innermost, status.message()) {
        (Some(innermost), _) => innermost,
        (None, "") => status.code().to_string(),
        (None, message) => message.to_string(),
    }
}
