//! The program `quorumfs-mount`, which is also the helper `mount.quorumfs` of mount(8).
//!
//! Errors that do not depend on the cluster are found in the terminal's own process. Then the mount moves into the
//! background, and the command returns when the mount can be used. The exit codes are those of mount(8): 0 success, 1
//! wrong usage or no permission, 32 the mount failed.

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

/// The environment variable with a log filter, in the syntax of tracing-subscriber.
const LOG_VARIABLE: &str = "QUORUMFS_LOG";

/// The kernel reports every signal to a waiting program; fuser refuses on another descriptor than the kernel expects,
/// and logs that as an error of the reply.
const QUIET: &str = "fuser::reply=off";

/// Most arenas of glibc's allocator. Its default is eight for each core, and memory freed in one arena is not used by
/// others: chunks, which are allocated on one thread and freed on another, would leave much unused memory (measured:
/// 350 MiB for 200 MiB in use; with two arenas 250 MiB, and faster; jemalloc has 275, mimalloc 290).
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 2;

fn main() -> ExitCode {
    bound_arenas();
    let request = match MountRequest::from_arguments(std::env::args_os()) {
        Ok(request) => request,
        Err(Usage::Information(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(Usage::Invalid(text)) => return fail(EXIT_USAGE, &text),
    };
    match run(&request) {
        Ok(exit) => exit,
        Err(error) => fail(exit_code(&error), &format!("{error:#}")),
    }
}

/// Limits free memory to few arenas. Must be called before other threads exist. Overrides `MALLOC_ARENA_MAX`.
#[cfg(target_env = "gnu")]
fn bound_arenas() {
    // SAFETY: mallopt sets a number of the allocator, under its lock. If it refuses, the number is unchanged.
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
    let mut readiness = match request.process_mode {
        ProcessMode::Foreground => {
            start_logging(request.verbosity, log);
            Readiness::unobserved()
        }
        ProcessMode::Background => {
            match daemon::into_background(log).context("cannot go into the background")? {
                Side::Parent(waiting) => {
                    return Ok(
                        match waiting.wait().context("cannot wait for the mount process")? {
                            Report::Ready => ExitCode::SUCCESS,
                            Report::Failed { exit_code, message } => fail(exit_code, &message),
                        },
                    );
                }
                Side::Child(readiness) => {
                    // Standard error is the log file now, if there is one.
                    start_logging(request.verbosity, None);
                    readiness
                }
            }
        }
    };
    if cleared > 0 {
        tracing::warn!(cleared, directory = %mount_point.path().display(), "unmounted the mount of a dead mount process");
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
    quorumfs_tasks::log_panics();
}

fn open_log(path: &Path) -> anyhow::Result<File> {
    File::options()
        .append(true)
        .create(true)
        // The log contains names of files, so only this user may read it.
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot open the log file {}", path.display()))
}

fn read_tls(files: &TlsFiles) -> anyhow::Result<ClientTlsConfig> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
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
    let doing = || format!("cannot enter the mount namespace {}", path.display());
    let namespace = File::open(path).with_context(doing)?;
    // SAFETY: the descriptor is open; setns touches no memory of this process.
    match unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&namespace), libc::CLONE_NEWNS) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).with_context(doing),
    }
}
