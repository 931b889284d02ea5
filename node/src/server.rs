//! Builds the parts of a node, joins them, and serves given listeners until told to stop.
//!
//! The edges are up before the node knows its cluster: they answer `Hello`, `Discover` and `/status` from the first
//! moment, and refuse the rest with the reason. Once the cluster is found, the disk's state is opened, the consensus
//! begins, and [`Node::parts`] is there.

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
use self::own_client::{close_session, open_client};
use self::stores::{consensus_options, has_others, is_damaged_metadata, open_stores};
use crate::api::grpc::filesystem::FileSystemService;
use crate::api::grpc::peer::PeerService;
use crate::api::http::connections::{self, Limits};
use crate::api::http::files::{self, ClientHandle, RestState};
use crate::api::http::metrics::counted;
use crate::api::http::{admin, status};
use crate::config::Config;
use crate::consensus::{AppliedEffects, Consensus, ConsensusError, FatalError};
use crate::incoming::{incoming, only_from_nodes};
use crate::integrity::audit::Auditor;
use crate::integrity::repair::{Repair, RepairOptions, RepairParts};
use crate::integrity::sweep::Sweeper;
use crate::leader::leases::Leases;
use crate::leader::read::Reader;
use crate::leader::rewrite::Rewriter;
use crate::leader::sessions::SessionKeeper;
use crate::leader::write::Writer;
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
use crate::tasks::Tasks;
use crate::transport::{TlsFiles, Transport};
use quorumfs_content::Stopped;
use quorumfs_metadata::Position;

/// Flow-control windows of the service: with the defaults, 1 MiB messages reach half the throughput (measured). A
/// client's stream of chunks may fill its window whatever else this process carries, so it is no larger than it must.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Batches of applied entries that wait for recovery and sweeper; what does not fit they find in their passes.
const EFFECTS_QUEUED_MAX: usize = 4096;
/// How long open requests may take to end after a shutdown was asked for.
const DRAIN_TIMEOUT_MS: u64 = 2_000;

/// How often a node that has no log yet looks whether it has one.
const TOOK_PART_INTERVAL_MS: u64 = 250;

/// The parts of the data folder that go together: either has promises in it that the other completes.
pub const LOG_FOLDER: &str = "wal";
/// See [`LOG_FOLDER`].
pub const METADATA_FILE: &str = "metadata.redb";

/// The node cannot go on as it is, but can begin again: in the same process, so that whoever watches over it need not.
#[derive(Debug, thiserror::Error)]
pub enum StartAgain {
    /// What it had promised to remember is lost, or its metadata is not what it should be. What is left was set aside and it has
    /// a new incarnation: it asks its cluster to take it in, with the content that it kept.
    #[error(transparent)]
    AsNew(#[from] Renounced),
    /// It could not be made anew after all (others failed at the same time), or it need not be: its disk is in order.
    #[error("{0}; the node starts again as it was")]
    AsItWas(String),
    /// Content was taken away under it. It is who it was, and fetches what it lacks.
    #[error("{0}; the node starts again with what is left")]
    WithLessContent(Stopped),
}

/// Runs a node on these listeners until `shutdown` is done, or until it must stop because its disk failed.
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
        .context("read TLS files")?;
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
        result = grpc_server => Err(anyhow::anyhow!("the gRPC service ended: {result:?}")),
        result = http_server => Err(anyhow::anyhow!("the HTTP service ended: {result:?}")),
    };
    // While this node still serves: it may be the leader that is to hear of it.
    close_session(&config.data, &closing).await;
    let _ = stop.send(true);
    if let Some((_, consensus)) = node.consensus() {
        let drained = consensus.shutdown();
        let _ = tokio::time::timeout(Duration::from_millis(DRAIN_TIMEOUT_MS), drained).await;
    }
    result
}

