//! `quorumfs-node`: arguments, logging, signals.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use quorumfs_node::config::{Config, Settings};
use quorumfs_node::server;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::error;

/// The exit code for settings that cannot be (EX_USAGE of sysexits.h, as clap's own 2 is for unknown flags).
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let config = match Settings::parse().resolve() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("quorumfs-node: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(&config.log))
        .with_writer(std::io::stderr)
        .init();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => {
            error!("{failed:#}");
            eprintln!("quorumfs-node: {failed:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(config: Config) -> anyhow::Result<()> {
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
