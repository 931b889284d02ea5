//! The directory that is mounted on: examining, mounting, unmounting.
//!
//! fuser's own mounting is not used: its test for "still mounted" is inverted, and its unmount fails if the mount is
//! busy. Existing mounts are read from `/proc/self/mountinfo`, which never accesses a mount and so never hangs on one.
//!
//! This module does not know FUSE requests, clusters or the threads that serve.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::options::{Access, Stacking};

/// The filesystem type that the kernel and `findmnt` show.
const FILESYSTEM_TYPE: &str = "fuse.quorumfs";

/// Most time for a mount to answer whether it is alive. A dead one answers at once; one that waits for its cluster is
/// alive.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Interval at which the answer is looked for.
const PROBE_POLL: Duration = Duration::from_millis(5);

/// Read-ahead of the kernel for sequential readers. Its default, 128 KiB, is a fraction of a chunk; the mount itself
/// reads ahead further and from several nodes.
const READ_AHEAD_KIB: u32 = 1024;

/// Why a directory cannot be mounted on or unmounted. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum MountPointError {
    /// The directory does not exist.
    #[error("mount point {0} does not exist")]
    Missing(PathBuf),
    /// It is not a directory.
    #[error("mount point {0} is not a directory")]
    NotDirectory(PathBuf),
    /// A living QuorumFS is mounted there.
    #[error(
        "mount point {path} is busy: {source_name} is mounted on it (umount {path} first, or cover it with -o stack)"
    )]
    Busy {
        /// The mount point.
        path: PathBuf,
        /// The source of the existing mount.
        source_name: String,
    },
    /// The kernel reports that it is busy.
    #[error("mount point {0} is busy")]
    InUse(PathBuf),
    /// The caller is not root.
    #[error("mounting on {0} needs root (CAP_SYS_ADMIN)")]
    NotPermitted(PathBuf),
    /// FUSE is not available.
    #[error("cannot open /dev/fuse (is the kernel's fuse module loaded?): {0}")]
    NoFuse(io::Error),
    /// Another mount covers it, so that it cannot be reached.
    #[error("{0} is covered by another mount")]
    Covered(PathBuf),
    /// Any other error of the kernel.
    #[error("cannot {doing} {path}: {error}")]
    Kernel {
        /// The action that failed.
        doing: &'static str,
        /// Path of the mount point or mount.
        path: PathBuf,
        /// The cause of the failure.
        error: io::Error,
    },
}

impl MountPointError {
    fn kernel(doing: &'static str, path: &Path, error: impl Into<io::Error>) -> MountPointError {
        MountPointError::Kernel {
            doing,
            path: path.to_owned(),
            error: error.into(),
        }
    }
}

/// A directory that can be mounted on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    path: PathBuf,
    /// Number of mounts of dead processes on it.
    dead: usize,
}

