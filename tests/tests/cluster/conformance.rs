//! What others say that a filesystem must do: pjdfstest and fsx, both from crates.io.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use quorumfs_tests::environment::tool;
use quorumfs_tests::{Cluster, Random, Sandbox};

/// Cases of pjdfstest that fail, each with its reason. One that passes must be taken from the list.
const KNOWN_FAILURES: &[(&str, &str)] = &[];

/// What pjdfstest is told: all optional features but birth time, which FUSE does not carry; a nap longer than the
/// granularity of our timestamps, which is a nanosecond.
const PJDFSTEST_CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// fsx' own weights leave out what a filesystem gets wrong most easily. Not punch_hole: fallocate(2) is not there yet, so
/// that answers EOPNOTSUPP, and fsx stops at it.
const FSX_CONFIGURATION: &str = "[weights]\ncopy_file_range = 1\nposix_fallocate = 1\n";

#[test]
fn pjdfstest_finds_nothing_new() {
    let Some(program) = tool("pjdfstest") else { return };
    // Short, since a socket's path may have 107 bytes, and the suite's own names are long.
    let sandbox = Sandbox::heavy("pj");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let (configuration, place) = (sandbox.path("pjdfstest.toml"), mount.path("p"));
    fs::write(&configuration, PJDFSTEST_CONFIGURATION).expect("write");
    fs::create_dir(&place).expect("mkdir");
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", "600"])
        .arg(program)
        .env("RUST_BACKTRACE", "0");
    command
        .arg("-c")
        .arg(configuration)
        .arg("-p")
        .arg(&place)
        .arg("-s")
        .arg(sandbox.make_folder("secondary"));
    let output = command.output().expect("run pjdfstest");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let summary = said.lines().find(|line| line.starts_with("Summary"));
    let verdict = |word: &str| -> Vec<&str> {
        let of = said.lines().filter(|line| line.trim_end().ends_with(word));
        of.filter_map(|line| line.split_whitespace().next()).collect()
    };
    let (failed, passed) = (verdict("FAILED"), verdict(" ok"));
    let summary = summary.unwrap_or_else(|| panic!("pjdfstest did not end:\n{said}"));
    eprintln!("measured: {summary}");
    let known: BTreeMap<&str, &str> = KNOWN_FAILURES.iter().copied().collect();
    let unknown: Vec<&&str> = failed.iter().filter(|name| !known.contains_key(**name)).collect();
    assert!(unknown.is_empty(), "failed: {unknown:#?}\n{said}");
    let mended: Vec<&&str> = passed.iter().filter(|name| known.contains_key(**name)).collect();
    assert!(
        mended.is_empty(),
        "pass now, take them from KNOWN_FAILURES: {mended:?}"
    );
    assert!(
        passed.len() + known.len() >= 380,
        "only {} passed: {summary}",
        passed.len()
    );
    mount.unmount();
}

#[test]
fn fsx_finds_nothing() {
    let Some(program) = tool("fsx") else { return };
    let sandbox = Sandbox::light("conformance-fsx");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let configuration = sandbox.path("fsx.toml");
    fs::write(&configuration, FSX_CONFIGURATION).expect("write");
    for (round, seed) in [42, 43, random.below(1 << 31)].into_iter().enumerate() {
        let mut command = Command::new("timeout");
        command
            .args(["-k", "5", "240"])
            .arg(&program)
            .args(["-N", "5000", "-S", &seed.to_string()]);
        if round > 0 {
            command.arg("-f").arg(&configuration);
        }
        command
            .arg("-P")
            .arg(sandbox.make_folder("fsx"))
            .arg(mount.path(format!("fsx-{seed}")));
        let output = command.output().expect("run fsx");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let shown = said.lines().count().saturating_sub(60);
        let end: Vec<&str> = said.lines().skip(shown).collect();
        assert!(
            output.status.success(),
            "fsx with seed {seed}: {}\n{}",
            output.status,
            end.join("\n")
        );
    }
    mount.unmount();
}
