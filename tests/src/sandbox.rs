//! What belongs to one test: a private folder, ports, a share of the machine; and a clean end.
//!
//! - Ports lie below the ephemeral range, in blocks; a block belongs to who holds the lock of its file. Asking the
//!   kernel for port 0 would hand out numbers that another test's outgoing connection may take a moment later.
//! - At most four light tests run at a time on this machine, or a heavy one and two light ones, or one that measures pauses,
//!   which must not be another test's load. Whichever test runner is used, and however many of them.
//! - A guard process ends, unmounts and removes everything below the folder when the sandbox is dropped, and just so
//!   when the test process is killed: it waits for the end of a pipe that only this process holds open.
//! - A watchdog kills the test's own processes when it takes too long: a call that hangs in a mount then fails, and
//!   the test with it, with its logs.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::environment::target_folder;
use crate::process::{processes_under, read_log, spawn_surviving};

/// First port of the first block; below 32768, where Linux' ephemeral ports begin.
const PORTS_FIRST: u16 = 20_000;
/// Ports of a block: seven nodes with two ports and a proxy each, twice over.
const PORTS_PER_BLOCK: u16 = 48;
const PORT_BLOCKS: u16 = 250;
/// Shares of the machine: a test takes as many as it needs.
const SHARES: usize = 4;
const LIGHT_SHARES: usize = 1;
const HEAVY_SHARES: usize = 2;
/// Between two attempts to take a share.
const SHARES_POLL: Duration = Duration::from_millis(50);
/// A light test that has not ended by then never will.
const LIGHT_LIMIT: Duration = Duration::from_secs(300);
const HEAVY_LIMIT: Duration = Duration::from_secs(1200);
/// Lines of each log that are printed when a test fails; the whole logs are kept.
const LOG_LINES_PRINTED: usize = 80;

/// Ends what still runs for the sandbox, unmounts (innermost first) and removes its folder. `$1` is the folder.
const GUARD: &str = r#"
trap '' INT TERM HUP
started() {
  read -r stat 2>/dev/null <"/proc/$1/stat" || return
  set -- ${stat##*) }
  shift 19 && echo "$1"
}
born=$(started $$)
cat >/dev/null
# The arguments of a process with a thread that hangs (in a debugger, in someone's broken mount) cannot be read: the
# reader hangs as well. So only those are looked at that are younger than this guard, as all that it must end are.
for folder in /proc/[0-9]*; do
  process=${folder#/proc/}
  start=$(started "$process")
  [ "${start:-0}" -ge "$born" ] && [ "$process" != $$ ] || continue
  if grep -qF -f "$1/.guard" "$folder/cmdline" 2>/dev/null; then kill -9 "$process" 2>/dev/null; fi
done
for attempt in 1 2 3 4 5; do
  awk -v folder="$1/" 'index($5, folder) == 1 { print $5 }' /proc/self/mountinfo | sort -r |
    while read -r place; do umount -l "$place" 2>/dev/null; done
  rm -rf --one-file-system "$1" 2>/dev/null && break
  sleep 0.3
done
"#;

/// A test's private corner of the machine. Keep it alive as long as anything in it runs: declare it
/// first. One for each test: it holds a share of the machine, and whoever waited for a second could wait for ever.
#[derive(Debug)]
pub struct Sandbox {
    name: String,
    folder: PathBuf,
    ports_next: AtomicU16,
    ports_end: u16,
    over: Arc<AtomicBool>,
    guard: Child,
    _ports: Flock<File>,
    _share: Vec<Flock<File>>,
}

impl Sandbox {
    /// For a test that shares the machine with three others.
    pub fn light(name: &str) -> Sandbox {
        Sandbox::new(name, LIGHT_SHARES, LIGHT_LIMIT)
    }

    /// For a test that loads the machine, or takes long: at most two light ones run beside it.
    pub fn heavy(name: &str) -> Sandbox {
        Sandbox::new(name, HEAVY_SHARES, HEAVY_LIMIT)
    }

    /// For a test that measures times: it runs alone.
    pub fn alone(name: &str) -> Sandbox {
        Sandbox::new(name, SHARES, HEAVY_LIMIT)
    }

    fn new(name: &str, shares: usize, limit: Duration) -> Sandbox {
        let share = take_shares(shares);
        let (ports, first) = take_ports();
        let base = std::env::var_os("QUORUMFS_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let folder = tempfile::Builder::new()
            .prefix(&format!("quorumfs-test-{name}-"))
            .tempdir_in(base)
            .expect("make a folder for the test")
            .keep();
        // Programs under other users (pjdfstest's) must get through it to the mount.
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        std::fs::create_dir(folder.join("logs")).expect("make the folder for logs");
        std::fs::write(folder.join(".guard"), format!("{}/\n", folder.display()))
            .expect("write the guard's pattern");
        let mut guard = Command::new("sh");
        guard
            .args(["-c", GUARD, "quorumfs-test-guard"])
            .arg(&folder)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        let guard = spawn_surviving(guard).expect("start the guard");
        let over = Arc::new(AtomicBool::new(false));
        watch(name, &folder, limit, Arc::clone(&over));
        Sandbox {
            name: name.to_string(),
            folder,
            ports_next: AtomicU16::new(first),
            ports_end: first + PORTS_PER_BLOCK,
            over,
            guard,
            _ports: ports,
            _share: share,
        }
    }

    /// The private folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path below it.
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.folder.join(below)
    }

    /// Makes a folder below it.
    pub fn make_folder(&self, below: impl AsRef<Path>) -> PathBuf {
        let path = self.path(below);
        std::fs::create_dir_all(&path).expect("make a folder in the sandbox");
        path
    }

    /// Where the log of the process `name` goes.
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    /// A port of our block that nobody listens on. Each is handed out once.
    pub fn port(&self) -> u16 {
        loop {
            let port = self.ports_next.fetch_add(1, Ordering::Relaxed);
            assert!(
                port < self.ports_end,
                "a test uses at most {PORTS_PER_BLOCK} ports"
            );
            if TcpListener::bind(("127.0.0.1", port)).is_ok() {
                return port;
            }
        }
    }

    /// `127.0.0.1:PORT` with a fresh port.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port())
    }

    fn logs(&self) -> Vec<(String, String)> {
        let mut logs: Vec<_> = std::fs::read_dir(self.folder.join("logs"))
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|entry| {
                (
                    entry.file_name().to_string_lossy().into_owned(),
                    read_log(&entry.path()),
                )
            })
            .collect();
        logs.sort();
        logs
    }

    fn report_failure(&self) {
        let kept = target_folder().join("test-logs").join(&self.name);
        let _ = std::fs::remove_dir_all(&kept);
        let _ = std::fs::create_dir_all(&kept);
        for (name, text) in self.logs() {
            let _ = std::fs::write(kept.join(&name), &text);
            // Frames of backtraces are in the kept log.
            let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("  ")).collect();
            eprintln!(
                "===== {name} (the last lines; whole: {})",
                kept.join(&name).display()
            );
            let shown = &lines[lines.len().saturating_sub(LOG_LINES_PRINTED)..];
            shown.iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let failed = std::thread::panicking();
        let panicked = self
            .logs()
            .into_iter()
            .find(|(_, text)| text.contains("panicked at"));
        if failed || panicked.is_some() {
            self.report_failure();
        }
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
        if let (false, Some((log, _))) = (failed, panicked) {
            panic!("a process under test panicked: see {log} above");
        }
        if !failed {
            assert!(
                !self.folder.exists(),
                "the test left {} behind",
                self.folder.display()
            );
        }
    }
}