impl MountPoint {
    /// Examines `directory` without a change.
    ///
    /// # Errors
    /// If it does not exist, is not a directory, or is already a QuorumFS mount.
    pub fn find(directory: &Path, stacking: Stacking) -> Result<MountPoint, MountPointError> {
        let path = match directory.canonicalize() {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(MountPointError::Missing(directory.to_owned()));
            }
            Err(error) if is_dead(&error) => std::path::absolute(directory)
                .map_err(|error| MountPointError::kernel("resolve", directory, error))?,
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(MountPointError::NotDirectory(directory.to_owned()));
            }
            Err(error) => return Err(MountPointError::kernel("resolve", directory, error)),
        };
        let mounts = mounts()?;
        let mut dead = 0;
        let mut covers = false;
        // The topmost first: mounts beneath a living one do not matter.
        for mount in mounts.iter().rev().filter(|mount| mount.path == path) {
            if mount.kind != FILESYSTEM_TYPE {
                break;
            }
            // A mount that will be covered need not be asked, and might not answer.
            if stacking == Stacking::Cover {
                covers = true;
                break;
            }
            // Only the topmost can be asked; those beneath a dead one are examined again in `clear`.
            let is_dead = dead > 0
                || probe(&path)
                    .map_err(|error| MountPointError::kernel("examine the mount on", &path, error))?
                    == Life::Dead;
            if is_dead {
                dead += 1;
                continue;
            }
            return Err(MountPointError::Busy {
                path,
                source_name: mount.source.clone(),
            });
        }
        // The root of a QuorumFS mount is a directory.
        if dead == 0 && !covers {
            let metadata = path
                .metadata()
                .map_err(|error| MountPointError::kernel("examine", &path, error))?;
            if !metadata.is_dir() {
                return Err(MountPointError::NotDirectory(path));
            }
        }
        Ok(MountPoint { path, dead })
    }

    /// Returns the path, absolute and without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes mounts that killed processes have left here. Returns their number.
    ///
    /// # Errors
    /// If that is not permitted, or a living mount appears beneath a dead one.
    pub fn clear(self, stacking: Stacking) -> Result<(MountPoint, usize), MountPointError> {
        let mut current = self;
        let mut cleared = 0;
        // Each round removes one mount, and `find` counted them.
        while current.dead > 0 {
            nix::mount::umount2(&current.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).map_err(
                |errno| match errno {
                    Errno::EPERM => MountPointError::NotPermitted(current.path.clone()),
                    errno => MountPointError::kernel("unmount the dead mount on", &current.path, errno),
                },
            )?;
            cleared += 1;
            current = MountPoint::find(&current.path.clone(), stacking)?;
        }
        Ok((current, cleared))
    }

    /// Mounts. The kernel's requests wait in the returned descriptor of `/dev/fuse`, INIT first.
    ///
    /// # Errors
    /// If FUSE is not available, or the caller is not permitted to mount.
    pub fn mount(
        &self,
        source: &str,
        flags: MsFlags,
        access: Access,
    ) -> Result<(Mounted, OwnedFd), MountPointError> {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(MountPointError::NoFuse)?;
        let data = format!(
            "fd={},rootmode={:o},user_id={},group_id={},default_permissions{}",
            device.as_raw_fd(),
            libc::S_IFDIR,
            nix::unistd::geteuid(),
            nix::unistd::getegid(),
            match access {
                Access::Everyone => ",allow_other",
                Access::Owner => "",
            }
        );
        nix::mount::mount(
            Some(source),
            &self.path,
            Some(FILESYSTEM_TYPE),
            flags,
            Some(data.as_str()),
        )
        .map_err(|errno| match errno {
            Errno::EPERM => MountPointError::NotPermitted(self.path.clone()),
            Errno::EBUSY => MountPointError::InUse(self.path.clone()),
            Errno::ENOTDIR => MountPointError::NotDirectory(self.path.clone()),
            errno => MountPointError::kernel("mount on", &self.path, errno),
        })?;
        let device_number = topmost(&mounts()?, &self.path).map(|mount| mount.device.clone());
        let mounted = Mounted {
            path: self.path.clone(),
            // The mount may already be gone again: `unmount` will find that too.
            device_number: device_number.unwrap_or_default(),
        };
        Ok((mounted, device.into()))
    }
}

/// A mount that this process made.
#[derive(Debug, Clone)]
pub struct Mounted {
    path: PathBuf,
    device_number: String,
}

/// The result of an attempt to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounting {
    /// It is no longer mounted: no more requests will come.
    Done,
    /// Files are open, or it is a working directory of a process.
    Busy,
}

/// How to treat a busy mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Leave it mounted.
    Polite,
    /// Remove it from the tree at once; it ends when its last user does.
    Detach,
}

impl Mounted {
    /// Returns the path of the mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Raises the kernel's read-ahead above its default.
    ///
    /// # Errors
    /// If sysfs does not exist or is not writable; the mount works anyway.
    pub fn raise_read_ahead(&self) -> io::Result<()> {
        let file = format!("/sys/class/bdi/{}/read_ahead_kb", self.device_number);
        std::fs::write(file, READ_AHEAD_KIB.to_string())
    }

    /// Unmounts this mount, and no other one on the same directory. Blocks while the kernel writes back dirty pages, so
    /// requests must be served meanwhile; if they are not, this process can still end (see [`unmount_apart`]).
    ///
    /// # Errors
    /// If the kernel refuses for another reason than that it is busy.
    pub fn unmount(&self, urgency: Urgency) -> Result<Unmounting, MountPointError> {
        let mounts = mounts()?;
        match topmost(&mounts, &self.path) {
            Some(top) if top.device == self.device_number => {}
            _ if mounts
                .iter()
                .any(|mount| mount.path == self.path && mount.device == self.device_number) =>
            {
                return Err(MountPointError::Covered(self.path.clone()));
            }
            _ => return Ok(Unmounting::Done),
        }
        let flags = match urgency {
            Urgency::Polite => MntFlags::UMOUNT_NOFOLLOW,
            Urgency::Detach => MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH,
        };
        match unmount_apart(&self.path, flags) {
            Ok(()) => Ok(Unmounting::Done),
            // It was unmounted by another process.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Unmounting::Done),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(Unmounting::Busy),
            Err(error) => Err(MountPointError::kernel("unmount", &self.path, error)),
        }
    }
}

