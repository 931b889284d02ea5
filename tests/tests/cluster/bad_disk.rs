//! Disks that are damaged or full.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use quorumfs_tests::damage::{bad_sectors_library, files_below, find_bytes, flip, last_used_byte};
use quorumfs_tests::environment::wait_for;
use quorumfs_tests::healing::{SeededFile, ask, assert_same_metadata, assert_served, content_folder, upload};
use quorumfs_tests::random::Content;
use quorumfs_tests::{Cluster, Random, Sandbox, posix, shell};

/// The files of a node's log, by what their path says.
fn log_files(cluster: &Cluster, slot: usize) -> Vec<PathBuf> {
    let data = cluster.data_folder(slot);
    let is_log = |path: &PathBuf| {
        let below = path
            .strip_prefix(data)
            .expect("below the data folder")
            .to_string_lossy()
            .to_lowercase();
        below.contains("wal") || below.contains("log")
    };
    let files: Vec<PathBuf> = files_below(data).into_iter().filter(is_log).collect();
    assert!(!files.is_empty(), "no log in {:?}", files_below(data));
    files
}

#[test]
fn damage_in_the_flushed_part_of_the_log_is_named_and_the_node_does_not_vote_with_it() {
    let sandbox = Sandbox::light("bad-wal");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    (0..400).for_each(|n| fs::create_dir(mount.path(format!("wal-marker-{n:04}"))).expect("mkdir"));
    let damaged = cluster.followers()[0];
    let before = cluster.status(damaged).expect("status").node.incarnation;
    cluster.kill(damaged);
    let logs = log_files(&cluster, damaged);
    // Not the last ones: those that later flushes are known to have followed. More than one, should a part of the
    // log be done with already.
    let mut places = Vec::new();
    for n in [200, 300, 350, 380] {
        let needle = format!("wal-marker-{n:04}");
        places.extend(
            find_bytes(cluster.data_folder(damaged), needle.as_bytes())
                .into_iter()
                .filter(|(file, _)| logs.contains(file)),
        );
    }
    assert!(!places.is_empty(), "the log holds what was logged");
    places.iter().for_each(|(file, at)| flip(file, *at + 3));
    cluster.start_node(damaged);
    let line = cluster.wait_log(
        damaged,
        &["damage", "corrupt", "checksum", "crc"],
        Duration::from_secs(20),
    );
    eprintln!("said: {line}");
    std::thread::sleep(Duration::from_secs(3));
    match cluster.ended(damaged) {
        Some(status) => assert!(!status.success()),
        None => {
            let status = cluster.status(damaged).expect("status");
            assert!(
                !["leader", "follower", "candidate"].contains(&status.role.as_str())
                    || status.node.incarnation != before,
                "it votes with a damaged log: {status:?}"
            );
        }
    }
    // The cluster goes on and has everything.
    assert_eq!(fs::read_dir(mount.directory()).expect("list").count(), 400);
    fs::create_dir(mount.path("after")).expect("mkdir");
    mount.unmount();
}

#[test]
fn a_torn_tail_of_the_log_is_cut_and_the_node_goes_on() {
    let sandbox = Sandbox::light("bad-torn-tail");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    (0..100).for_each(|n| fs::create_dir(mount.path(format!("before-{n}"))).expect("mkdir"));
    let torn = cluster.followers()[0];
    for round in 0..5 {
        cluster.kill(torn);
        // The newest file's last bytes, as a power cut in the middle of a write leaves them.
        let newest = log_files(&cluster, torn)
            .into_iter()
            .filter(|path| last_used_byte(path).is_some())
            .max_by_key(|path| path.metadata().expect("stat").modified().expect("mtime"))
            .expect("a log with something in it");
        let last = last_used_byte(&newest).expect("not empty");
        (0..=random.below(6)).for_each(|back| flip(&newest, last - back));
        fs::create_dir(mount.path(format!("meanwhile-{round}"))).expect("mkdir");
        cluster.start_node(torn);
        cluster.wait_ready();
        cluster.wait_at_rest();
        assert_eq!(cluster.status(torn).expect("status").role, "follower");
    }
    let other = cluster
        .followers()
        .into_iter()
        .find(|slot| *slot != torn)
        .expect("two followers");
    cluster.kill(other);
    cluster.leader();
    assert_eq!(fs::read_dir(mount.directory()).expect("list").count(), 105);
    mount.unmount();
}

/// A folder on a disk of its own with so much room.
fn small_disk(sandbox: &Sandbox, name: &str, mebibytes: u64) -> PathBuf {
    let folder = sandbox.make_folder(name);
    shell(&format!(
        "mount -t tmpfs -o size={mebibytes}m none '{}'",
        folder.display()
    ));
    folder.join("data")
}

