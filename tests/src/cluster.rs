//! A cluster of real nodes on this machine, and what can be done to it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::Sandbox;
use crate::environment::{binary, wait_for, wait_until};
use crate::http::Http;
use crate::mount::{Mount, MountOptions};
use crate::process::{ManagedProcess, read_log};
use crate::proxy::Proxy;

/// From a start or a failure to a leader that can commit; generous, for a loaded machine.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Until every node holds everything.
const REST_LIMIT: Duration = Duration::from_secs(60);

/// `GET /status`.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// Hexadecimal.
    pub cluster_id: Option<String>,
    /// Who answers.
    pub node: StatusNode,
    /// `leader`, `follower`, `learner`, `candidate`, or `starting`.
    pub role: String,
    /// Whom this node believes to lead.
    pub leader: Option<StatusLeader>,
    /// Whether this node can commit now.
    pub writable: bool,
    /// Why not.
    pub reason: Option<String>,
    /// Of the consensus; a node that is still starting has none, nor what follows.
    pub term: Option<u64>,
    /// The last log entry that took effect here.
    pub applied_index: Option<u64>,
    /// The last log entry known to be committed.
    pub committed_index: Option<u64>,
    /// The log on disk.
    #[serde(default)]
    pub wal: StatusWal,
}

/// Who a node is.
#[derive(Clone, Debug, Deserialize)]
pub struct StatusNode {
    /// Its number.
    pub slot: usize,
    /// Its data folder's random number, as the node writes it.
    pub incarnation: serde_json::Value,
}

/// Who leads.
#[derive(Clone, Debug, Deserialize)]
pub struct StatusLeader {
    /// Its number.
    pub slot: usize,
}

/// Counts of the write-ahead log.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct StatusWal {
    /// Times it was flushed.
    pub flushes: u64,
    /// Entries that became durable by it.
    pub entries_flushed: u64,
}

/// One member in `GET /membership`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MemberView {
    /// Its number.
    pub slot: usize,
    /// Its incarnation.
    pub incarnation: String,
    /// Whether it votes.
    pub voter: bool,
}

/// `GET /recovery/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct RecoveryStatus {
    /// Chunks that the metadata names and this node lacks.
    pub missing_chunks: u64,
    /// Chunks here.
    pub held_chunks: u64,
    /// Chunks that the metadata names.
    pub named_chunks: u64,
    /// Chunks fetched from others since the node started.
    pub fetched_chunks: u64,
    /// Chunks here that are for others to hold.
    pub surplus_chunks: u64,
    /// On how many nodes each chunk is kept.
    pub copies: u64,
}

/// One node: what it is started with, and its process while it runs.
#[derive(Debug)]
struct Node {
    slot: usize,
    listen: String,
    http: Http,
    data: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    proxy: Option<Proxy>,
    process: Mutex<Option<ManagedProcess>>,
}

/// How a cluster is to be; see [`Cluster::start`] for the usual one.
#[derive(Debug)]
pub struct ClusterBuilder<'a> {
    sandbox: &'a Sandbox,
    name: String,
    nodes: usize,
    founders: Option<usize>,
    proxied: bool,
    data_folders: Vec<(usize, PathBuf)>,
    arguments: Vec<String>,
    environment: Vec<(usize, String, String)>,
}

impl<'a> ClusterBuilder<'a> {
    /// 1, 3, 5 or 7; 3 unless said.
    pub fn nodes(mut self, nodes: usize) -> Self {
        self.nodes = nodes;
        self
    }

    /// How many of them make the cluster; the others are started by the test, and join it. All, unless said.
    pub fn founders(mut self, founders: usize) -> Self {
        self.founders = Some(founders);
        self
    }

    /// A prefix for the data folders, where a test has several clusters.
    pub fn name(mut self, name: &str) -> Self {
        self.name = format!("{name}-");
        self
    }

    /// Every node is reached through a [`Proxy`], by mounts and by the other nodes.
    pub fn proxied(mut self) -> Self {
        self.proxied = true;
        self
    }

    /// Where the node of this slot keeps its data.
    pub fn data_folder(mut self, slot: usize, folder: PathBuf) -> Self {
        self.data_folders.push((slot, folder));
        self
    }