/// Calls umount2(2) in a separate process. A thread that waits for an answer of its own process cannot be killed while
/// the process holds `/dev/fuse` open, and its existence would keep that open: the process could never end.
fn unmount_apart(path: &Path, flags: MntFlags) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: umount2 is a plain system call and touches no memory but `path`.
    let child = unsafe { call_apart(|| libc::umount2(path.as_ptr(), flags.bits())) }?;
    loop {
        match waitpid(child, None) {
            Ok(status) => return outcome_of(status),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Makes a system call in a separate process, whose exit code is 0 or the error number.
///
/// # Safety
/// Other threads are running, so `call` may only do what is safe in a signal handler.
unsafe fn call_apart(call: impl FnOnce() -> libc::c_int) -> io::Result<Pid> {
    // SAFETY: close_range and _exit are plain system calls, and the caller guarantees that `call` is safe.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => unsafe {
            libc::close_range(0, u32::MAX, 0);
            match call() {
                0 => libc::_exit(0),
                // The error numbers of umount2 and statfs are far below 256.
                _ => libc::_exit(*libc::__errno_location()),
            }
        },
        ForkResult::Parent { child } => Ok(child),
    }
}

/// Converts the exit status of a process of [`call_apart`].
fn outcome_of(status: WaitStatus) -> io::Result<()> {
    match status {
        WaitStatus::Exited(_, 0) => Ok(()),
        WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)),
        other => Err(io::Error::other(format!(
            "the process of a system call ended unexpectedly ({other:?})"
        ))),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Alive,
    Dead,
}

/// Asks the mount on `path` a question that no cache answers. A mount that does not reply in time is alive: its process
/// waits for a cluster, or was stopped. A separate process asks: one that waits for the answer of a stopped process
/// cannot end, and this one must.
fn probe(path: &Path) -> io::Result<Life> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut answer = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: statfs is a plain system call and touches no memory but `path` and `answer`.
    let child = unsafe { call_apart(|| libc::statfs(path.as_ptr(), answer.as_mut_ptr())) }?;
    let begin = Instant::now();
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if begin.elapsed() < PROBE_TIMEOUT => std::thread::sleep(PROBE_POLL),
            Ok(WaitStatus::StillAlive) => {
                // It ends when the mount's process answers or has ended; it is not waited for.
                nix::sys::signal::kill(child, Signal::SIGKILL)?;
                return Ok(Life::Alive);
            }
            Ok(status) => match outcome_of(status) {
                Err(error) if is_dead(&error) => return Ok(Life::Dead),
                _ => return Ok(Life::Alive),
            },
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether the error means that the process of the mount is gone, or its connection was aborted.
fn is_dead(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    device: String,
    path: PathBuf,
    kind: String,
    source: String,
}

fn mounts() -> Result<Vec<Mount>, MountPointError> {
    let file = Path::new("/proc/self/mountinfo");
    let text = std::fs::read(file).map_err(|error| MountPointError::kernel("read", file, error))?;
    Ok(parse_mounts(&text))
}

/// Returns the visible mount at `path`: the kernel lists upper mounts later.
fn topmost<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.path == path)
}

/// Parses mountinfo (proc_pid_mountinfo(5)): `id parent major:minor root path options tags… - type source super`.
fn parse_mounts(text: &[u8]) -> Vec<Mount> {
    let parse = |line: &[u8]| {
        let mut fields = line.split(|&byte| byte == b' ');
        let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
        let path = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
        let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
        let kind = String::from_utf8_lossy(rest.next()?).into_owned();
        let source = String::from_utf8_lossy(&unescape(rest.next()?)).into_owned();
        Some(Mount {
            device,
            path,
            kind,
            source,
        })
    };
    text.split(|&byte| byte == b'\n').filter_map(parse).collect()
}

