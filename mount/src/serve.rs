//! One mount from connecting to unmounting.
//!
//! 1. Connect to the cluster and find the directory that becomes the root; nothing is mounted before both succeed.
//! 2. Mount, let fuser's threads serve, report that the mount is ready.
//! 3. When it is unmounted by a user, or a signal (SIGTERM, SIGINT, SIGHUP) asks for it: flush everything and unmount.
//!    If the mount is busy, detach it and continue to serve its users, for at most [`STOP_TIMEOUT`] or until a second
//!    signal.
//!
//! Invariant: no thread of this process ever waits for its own mount.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::MsFlags;
use quorumfs_client::{Client, ClientOptions, ConnectError};
use quorumfs_proto::{FileKind, FsError, InodeNumber, Name, Query};
use quorumfs_tasks::Tasks;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tonic::transport::ClientTlsConfig;

use crate::daemon::{Readiness, Report};
use crate::fuse::{FuseEdge, serve_kernel};
use crate::mountpoint::{MountPoint, MountPointError, Mounted, Unmounting, Urgency};
use crate::options::{Access, DurabilityOption, MountRequest};
use quorumfs_fs::{Cluster, Durability, Filesystem, FsOptions, Leased};

/// Longest time that a stopping mount serves its users: service managers kill after 90 s, and flushed data is safe.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Most time for the last flush: a few seconds of writing, and a change of leader.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);

/// Most time for a last detaching unmount. It only waits for write-back, which ends with this process.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);

/// Most time to wait until the cluster has closed the session. After that it lapses by itself.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Most inode numbers in the log when bytes of files are lost.
const NAMED_FILES_MAX: usize = 16;

/// prctl(2)'s flag for a process that serves a filesystem; the libc crate does not define it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Why a mount failed, or did not end well. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Threads or signals could not be set up.
    #[error("cannot {doing}: {error}")]
    System {
        /// The action that failed.
        doing: &'static str,
        /// The cause of the failure.
        error: io::Error,
    },
    /// No cluster was found, or it refuses this mount.
    #[error("cannot mount: {0}")]
    Connect(ConnectError),
    /// A signal came before the mount was ready.
    #[error("interrupted before the mount was ready")]
    Interrupted,
    /// The sub-directory cannot be mounted.
    #[error("cannot mount the sub-directory /{path}: {error}")]
    Subdirectory {
        /// The path in the filesystem.
        path: String,
        /// The cause of the failure.
        error: FsError,
    },
    /// Mounting or unmounting failed.
    #[error(transparent)]
    MountPoint(#[from] MountPointError),
    /// Some data that programs wrote is not at the cluster.
    #[error("data written through this mount did not reach the cluster and is lost: {0}")]
    Unflushed(FsError),
}

impl ServeError {
    fn system(doing: &'static str) -> impl FnOnce(io::Error) -> ServeError {
        move |error| ServeError::System { doing, error }
    }
}

/// Mounts as `request` asks on `mount_point`, reports through `readiness`, and returns when the mount has ended.
///
/// # Errors
/// [`ServeError`]; errors after the mount was ready are not reported elsewhere.
pub fn serve(
    request: &MountRequest,
    mount_point: &MountPoint,
    tls: Option<ClientTlsConfig>,
    readiness: &mut Readiness,
) -> Result<(), ServeError> {
    // SAFETY: prctl with these arguments touches no memory.
    // The kernel must not wait for this mount when it needs memory for a thread of this process. Threads inherit this.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "cannot become an I/O flusher");
    }
    // A call is a chain of short tasks, and each hand-over between threads costs a context switch; fuser's threads
    // answer from memory themselves.
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 2).max(1))
        .enable_all()
        .thread_name("quorumfs")
        .build()
        .map_err(ServeError::system("start the runtime"))?;
    let result = runtime.block_on(async {
        let mut stop = stop_requests()?;
        let (client, service) = tokio::select! {
            ready = start(request, mount_point, tls) => ready?,
            _ = stop.recv() => return Err(ServeError::Interrupted),
        };
        tracing::info!(source = request.source, directory = %mount_point.path().display(), "mounted");
        readiness.report(&Report::Ready);
        let flushed = service.run(&mut stop, STOP_TIMEOUT).await;
        if tokio::time::timeout(CLOSE_TIMEOUT, client.close()).await.is_err() {
            tracing::info!("the session was not closed in time; it lapses by itself");
        }
        tracing::info!(directory = %mount_point.path().display(), "unmounted");
        flushed.map_err(ServeError::Unflushed)
    });
    // Remaining tasks wait for a cluster that does not answer; they are not awaited.
    runtime.shutdown_background();
    result
}