fn write_synced(path: &Path, seed: u64, bytes: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    std::io::copy(&mut Content::new(seed, bytes), &mut file)?;
    file.sync_all()?;
    posix::close(file)
}

#[test]
fn full_disks_are_enospc_and_deleting_makes_room_again() {
    const FILE_BYTES: u64 = 8 << 20;
    let sandbox = Sandbox::heavy("bad-full-disks");
    let builder = Cluster::builder(&sandbox);
    let cluster = (1..=3)
        .fold(builder, |builder, slot| {
            builder.data_folder(slot, small_disk(&sandbox, &format!("disk-{slot}"), 1024))
        })
        .start();
    let ids: Vec<i32> = cluster.slots().map(|slot| cluster.process_id(slot)).collect();
    let mount = cluster.mount();
    let at = |number: u64| mount.path(format!("file-{number}"));
    let mut kept = 0u64;
    let error = loop {
        assert!(kept < 200, "1 GiB was never full");
        match write_synced(&at(kept), kept, FILE_BYTES) {
            Ok(()) => kept += 1,
            Err(error) => break error,
        }
    };
    eprintln!("full after {} MiB: {error}", (kept * FILE_BYTES) >> 20);
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    assert!(kept >= 20, "full after {kept} files of 8 MiB on a disk of 1 GiB");
    // By REST it is an answer too: 507 Insufficient Storage.
    cluster
        .http(2)
        .post("/upload/too-much", vec![1; FILE_BYTES as usize])
        .expect(&[507]);
    for slot in cluster.slots() {
        assert!(
            cluster.ended(slot).is_none(),
            "node {slot} ended: {}",
            cluster.log(slot)
        );
    }
    posix::drop_caches();
    for number in 0..kept {
        let name = format!("file-{number}");
        Content::new(number, FILE_BYTES).assert_equals(File::open(at(number)).expect("open"), &name);
    }
    // Every node says so, whichever leads.
    for slot in cluster.slots() {
        wait_for(
            &format!("node {slot} says that nothing can be written"),
            Duration::from_secs(10),
            || {
                cluster.http(slot).get("/readyz").status == 503
                    && cluster.status(slot).is_ok_and(|status| !status.writable)
            },
        );
    }
    // Whatever the failed write left may go too. Who comes anew can delete as well.
    let _ = fs::remove_file(at(kept));
    let newcomer = cluster.mount();
    for number in 0..kept / 2 {
        fs::remove_file(newcomer.path(format!("file-{number}"))).expect("deleting works on a full disk");
    }
    newcomer.unmount();
    wait_for("there is room again", Duration::from_secs(60), || {
        write_synced(&mount.path("again"), 77, FILE_BYTES).is_ok()
    });
    for slot in cluster.slots() {
        wait_for(
            &format!("node {slot} is ready again"),
            Duration::from_secs(10),
            || cluster.http(slot).get("/readyz").status == 200,
        );
    }
    Content::new(77, FILE_BYTES).assert_equals(File::open(mount.path("again")).expect("open"), "again");
    for number in kept / 2..kept {
        Content::new(number, FILE_BYTES)
            .assert_equals(File::open(at(number)).expect("open"), "a file that was kept");
    }
    assert_eq!(
        ids,
        cluster
            .slots()
            .map(|slot| cluster.process_id(slot))
            .collect::<Vec<_>>(),
        "no node was restarted"
    );
    mount.unmount();
    cluster.wait_at_rest();
}

#[test]
fn one_full_disk_stops_nobody_and_is_made_whole_when_it_has_room() {
    let sandbox = Sandbox::heavy("bad-one-full-disk");
    let cluster = Cluster::builder(&sandbox)
        .data_folder(3, small_disk(&sandbox, "disk", 512))
        .start();
    let mount = cluster.mount();
    // More than it has room for.
    for number in 0..80u64 {
        write_synced(&mount.path(format!("{number}")), number, 8 << 20).expect("the others have room");
    }
    assert!(
        cluster.ended(3).is_none(),
        "the node with the full disk stays up: {}",
        cluster.log(3)
    );
    let disk = sandbox.path("disk");
    shell(&format!("mount -o remount,size=2048m '{}'", disk.display()));
    cluster.wait_at_rest();
    let recovery = cluster.recovery_status(3).expect("recovery status");
    assert!(
        recovery.held_chunks >= recovery.named_chunks && recovery.named_chunks > 0,
        "{recovery:?}"
    );
    mount.unmount();
}

