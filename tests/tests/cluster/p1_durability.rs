//! P1: nothing acknowledged is lost.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use quorumfs_tests::mount::{MountOptions, unmount_lazily};
use quorumfs_tests::random::Content;
use quorumfs_tests::trace::{Flush, Trace, now};
use quorumfs_tests::{Cluster, Random, Sandbox, posix, wait_until};

/// What a writer was told: a directory, a file with this content (seed, length), or that it is gone.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    Directory,
    File(u64, u64),
    Gone,
}

/// Works in `folder` until the first call that fails. Answers what was acknowledged, less what the failed call was
/// about (that may have happened or not).
fn write_until_the_end(folder: &Path, mut random: Random) -> BTreeMap<PathBuf, Known> {
    let mut known: BTreeMap<PathBuf, Known> = BTreeMap::new();
    for number in 0.. {
        let path = folder.join(format!("{number}"));
        let earlier = folder.join(format!("{}", random.below(number + 1)));
        let is_file = |path: &PathBuf| matches!(known.get(path), Some(Known::File(..)));
        let (touched, changes, result) = match random.below(5) {
            0 => (
                vec![path.clone()],
                vec![(path.clone(), Known::Directory)],
                fs::create_dir(&path),
            ),
            1 if is_file(&earlier) => {
                let changes = vec![(path.clone(), known[&earlier]), (earlier.clone(), Known::Gone)];
                (
                    vec![path.clone(), earlier.clone()],
                    changes,
                    fs::rename(&earlier, &path),
                )
            }
            2 if is_file(&earlier) => (
                vec![earlier.clone()],
                vec![(earlier.clone(), Known::Gone)],
                fs::remove_file(&earlier),
            ),
            kind => {
                let (seed, length) = (random.number(), random.below(200_000));
                let write = || {
                    let mut file = File::create(&path)?;
                    std::io::copy(&mut Content::new(seed, length), &mut file)?;
                    if kind == 3 {
                        file.sync_all()?;
                    }
                    posix::close(file)
                };
                (
                    vec![path.clone()],
                    vec![(path.clone(), Known::File(seed, length))],
                    write(),
                )
            }
        };
        if result.is_err() {
            known.retain(|path, _| !touched.contains(path));
            return known;
        }
        known.extend(changes);
    }
    unreachable!("numbers do not end")
}

fn check(known: &BTreeMap<PathBuf, Known>) {
    for (path, what) in known {
        match what {
            Known::Directory => assert!(path.is_dir(), "directory {} is lost", path.display()),
            Known::Gone => assert!(path.symlink_metadata().is_err(), "{} is back", path.display()),
            Known::File(seed, length) => {
                let file =
                    File::open(path).unwrap_or_else(|e| panic!("file {} is lost: {e}", path.display()));
                Content::new(*seed, *length).assert_equals(file, &path.display().to_string());
            }
        }
    }
}

#[test]
fn p1_kill_of_every_process_at_once_loses_nothing_acknowledged() {
    let sandbox = Sandbox::heavy("p1-kill-everything");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let place = sandbox.make_folder("mnt");
    let mut known: BTreeMap<PathBuf, Known> = BTreeMap::new();
    for round in 0..3 {
        let mut mount = cluster.mount_with(MountOptions::at(&place));
        check(&known);
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..6)
                .map(|writer| {
                    let folder = mount.path(format!("round-{round}-writer-{writer}"));
                    fs::create_dir(&folder).expect("mkdir");
                    let random = Random::seeded(random.number());
                    scope.spawn(move || write_until_the_end(&folder, random))
                })
                .collect();
            std::thread::sleep(Duration::from_millis(2_000 + random.below(2_000)));
            cluster.kill_all();
            mount.kill();
            for writer in writers {
                let acknowledged = writer.join().expect("a writer does not panic");
                eprintln!("round {round}: {} acknowledged", acknowledged.len());
                assert!(
                    !acknowledged.is_empty(),
                    "nothing was acknowledged before the kill"
                );
                known.extend(acknowledged);
            }
        });
        drop(mount);
        unmount_lazily(&place);
        cluster.start_all();
        cluster.wait_ready();
    }
    let mount = cluster.mount_with(MountOptions::at(&place));
    check(&known);
    cluster.wait_at_rest();
    mount.unmount();
}