    /// More arguments for every node.
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(ToString::to_string));
        self
    }

    /// An environment variable for the node of this slot.
    pub fn variable(mut self, slot: usize, name: &str, value: &str) -> Self {
        self.environment.push((slot, name.to_string(), value.to_string()));
        self
    }

    /// The cluster, with no node running.
    pub fn build(self) -> Cluster<'a> {
        let listen: Vec<String> = (0..self.nodes).map(|_| self.sandbox.address()).collect();
        let members = match self.proxied {
            false => listen.clone(),
            true => (0..self.nodes).map(|_| self.sandbox.address()).collect(),
        };
        let node = |index: usize| {
            let slot = index + 1;
            let name = format!("{}node-{slot}", self.name);
            let given = self
                .data_folders
                .iter()
                .find(|(s, _)| *s == slot)
                .map(|(_, folder)| folder.clone());
            Node {
                slot,
                listen: listen[index].clone(),
                http: Http::new(&self.sandbox.address()),
                data: given.unwrap_or_else(|| self.sandbox.path(&name)),
                log: self.sandbox.log_path(&name),
                arguments: self.arguments.clone(),
                environment: self
                    .environment
                    .iter()
                    .filter(|(of, _, _)| *of == slot)
                    .map(|(_, name, value)| (name.clone(), value.clone()))
                    .collect(),
                proxy: self
                    .proxied
                    .then(|| Proxy::start(&members[index], &listen[index])),
                process: Mutex::new(None),
            }
        };
        Cluster {
            sandbox: self.sandbox,
            founders: self.founders.unwrap_or(self.nodes),
            nodes: (0..self.nodes).map(node).collect(),
            members,
        }
    }

    /// The cluster, running and ready.
    pub fn start(self) -> Cluster<'a> {
        let cluster = self.build();
        (1..=cluster.founders).for_each(|slot| cluster.start_node(slot));
        cluster.wait_ready();
        cluster
    }
}

/// A cluster. Nodes are named by their slot, from 1. All methods take `&self`: helper threads kill and start nodes
/// while the test goes on.
#[derive(Debug)]
pub struct Cluster<'a> {
    sandbox: &'a Sandbox,
    founders: usize,
    nodes: Vec<Node>,
    members: Vec<String>,
}

