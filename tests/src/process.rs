//! Child processes that never outlive the tests.
//!
//! Every child asks the kernel to be killed when its parent *thread* ends (PR_SET_PDEATHSIG counts threads), so all
//! children are started by one thread that lives as long as the test process: a node started again by a helper
//! thread must not die with that thread.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

struct SpawnRequest {
    command: Command,
    answer: Sender<std::io::Result<Child>>,
}

/// Starts `command` from the long-lived thread.
fn spawn_from_long_lived_thread(command: Command) -> std::io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<SpawnRequest>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests): (_, Receiver<SpawnRequest>) = channel();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for mut request in requests {
                    // The asker waits for the answer, so it can only be gone if it panicked meanwhile.
                    let _ = request.answer.send(request.command.spawn());
                }
            })
            .expect("start a thread");
        Mutex::new(sender)
    });
    let (answer, result) = channel();
    spawner
        .lock()
        .expect("nothing panics while it holds the lock")
        .send(SpawnRequest { command, answer })
        .expect("the spawner never ends");
    result.recv().expect("the spawner answers every request")
}

/// Starts `command` so that it dies with the test process.
pub fn spawn(mut command: Command) -> std::io::Result<Child> {
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
    spawn_from_long_lived_thread(command)
}

/// Starts `command` so that it lives on when the test process dies (the guard does).
pub fn spawn_surviving(command: Command) -> std::io::Result<Child> {
    spawn_from_long_lived_thread(command)
}

/// A running program whose output goes to a log file. Killed when dropped.
#[derive(Debug)]
pub struct ManagedProcess {
    name: String,
    child: Child,
    log: PathBuf,
}

impl ManagedProcess {
    /// Starts `command`; its output is appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> ManagedProcess {
        let mut file = open_log(log);
        writeln!(file, "--- test: starting {name}: {command:?}").expect("write to the log file");
        let errors = file.try_clone().expect("duplicate a file descriptor");
        command.stdin(Stdio::null()).stdout(file).stderr(errors);
        let child = spawn(command).unwrap_or_else(|e| panic!("start {name}: {e}"));
        ManagedProcess {
            name: name.to_string(),
            child,
            log: log.to_path_buf(),
        }
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids fit")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        self.note(&format!("{signal}"));
        kill(Pid::from_raw(self.id()), signal)
            .unwrap_or_else(|e| panic!("send {signal} to {}: {e}", self.name));
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&mut self) {
        self.note("SIGKILL");
        // It may have ended by itself; there is nothing to kill then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .unwrap_or_else(|e| panic!("wait for {}: {e}", self.name))
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if start.elapsed() > limit {
                return None;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// All it (and those before it with the same log) said.
    pub fn log(&self) -> String {
        read_log(&self.log)
    }

    fn note(&self, what: &str) {
        let _ = writeln!(
            open_log(&self.log),
            "--- test: {what} to {} ({})",
            self.name,
            self.id()
        );
    }
}

impl Drop for ManagedProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn open_log(log: &Path) -> File {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .unwrap_or_else(|e| panic!("open {}: {e}", log.display()))
}

/// The text of a log file; empty if there is none.
pub fn read_log(log: &Path) -> String {
    std::fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// Resident memory of a process at its highest, in bytes.
pub fn resident_peak_bytes(id: i32) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_else(|e| panic!("process {id}: {e}"));
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .expect("Linux tells VmHWM");
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("VmHWM is a number");
    kib << 10
}

/// When a process started, in clock ticks since boot.
fn started_ticks(id: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name, in parentheses, may hold anything; field 22 is the twentieth after it.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// The processes that name `folder` (or what lies below it) in their arguments, and are not older than this one:
/// reading the arguments of a process that hangs (in a debugger, in a broken mount) hangs the reader too.
pub fn processes_under(folder: &Path) -> Vec<i32> {
    let mut needle = folder.as_os_str().as_encoded_bytes().to_vec();
    needle.push(b'/');
    let own = std::process::id();
    let since = started_ticks(own);
    std::fs::read_dir("/proc")
        .expect("Linux has /proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|id| *id != own && started_ticks(*id) >= since)
        .filter(|id| {
            let arguments = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            arguments.windows(needle.len()).any(|window| window == needle)
        })
        .map(|id| i32::try_from(id).expect("process ids fit"))
        .collect()
}