/// Numbered files, each closed before the next is made, of sizes that differ as much as they can: what is handed over
/// takes long for some and next to nothing for those right behind them.
fn numbered_content(number: usize) -> Content {
    let length = match number % 4 {
        0 => 6 << 20,
        1 => 1,
        2 => 300_000,
        _ => 5_000,
    };
    Content::new(number as u64, length)
}

#[test]
fn p1_with_durability_fsync_a_crash_leaves_a_prefix_and_all_that_was_synced() {
    let sandbox = Sandbox::light("p1-prefix");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let place = sandbox.make_folder("mnt");
    for round in 0..3 {
        let mut options = MountOptions::at(&place);
        options.options = Some("durability=fsync".into());
        let mut mount = cluster.mount_with(options);
        let folder = place.join(format!("round-{round}"));
        fs::create_dir(&folder).expect("mkdir");
        let synced = 20;
        let last = std::thread::scope(|scope| {
            let (sender, reached) = std::sync::mpsc::channel();
            let folder = &folder;
            scope.spawn(move || {
                let make = |number: usize| {
                    let mut file = File::create(folder.join(format!("{number:05}")))?;
                    std::io::copy(&mut numbered_content(number), &mut file)?;
                    posix::close(file)?;
                    match number % 5 {
                        0 => fs::create_dir(folder.join(format!("{number:05}.directory"))),
                        _ => Ok(()),
                    }
                };
                for number in 0.. {
                    if make(number).is_err()
                        || (number + 1 == synced && posix::sync_directory(folder).is_err())
                    {
                        return;
                    }
                    let _ = sender.send(number + 1);
                }
            });
            wait_until("the synced part is made", Duration::from_secs(60), || {
                reached.try_iter().last().filter(|made| *made >= synced)
            });
            std::thread::sleep(Duration::from_millis(random.below(600)));
            cluster.kill_all();
            mount.kill();
            reached.iter().last().unwrap_or(synced)
        });
        drop(mount);
        unmount_lazily(&place);
        cluster.start_all();
        cluster.wait_ready();
        let mount = cluster.mount_with(MountOptions::at(&place));
        let is_whole = |number: usize| {
            let path = folder.join(format!("{number:05}"));
            let mut expected = Vec::new();
            std::io::copy(&mut numbered_content(number), &mut expected).expect("make the content");
            let directory = folder.join(format!("{number:05}.directory"));
            (
                fs::read(path).is_ok_and(|left| left == expected),
                directory.is_dir() || !number.is_multiple_of(5),
            )
        };
        let left = (0..)
            .take_while(|number| is_whole(*number) == (true, true))
            .count();
        eprintln!("made {last}, left {left}");
        assert!(left >= synced, "{left} of {synced} synced files are left");
        // The first that is not whole may be there in part; what was made after it must not be there at all.
        let later: Vec<_> = fs::read_dir(&folder)
            .expect("list")
            .map(|entry| entry.expect("list").file_name().into_string().expect("a number"))
            .filter(|name| name.as_str() > format!("{left:05}.directory").as_str())
            .collect();
        assert!(
            later.is_empty(),
            "after {left} whole files there are {later:?}: no prefix"
        );
        assert!(
            is_whole(left) != (false, true) || left % 5 != 0,
            "a directory overtook the file before it"
        );
        mount.unmount();
    }
}

/// The nodes that flushed between `start` and `end`, and how many different files each flushed.
fn files_flushed(traces: &[Vec<Flush>], start: Duration, end: Duration) -> Vec<usize> {
    let of_node = |flushes: &Vec<Flush>| {
        let within = flushes
            .iter()
            .filter(|flush| start <= flush.done && flush.done <= end);
        let mut files: Vec<&str> = within.map(|flush| flush.file.as_str()).collect();
        files.sort_unstable();
        files.dedup();
        files.len()
    };
    traces.iter().map(of_node).collect()
}

