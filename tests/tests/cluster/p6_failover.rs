//! P6: while no leader is there, calls wait; they do not fail.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use quorumfs_tests::environment::{Finally, pause_max, wait_for};
use quorumfs_tests::healing::assert_same_metadata;
use quorumfs_tests::mount::MountOptions;
use quorumfs_tests::prober::Prober;
use quorumfs_tests::random::Content;
use quorumfs_tests::tree::{self, TreeSize};
use quorumfs_tests::{Cluster, Mount, Random, Sandbox, scaled, shell};

/// Between two failures, as long as the promise says.
const APART: Duration = Duration::from_secs(10);

/// Works in the mount as users do, in three ways at once, while `fail` breaks things; each way checks its results as
/// it goes and once more in the end. A command that fails, or only prints an error, fails the test.
fn work_while(sandbox: &Sandbox, mount: &Mount, random: &mut Random, fail: impl FnOnce()) {
    let original = sandbox.path("original");
    tree::make(&original, TreeSize::SMALL, random);
    // tar leaves sockets out and says so.
    fs::remove_file(original.join("oddities/special-socket")).expect("remove the socket");
    let archive = sandbox.path("tree.tar");
    shell(&format!(
        "tar --xattrs -S -cf '{}' -C '{}' .",
        archive.display(),
        original.display()
    ));
    let large = sandbox.path("large");
    let bytes = scaled(1 << 30);
    std::io::copy(
        &mut Content::new(random.number(), bytes),
        &mut fs::File::create(&large).expect("create"),
    )
    .expect("write the large file");
    let stop = sandbox.path("stop");
    let script = |body: &str| {
        format!(
            "original='{}' archive='{}' large='{}' stop='{}'; cd '{}'; n=0; {body}",
            original.display(),
            archive.display(),
            large.display(),
            stop.display(),
            mount.directory().display()
        )
    };
    let untar = script(
        r#"while [ ! -e "$stop" ] || [ $n = 0 ]; do n=$((n+1)); rm -rf tree; mkdir tree
             tar --warning=no-timestamp --xattrs -xf "$archive" -C tree
             diff -r --no-dereference -x 'special-*' "$original" tree; done; echo $n"#,
    );
    let copy = script(
        r#"while [ ! -e "$stop" ] || [ $n = 0 ]; do n=$((n+1))
             dd if="$large" of=large bs=1M conv=fsync status=none; cmp "$large" large; done; echo $n"#,
    );
    let names = script(
        r#"mkdir names; while [ ! -e "$stop" ]; do n=$((n+1)); mkdir names/a$n; mv names/a$n names/b$n
             echo $n >names/b$n/file; [ "$(cat names/b$n/file)" = $n ]; rm -r names/b$n; done; rmdir names; echo $n"#,
    );
    let prober = Prober::start(&mount.path("probe"));
    let start = Instant::now();
    std::thread::scope(|scope| {
        let workers = [("untar", &untar), ("dd", &copy), ("names", &names)]
            .map(|(what, script)| (what, scope.spawn(move || shell(script))));
        let tell_to_stop = Finally(|| fs::write(&stop, "").expect("tell the workers to stop"));
        fail();
        drop(tell_to_stop);
        for (what, worker) in workers {
            let rounds = worker
                .join()
                .unwrap_or_else(|cause| std::panic::resume_unwind(cause));
            eprintln!("{what}: {} rounds", rounds.trim());
        }
    });
    eprintln!(
        "worked for {:?}, {} MiB each time with dd",
        start.elapsed(),
        bytes >> 20
    );
    let pauses = prober.stop();
    tree::assert_equal(&original, &mount.path("tree"));
    pauses.assert_within(pause_max());
}

#[test]
fn p6_three_kills_of_the_leader_under_load_go_unnoticed() {
    let sandbox = Sandbox::alone("p6-kill-leader");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    work_while(&sandbox, &mount, &mut random, || {
        for _ in 0..3 {
            std::thread::sleep(Duration::from_secs(3));
            let leader = cluster.leader();
            eprintln!("kill -9 of node {leader}, the leader");
            cluster.kill(leader);
            std::thread::sleep(Duration::from_secs(3));
            cluster.start_node(leader);
            std::thread::sleep(APART - Duration::from_secs(6));
        }
    });
    mount.unmount();
    cluster.wait_at_rest();
    assert_same_metadata(&cluster);
}