#[test]
fn a_small_disk_full_of_small_files_takes_deletes_and_is_made_whole_by_itself() {
    const LARGE_BYTES: u64 = 8 << 20;
    const LARGE_FILES: u64 = 48;
    // What rides inside commands: twice what waited in memory once, and more than the log has room for.
    const SMALL_BYTES: u64 = 32 << 10;
    const SMALL_FILES: u64 = 6_000;
    const WRITERS: u64 = 4;
    const KEPT: u64 = 50;
    let sandbox = Sandbox::heavy("bad-small-follower");
    let cluster = Cluster::builder(&sandbox)
        .data_folder(3, small_disk(&sandbox, "disk", 512))
        .start();
    let mount = cluster.mount();
    let large = |number: u64| mount.path(format!("large-{number}"));
    let small = |number: u64| mount.path(format!("small-{number}"));
    for number in 0..LARGE_FILES {
        write_synced(&large(number), number, LARGE_BYTES).expect("the others have room");
    }
    let write_small = |from: u64, to: u64| {
        std::thread::scope(|threads| {
            for writer in 0..WRITERS {
                threads.spawn(move || {
                    for number in (from..to).filter(|number| number % WRITERS == writer) {
                        write_synced(&small(number), number, SMALL_BYTES).expect("the others have room");
                    }
                });
            }
        });
    };
    write_small(0, SMALL_FILES / 2);
    assert!(cluster.ended(3).is_none(), "{}", cluster.log(3));
    // What only its log has it finds again.
    cluster.restart(3);
    write_small(SMALL_FILES / 2, SMALL_FILES);
    let missing = cluster
        .recovery_status(3)
        .expect("recovery status")
        .missing_chunks;
    eprintln!("{missing} chunks found no room");
    assert!(missing > 0, "the disk was not full");
    let is_kept = |number: &u64| number.is_multiple_of(KEPT);
    for number in (0..SMALL_FILES).filter(|number| !is_kept(number)) {
        fs::remove_file(small(number)).expect("deleting works");
    }
    for number in 1..LARGE_FILES {
        fs::remove_file(large(number)).expect("deleting works");
    }
    // Nobody helps. What is removed is kept until the session of the node that was killed has ended.
    wait_for("what is left is held by all", Duration::from_secs(150), || {
        cluster.slots().all(|slot| {
            cluster
                .recovery_status(slot)
                .is_ok_and(|status| status.missing_chunks == 0 && status.named_chunks < LARGE_FILES * 8)
        })
    });
    cluster.wait_at_rest();
    wait_for("the small disk has room", Duration::from_secs(60), || {
        cluster.http(3).get("/status").json::<serde_json::Value>()["space"]["has_room"] == true
    });
    assert!(cluster.ended(3).is_none(), "{}", cluster.log(3));
    assert_same_metadata(&cluster);
    let kept = (0..SMALL_FILES)
        .filter(is_kept)
        .map(|number| (format!("small-{number}"), number, SMALL_BYTES));
    let kept: Vec<SeededFile> = kept.chain([("large-0".to_string(), 0, LARGE_BYTES)]).collect();
    for slot in cluster.slots() {
        assert_served(&cluster, slot, &kept);
    }
    let recovery = cluster.recovery_status(3).expect("recovery status");
    assert!(recovery.held_chunks >= recovery.named_chunks, "{recovery:?}");
    mount.unmount();
}

#[test]
fn with_one_node_dead_and_another_full_writes_are_enospc() {
    const FILE_BYTES: u64 = 8 << 20;
    let sandbox = Sandbox::heavy("bad-dead-and-full");
    let cluster = Cluster::builder(&sandbox)
        .data_folder(2, small_disk(&sandbox, "disk", 512))
        .start();
    let mount = cluster.mount();
    let at = |number: u64| mount.path(format!("file-{number}"));
    for number in 0..60 {
        write_synced(&at(number), number, FILE_BYTES).expect("two have room");
    }
    cluster.kill(3);
    let began = std::time::Instant::now();
    let error = (60..).find_map(|number| write_synced(&at(number), number, FILE_BYTES).err());
    let error = error.expect("nobody takes a second copy");
    eprintln!("after {:?}: {error}", began.elapsed());
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    for number in 0..40 {
        fs::remove_file(at(number)).expect("deleting works");
    }
    wait_for("there is room again", Duration::from_secs(120), || {
        write_synced(&mount.path("again"), 77, FILE_BYTES).is_ok()
    });
    cluster.start_node(3);
    cluster.wait_ready();
    cluster.wait_at_rest();
    mount.unmount();
}

