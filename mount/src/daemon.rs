//! Moves the mount process into the background and reports the result to the waiting parent.
//!
//! [`into_background`] forks before any other thread exists. The parent keeps the terminal and waits for one report
//! through a pipe: ready, or an exit code and an error message. So `mount` returns when the directory can be used, and
//! never reports success too early. Until it has reported, the child dies with its parent (a `^C` ends both);
//! afterwards they are independent.
//!
//! This module does not know mounts.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::fcntl::OFlag;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

/// The process in which the function returned.
#[derive(Debug)]
pub enum Side {
    /// The process that the user started.
    Parent(Waiting),
    /// The process that stays in the background.
    Child(Readiness),
}

/// The result of starting the mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The mount is ready.
    Ready,
    /// The mount failed.
    Failed {
        /// The exit code of the command.
        exit_code: u8,
        /// The error message for the user.
        message: String,
    },
}

/// The parent's end of the pipe.
#[derive(Debug)]
pub struct Waiting {
    child: Pid,
    pipe: File,
}

/// The child's end of the pipe; it reports the result once.
#[derive(Debug)]
pub struct Readiness {
    pipe: Option<File>,
}

/// The file descriptor of the child for its report; all higher ones are closed.
const REPORT_FD: RawFd = 3;

/// The exit code of a mount that failed, as defined by mount(8).
const EXIT_MOUNT_FAILED: u8 = 32;

/// Forks. The child leaves the terminal and the working directory, and closes every descriptor it inherited. Its
/// standard streams go to `/dev/null`, standard error to `log`, if given.
///
/// # Errors
/// If the kernel cannot create a process.
///
/// # Panics
/// If other threads are running: locks that they hold would stay locked in the child for ever.
pub fn into_background(log: Option<File>) -> io::Result<Side> {
    assert_eq!(
        thread_count()?,
        1,
        "forking is only sound before any other thread exists"
    );
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let parent = Pid::this();
    // SAFETY: there is only this thread (checked above), so the child may continue as usual.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Side::Parent(Waiting {
            child,
            pipe: File::from(read),
        })),
        ForkResult::Child => {
            drop(read);
            let pipe = leave_everything(parent, write, log)?;
            Ok(Side::Child(Readiness { pipe: Some(pipe) }))
        }
    }
}

fn leave_everything(parent: Pid, pipe: OwnedFd, log: Option<File>) -> io::Result<File> {
    // SAFETY: prctl with these arguments touches no memory.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
    if nix::unistd::getppid() != parent {
        // The parent died before the line above.
        return Err(io::Error::other("the mount command was terminated"));
    }
    nix::unistd::setsid()?;
    // This process must not keep a directory busy.
    nix::unistd::chdir("/")?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?
        .into_raw_fd();
    let error = log.map_or(null, IntoRawFd::into_raw_fd);
    for (from, to) in [
        (null, libc::STDIN_FILENO),
        (null, libc::STDOUT_FILENO),
        (error, libc::STDERR_FILENO),
    ] {
        // SAFETY: both are open descriptors of this process.
        if unsafe { libc::dup2(from, to) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // Descriptors that the shell left open (locks, pipes that another process reads to their end) must not live as long
    // as the mount.
    let old = pipe.into_raw_fd();
    // SAFETY: nothing in this process owns a descriptor above the standard streams any more: `null`, `log`
    // and `pipe` were given up by `into_raw_fd`, and a program that has just started has opened no others.
    unsafe {
        if old != REPORT_FD && libc::dup2(old, REPORT_FD) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::close_range((REPORT_FD + 1) as u32, u32::MAX, 0);
        Ok(File::from_raw_fd(REPORT_FD))
    }
}

fn thread_count() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

impl Waiting {
    /// Waits for the child's report, or for its end.
    ///
    /// # Errors
    /// If the pipe cannot be read.
    pub fn wait(mut self) -> io::Result<Report> {
        let mut bytes = Vec::new();
        self.pipe.read_to_end(&mut bytes)?;
        if bytes == [0] {
            return Ok(Report::Ready);
        }
        // The child has reported everything, or has already ended.
        let end = waitpid(self.child, None);
        Ok(match bytes.split_first() {
            Some((&exit_code, message)) => Report::Failed {
                exit_code,
                message: String::from_utf8_lossy(message).into_owned(),
            },
            None => Report::Failed {
                exit_code: EXIT_MOUNT_FAILED,
                message: match end {
                    Ok(WaitStatus::Signaled(_, signal, _)) => {
                        format!("the mount process was killed by {signal}")
                    }
                    Ok(status) => format!("the mount process ended before it was ready ({status:?})"),
                    Err(error) => format!("the mount process ended before it was ready ({error})"),
                },
            },
        })
    }
}

impl Readiness {
    /// Makes the reporter of a process that stays in the foreground: the report goes nowhere.
    pub fn unobserved() -> Readiness {
        Readiness { pipe: None }
    }

    /// Reports the result. It does not matter if the parent has already ended.
    pub fn report(&mut self, report: &Report) {
        let Some(mut pipe) = self.pipe.take() else {
            return;
        };
        let bytes = match report {
            Report::Ready => {
                // SAFETY: prctl with these arguments touches no memory.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0) };
                vec![0]
            }
            Report::Failed { exit_code, message } => {
                let mut bytes = vec![(*exit_code).max(1)];
                bytes.extend_from_slice(message.as_bytes());
                bytes
            }
        };
        // If the parent is gone, the report is not needed.
        let _ = pipe.write_all(&bytes);
    }
}
