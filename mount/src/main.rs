//! `quorumfs-mount`, and `mount.quorumfs` as mount(8) calls it.
//!
//! What can be wrong without a cluster is found out in the terminal's own process; then the mount goes into
//! the background, and the command returns when it can be used. Exit codes are mount(8)'s: 0 done, 1 wrong
//! usage or no permission, 32 the mount failed.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use quorumfs_mount::daemon::{self, Readiness, Report, Side};
use quorumfs_mount::mountpoint::{MountPoint, MountPointError};
use quorumfs_mount::options::{Effect, MountRequest, ProcessMode, TlsFiles, Usage, Verbosity};
use quorumfs_mount::serve::{ServeError, serve};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use tracing_subscriber::EnvFilter;

const EXIT_USAGE: u8 = 1;
const EXIT_MOUNT_FAILED: u8 = 32;

/// Where more or less logging can be asked for, in the words of tracing-subscriber's filters.
const LOG_VARIABLE: &str = "QUORUMFS_LOG";

/// The kernel tells of every signal of a program that waits; fuser refuses on another descriptor than the kernel expects
/// it on, and logs that as an error of the reply.
const QUIET: &str = "fuser::reply=off";

/// As many arenas as glibc's allocator may have. By itself it has eight for each core, and what one thread frees in its arena
/// serves no other: chunks, which are made on one thread and dropped on another, then lie free many times over (measured: 350
/// MiB where 200 MiB are in use; with two arenas 250 MiB, in less time; jemalloc has 275, mimalloc 290).
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 2;

fn main() -> ExitCode {
    bound_arenas();
    let request = match MountRequest::from_arguments(std::env::args_os()) {
        Ok(request) => request,
        Err(Usage::Asked(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(Usage::Wrong(text)) => return fail(EXIT_USAGE, &text),
    };
    match run(&request) {
        Ok(exit) => exit,
        Err(error) => fail(exit_code(&error), &format!("{error:#}")),
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

fn fail(code: u8, text: &str) -> ExitCode {
    let program = std::env::args_os().next().unwrap_or_default();
    let program = Path::new(&program)
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    eprintln!("{program}: {text}");
    ExitCode::from(code)
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let mount_point = match error.downcast_ref::<ServeError>() {
        Some(ServeError::MountPoint(error)) => Some(error),
        _ => error.downcast_ref::<MountPointError>(),
    };
    match mount_point {
        Some(MountPointError::NotPermitted(_)) => EXIT_USAGE,
        _ => EXIT_MOUNT_FAILED,
    }
}

fn run(request: &MountRequest) -> anyhow::Result<ExitCode> {
    if let Some(namespace) = &request.namespace {
        enter_mount_namespace(namespace)?;
    }
    let tls = request.tls.as_ref().map(read_tls).transpose()?;
    let log = request.log_file.as_deref().map(open_log).transpose()?;
    let mount_point = MountPoint::find(&request.directory, request.stacking)?;
    if request.effect == Effect::Rehearse {
        return Ok(ExitCode::SUCCESS);
    }
    let (mount_point, cleared) = mount_point.clear(request.stacking)?;
    let mut readiness = match request.place {
        ProcessMode::Foreground => {
            start_logging(request.verbosity, log);
            Readiness::unobserved()
        }
        ProcessMode::Background => match daemon::into_background(log).context("go into the background")? {
            Side::Parent(waiting) => {
                return Ok(match waiting.wait().context("wait for the mount process")? {
                    Report::Ready => ExitCode::SUCCESS,
                    Report::Failed { exit_code, message } => fail(exit_code, &message),
                });
            }
            Side::Child(readiness) => {
                // Standard error is the log file now, if there is one.
                start_logging(request.verbosity, None);
                readiness
            }
        },
    };
    if cleared > 0 {
        tracing::warn!(cleared, directory = %mount_point.path().display(), "unmounted what a dead mount process had left");
    }
    match serve(request, &mount_point, tls, &mut readiness) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            let error = anyhow::Error::from(error);
            readiness.report(&Report::Failed {
                exit_code: exit_code(&error),
                message: format!("{error:#}"),
            });
            Err(error)
        }
    }
}

fn start_logging(verbosity: Verbosity, file: Option<File>) {
    let default = match verbosity {
        Verbosity::Normal => format!("info,{QUIET}"),
        Verbosity::Verbose => format!("info,{QUIET},quorumfs_mount=debug,quorumfs_client=debug"),
    };
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    match file {
        Some(file) => builder.with_ansi(false).with_writer(file).init(),
        None => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_writer(std::io::stderr)
            .init(),
    }
}

fn open_log(path: &Path) -> anyhow::Result<File> {
    File::options()
        .append(true)
        .create(true)
        // It names files, whoever may see them.
        .mode(0o600)
        .open(path)
        .with_context(|| format!("open log file {}", path.display()))
}

fn read_tls(files: &TlsFiles) -> anyhow::Result<ClientTlsConfig> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("read {}", path.display()));
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&files.authority)?));
    Ok(match &files.identity {
        Some(identity) => {
            let identity = Identity::from_pem(read(&identity.certificate)?, read(&identity.key)?);
            config.identity(identity)
        }
        None => config,
    })
}

fn enter_mount_namespace(path: &Path) -> anyhow::Result<()> {
    let doing = || format!("enter the mount namespace {}", path.display());
    let namespace = File::open(path).with_context(doing)?;
    // SAFETY: the descriptor is open; setns touches no memory of this process.
    match unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&namespace), libc::CLONE_NEWNS) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).with_context(doing),
    }
}