/// How long a node takes from its start until it serves.
fn time_to_start(cluster: &Cluster, slot: usize) -> Duration {
    let began = Instant::now();
    cluster.start_node(slot);
    wait_for(&format!("node {slot} serves"), Duration::from_secs(60), || {
        assert!(cluster.ended(slot).is_none(), "{}", cluster.log(slot));
        cluster
            .http(slot)
            .try_get("/readyz")
            .is_ok_and(|reply| reply.status == 200)
    });
    began.elapsed()
}

#[test]
fn a_node_starts_with_unreadable_sectors_and_fetches_what_they_held() {
    const SLOT: usize = 2;
    let sandbox = Sandbox::light("bad-sectors");
    let mut random = Random::announced();
    let library = bad_sectors_library(&sandbox);
    let list = sandbox.path("bad-sectors");
    fs::write(&list, "").expect("write the list");
    let text = |path: &Path| path.to_str().expect("UTF-8").to_string();
    let cluster = Cluster::builder(&sandbox)
        .variable(SLOT, "LD_PRELOAD", &text(&library))
        .variable(SLOT, "QUORUMFS_TEST_BAD_SECTORS", &text(&list))
        .start();
    let files = upload(&cluster, 1, "sectors", (0..12).map(|_| 2 << 20), &mut random);
    cluster.wait_at_rest();
    let incarnation = cluster.status(SLOT).expect("status").node.incarnation;
    // A segment has its footer when it is opened again.
    cluster.kill(SLOT);
    let healthy = time_to_start(&cluster, SLOT);
    cluster.wait_at_rest();
    cluster.kill(SLOT);
    let mut segments = files_below(&content_folder(&cluster, SLOT));
    segments.sort_by_key(|path| path.metadata().expect("stat").len());
    let segment = segments.pop().expect("a segment");
    let end = segment.metadata().expect("stat").len();
    let path = segment.display();
    let (middle, last) = (end / 2 / 4096 * 4096, end - 1);
    let bad = format!(
        "{path} 0 4096\n{path} {middle} {}\n{path} {last} {end}\n",
        middle + 4096
    );
    fs::write(&list, bad).expect("write the list");
    let took = time_to_start(&cluster, SLOT);
    eprintln!(
        "measured: {took:?} to start with unreadable sectors in a segment of {end} bytes, {healthy:?} without"
    );
    let incarnation_now = cluster.status(SLOT).expect("status").node.incarnation;
    assert_eq!(incarnation_now, incarnation, "it is who it was");
    cluster.wait_at_rest();
    let status = ask(&cluster, SLOT, "/repair/status");
    let aside = status["files_set_aside"][0].as_str().expect("the file is named");
    assert!(
        aside.contains("/unreadable-segment-") && Path::new(aside).is_file(),
        "{status}"
    );
    assert!(
        cluster.log(SLOT).contains(aside),
        "the log names it: {}",
        cluster.log(SLOT)
    );
    assert!(!segment.exists());
    let recovery = cluster.recovery_status(SLOT).expect("recovery status");
    assert_eq!(recovery.missing_chunks, 0, "{recovery:?}");
    assert!(recovery.held_chunks >= recovery.named_chunks, "{recovery:?}");
    assert!(
        (1..=6).contains(&recovery.fetched_chunks),
        "only what could not be read was fetched: {recovery:?}"
    );
    assert_served(&cluster, SLOT, &files);
}

#[test]
fn what_a_node_keeps_is_for_its_user_alone() {
    let sandbox = Sandbox::light("bad-permissions");
    let mut random = Random::announced();
    let builder = Cluster::builder(&sandbox);
    let folder = sandbox.make_folder("readable");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).expect("chmod");
    let cluster = builder.data_folder(1, folder).start();
    upload(&cluster, 1, "private", [100, 3 << 20].into_iter(), &mut random);
    cluster.wait_at_rest();
    let open_to_others = |slot: usize| {
        let found = shell(&format!(
            "find '{}' -perm /077 -printf '%m %p\n'",
            cluster.data_folder(slot).display()
        ));
        found.lines().map(str::to_string).collect::<Vec<_>>()
    };
    for slot in cluster.slots() {
        assert_eq!(open_to_others(slot), [] as [String; 0], "node {slot}");
    }
    // As an earlier version left it.
    cluster.kill(1);
    shell(&format!("chmod -R go+rX '{}'", cluster.data_folder(1).display()));
    assert!(open_to_others(1).len() > 3, "{:?}", open_to_others(1));
    cluster.start_node(1);
    cluster.wait_ready();
    cluster.wait_at_rest();
    assert_eq!(open_to_others(1), [] as [String; 0]);
}
