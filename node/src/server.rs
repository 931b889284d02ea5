//! Builds the parts of a node, connects them, and serves the given listeners until it is told to stop.
//!
//! The edges start before the node knows its cluster: they answer `Hello`, `Discover` and `/status` at once, and refuse
//! other requests with the reason. Once the cluster is found, the stores are opened, the consensus starts, and
//! [`Node::parts`] is set.

mod log_only;
mod own_client;
mod stores;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;
use quorumfs_proto::limits::MESSAGE_BYTES_MAX;
use quorumfs_proto::{Addresses, Member};
use quorumfs_wire::file_system_server::FileSystemServer;
use quorumfs_wire::peer_server::PeerServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tracing::{info, warn};

use self::log_only::LogOnly;
use self::own_client::{close_session, start_client};
use self::stores::{consensus_options, has_others, is_damaged_metadata, open_stores};
use crate::api::grpc::filesystem::FileSystemService;
use crate::api::grpc::peer::PeerService;
use crate::api::http::connections::{self, Limits};
use crate::api::http::files::{self, ClientHandle, RestState};
use crate::api::http::metrics::with_request_metrics;
use crate::api::http::{admin, status};
use crate::config::Config;
use crate::consensus::{AppliedEffects, Consensus, ConsensusError, FatalError};
use crate::incoming::{incoming, only_from_nodes};
use crate::integrity::audit::Auditor;
use crate::integrity::repair::{Repair, RepairOptions, RepairParts};
use crate::integrity::sweep::Sweeper;
use crate::leader::leases::Leases;
use crate::leader::read::ReadPath;
use crate::leader::rewrite::Rewriter;
use crate::leader::sessions::SessionTracker;
use crate::leader::write::WritePath;
use crate::membership::bootstrap::{find_membership, watch_for_strangers};
use crate::membership::changes::MembershipChanges;
use crate::membership::features;
use crate::membership::identity::DataFolder;
use crate::membership::renounce::{Leave, Renounced, Renouncing};
use crate::node::{Node, Parts};
use crate::observe::clock::{ClockMonitor, StampClock};
use crate::observe::health::HealthMonitor;
use crate::replication::PeerChunks;
use crate::replication::placement::Placement;
use crate::replication::recovery::Recovery;
use crate::replication::space::SpaceMonitor;
use crate::transport::{TlsFiles, Transport};
use quorumfs_content::Stopped;
use quorumfs_metadata::Position;
use quorumfs_tasks::Tasks;

/// Flow-control windows of the service: with the defaults, 1 MiB messages reach half the throughput (measured). A
/// client's stream of chunks may fill its window independently of other load, so it is no larger than necessary.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Most batches of applied entries that wait for recovery and sweeper; those that do not fit are found by their passes.
const EFFECTS_QUEUED_MAX: usize = 4096;
/// Most time for open requests to end after a shutdown was requested.
const DRAIN_TIMEOUT_MS: u64 = 2_000;

/// Interval at which a node without a log checks whether it has one.
const TOOK_PART_INTERVAL_MS: u64 = 250;

/// The parts of the data folder that belong together: each has promises that the other completes.
pub const LOG_FOLDER: &str = "wal";
/// The database of the metadata; see [`LOG_FOLDER`].
pub const METADATA_FILE: &str = "metadata.redb";