/// What ended the node, once it may start again where that is what it asks for: before it gives anything up it makes sure
/// that others have it.
async fn may_start_again(
    config: &Config,
    node: &Node,
    transport: &Transport,
    error: anyhow::Error,
) -> anyhow::Error {
    let Some(StartAgain::AsNew(why)) = error.downcast_ref() else {
        return error;
    };
    // Who has bound no cluster has promised nothing.
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

/// Finds the cluster, opens the state, joins the parts; returns only when the node must stop.
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
        Err(error) => return Err(error).context("start consensus"),
    };
    // Who was taken in later has no founders to make a cluster with.
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
    let roster = MembershipChanges::new(
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
    let sessions = SessionKeeper::new(consensus.clone(), metadata.clone(), stamps.clone());
    let contradicted = node.clone();
    let auditor = Auditor::new(
        consensus.clone(),
        metadata.clone(),
        transport.clone(),
        stamps.clone(),
        Duration::from_secs(config.audit_interval_s),
        move |index| {
            if let Err(failed) = contradicted.folder().note_contradicted(index) {
                warn!(%failed, "cannot note that a majority has other metadata");
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
    let writer = Writer::new(
        consensus.clone(),
        content.clone(),
        peers.clone(),
        placement.clone(),
        space.clone(),
        stamps,
        node.metrics().clone(),
    );
    let reader = Arc::new(Reader {
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
        writer.clone(),
        reader.clone(),
        sessions.clone(),
    );
    tasks.supervise("rewriting", rewriter.clone(), Rewriter::run);
    tasks.supervise("placement", placement.clone(), Placement::run);
    tasks.supervise("space", space.clone(), SpaceMonitor::run);
    tasks.supervise_until_done("clock", clock, ClockMonitor::run);
    sessions.start(tasks);
    roster.start(tasks);
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
    let session = (config.clone(), client_tls, client, tasks.clone());
    tasks.supervise_until_done("own-session", session, |(config, client_tls, client, tasks)| {
        open_client(config, client_tls, client, tasks)
    });
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
        writer,
        rewriter,
        reader,
        recovery,
        repair,
        auditor,
        sweeper,
        placement,
        space,
        leases: Leases::default(),
        roster,
        sessions,
        health,
    };
    node.begin(parts);
    info!("node takes part in its cluster");
    // A failed flush is never retried: what the disk holds is not known any more.
    let reason = tokio::select! {
        reason = consensus_fault.fatal() => {
            if reason.costs_state() && has_others(config) {
                return Err(StartAgain::AsNew(lost_state(&reason)).into());
            }
            if reason.is_over_after_start() {
                return Err(StartAgain::AsItWas(reason.to_string()).into());
            }
            reason.to_string()
        }
        stopped = content_fault.fatal() => stopped.to_string(),
        index = audited.contradicted() => return Err(StartAgain::AsNew(Renounced::State { index }).into()),
    };
    // Where content cannot be flushed, the consensus stops too, and may be heard first.
    if let Some(stopped) = content_fault.fatal().now_or_never()
        && stopped.files_gone
    {
        return Err(StartAgain::WithLessContent(stopped).into());
    }
    anyhow::bail!("the node stops because its disk failed: {reason}")
}

fn lost_state(fatal: &FatalError) -> Renounced {
    Renounced::Metadata {
        reason: fatal.to_string(),
        entry: fatal.entry,
    }
}

/// Founds the cluster, if this node's log is empty still. Every founder does: with the same members it is the same act.
async fn bootstrap(consensus: &Consensus, founders: Vec<Member>) -> anyhow::Result<()> {
    if !consensus.is_empty() {
        return Ok(());
    }
    match consensus.initialize(founders).await {
        // Another founder was quicker, and its first entries are here.
        Ok(()) | Err(ConsensusError::Initialize(_)) => Ok(()),
        Err(error) => Err(error).context("make the cluster"),
    }
}

/// Once there is a log, the folder says so: found without it later, the node knows that it has forgotten its promises.
async fn note_took_part(node: Arc<Node>, consensus: Consensus) {
    while !node.folder().took_part() {
        if !consensus.is_empty() {
            let folder = node.clone();
            let noted = tokio::task::spawn_blocking(move || folder.folder().note_took_part()).await;
            if let Ok(Err(failed)) = noted {
                warn!(%failed, "cannot note that this node has a log");
            }
        }
        tokio::time::sleep(Duration::from_millis(TOOK_PART_INTERVAL_MS)).await;
    }
}

/// What applies changed about content goes to who looks after it.
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
        recovery.applied(&effects);
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
            std::fs::read(&files.certificate).context("read --tls-cert")?,
            std::fs::read(&files.key).context("read --tls-key")?,
        );
        let authority = Certificate::from_pem(std::fs::read(&files.authority).context("read --tls-ca")?);
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
        // Numbers, names and lists: nothing that JSON could not say.
        status: Arc::new(move || serde_json::json!(status::status(&for_status))),
        admin: admin::router(node.clone(), config.secret.clone()).layer(axum::Extension(client)),
        request_timeout: Duration::from_millis(config.request_timeout_ms),
        patience: limits.patience,
    };
    let stop = async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    connections::serve(listener, counted(files::router(state), &node), limits, stop).await;
    Ok(())
}

#[cfg(test)]
mod tests;
