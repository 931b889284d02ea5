//! What the tests are told from outside: where the binaries are, how large the heavy tests are; and waiting.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How often [`wait_until`] looks.
const POLL_INTERVAL_MS: u64 = 20;

/// The folder that cargo built this test into: `target/debug` or `target/release`.
fn profile_folder() -> PathBuf {
    let exe = std::env::current_exe().expect("path of the test binary");
    let deps = exe.parent().expect("a binary lies in a folder");
    match deps.file_name() {
        Some(name) if name == "deps" => deps.parent().expect("deps lies in a folder").to_path_buf(),
        _ => deps.to_path_buf(),
    }
}

/// Cargo's target folder.
pub fn target_folder() -> PathBuf {
    let profile = profile_folder();
    profile.parent().map(Path::to_path_buf).unwrap_or(profile)
}

/// The top of the source tree.
pub fn workspace_folder() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("tests/ lies in the workspace").to_path_buf()
}

/// The program `name` of this workspace, as new as its sources: it is built (once for each test process) unless
/// `QUORUMFS_BIN_DIR` says where it is.
pub fn binary(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| match std::env::var_os("QUORUMFS_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let folder = profile_folder();
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            cargo
                .current_dir(workspace_folder())
                .args([
                    "build",
                    "--quiet",
                    "-p",
                    "quorumfs-node",
                    "-p",
                    "quorumfs-mount",
                    "--bins",
                ])
                .arg("--target-dir")
                .arg(target_folder());
            if folder.ends_with("release") {
                cargo.arg("--release");
            }
            let status = cargo.status().expect("run cargo build");
            assert!(status.success(), "the programs under test do not build");
            folder
        }
    });
    let path = folder.join(name);
    assert!(
        path.is_file(),
        "{} is missing: cargo build --bins",
        path.display()
    );
    path
}

/// `full` times `QUORUMFS_TEST_SCALE` (default 0.25): how much of the promised size this run tries.
pub fn scaled(full: u64) -> u64 {
    let scale: f64 = match std::env::var("QUORUMFS_TEST_SCALE") {
        Ok(text) => text.parse().expect("QUORUMFS_TEST_SCALE is a number"),
        Err(_) => 0.25,
    };
    assert!(scale > 0.0 && scale <= 1.0, "QUORUMFS_TEST_SCALE lies in (0, 1]");
    ((full as f64) * scale) as u64
}

/// The longest pause that a failover may cause (P6): 3 s, or `QUORUMFS_TEST_PAUSE_MAX_MS`.
pub fn pause_max() -> Duration {
    let ms = match std::env::var("QUORUMFS_TEST_PAUSE_MAX_MS") {
        Ok(text) => text.parse().expect("QUORUMFS_TEST_PAUSE_MAX_MS is a number"),
        Err(_) => 3_000,
    };
    Duration::from_millis(ms)
}

/// Waits until `look` finds something. Panics, saying `what` did not happen, when `limit` has passed.
#[track_caller]
pub fn wait_until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(POLL_INTERVAL_MS));
    }
}

/// Like [`wait_until`], for what is a plain yes or no.
#[track_caller]
pub fn wait_for(what: &str, limit: Duration, mut look: impl FnMut() -> bool) {
    wait_until(what, limit, || look().then_some(()));
}

/// Where `scripts/test.sh` installs a tool, or wherever it is in the PATH. `None` where it is missing and need not be
/// there.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = vec![
        target_folder().join("tools/bin"),
        PathBuf::from("/tmp/peers/cargo/bin"),
    ];
    folders.extend(std::env::split_paths(&path));
    let found = folders
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        let required = std::env::var("QUORUMFS_TEST_TOOLS").is_ok_and(|value| value == "required");
        assert!(!required, "{name} is missing: scripts/test.sh installs it");
        eprintln!("SKIPPED: {name} is missing: scripts/test.sh installs it");
    }
    found
}

/// Runs its closure when dropped: what must happen in the end, even if a check in between panics (a helper thread that
/// is never told to stop would keep the test from ever failing).
#[derive(Debug)]
pub struct Finally<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for Finally<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