impl<'a> Cluster<'a> {
    /// Three nodes, ready.
    pub fn start(sandbox: &'a Sandbox) -> Cluster<'a> {
        Cluster::builder(sandbox).start()
    }

    /// To say how it is to be.
    pub fn builder(sandbox: &'a Sandbox) -> ClusterBuilder<'a> {
        ClusterBuilder {
            sandbox,
            name: String::new(),
            nodes: 3,
            founders: None,
            proxied: false,
            data_folders: Vec::new(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    fn node(&self, slot: usize) -> &Node {
        &self.nodes[slot - 1]
    }

    /// All slots.
    pub fn slots(&self) -> std::ops::RangeInclusive<usize> {
        1..=self.nodes.len()
    }

    /// The gRPC addresses, as `--members` and a mount take them.
    pub fn members(&self) -> String {
        self.members.join(",")
    }

    /// The gRPC address of one node.
    pub fn grpc_address(&self, slot: usize) -> &str {
        &self.members[slot - 1]
    }

    /// The REST interface of one node.
    pub fn http(&self, slot: usize) -> &Http {
        &self.node(slot).http
    }

    /// The data folder of one node.
    pub fn data_folder(&self, slot: usize) -> &Path {
        &self.node(slot).data
    }

    /// The proxy in front of one node.
    pub fn proxy(&self, slot: usize) -> &Proxy {
        self.node(slot).proxy.as_ref().expect("a proxied cluster")
    }

    /// All that one node logged.
    pub fn log(&self, slot: usize) -> String {
        read_log(&self.node(slot).log)
    }

    /// The command that starts one node.
    pub fn command(&self, slot: usize) -> Command {
        let node = self.node(slot);
        let founders = self.members[..self.founders].join(",");
        let mut command = Command::new(binary("quorumfs-node"));
        command
            .args(["--slot", &slot.to_string()])
            .args(match slot <= self.founders {
                true => ["--members", &founders].to_vec(),
                false => ["--join", &founders, "--grpc", self.grpc_address(slot)].to_vec(),
            })
            .args(["--http", node.http.address()])
            .arg("--data")
            .arg(&node.data)
            .args(["--log", &log_level()])
            .args(&node.arguments)
            // Weaker than an argument: a test that wants NTP says `--ntp`.
            .env("QUORUMFS_NTP", "none")
            .envs(node.environment.iter().cloned())
            .env("RUST_BACKTRACE", "1")
            .env("NO_COLOR", "1");
        if node.proxy.is_some() {
            command.args(["--listen-grpc", &node.listen]);
        }
        command
    }

    /// Starts one node that does not run.
    pub fn start_node(&self, slot: usize) {
        let mut process = self.node(slot).process.lock().expect("no panic under the lock");
        assert!(process.is_none(), "node {slot} runs already");
        let name = format!("node {slot}");
        *process = Some(ManagedProcess::start(
            &name,
            self.command(slot),
            &self.node(slot).log,
        ));
    }

    /// Starts every node.
    pub fn start_all(&self) {
        self.slots().for_each(|slot| self.start_node(slot));
    }

    /// kill -9.
    pub fn kill(&self, slot: usize) {
        let process = self
            .node(slot)
            .process
            .lock()
            .expect("no panic under the lock")
            .take();
        process
            .unwrap_or_else(|| panic!("node {slot} does not run"))
            .kill();
    }

    /// kill -9 of every node that runs: first all are signalled, then all are waited for.
    pub fn kill_all(&self) {
        for slot in self.running() {
            self.signal(slot, Signal::SIGKILL);
        }
        for slot in self.running() {
            self.kill(slot);
        }
    }

    /// kill -9, then starts it again.
    pub fn restart(&self, slot: usize) {
        self.kill(slot);
        self.start_node(slot);
    }

    /// SIGTERM, and waits for the end.
    pub fn terminate(&self, slot: usize) -> ExitStatus {
        self.signal(slot, Signal::SIGTERM);
        self.wait_ended(slot, Duration::from_secs(20))
    }

    /// Waits until one node ends by itself.
    #[track_caller]
    pub fn wait_ended(&self, slot: usize, limit: Duration) -> ExitStatus {
        let mut process = self.node(slot).process.lock().expect("no panic under the lock");
        let ended = process
            .as_mut()
            .unwrap_or_else(|| panic!("node {slot} does not run"))
            .wait(limit);
        let status = ended.unwrap_or_else(|| panic!("node {slot} did not end within {limit:?}"));
        *process = None;
        status
    }

    /// How one node ended by itself, if it has.
    pub fn ended(&self, slot: usize) -> Option<ExitStatus> {
        let mut process = self.node(slot).process.lock().expect("no panic under the lock");
        process.as_mut().and_then(ManagedProcess::ended)
    }

    /// Sends a signal to one node.
    pub fn signal(&self, slot: usize, signal: Signal) {
        let process = self.node(slot).process.lock().expect("no panic under the lock");
        process
            .as_ref()
            .unwrap_or_else(|| panic!("node {slot} does not run"))
            .signal(signal);
    }

    /// The slots of the nodes that were started and not killed.
    pub fn running(&self) -> Vec<usize> {
        let runs = |node: &&Node| node.process.lock().expect("no panic under the lock").is_some();
        self.nodes.iter().filter(runs).map(|node| node.slot).collect()
    }

    /// The process id of one node.
    pub fn process_id(&self, slot: usize) -> i32 {
        let process = self.node(slot).process.lock().expect("no panic under the lock");
        process
            .as_ref()
            .unwrap_or_else(|| panic!("node {slot} does not run"))
            .id()
    }

    /// `GET /status` of one node.
    pub fn status(&self, slot: usize) -> Result<Status, String> {
        let reply = self.http(slot).try_get("/status")?;
        serde_json::from_slice(&reply.body)
            .map_err(|e| format!("/status of node {slot}: {e} in: {}", reply.text()))
    }

    /// `GET /recovery/status` of one node.
    pub fn recovery_status(&self, slot: usize) -> Result<RecoveryStatus, String> {
        let reply = self.http(slot).try_get("/recovery/status")?;
        serde_json::from_slice(&reply.body)
            .map_err(|e| format!("/recovery/status of node {slot}: {e} in: {}", reply.text()))
    }

    /// `GET /membership`, asked of one node.
    pub fn membership(&self, slot: usize) -> Result<Vec<MemberView>, String> {
        #[derive(Deserialize)]
        struct Membership {
            members: Vec<MemberView>,
        }
        let reply = self.http(slot).try_get("/membership")?;
        let membership: Membership = serde_json::from_slice(&reply.body)
            .map_err(|e| format!("/membership of node {slot}: {e} in: {}", reply.text()))?;
        Ok(membership.members)
    }

    /// Waits until the leader says that exactly these slots vote, each once, and that nobody else belongs to it.
    #[track_caller]
    pub fn wait_voters(&self, slots: &[usize], limit: Duration) {
        let start = std::time::Instant::now();
        loop {
            let members = self.membership(self.leader());
            let voters = members.as_ref().map(|members| {
                let of = |member: &MemberView| (member.slot, member.voter);
                members.iter().map(of).collect::<Vec<_>>()
            });
            let wanted: Vec<(usize, bool)> = slots.iter().map(|slot| (*slot, true)).collect();
            if voters.as_ref() == Ok(&wanted) {
                return;
            }
            assert!(
                start.elapsed() < limit,
                "not {slots:?} after {limit:?}: {members:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The slot of the running node that leads and can commit; waits for one.
    #[track_caller]
    pub fn leader(&self) -> usize {
        let mut last = String::new();
        let start = std::time::Instant::now();
        loop {
            for slot in self.running() {
                match self.status(slot) {
                    Ok(status) if status.role == "leader" && status.writable => return slot,
                    Ok(status) => last = format!("{status:?}"),
                    Err(error) => last = error,
                }
            }
            assert!(
                start.elapsed() < READY_LIMIT,
                "no leader within {READY_LIMIT:?}; last seen: {last}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The slots of the running nodes that do not lead.
    pub fn followers(&self) -> Vec<usize> {
        let leader = self.leader();
        self.running()
            .into_iter()
            .filter(|slot| *slot != leader)
            .collect()
    }

    /// Waits until there is a leader that can commit and every running node answers and follows it.
    #[track_caller]
    pub fn wait_ready(&self) {
        let leader = self.leader();
        for slot in self.running() {
            wait_for(&format!("node {slot} follows node {leader}"), READY_LIMIT, || {
                self.status(slot).is_ok_and(|status| status.leader.is_some())
            });
        }
    }

    /// Waits until the running nodes have applied all that is committed and hold every chunk that it names.
    #[track_caller]
    pub fn wait_at_rest(&self) {
        let leader = self.leader();
        let goal = self.status(leader).expect("the leader answers").committed_index;
        for slot in self.running() {
            let start = std::time::Instant::now();
            while let Err(why) = self.is_whole(slot, goal) {
                assert!(
                    start.elapsed() < REST_LIMIT,
                    "node {slot} is not whole after {REST_LIMIT:?}: {why}"
                );
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn is_whole(&self, slot: usize, goal: Option<u64>) -> Result<(), String> {
        let (status, recovery) = (self.status(slot)?, self.recovery_status(slot)?);
        let as_it_should = recovery.missing_chunks == 0 && recovery.surplus_chunks == 0;
        match status.applied_index >= goal && as_it_should {
            true => Ok(()),
            false => Err(format!(
                "applied {:?} of {goal:?}, {recovery:?}",
                status.applied_index
            )),
        }
    }

    /// Waits until a node's log says `text` (in whatever case).
    #[track_caller]
    pub fn wait_log(&self, slot: usize, texts: &[&str], limit: Duration) -> String {
        wait_until(
            &format!("the log of node {slot} says one of {texts:?}"),
            limit,
            || {
                let log = self.log(slot);
                let said = |line: &&str| {
                    texts
                        .iter()
                        .any(|text| line.to_lowercase().contains(&text.to_lowercase()))
                };
                log.lines()
                    .filter(|line| !line.starts_with("--- test:"))
                    .find(said)
                    .map(ToString::to_string)
            },
        )
    }

    /// Mounts the cluster in a fresh folder.
    #[track_caller]
    pub fn mount(&self) -> Mount {
        self.mount_with(MountOptions::default())
    }

    /// Mounts the cluster as told.
    #[track_caller]
    pub fn mount_with(&self, options: MountOptions) -> Mount {
        Mount::start(self.sandbox, &self.members(), options)
    }
}

fn log_level() -> String {
    std::env::var("QUORUMFS_TEST_LOG").unwrap_or_else(|_| "info,openraft=warn".to_string())
}
