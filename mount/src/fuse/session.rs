//! fuser's session: the threads that read the kernel's requests.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use fuser::{Config, Session, SessionACL};
use tokio::sync::oneshot;

use super::FuseEdge;
use super::notices::Notices;
use crate::options::Access;
use quorumfs_fs::Cluster;

/// The threads only decode and copy, so a few saturate any kernel.
const THREADS_MAX: usize = 8;

/// Answers the INIT that waits in `device` and starts fuser's threads. The returned receiver resolves when the kernel
/// has released the mount.
///
/// # Errors
/// If INIT fails or no thread can be started; the mount is not served then.
pub fn serve_kernel<C: Cluster>(
    edge: FuseEdge<C>,
    device: OwnedFd,
    access: Access,
) -> io::Result<oneshot::Receiver<io::Result<()>>> {
    let acl = match access {
        Access::Everyone => SessionACL::All,
        Access::Owner => SessionACL::Owner,
    };
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(cores.clamp(2, THREADS_MAX));
    config.clone_fd = true;
    edge.attach_notices(Notices::new(device.as_fd(), edge.view.inodes)?);
    let session = Session::from_fd(edge, device, acl, config)?;
    let (sender, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("fuse".to_owned())
        .spawn(move || {
            // The receiver may be gone when the process is about to end.
            let _ = sender.send(session.run());
        })?;
    Ok(ended)
}
