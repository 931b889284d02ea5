//! `quorumfs-node`: arguments, logging, signals.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use quorumfs_node::config::{Config, ConfigError, RecoverSettings, Settings};
use quorumfs_node::logging::Limited;
use quorumfs_node::membership::recover::{Consent, recover};
use quorumfs_node::private_files;
use quorumfs_node::server::{self, StartAgain};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, warn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// The exit code for settings that cannot be (EX_USAGE of sysexits.h, as clap's own 2 is for unknown flags).
const EXIT_USAGE: u8 = 2;

/// The first argument that makes this program the last resort instead of a node.
const RECOVER: &str = "recover";

/// How long tasks may take to end, once all that matters has.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// As many arenas as glibc's allocator may have. By itself it has eight for each core, and what one thread frees in its arena
/// serves no other: chunks, which are made on one thread and dropped on another, then lie free many times over (measured: 350
/// MiB where 200 MiB are in use; with two arenas 250 MiB, in less time; jemalloc has 275, mimalloc 290).
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 2;

fn main() -> ExitCode {
    bound_arenas();
    private_files::keep_new_files_private();
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|first| first == RECOVER) {
        arguments.remove(1);
        return recover_by_hand(RecoverSettings::parse_from(arguments));
    }
    let config = match Settings::parse_from(arguments).resolve() {
        Ok(config) => config,
        Err(error) => return usage(&error),
    };
    tracing_subscriber::registry()
        .with(tracing_subscriber::EnvFilter::new(&config.log))
        .with(Limited::default())
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr))
        .init();
    quorumfs_node::tasks::log_panics();
    raise_open_files_limit();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(again) if again.is::<StartAgain>() => {
            error!("{again:#}");
            // In the same process, so that whoever watches over it need not start it again; with everything that was
            // open closed.
            let mut command = std::process::Command::new("/proc/self/exe");
            let failed = command.args(std::env::args_os().skip(1)).exec();
            error!(%failed, "cannot start again");
            ExitCode::FAILURE
        }
        Err(failed) => {
            error!("{failed:#}");
            eprintln!("quorumfs-node: {failed:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage(error: &ConfigError) -> ExitCode {
    eprintln!("quorumfs-node: {error}");
    ExitCode::from(EXIT_USAGE)
}

/// `quorumfs-node recover`: see [`RecoverSettings`].
fn recover_by_hand(settings: RecoverSettings) -> ExitCode {
    let config = match settings.node.resolve() {
        Ok(config) => config,
        Err(error) => return usage(&error),
    };
    let consent = match settings.accept_loss {
        true => Consent::AcceptLoss,
        false => Consent::Look,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.context("start the runtime").and_then(|runtime| {
        runtime.block_on(recover(
            &config,
            server::LOG_FOLDER,
            server::METADATA_FILE,
            consent,
        ))
    });
    match done {
        Ok(report) => {
            print!("{report}");
            ExitCode::SUCCESS
        }
        Err(refused) => {
            eprintln!("quorumfs-node recover: {refused:#}");
            ExitCode::FAILURE
        }
    }
}

/// Keeps memory that is free to few arenas. Called before there are other threads. What is set with `MALLOC_ARENA_MAX` counts
/// no more.
#[cfg(target_env = "gnu")]
fn bound_arenas() {
    // SAFETY: mallopt sets a number of the allocator, under its lock. A refusal leaves what it was.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX) };
}

#[cfg(not(target_env = "gnu"))]
fn bound_arenas() {}

fn run(config: Config) -> anyhow::Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // A call is a chain of short tasks; handed from one thread to another each costs a context switch. Half the cores
    // is what the rest of the work (the log, the content store, the other programs) leaves. tokio's own
    // TOKIO_WORKER_THREADS overrides it.
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        runtime.worker_threads((cores / 2).max(1));
    }
    let runtime = runtime.enable_all().build().context("start the runtime")?;
    let ended = runtime.block_on(run_until_told(config));
    // Work that blocks (a look at all content, a log that waits for room) is not waited for: what it leaves behind is what a
    // crash leaves.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    ended
}

/// The soft limit of open files is 1024 for the sake of select(2), which is not used here; connections, the log and the
/// segments of the content store can be more (getrlimit(2)).
fn raise_open_files_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        warn!(%errno, "the limit of open files stays as it is");
    }
}

async fn run_until_told(config: Config) -> anyhow::Result<()> {
    let grpc = bind(config.listen_grpc, "gRPC").await?;
    let http = bind(config.listen_http, "HTTP").await?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    server::serve(config, grpc, http, shutdown).await
}

async fn bind(address: std::net::SocketAddr, what: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listen for {what} on {address}"))
}