/// Decodes blanks and backslashes, which the kernel writes as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = |digit: u8| (b'0'..=b'7').contains(&digit).then(|| u32::from(digit - b'0'));
        if let (b'\\', [a, b, c, after_digits @ ..]) = (byte, after)
            && let (Some(a), Some(b), Some(c)) = (octal(*a), octal(*b), octal(*c))
            && let Ok(value) = u8::try_from(a * 64 + b * 8 + c)
        {
            plain.push(value);
            rest = after_digits;
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &[u8] = b"\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:57 / /mnt/a\\040b rw,nosuid shared:5 master:1 - fuse.quorumfs h:1,h:2:/x rw,user_id=0
41 40 0:58 / /mnt/a\\040b rw - fuse.quorumfs other rw
42 22 0:59 / /mnt/c\\134d rw - tmpfs tmpfs rw
";

    #[test]
    fn mountinfo_is_read() {
        let mounts = parse_mounts(MOUNTINFO);
        assert_eq!(mounts.len(), 4);
        assert_eq!(
            mounts[1],
            Mount {
                device: "0:57".into(),
                path: "/mnt/a b".into(),
                kind: "fuse.quorumfs".into(),
                source: "h:1,h:2:/x".into(),
            }
        );
        assert_eq!(mounts[3].path, Path::new("/mnt/c\\d"));
        assert_eq!(topmost(&mounts, Path::new("/mnt/a b")).unwrap().device, "0:58");
        assert_eq!(topmost(&mounts, Path::new("/mnt")), None);
    }

    #[test]
    fn this_machine_has_a_root() {
        let mounts = mounts().unwrap();
        assert!(topmost(&mounts, Path::new("/")).is_some());
    }

    #[test]
    fn odd_escapes_stay_as_they_are() {
        assert_eq!(unescape(b"a\\04"), b"a\\04");
        assert_eq!(unescape(b"\\777"), b"\\777", "more than a byte");
        assert_eq!(unescape(b"\\"), b"\\");
        assert_eq!(unescape(b"\\011x"), b"\tx");
    }

    #[test]
    fn a_mount_point_that_is_no_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let find = |path: &Path| MountPoint::find(path, Stacking::Refuse);
        assert!(matches!(
            find(&directory.path().join("none")),
            Err(MountPointError::Missing(_))
        ));
        assert!(matches!(find(&file), Err(MountPointError::NotDirectory(_))));
        assert!(matches!(
            find(&file.join("below")),
            Err(MountPointError::NotDirectory(_))
        ));
        let found = find(directory.path()).unwrap();
        assert_eq!(found.path(), directory.path().canonicalize().unwrap());
    }
    /// Mounting needs root and the kernel's FUSE, which not every build machine has.
    fn can_mount() -> bool {
        let can = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
        if !can {
            eprintln!("skipped: needs root and /dev/fuse");
        }
        can
    }

    #[test]
    fn the_mount_of_a_killed_process_is_detected_and_cleared() {
        if !can_mount() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let free = MountPoint::find(directory.path(), Stacking::Refuse).unwrap();
        // A process that dies closes its descriptors; the mount stays.
        for _ in 0..2 {
            let (_, device) = free.mount("test", MsFlags::empty(), Access::Everyone).unwrap();
            drop(device);
        }
        assert!(directory.path().metadata().is_err_and(|error| is_dead(&error)));
        let dead = MountPoint::find(directory.path(), Stacking::Refuse).unwrap();
        let (found, cleared) = dead.clear(Stacking::Refuse).unwrap();
        assert_eq!(cleared, 2);
        assert_eq!(found, free);
        assert!(directory.path().metadata().unwrap().is_dir());
    }

    #[test]
    fn a_living_mount_is_busy_even_if_it_does_not_answer() {
        if !can_mount() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let free = MountPoint::find(directory.path(), Stacking::Refuse).unwrap();
        let (mounted, device) = free.mount("h:1", MsFlags::MS_RDONLY, Access::Everyone).unwrap();
        let refused = MountPoint::find(directory.path(), Stacking::Refuse).unwrap_err();
        assert!(refused.to_string().contains("h:1 is mounted on it"), "{refused}");
        assert!(MountPoint::find(directory.path(), Stacking::Cover).is_ok());
        assert!(mounted.raise_read_ahead().is_ok());

        let (above, other) = free.mount("h:2", MsFlags::empty(), Access::Everyone).unwrap();
        assert!(matches!(
            mounted.unmount(Urgency::Polite),
            Err(MountPointError::Covered(_))
        ));
        assert_eq!(above.unmount(Urgency::Polite).unwrap(), Unmounting::Done);
        assert_eq!(
            above.unmount(Urgency::Polite).unwrap(),
            Unmounting::Done,
            "already"
        );
        drop(other);
        assert_eq!(mounted.unmount(Urgency::Detach).unwrap(), Unmounting::Done);
        drop(device);
        assert_eq!(
            MountPoint::find(directory.path(), Stacking::Refuse).unwrap(),
            free
        );
    }
}