/// Returns a receiver with one item for each SIGTERM, SIGINT or SIGHUP.
fn stop_requests() -> Result<mpsc::Receiver<()>, ServeError> {
    // The first asks to stop, the second to hurry; more have no effect.
    let (sender, requests) = mpsc::channel(2);
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ] {
        let mut signals = signal(kind).map_err(ServeError::system("listen for signals"))?;
        let sender = sender.clone();
        tokio::spawn(async move { while signals.recv().await.is_some() && sender.send(()).await.is_ok() {} });
    }
    Ok(requests)
}

/// A mount that is being served.
struct Service<C: Cluster> {
    filesystem: Arc<Filesystem<C>>,
    mounted: Mounted,
    /// Resolves when the kernel has released the mount.
    ended: oneshot::Receiver<io::Result<()>>,
}

impl<C: Cluster> Service<C> {
    /// Serves until the mount is unmounted or asked to `stop`. Then its users have `stop_timeout` to finish.
    async fn run(mut self, stop: &mut mpsc::Receiver<()>, stop_timeout: Duration) -> Result<(), FsError> {
        let early = tokio::select! {
            ended = &mut self.ended => {
                log_end(ended);
                // After `umount -f` the kernel has released the mount, but leaves it in the tree if files are open.
                self.detach().await;
                Ok(())
            }
            _ = stop.recv() => {
                tracing::info!("asked to stop");
                self.stop(stop, Instant::now() + stop_timeout).await
            }
        };
        let last = until(Instant::now() + FLUSH_TIMEOUT, self.filesystem.flush_all()).await;
        let unwritten = self.filesystem.unwritten();
        if !unwritten.is_empty() {
            let bytes = self.filesystem.dirty_bytes();
            let (files, inodes) = (
                unwritten.len(),
                &unwritten[..unwritten.len().min(NAMED_FILES_MAX)],
            );
            tracing::error!(
                bytes,
                files,
                ?inodes,
                "written bytes did not reach the cluster and are lost"
            );
        }
        match early {
            // A flush that took too long has been tried again; failed bytes are lost and not tried twice.
            Ok(()) | Err(FsError::TimedOut) => last,
            Err(error) => Err(error),
        }
    }

    /// Flushes and unmounts; continues to serve while the mount is busy, until `deadline` or a second request to stop.
    /// The mount is not in the tree afterwards in any case. Returns the result of the flush.
    async fn stop(&mut self, stop: &mut mpsc::Receiver<()>, deadline: Instant) -> Result<(), FsError> {
        let mut flushed = Err(FsError::TimedOut);
        let stopping = async {
            flushed = until(deadline, self.filesystem.flush_all()).await;
            match unmount(&self.mounted, Urgency::Polite).await {
                Some(Unmounting::Busy) => {
                    tracing::info!(
                        "the mount is busy: it was detached, and is served until its users are done"
                    );
                    unmount(&self.mounted, Urgency::Detach).await;
                }
                Some(Unmounting::Done) | None => {}
            }
            log_end((&mut self.ended).await);
        };
        let left = tokio::select! {
            () = stopping => return flushed,
            () = tokio::time::sleep_until(deadline) => "time is up",
            _ = stop.recv() => "asked to stop again",
        };
        tracing::warn!("{left}: the remaining users of the mount lose it now");
        self.detach().await;
        flushed
    }

