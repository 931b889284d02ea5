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

/// The exit code for invalid settings, the same as clap's for unknown flags.
const EXIT_USAGE: u8 = 2;

/// The first argument that selects the recovery by hand instead of running a node.
const RECOVER: &str = "recover";

/// Most time for background tasks to end after the important ones have ended.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// A command makes some hundred small allocations, often freed on another thread: a `mkdir` costs the three nodes 6 % less
/// processor time than with glibc's allocator (jemalloc 3 %), and what is in use after 600 MiB of writes is the same.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
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
    quorumfs_tasks::log_panics();
    raise_open_files_limit();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(again) if again.is::<StartAgain>() => {
            error!("{again:#}");
            // Restarts in the same process, so that no service manager is needed; everything that was open is closed.
            let mut command = std::process::Command::new("/proc/self/exe");
            let failed = command.args(std::env::args_os().skip(1)).exec();
            error!(%failed, "cannot start again");
            ExitCode::FAILURE
        }
        Err(failed) => {
            // The log goes to standard error too: once is enough.
            match tracing::enabled!(tracing::Level::ERROR) {
                true => error!("{failed:#}"),
                false => eprintln!("quorumfs-node: {failed:#}"),
            }
            ExitCode::FAILURE
        }
    }
}

fn usage(error: &ConfigError) -> ExitCode {
    eprintln!("quorumfs-node: {error}");
    ExitCode::from(EXIT_USAGE)
}

/// Runs `quorumfs-node recover`: see [`RecoverSettings`].
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
    let done = runtime.context("cannot start the runtime").and_then(|runtime| {
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

fn run(config: Config) -> anyhow::Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // A call is a chain of short tasks; moving it from one thread to another costs a context switch. Half the cores
    // leave enough for the other work (the log, the content store, other programs). tokio's own TOKIO_WORKER_THREADS
    // overrides this.
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        runtime.worker_threads((cores / 2).max(1));
    }
    let runtime = runtime.enable_all().build().context("cannot start the runtime")?;
    let ended = runtime.block_on(run_until_told(config));
    // Blocking work (a walk over all content, a log that waits for space) is not awaited: it leaves the same state as a
    // crash.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    ended
}

/// Raises the soft limit of open files. It is 1024 for the sake of select(2), which is not used here; there can be more
/// connections, log files and segments (getrlimit(2)).
fn raise_open_files_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        warn!(%errno, "cannot raise the limit of open files");
    }
}

async fn run_until_told(config: Config) -> anyhow::Result<()> {
    let grpc = bind(config.listen_grpc, "gRPC").await?;
    let http = bind(config.listen_http, "HTTP").await?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
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
        .with_context(|| format!("cannot listen for {what} on {address}"))
}