#[test]
fn p1_each_acknowledged_call_follows_a_flush_on_two_nodes() {
    const REPEATS: usize = 15;
    let sandbox = Sandbox::alone("p1-strace");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    fs::write(mount.path("warm"), "up").expect("write");
    let traces: Vec<Trace> = cluster
        .slots()
        .map(|slot| Trace::attach(&sandbox, &format!("node-{slot}"), cluster.process_id(slot)))
        .collect();
    // Each is done at a quiet moment, so that a flush within its time is its own.
    let at = |name: &str, number: usize| mount.path(format!("{name}-{number}"));
    let write = |path: PathBuf, length: usize| {
        let mut file = File::create(path).expect("create");
        file.write_all(&vec![7; length]).expect("write");
        file
    };
    type Call<'a> = Box<dyn Fn(usize) + 'a>;
    let calls: [(&str, usize, Call); 7] = [
        (
            "mkdir",
            1,
            Box::new(|n| fs::create_dir(at("d", n)).expect("mkdir")),
        ),
        (
            "close of a small file",
            1,
            Box::new(|n| posix::close(write(at("s", n), 4096)).expect("close")),
        ),
        // Two files on each: the segment with the content, then the log.
        (
            "close of a large file",
            2,
            Box::new(|n| posix::close(write(at("l", n), 1 << 20)).expect("close")),
        ),
        (
            "fsync",
            1,
            Box::new(|n| write(at("y", n), 4096).sync_all().expect("fsync")),
        ),
        (
            "rename",
            1,
            Box::new(|n| fs::rename(at("d", n), at("r", n)).expect("rename")),
        ),
        (
            "link",
            1,
            Box::new(|n| fs::hard_link(at("s", n), at("h", n)).expect("link")),
        ),
        (
            "unlink",
            1,
            Box::new(|n| fs::remove_file(at("h", n)).expect("unlink")),
        ),
    ];
    let mut windows = Vec::new();
    for (name, files, call) in &calls {
        for number in 0..REPEATS {
            std::thread::sleep(Duration::from_millis(40));
            let start = now();
            call(number);
            windows.push((*name, *files, start, now()));
        }
    }
    // The control: what changes nothing flushes nothing. Without it, nodes that flush all the time would pass.
    let mut quiet = Vec::new();
    for number in 0..REPEATS {
        std::thread::sleep(Duration::from_millis(40));
        let start = now();
        assert!(at("nothing", number).symlink_metadata().is_err());
        quiet.push((start, now()));
    }
    let traces: Vec<Vec<Flush>> = traces.into_iter().map(Trace::stop).collect();
    for (name, files, start, end) in &windows {
        let flushed = files_flushed(&traces, *start, *end);
        let nodes = flushed.iter().filter(|count| *count >= files).count();
        assert!(
            nodes >= 2,
            "{name}: acknowledged after {:?}, files flushed by each node: {flushed:?}",
            *end - *start
        );
    }
    let busy = quiet
        .iter()
        .filter(|(start, end)| files_flushed(&traces, *start, *end).iter().any(|n| *n > 0));
    assert!(
        busy.count() <= REPEATS / 3,
        "nodes flush although nothing is written: the test shows nothing"
    );
    eprintln!(
        "measured: {} calls, each after a flush on two nodes or three",
        windows.len()
    );
}

#[test]
fn p1_concurrent_calls_share_their_flushes() {
    const THREADS: usize = 64;
    const CALLS: usize = 20;
    let sandbox = Sandbox::alone("p1-group-commit");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let leader = cluster.leader();
    let before = cluster.status(leader).expect("status").wal;
    let trace = Trace::attach(&sandbox, "leader", cluster.process_id(leader));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let folder = mount.path(format!("{thread}"));
            scope.spawn(move || {
                fs::create_dir(&folder).expect("mkdir");
                (1..CALLS)
                    .for_each(|number| fs::create_dir(folder.join(format!("{number}"))).expect("mkdir"));
            });
        }
    });
    let flushes = trace.stop().len();
    let after = cluster.status(leader).expect("status").wal;
    let calls = (THREADS * CALLS) as u64;
    let (counted, entries) = (
        after.flushes - before.flushes,
        after.entries_flushed - before.entries_flushed,
    );
    eprintln!(
        "measured: {calls} calls, {entries} entries in {counted} flushes of the log; strace saw {flushes} flushes"
    );
    assert!(entries >= calls, "{entries} entries for {calls} calls");
    assert!(counted <= calls / 2, "{counted} flushes for {calls} calls");
    assert!(
        flushes as u64 <= calls,
        "{flushes} flushes of whatever file for {calls} calls"
    );
}