    /// Removes the mount from the tree, if it is there.
    async fn detach(&self) {
        if tokio::time::timeout(DETACH_TIMEOUT, unmount(&self.mounted, Urgency::Detach))
            .await
            .is_err()
        {
            tracing::info!("the kernel is still writing back; unmounting without waiting for it");
        }
    }
}

async fn start(
    request: &MountRequest,
    mount_point: &MountPoint,
    tls: Option<ClientTlsConfig>,
) -> Result<(Client, Service<Leased<Client>>), ServeError> {
    let tasks = Arc::new(Tasks::default());
    let client = Client::connect(ClientOptions {
        addresses: request.spec.addresses.clone(),
        description: description(mount_point),
        call_timeout: request.call_timeout,
        tls,
        tasks: tasks.clone(),
        ..ClientOptions::default()
    })
    .await
    .map_err(ServeError::Connect)?;
    let root = resolve_root(&client, &request.spec.subdirectory).await?;
    let filesystem = Filesystem::new(
        Leased::new(client.clone()),
        filesystem_options(request, root),
        &tasks,
    );
    let edge = FuseEdge::new(
        Arc::clone(&filesystem),
        root,
        request.kernel_cache,
        tasks,
        tokio::runtime::Handle::current(),
    );
    let (counted, statistics) = (Arc::downgrade(&filesystem), Arc::clone(edge.statistics()));
    client.set_statistics_source(move || {
        let filesystem = counted.upgrade();
        let filesystem = filesystem.as_ref();
        statistics.report(
            filesystem.map_or_else(Default::default, |fs| fs.cache_statistics()),
            filesystem.map_or(0, |fs| fs.dirty_bytes()),
        )
    });
    let access = request.access.unwrap_or(if nix::unistd::geteuid().is_root() {
        Access::Everyone
    } else {
        Access::Owner
    });
    let (mounted, device) = mount_point.mount(&request.source, request.flags, access)?;
    // From here on accesses to the directory wait for this process, so nothing may block in between.
    let ended = match serve_kernel(edge, device, access) {
        Ok(ended) => ended,
        Err(error) => {
            // The mount is not served, so it must not stay.
            if let Err(error) = mounted.unmount(Urgency::Detach) {
                tracing::error!(%error, "cannot remove a mount that is not served: unmount it with umount -l");
            }
            return Err(ServeError::system("serve the mount")(error));
        }
    };
    if let Err(error) = mounted.raise_read_ahead() {
        tracing::info!(%error, "the kernel keeps its default read-ahead");
    }
    let service = Service {
        filesystem,
        mounted,
        ended,
    };
    Ok((client, service))
}

/// Returns a description of this mount, for people who examine the cluster.
fn description(mount_point: &MountPoint) -> String {
    let host = nix::sys::utsname::uname().map(|names| names.nodename().to_string_lossy().into_owned());
    let host = host.unwrap_or_else(|_| "unknown host".to_owned());
    let process = std::process::id();
    format!(
        "mount on {host}:{} (process {process})",
        mount_point.path().display()
    )
}