/// The node cannot continue, but can start again in the same process, without a service manager.
#[derive(Debug, thiserror::Error)]
pub enum StartAgain {
    /// Its promises are lost, or its metadata is wrong. Its files were set aside and it has a new incarnation, with
    /// which it asks the cluster to accept it, with the content that it kept.
    #[error(transparent)]
    AsNew(#[from] Renounced),
    /// It could not be rebuilt after all (other nodes failed at the same time), or need not be: its disk is intact.
    #[error("{0}; the node starts again unchanged")]
    AsItWas(String),
    /// Content was removed from under it. It keeps its identity, and fetches what it lacks.
    #[error("{0}; the node starts again with the content that is left")]
    WithLessContent(Stopped),
}

/// Runs a node on these listeners until `shutdown` completes, or until the node must stop.
///
/// # Errors
/// The reason why the node must stop; [`StartAgain`] if it should start again.
pub async fn serve(
    config: Config,
    grpc: TcpListener,
    http: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    serve_with(config, grpc, http, Arc::default(), shutdown).await
}

async fn serve_with(
    config: Config,
    grpc: TcpListener,
    http: TcpListener,
    tasks: Arc<Tasks>,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let folder = DataFolder::open(&config.data, config.slot)?;
    let addresses = Addresses {
        grpc: config.grpc.clone(),
        http: config.http.clone(),
    };
    let own = Member {
        id: folder.id(),
        addresses,
    };
    info!(slot = own.id.slot, incarnation = %own.id, data = %config.data.display(), "node starts");
    let client_tls = config
        .tls
        .as_ref()
        .map(TlsFiles::client_config)
        .transpose()
        .context("cannot read the TLS files")?;
    let transport = Arc::new(Transport::new(client_tls.clone()));
    let node = Arc::new(Node::new(own, folder, tasks));

    let summary_interval = Duration::from_secs(config.metrics_summary_s);
    node.tasks()
        .supervise("metrics-summary", node.metrics().clone(), move |metrics| {
            metrics.run(summary_interval)
        });
    let (stop, stopped) = watch::channel(false);
    let (client, closing) = watch::channel(ClientHandle::Connecting {
        reason: "the node is starting".to_string(),
    });
    let grpc_server = tokio::spawn(serve_grpc(config.clone(), node.clone(), grpc, stopped.clone()));
    let http_server = tokio::spawn(serve_http(
        config.clone(),
        node.clone(),
        http,
        closing.clone(),
        stopped,
    ));

    tokio::pin!(shutdown);
    let run = async {
        match run_parts(&config, &node, &transport, client_tls, client).await {
            Err(error) => Err(may_start_again(&config, &node, &transport, error).await),
            ended => ended,
        }
    };
    let result = tokio::select! {
        () = &mut shutdown => {
            info!("stopping");
            Ok(())
        }
        result = run => match result {
            Err(error) => {
                if let Some(StartAgain::AsNew(_)) = error.downcast_ref() {
                    node.folder().renounce(&[LOG_FOLDER, METADATA_FILE])?;
                }
                Err(error)
            }
            ended => ended,
        },
        result = grpc_server => Err(service_ended("gRPC", result)),
        result = http_server => Err(service_ended("HTTP", result)),
    };
    // Closed while this node still serves: it may be the leader that must be told.
    close_session(&config.data, &closing).await;
    let _ = stop.send(true);
    if let Some((_, consensus)) = node.consensus() {
        let drained = consensus.shutdown();
        let _ = tokio::time::timeout(Duration::from_millis(DRAIN_TIMEOUT_MS), drained).await;
    }
    result
}

/// Describes why a service ended although the node was not told to stop.
fn service_ended(name: &str, result: Result<anyhow::Result<()>, tokio::task::JoinError>) -> anyhow::Error {
    match result.map_err(anyhow::Error::from).flatten() {
        Ok(()) => anyhow::anyhow!("the {name} service ended without an error"),
        Err(error) => error.context(format!("the {name} service ended")),
    }
}

/// Decides how the node may start again after `error`: before it gives up its state, it makes sure that other nodes
/// have it.
async fn may_start_again(
    config: &Config,
    node: &Node,
    transport: &Transport,
    error: anyhow::Error,
) -> anyhow::Error {
    let Some(StartAgain::AsNew(why)) = error.downcast_ref() else {
        return error;
    };
    // A node without a cluster has promised nothing.
    let Some(membership) = node.membership() else {
        return error;
    };
    let renouncing = Renouncing {
        config,
        own: node.own(),
        cluster: membership.cluster,
        transport,
        consensus: node.consensus().map(|(_, consensus)| consensus.clone()),
        why,
    };
    match renouncing.wait(|waits| node.set_trouble(waits)).await {
        Leave::Granted => error,
        Leave::Withdrawn(reason) => StartAgain::AsItWas(reason).into(),
    }
}

/// Finds the cluster, opens the stores, connects the parts; returns only when the node must stop.
async fn run_parts(
    config: &Config,
    node: &Arc<Node>,
    transport: &Arc<Transport>,
    client_tls: Option<tonic::transport::ClientTlsConfig>,
    client: watch::Sender<ClientHandle>,
) -> anyhow::Result<()> {
    let membership = find_membership(
        config,
        node.folder(),
        node.own(),
        transport,
        node.waiting_for(),
        node.invitation(),
    )
    .await?;
    transport.set_cluster(membership.cluster);

    let (metadata, content) = open_stores(config).await?;
    let options = consensus_options(config, node, membership.cluster, &content)?;
    let log_only = LogOnly {
        node,
        transport,
        content: &content,
        options: options.clone(),
    };
    let metadata = match metadata {
        Err(error) if is_damaged_metadata(&error) && has_others(config) => {
            let why = Renounced::Metadata {
                reason: format!("{error:#}"),
                entry: None,
            };
            return Err(log_only.begin(why, Position::default()).await.into());
        }
        metadata => metadata?,
    };
    if let Some(index) = node.folder().contradicted_at() {
        let why = Renounced::State { index };
        return Err(log_only.begin(why, metadata.durable_position()).await.into());
    }

    let (effects, applied) = tokio::sync::mpsc::channel(EFFECTS_QUEUED_MAX);
    let consensus = Consensus::start(
        options,
        metadata.clone(),
        content.clone(),
        transport.clone(),
        effects,
    )
    .await;
    let consensus = match consensus {
        Ok(consensus) => consensus,
        Err(ConsensusError::Metadata(fatal)) if has_others(config) => {
            let known = metadata.durable_position();
            return Err(log_only.begin(lost_state(&fatal), known).await.into());
        }
        Err(error) if error.costs_incarnation() && has_others(config) => {
            return Err(StartAgain::AsNew(Renounced::Log(error)).into());
        }
        Err(error) => return Err(error).context("cannot start the consensus"),
    };
    // A node that was accepted later has no founders with which to create a cluster.
    if membership
        .founders
        .iter()
        .any(|founder| founder.id == node.own().id)
    {
        bootstrap(&consensus, membership.founders.clone()).await?;
    }

    let logged = (node.clone(), consensus.clone());
    let tasks = node.tasks();
    tasks.supervise_until_done("took-part", logged, |(node, consensus)| {
        note_took_part(node, consensus)
    });
    let peers = Arc::new(PeerChunks::new(transport.clone()));
    let placement = Placement::new(consensus.clone(), metadata.clone());
    let space = SpaceMonitor::new(
        consensus.clone(),
        content.clone(),
        placement.clone(),
        transport.clone(),
    );
    let recovery = Recovery::new(
        consensus.clone(),
        metadata.clone(),
        content.clone(),
        peers.clone(),
        placement.clone(),
        config.recovery_bytes_per_s,
    );
    let repair = Repair::new(
        RepairParts {
            consensus: consensus.clone(),
            metadata: metadata.clone(),
            content: content.clone(),
            peers: peers.clone(),
            placement: placement.clone(),
            recovery: recovery.clone(),
            transport: transport.clone(),
        },
        RepairOptions {
            bytes_per_s: config.scrub_bytes_per_s,
            interval: Duration::from_secs(config.scrub_interval_s),
            cursor_file: config.data.join("scrub"),
        },
    );
    let sweeper = Sweeper::new(
        consensus.clone(),
        metadata.clone(),
        content.clone(),
        repair.clone(),
        Duration::from_secs(config.sweep_interval_s),
    );
    let membership_changes = MembershipChanges::new(
        consensus.clone(),
        metadata.clone(),
        placement.clone(),
        transport.clone(),
    );
    let stamped = metadata.clone();
    let stamps = Arc::new(StampClock::new(move || stamped.last_stamp()));
    let clock = ClockMonitor::new(config.ntp.clone(), Duration::from_millis(config.ntp_interval_ms));
    let health = HealthMonitor::new(
        Duration::from_millis(config.probe_interval_ms),
        consensus.clone(),
        transport.clone(),
        clock.clone(),
        stamps.clone(),
    );
    let sessions = SessionTracker::new(consensus.clone(), metadata.clone(), stamps.clone());
    let contradicted = node.clone();
    let auditor = Auditor::new(
        consensus.clone(),
        metadata.clone(),
        transport.clone(),
        stamps.clone(),
        Duration::from_secs(config.audit_interval_s),
        move |index| {
            if let Err(failed) = contradicted.folder().note_contradicted(index) {
                warn!(%failed, "cannot record that a majority has other metadata");
            }
        },
    );
    let known = (
        consensus.clone(),
        metadata.clone(),
        transport.clone(),
        stamps.clone(),
    );
    tasks.supervise(
        "feature-level",
        known,
        |(consensus, metadata, transport, stamps)| features::run(consensus, metadata, transport, stamps),
    );
    let write_path = WritePath::new(
        consensus.clone(),
        content.clone(),
        peers.clone(),
        placement.clone(),
        space.clone(),
        stamps,
        node.metrics().clone(),
    );
    let read_path = Arc::new(ReadPath {
        consensus: consensus.clone(),
        metadata: metadata.clone(),
        content: content.clone(),
        peers,
        placement: placement.clone(),
        recovery: recovery.clone(),
        repair: repair.clone(),
        space: space.clone(),
    });
    let rewriter = Rewriter::new(
        consensus.clone(),
        metadata.clone(),
        write_path.clone(),
        read_path.clone(),
        sessions.clone(),
    );
    tasks.supervise("rewriting", rewriter.clone(), Rewriter::run);
    tasks.supervise("placement", placement.clone(), Placement::run);
    tasks.supervise("space", space.clone(), SpaceMonitor::run);
    tasks.supervise_until_done("clock", clock, ClockMonitor::run);
    sessions.start(tasks);
    membership_changes.start(tasks);
    health.start(tasks);
    recovery.start(tasks);
    repair.start(tasks);
    auditor.start(tasks);
    sweeper.start(tasks);
    let applied = Arc::new(tokio::sync::Mutex::new(applied));
    let told = (applied, recovery.clone(), sweeper.clone());
    tasks.supervise("applied-effects", told, |(applied, recovery, sweeper)| {
        hand_on_effects(applied, recovery, sweeper)
    });
    start_client(tasks, config.clone(), client_tls, client);
    let cluster = membership.cluster;
    let watched = (config.clone(), node.clone(), transport.clone());
    tasks.supervise("strangers", watched, move |(config, node, transport)| {
        let (own, waiting_for) = (node.own().clone(), node.waiting_for().clone());
        watch_for_strangers(config, own, cluster, transport, waiting_for)
    });

    let (consensus_fault, content_fault, audited) = (consensus.clone(), content.clone(), auditor.clone());
    let parts = Parts {
        cluster: membership.cluster,
        consensus,
        metadata,
        content,
        write_path,
        rewriter,
        read_path,
        recovery,
        repair,
        auditor,
        sweeper,
        placement,
        space,
        leases: Leases::default(),
        membership_changes,
        sessions,
        health,
    };
    node.begin(parts);
    info!("the node takes part in its cluster");
    // A failed flush is never retried: the content of the disk is unknown.
    let (reason, storage_failed) = tokio::select! {
        reason = consensus_fault.fatal() => {
            if reason.costs_state() && has_others(config) {
                return Err(StartAgain::AsNew(lost_state(&reason)).into());
            }
            if reason.is_over_after_start() {
                return Err(StartAgain::AsItWas(reason.to_string()).into());
            }
            (reason.to_string(), reason.is_storage_failure())
        }
        stopped = content_fault.fatal() => (stopped.to_string(), true),
        index = audited.contradicted() => return Err(StartAgain::AsNew(Renounced::State { index }).into()),
    };
    // If content cannot be flushed, the consensus stops too, and its signal may arrive first.
    if let Some(stopped) = content_fault.fatal().now_or_never()
        && stopped.files_gone
    {
        return Err(StartAgain::WithLessContent(stopped).into());
    }
    let advice = match storage_failed {
        true => "its storage failed: check the disk of its data folder, then start it again",
        false => "start it again; if this recurs, it is a defect of the program",
    };
    anyhow::bail!("the node stops: {reason}; {advice}")
}

fn lost_state(fatal: &FatalError) -> Renounced {
    Renounced::Metadata {
        reason: fatal.to_string(),
        entry: fatal.entry,
    }
}

/// Creates the cluster if this node's log is still empty. Every founder does so; with the same members the result is
/// the same.
async fn bootstrap(consensus: &Consensus, founders: Vec<Member>) -> anyhow::Result<()> {
    if !consensus.is_empty() {
        return Ok(());
    }
    match consensus.initialize(founders).await {
        // Another founder was faster, and its first entries are here.
        Ok(()) | Err(ConsensusError::Initialize(_)) => Ok(()),
        Err(error) => Err(error).context("cannot create the cluster"),
    }
}

/// Records in the folder that there is a log: if it is missing later, the node knows that it has lost its promises.
async fn note_took_part(node: Arc<Node>, consensus: Consensus) {
    while !node.folder().took_part() {
        if !consensus.is_empty() {
            let folder = node.clone();
            let noted = tokio::task::spawn_blocking(move || folder.folder().note_took_part()).await;
            if let Ok(Err(failed)) = noted {
                warn!(%failed, "cannot record that this node has a log");
            }
        }
        tokio::time::sleep(Duration::from_millis(TOOK_PART_INTERVAL_MS)).await;
    }
}

/// Passes the effects of applied entries on content to recovery and sweeper.
async fn hand_on_effects(
    applied: Arc<tokio::sync::Mutex<tokio::sync::mpsc::Receiver<AppliedEffects>>>,
    recovery: Arc<Recovery>,
    sweeper: Arc<Sweeper>,
) {
    let mut applied = applied.lock().await;
    while let Some(effects) = applied.recv().await {
        if let AppliedEffects::Entries { dead, .. } = &effects {
            sweeper.dead(dead);
        }
        recovery.on_applied(&effects);
    }
}

async fn serve_grpc(
    config: Config,
    node: Arc<Node>,
    listener: TcpListener,
    mut stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut server = Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(256 << 10)
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)));
    if let Some(files) = &config.tls {
        let identity = Identity::from_pem(
            std::fs::read(&files.certificate).context("cannot read the file of --tls-cert")?,
            std::fs::read(&files.key).context("cannot read the file of --tls-key")?,
        );
        let authority = Certificate::from_pem(
            std::fs::read(&files.authority).context("cannot read the file of --tls-ca")?,
        );
        server = server.tls_config(
            ServerTlsConfig::new()
                .identity(identity)
                .client_ca_root(authority),
        )?;
    }
    let filesystem = FileSystemServer::new(FileSystemService::new(node.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let peer = PeerServer::new(PeerService::new(node))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let peer = InterceptedService::new(peer, only_from_nodes);
    let incoming = incoming(listener);
    let stop = async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    server
        .add_service(filesystem)
        .add_service(peer)
        .serve_with_incoming_shutdown(incoming, stop)
        .await?;
    Ok(())
}

async fn serve_http(
    config: Config,
    node: Arc<Node>,
    listener: TcpListener,
    client: watch::Receiver<ClientHandle>,
    mut stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let limits = Limits::default();
    let for_status = node.clone();
    let state = RestState {
        client: client.clone(),
        // Cannot fail: the status has only numbers, names and lists.
        status: Arc::new(move || serde_json::json!(status::status(&for_status))),
        admin: admin::router(node.clone(), config.secret.clone()).layer(axum::Extension(client)),
        request_timeout: Duration::from_millis(config.request_timeout_ms),
        timeouts: limits.timeouts,
    };
    let stop = async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let router = with_request_metrics(files::router(state), &node);
    connections::serve(listener, router, limits, stop).await;
    Ok(())
}

#[cfg(test)]
mod tests;