/// Kills the test's processes when `limit` has passed.
fn watch(name: &str, folder: &Path, limit: Duration, over: Arc<AtomicBool>) {
    let (name, folder) = (name.to_string(), folder.to_path_buf());
    std::thread::spawn(move || {
        let start = Instant::now();
        while !over.load(Ordering::Relaxed) {
            if start.elapsed() > limit {
                eprintln!("watchdog: {name} takes more than {limit:?}; its processes are killed now");
                for id in processes_under(&folder) {
                    let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
                }
                return;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    });
}

fn locks_folder() -> PathBuf {
    let folder = std::env::temp_dir().join("quorumfs-test-locks");
    std::fs::create_dir_all(&folder).expect("make the folder for locks");
    folder
}

fn try_lock(name: &str) -> Option<Flock<File>> {
    let path = locks_folder().join(name);
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .expect("open a lock file");
    Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()
}

/// Takes `count` shares. Only one test at a time takes any: whoever needs more of them is not overtaken for ever.
fn take_shares(count: usize) -> Vec<Flock<File>> {
    let _turn = loop {
        match try_lock("turn") {
            Some(turn) => break turn,
            None => std::thread::sleep(SHARES_POLL),
        }
    };
    let mut free: Vec<usize> = (0..SHARES).collect();
    let mut taken = Vec::new();
    while taken.len() < count {
        let got = free
            .iter()
            .enumerate()
            .find_map(|(at, share)| Some((at, try_lock(&format!("share-{share}"))?)));
        match got {
            Some((at, share)) => {
                free.swap_remove(at);
                taken.push(share);
            }
            None => std::thread::sleep(SHARES_POLL),
        }
    }
    taken
}

fn take_ports() -> (Flock<File>, u16) {
    let start = std::process::id() as u16;
    (0..PORT_BLOCKS)
        .map(|n| (start.wrapping_add(n)) % PORT_BLOCKS)
        .find_map(|block| {
            Some((
                try_lock(&format!("ports-{block}"))?,
                PORTS_FIRST + block * PORTS_PER_BLOCK,
            ))
        })
        .expect("a free block of ports")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_leaves_nothing_not_even_a_process_or_a_mount() {
        let sandbox = Sandbox::light("sandbox");
        let folder = sandbox.folder().to_path_buf();
        let inner = sandbox.make_folder("tmpfs");
        crate::shell(&format!("mount -t tmpfs none '{}'", inner.display()));
        std::fs::write(inner.join("file"), "content").unwrap();
        std::fs::write(folder.join("endless"), "").unwrap();
        let mut sleeper = Command::new("tail");
        sleeper
            .arg("-f")
            .arg(folder.join("endless"))
            .stdout(Stdio::null());
        let mut sleeper = crate::process::spawn(sleeper).unwrap();
        assert_eq!(processes_under(&folder), [sleeper.id() as i32]);
        drop(sandbox);
        assert!(!folder.exists());
        assert!(!sleeper.wait().unwrap().success());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(folder.to_str().unwrap()));
    }

    #[test]
    fn two_holders_never_share_a_block_of_ports() {
        let ((_one, first), (_two, second)) = (take_ports(), take_ports());
        assert!(first.abs_diff(second) >= PORTS_PER_BLOCK);
        let end = PORTS_FIRST + PORT_BLOCKS * PORTS_PER_BLOCK;
        assert!(
            end <= 32_768,
            "the blocks end below the ephemeral ports, not at {end}"
        );
    }
}