#[test]
fn p6_a_leader_stopped_for_ten_seconds_goes_unnoticed() {
    let sandbox = Sandbox::alone("p6-stop-leader");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    work_while(&sandbox, &mount, &mut random, || {
        std::thread::sleep(Duration::from_secs(3));
        let leader = cluster.leader();
        eprintln!("SIGSTOP of node {leader}, the leader");
        cluster.signal(leader, Signal::SIGSTOP);
        std::thread::sleep(APART);
        cluster.signal(leader, Signal::SIGCONT);
        std::thread::sleep(Duration::from_secs(5));
    });
    mount.unmount();
    cluster.wait_at_rest();
    assert_same_metadata(&cluster);
}

#[test]
fn p6_calls_wait_while_there_is_no_quorum_and_go_on_when_there_is_one() {
    let sandbox = Sandbox::light("p6-wait");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    fs::write(mount.path("before"), "before").expect("write");
    for slot in cluster.followers() {
        cluster.kill(slot);
    }
    std::thread::scope(|scope| {
        let path = mount.path("during");
        let writer = scope.spawn(move || fs::write(path, "during"));
        std::thread::sleep(Duration::from_secs(4));
        assert!(!writer.is_finished(), "a write was answered without a quorum");
        for slot in cluster.slots() {
            if !cluster.running().contains(&slot) {
                cluster.start_node(slot);
            }
        }
        writer
            .join()
            .expect("no panic")
            .expect("the write succeeds when the quorum is back");
    });
    assert_eq!(fs::read(mount.path("during")).expect("read"), b"during");
    assert_eq!(fs::read(mount.path("before")).expect("read"), b"before");
    mount.unmount();
}

#[test]
fn p6_with_a_timeout_calls_fail_in_time_and_work_again_later() {
    let sandbox = Sandbox::light("p6-timeout");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount_with(MountOptions::options("timeout=2"));
    fs::create_dir(mount.path("before")).expect("mkdir");
    cluster.kill_all();
    let start = Instant::now();
    let error = fs::create_dir(mount.path("during")).expect_err("nobody is there");
    let took = start.elapsed();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    assert!(took >= Duration::from_millis(1_500), "gave up after {took:?}");
    assert!(took <= Duration::from_secs(10), "gave up only after {took:?}");
    cluster.start_all();
    cluster.wait_ready();
    wait_for("the mount recovers by itself", Duration::from_secs(20), || {
        is_made(&mount.path("after"))
    });
    mount.unmount();
}

fn is_made(directory: &Path) -> bool {
    fs::create_dir(directory).is_ok()
}

/// What timed out must not come back: a program that was told of the failure and wrote the file anew keeps what it
/// wrote.
#[test]
fn p6_what_timed_out_never_replaces_what_was_acknowledged_later() {
    const ROUNDS: usize = 4;
    let sandbox = Sandbox::light("p6-overtaken");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount_with(MountOptions::options("timeout=2"));
    let (overwritten, cut, moved) = (mount.path("overwritten"), mount.path("cut"), mount.path("moved"));
    for round in 0..ROUNDS {
        let spare = mount.path("spare");
        for path in [&overwritten, &cut, &moved, &spare] {
            fs::write(path, "before").expect("write with a quorum");
        }
        let stopped = cluster.followers();
        for slot in &stopped {
            cluster.kill(*slot);
        }
        std::thread::scope(|scope| {
            // One MiB of old bytes, a truncation, and a replacement of a name, all in vain.
            scope.spawn(|| {
                let old = vec![b'o'; 1 << 20];
                assert!(
                    write_and_sync(&overwritten, &old).is_err(),
                    "synced without a quorum"
                );
            });
            scope.spawn(|| assert!(fs::File::create(&cut).is_err(), "truncated without a quorum"));
            scope.spawn(|| assert!(fs::rename(&spare, &moved).is_err(), "renamed without a quorum"));
        });
        for slot in &stopped {
            cluster.start_node(*slot);
        }
        let new = format!("new content of round {round}");
        for path in [&overwritten, &cut, &moved] {
            wait_for("the mount works again", Duration::from_secs(20), || {
                write_and_sync(path, new.as_bytes()).is_ok()
            });
        }
        std::thread::sleep(Duration::from_secs(3));
        for path in [&overwritten, &cut, &moved] {
            let left = fs::read(path).expect("read");
            assert!(
                left == new.as_bytes(),
                "round {round}: {} has {} bytes of something else",
                path.display(),
                left.len()
            );
        }
    }
    mount.unmount();
}

/// Writes over what is there, and cuts behind it only then.
fn write_and_sync(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()?;
    file.set_len(content.len() as u64)
}
