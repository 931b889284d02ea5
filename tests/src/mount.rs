//! A real FUSE mount, made by the real program.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use crate::Sandbox;
use crate::environment::binary;
use crate::process::{ManagedProcess, read_log};

/// From the start of the program to a usable mount.
const READY_LIMIT: Duration = Duration::from_secs(40);
/// Until a mount that was told to end has flushed and gone.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(60);

/// How a mount is made.
#[derive(Clone, Debug, Default)]
pub struct MountOptions {
    /// The argument of `-o`.
    pub options: Option<String>,
    /// `/below`: only that directory of the cluster.
    pub subdirectory: Option<String>,
    /// Where; a fresh folder unless given.
    pub directory: Option<PathBuf>,
    /// Environment variables of its process.
    pub variables: Vec<(String, String)>,
}

impl MountOptions {
    /// With this argument of `-o`.
    pub fn options(options: &str) -> MountOptions {
        MountOptions {
            options: Some(options.to_string()),
            ..MountOptions::default()
        }
    }

    /// At this place.
    pub fn at(directory: &Path) -> MountOptions {
        MountOptions {
            directory: Some(directory.to_path_buf()),
            ..MountOptions::default()
        }
    }
}

/// A mounted cluster. Dropping it is kill -9 and a lazy unmount; see [`Mount::unmount`] for the proper end.
#[derive(Debug)]
pub struct Mount {
    directory: PathBuf,
    process: ManagedProcess,
}

impl Mount {
    /// Mounts and waits until it can be used.
    #[track_caller]
    pub fn start(sandbox: &Sandbox, members: &str, options: MountOptions) -> Mount {
        static COUNT: AtomicUsize = AtomicUsize::new(1);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = options
            .directory
            .unwrap_or_else(|| sandbox.make_folder(format!("mount-{number}")));
        let below = options
            .subdirectory
            .map(|path| format!(":{path}"))
            .unwrap_or_default();
        let mut command = Command::new(binary("quorumfs-mount"));
        command
            .arg(format!("{members}{below}"))
            .arg(&directory)
            .arg("--foreground")
            .env("RUST_BACKTRACE", "1")
            .env("NO_COLOR", "1");
        command.envs(options.variables);
        if let Some(options) = &options.options {
            command.args(["-o", options]);
        }
        let log = sandbox.log_path(&format!("mount-{number}"));
        let mut process = ManagedProcess::start(&format!("mount {number}"), command, &log);
        let start = Instant::now();
        while !(is_mounted(&directory) && std::fs::metadata(&directory).is_ok()) {
            if let Some(status) = process.ended() {
                panic!("the mount ended ({status}): {}", read_log(&log));
            }
            assert!(
                start.elapsed() < READY_LIMIT,
                "not mounted after {READY_LIMIT:?}: {}",
                read_log(&log)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Mount { directory, process }
    }

    /// A path in the mount.
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.directory.join(below)
    }

    /// The mount point.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The process id of the mount program.
    pub fn process_id(&self) -> i32 {
        self.process.id()
    }

    /// Sends a signal to the mount program.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// All that the mount program logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// SIGTERM: flushes, unmounts, ends. Panics unless all of that happens.
    #[track_caller]
    pub fn unmount(mut self) {
        self.process.signal(Signal::SIGTERM);
        let status = self.wait_ended(UNMOUNT_LIMIT);
        assert!(
            status.success(),
            "unmounting {}: {status}: {}",
            self.directory.display(),
            self.process.log()
        );
        assert!(
            !is_mounted(&self.directory),
            "{} is still mounted",
            self.directory.display()
        );
    }

    /// Waits until the program ends.
    #[track_caller]
    pub fn wait_ended(&mut self, limit: Duration) -> ExitStatus {
        let ended = self.process.wait(limit);
        ended.unwrap_or_else(|| {
            panic!(
                "{} still runs after {limit:?}: {}",
                self.directory.display(),
                self.process.log()
            )
        })
    }

    /// kill -9. The dead mount stays in the table, as it would for a user.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.process.kill();
        unmount_lazily(&self.directory);
    }
}

/// Whether a filesystem of ours is mounted right at `directory`.
pub fn is_mounted(directory: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("Linux has mountinfo");
    table.lines().any(|line| {
        let mut fields = line.split(' ');
        fields.nth(4).map(OsStr::new) == Some(directory.as_os_str()) && line.contains(" - fuse")
    })
}

/// Takes every mount away from `directory`, used or not.
pub fn unmount_lazily(directory: &Path) {
    while is_mounted(directory) {
        if umount2(directory, MntFlags::MNT_DETACH).is_err() {
            return;
        }
    }
}