/// Returns the inode of the sub-directory that is mounted.
async fn resolve_root(client: &Client, path: &[Name]) -> Result<InodeNumber, ServeError> {
    if path.is_empty() {
        return Ok(InodeNumber::ROOT);
    }
    let resolved = match client.ask(Query::resolve(InodeNumber::ROOT, path.to_vec())).await {
        Ok(attributes) if attributes.kind == FileKind::Directory => Ok(attributes.inode),
        Ok(_) => Err(FsError::NotDirectory),
        Err(error) => Err(error),
    };
    resolved.map_err(|error| ServeError::Subdirectory {
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
        Ok(Err(error)) => tracing::error!(%error, "the connection to the kernel failed"),
        Err(_) => tracing::error!("the thread that serves the kernel panicked"),
    }
}

/// Unmounts; returns `None` after an error, which is logged.
async fn unmount(mounted: &Mounted, urgency: Urgency) -> Option<Unmounting> {
    let mounted = mounted.clone();
    match tokio::task::spawn_blocking(move || mounted.unmount(urgency)).await {
        Ok(Ok(done)) => Some(done),
        Ok(Err(error)) => {
            tracing::error!(%error, "cannot unmount");
            None
        }
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Returns the result of `work`, or [`FsError::TimedOut`] at `deadline`.
async fn until<T>(deadline: Instant, work: impl Future<Output = Result<T, FsError>>) -> Result<T, FsError> {
    tokio::time::timeout_at(deadline, work)
        .await
        .unwrap_or(Err(FsError::TimedOut))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::Write;

    use crate::fuse::tests::{TestMount, can_mount, mount};
    use quorumfs_memory::{Connection, MemoryCluster};

    fn service(mount: &mut TestMount) -> Service<Connection> {
        Service {
            filesystem: Arc::clone(&mount.filesystem),
            mounted: mount.mounted.clone(),
            ended: mount.ended.take().unwrap(),
        }
    }

    /// Runs the service of `mount` with `stops` requests to stop.
    fn stop(mount: &mut TestMount, stops: usize, timeout: Duration) -> Result<(), FsError> {
        let service = service(mount);
        mount.runtime.block_on(async {
            let (sender, mut requests) = mpsc::channel(2);
            for _ in 0..stops {
                sender.send(()).await.unwrap();
            }
            service.run(&mut requests, timeout).await
        })
    }

    #[test]
    fn a_stop_request_unmounts() {
        if !can_mount() {
            return;
        }
        let mut mount = mount(&MemoryCluster::new(), 1);
        fs::write(mount.path("file"), "x").unwrap();
        assert_eq!(stop(&mut mount, 1, STOP_TIMEOUT), Ok(()));
        assert!(!mount.path("file").exists(), "it is still mounted");
    }

    #[test]
    fn it_ends_when_another_process_unmounts() {
        if !can_mount() {
            return;
        }
        let mut mount = mount(&MemoryCluster::new(), 1);
        assert_eq!(mount.mounted.unmount(Urgency::Polite).unwrap(), Unmounting::Done);
        assert_eq!(stop(&mut mount, 0, STOP_TIMEOUT), Ok(()));
    }

    #[test]
    fn a_busy_mount_continues_until_the_timeout_or_a_second_signal() {
        if !can_mount() {
            return;
        }
        let cluster = MemoryCluster::new();
        for (stops, timeout) in [(1, Duration::from_millis(300)), (2, STOP_TIMEOUT)] {
            let mut mount = mount(&cluster, stops as u64);
            let mut open = File::create(mount.path("file")).unwrap();
            open.write_all(b"unsynced").unwrap();
            let begin = Instant::now();
            assert_eq!(stop(&mut mount, stops, timeout), Ok(()));
            assert!(begin.elapsed() < STOP_TIMEOUT / 2, "{:?}", begin.elapsed());
            assert!(!mount.path("file").exists(), "it is still mounted");
            let again = self::mount(&cluster, 9);
            assert_eq!(fs::read(again.path("file")).unwrap(), b"unsynced");
            again.unmount();
        }
    }

    #[test]
    fn a_failed_flush_is_reported() {
        if !can_mount() {
            return;
        }
        let cluster = MemoryCluster::new();
        let mut mount = mount(&cluster, 1);
        let mut open = File::create(mount.path("file")).unwrap();
        *cluster.put_fault.lock() = Some(FsError::NoSpace);
        open.write_all(&vec![1; 100_000]).unwrap();
        assert_eq!(
            stop(&mut mount, 1, Duration::from_millis(300)),
            Err(FsError::NoSpace)
        );
        assert!(!mount.path("file").exists(), "it is still mounted");
    }
}
