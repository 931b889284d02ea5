//! The messages and exit codes of the mount command, without a cluster.

#![allow(clippy::unwrap_used)] // It is all tests.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn mount(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quorumfs-mount"))
        .args(arguments)
        .output()
        .unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Returns an address without a listener.
fn unused_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn mistakes_are_told_and_exit_with_1() {
    for (arguments, word) in [
        (&["127.0.0.1:1"][..], "DIRECTORY"),
        (&["nowhere", "/mnt"], "`nowhere` is not HOST:PORT"),
        (&["h:1", "/mnt", "-o", "speed=11"], "unknown mount option `speed`"),
        (&["h:1", "/mnt", "--speed"], "--speed"),
    ] {
        let output = mount(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(told(&output).contains(word), "{arguments:?}: {}", told(&output));
    }
    let help = mount(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("SPEC"));
}

#[test]
fn a_mount_point_that_cannot_be_is_told_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let missing = directory.path().join("missing");
    for (path, word) in [(&file, "is not a directory"), (&missing, "does not exist")] {
        let output = mount(&["127.0.0.1:1", text(path)]);
        assert_eq!(output.status.code(), Some(32));
        assert!(told(&output).contains(word), "{}", told(&output));
        assert!(told(&output).contains(text(path)));
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("ca.pem");
    let output = mount(&["127.0.0.1:1", text(directory.path()), "--tls-ca", text(&missing)]);
    assert_eq!(output.status.code(), Some(32));
    assert!(told(&output).contains(text(&missing)), "{}", told(&output));
}

#[test]
fn without_a_cluster_the_mount_fails_in_time_and_says_whom_it_asked() {
    let directory = tempfile::tempdir().unwrap();
    let (one, other) = (unused_address(), unused_address());
    let spec = format!("{one},{other}");
    for form in [&["--foreground"][..], &[]] {
        let start = Instant::now();
        let arguments = [form, &["-o", "timeout=1", &spec, text(directory.path())]].concat();
        let output = mount(&arguments);
        assert_eq!(output.status.code(), Some(32), "{}", told(&output));
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        for address in [&one, &other] {
            assert!(told(&output).contains(address), "{}", told(&output));
        }
    }
}

#[test]
fn as_mount_quorumfs_it_is_a_mount_helper() {
    let directory = tempfile::tempdir().unwrap();
    let helper = directory.path().join("mount.quorumfs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_quorumfs-mount"), &helper).unwrap();
    let run = |arguments: &[&str]| Command::new(&helper).args(arguments).output().unwrap();
    let here = text(directory.path());
    let rehearsal = run(&["h:1", here, "-f", "-o", "rw,_netdev,nofail"]);
    assert_eq!(rehearsal.status.code(), Some(0), "{}", told(&rehearsal));
    let unknown = run(&["h:1", here, "-f", "-o", "hitherto"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        told(&unknown).starts_with("mount.quorumfs: "),
        "{}",
        told(&unknown)
    );
    let sloppy = run(&["h:1", here, "-fs", "-o", "hitherto"]);
    assert_eq!(sloppy.status.code(), Some(0), "{}", told(&sloppy));
}
