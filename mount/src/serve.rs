//! One mount from connecting to unmounting.
//!
//! 1. Connect to the cluster and find the directory that becomes the root; nothing is mounted before both are
//!    there.
//! 2. Mount, let fuser's threads serve, report that the mount is ready.
//! 3. Until somebody unmounts it, or a signal (SIGTERM, SIGINT, SIGHUP) asks for it: flush everything,
//!    unmount; when it is busy, detach it and go on serving those who still use it, for [`STOP_TIMEOUT`] at
//!    most or until a second signal.
//!
//! Invariant: no thread of this process ever waits for its own mount.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::MsFlags;
use quorumfs_client::{Client, ClientOptions, ConnectError};
use quorumfs_proto::{Answer, FileKind, FsError, InodeNumber, Name, Query};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::transport::ClientTlsConfig;

use crate::daemon::{Readiness, Report};
use crate::fs::{Durability, Filesystem, FsOptions};
use crate::fuse::{FuseEdge, serve_kernel};
use crate::mountpoint::{MountPoint, MountPointError, Mounted, Unmounting, Urgency};
use crate::options::{Access, DurabilityOption, MountRequest};

/// How long a stopping mount goes on for those who still use it: service managers kill after 90 s, and what
/// was flushed is safe.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait for the session to be closed at the cluster. If that fails it lapses by itself.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// prctl(2)'s word for a process that serves a filesystem; the libc crate does not know it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Why a mount did not come about, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Threads or signals could not be set up.
    #[error("{doing}: {error}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// What came of it.
        #[source]
        error: io::Error,
    },
    /// No cluster was found, or it refuses us.
    #[error("cannot mount: {0}")]
    Connect(#[from] ConnectError),
    /// A signal came before the mount was ready.
    #[error("interrupted before the mount was ready")]
    Interrupted,
    /// The sub-directory cannot be mounted.
    #[error("sub-directory /{path}: {error}")]
    Subdirectory {
        /// Which.
        path: String,
        /// Why.
        #[source]
        error: FsError,
    },
    /// Mounting or unmounting failed.
    #[error(transparent)]
    MountPoint(#[from] MountPointError),
    /// What programs wrote is not all at the cluster.
    #[error("data that was written here did not reach the cluster: {0}")]
    Unflushed(FsError),
}

impl ServeError {
    fn system(doing: &'static str) -> impl FnOnce(io::Error) -> ServeError {
        move |error| ServeError::System { doing, error }
    }
}

/// Makes the mount that `request` asks for on `mount_point`, reports through `readiness`, and returns when it
/// is unmounted.
///
/// # Errors
/// See [`ServeError`]; those that come after the mount was ready are told by nobody else.
pub fn serve(
    request: &MountRequest,
    mount_point: &MountPoint,
    tls: Option<ClientTlsConfig>,
    readiness: &mut Readiness,
) -> Result<(), ServeError> {
    // SAFETY: prctl with these arguments touches no memory.
    // The kernel must not wait for this mount when it needs memory for a thread of this process. Threads
    // inherit it.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "cannot become an I/O flusher");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("quorumfs")
        .build()
        .map_err(ServeError::system("start the runtime"))?;
    let result = runtime.block_on(async {
        let mut signals = StopSignals::install()?;
        let ready = tokio::select! {
            ready = Service::start(request, mount_point, tls) => ready?,
            () = signals.next() => return Err(ServeError::Interrupted),
        };
        tracing::info!(source = request.source, directory = %mount_point.path().display(), "mounted");
        readiness.report(&Report::Ready);
        ready.run(&mut signals).await
    });
    // What still runs waits for a cluster that does not answer; nobody waits for it.
    runtime.shutdown_background();
    result
}

/// SIGTERM, SIGINT and SIGHUP.
struct StopSignals([Signal; 3]);

impl StopSignals {
    fn install() -> Result<StopSignals, ServeError> {
        let one = |kind| signal(kind).map_err(ServeError::system("listen for signals"));
        Ok(StopSignals([
            one(SignalKind::terminate())?,
            one(SignalKind::interrupt())?,
            one(SignalKind::hangup())?,
        ]))
    }

    async fn next(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// A mount that is being served.
struct Service {
    client: Client,
    filesystem: Arc<Filesystem<Client>>,
    mounted: Mounted,
    /// Resolves when the kernel has let go of the mount.
    ended: oneshot::Receiver<io::Result<()>>,
}

impl Service {
    async fn start(
        request: &MountRequest,
        mount_point: &MountPoint,
        tls: Option<ClientTlsConfig>,
    ) -> Result<Service, ServeError> {
        let client = Client::connect(ClientOptions {
            addresses: request.spec.addresses.clone(),
            description: description(mount_point),
            call_timeout: request.call_timeout,
            tls,
            ..ClientOptions::default()
        })
        .await?;
        let root = resolve_root(&client, &request.spec.subdirectory).await?;
        let filesystem = Filesystem::new(client.clone(), filesystem_options(request, root));
        let edge = FuseEdge::new(
            Arc::clone(&filesystem),
            root,
            request.kernel_cache,
            tokio::runtime::Handle::current(),
        );
        let access = request.access.unwrap_or(if nix::unistd::geteuid().is_root() {
            Access::Everyone
        } else {
            Access::Owner
        });
        let (mounted, device) = mount_point.mount(&request.source, request.flags, access)?;
        // From here on whoever looks at the directory waits for us, so nothing may wait in between.
        let ended = match serve_kernel(edge, device, access) {
            Ok(ended) => ended,
            Err(error) => {
                // Nobody serves it, so it must not stay.
                if let Err(error) = mounted.unmount(Urgency::Detach) {
                    tracing::error!(%error, "a mount that nobody serves stays behind");
                }
                return Err(ServeError::system("serve the mount")(error));
            }
        };
        if let Err(error) = mounted.raise_read_ahead() {
            tracing::info!(%error, "the kernel keeps its default read-ahead");
        }
        Ok(Service {
            client,
            filesystem,
            mounted,
            ended,
        })
    }

    async fn run(mut self, signals: &mut StopSignals) -> Result<(), ServeError> {
        let deadline = tokio::select! {
            ended = &mut self.ended => {
                log_end(ended);
                Instant::now() + STOP_TIMEOUT
            }
            () = signals.next() => {
                tracing::info!("asked to stop");
                let deadline = Instant::now() + STOP_TIMEOUT;
                self.stop(signals, deadline).await;
                deadline
            }
        };
        let flushed = until(deadline, self.filesystem.flush_all()).await;
        if tokio::time::timeout(CLOSE_TIMEOUT, self.client.close())
            .await
            .is_err()
        {
            tracing::info!("the session was not closed in time; it lapses by itself");
        }
        tracing::info!(directory = %self.mounted.path().display(), "unmounted");
        flushed.map_err(ServeError::Unflushed)
    }

    /// Flushes and unmounts; serves on while the mount is busy, until `deadline` or a second signal.
    async fn stop(&mut self, signals: &mut StopSignals, deadline: Instant) {
        let stopping = async {
            // What fails now is tried again, and reported, after the unmount.
            if let Err(error) = until(deadline, self.filesystem.flush_all()).await {
                tracing::warn!(%error, "flushing before the unmount");
            }
            let unmounting = match unmount(&self.mounted, Urgency::Polite).await {
                Ok(Unmounting::Busy) => {
                    let wait_s = STOP_TIMEOUT.as_secs();
                    tracing::info!(wait_s, "busy: detached, and served until it is let go");
                    unmount(&self.mounted, Urgency::Detach).await
                }
                other => other,
            };
            if let Err(error) = unmounting {
                tracing::error!(%error, "cannot unmount");
            }
            log_end((&mut self.ended).await);
        };
        tokio::select! {
            () = stopping => {}
            () = tokio::time::sleep_until(deadline) => {
                tracing::warn!("files are still open: their users lose the mount now");
            }
            () = signals.next() => {
                tracing::warn!("asked to stop again: whoever still uses the mount loses it now");
            }
        }
    }
}

/// For people who look at the cluster: where this mount is.
fn description(mount_point: &MountPoint) -> String {
    let host = nix::sys::utsname::uname().map(|names| names.nodename().to_string_lossy().into_owned());
    let host = host.unwrap_or_else(|_| "unknown host".to_owned());
    let process = std::process::id();
    format!(
        "mount on {host}:{} (process {process})",
        mount_point.path().display()
    )
}

/// The inode of the sub-directory that is mounted.
async fn resolve_root(client: &Client, path: &[Name]) -> Result<InodeNumber, ServeError> {
    if path.is_empty() {
        return Ok(InodeNumber::ROOT);
    }
    let query = Query::Resolve {
        from: InodeNumber::ROOT,
        path: path.to_vec(),
    };
    let verdict = match client.query(query).await {
        Ok(Answer::Attributes(attributes)) if attributes.kind == FileKind::Directory => Ok(attributes.inode),
        Ok(Answer::Attributes(_)) => Err(FsError::NotDirectory),
        Ok(_) => Err(FsError::Io),
        Err(error) => Err(error),
    };
    verdict.map_err(|error| ServeError::Subdirectory {
        path: path.iter().map(Name::to_string).collect::<Vec<_>>().join("/"),
        error,
    })
}

fn filesystem_options(request: &MountRequest, root: InodeNumber) -> FsOptions {
    FsOptions {
        durability: match request.durability {
            DurabilityOption::Close => Durability::Close,
            DurabilityOption::Fsync => Durability::Fsync,
        },
        read_only: request.flags.contains(MsFlags::MS_RDONLY),
        root,
        ..FsOptions::default()
    }
}

fn log_end(ended: Result<io::Result<()>, oneshot::error::RecvError>) {
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "the kernel's connection broke"),
        Err(_) => tracing::error!("the thread that serves the kernel panicked"),
    }
}

async fn unmount(mounted: &Mounted, urgency: Urgency) -> Result<Unmounting, MountPointError> {
    let mounted = mounted.clone();
    match tokio::task::spawn_blocking(move || mounted.unmount(urgency)).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// What `work` says, or [`FsError::TimedOut`] at `deadline`.
async fn until<T>(deadline: Instant, work: impl Future<Output = Result<T, FsError>>) -> Result<T, FsError> {
    tokio::time::timeout_at(deadline, work)
        .await
        .unwrap_or(Err(FsError::TimedOut))
}
