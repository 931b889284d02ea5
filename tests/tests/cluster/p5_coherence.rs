//! P5: a call that starts after another returned sees its effect, on any mount, through any node.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use quorumfs_tests::{Cluster, Random, Sandbox};

#[test]
fn p5_what_one_mount_did_the_other_sees_at_once() {
    let sandbox = Sandbox::light("p5-two-mounts");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mounts = [cluster.mount(), cluster.mount()];
    for round in 0..200 {
        let (here, there) = (&mounts[round % 2], &mounts[(round + 1) % 2]);
        let name = format!("entry-{}", random.below(20));
        let (own, other) = (here.path(&name), there.path(&name));
        // Looked at before, so that a stale cache would show.
        let before = other.symlink_metadata().ok();
        assert_eq!(
            before.is_some(),
            own.symlink_metadata().is_ok(),
            "round {round}: {name}"
        );
        match (before, random.below(3)) {
            (None, _) => {
                fs::write(&own, round.to_string()).expect("write");
                assert_eq!(
                    fs::read_to_string(&other).expect("read"),
                    round.to_string(),
                    "round {round}: {name}"
                );
            }
            (Some(_), 0) => {
                fs::remove_file(&own).expect("unlink");
                assert!(
                    other.symlink_metadata().is_err(),
                    "round {round}: {name} is removed"
                );
            }
            (Some(_), 1) => {
                let mode = 0o600 + (random.below(8) as u32) * 8;
                fs::set_permissions(&own, fs::Permissions::from_mode(mode)).expect("chmod");
                let seen = other.metadata().expect("stat").mode() & 0o777;
                assert_eq!(seen, mode, "round {round}: {name}");
            }
            (Some(_), _) => {
                let text = "x".repeat(random.below(100_000) as usize);
                fs::write(&own, &text).expect("write");
                assert!(
                    fs::read_to_string(&other).expect("read") == text,
                    "round {round}: {name} is rewritten"
                );
                let new = format!("renamed-{round}");
                fs::rename(&own, here.path(&new)).expect("rename");
                assert!(
                    other.symlink_metadata().is_err(),
                    "round {round}: {name} is renamed"
                );
                assert_eq!(
                    there.path(&new).metadata().expect("stat").len(),
                    text.len() as u64
                );
            }
        }
    }
    mounts.into_iter().for_each(|mount| mount.unmount());
}

#[test]
fn p5_what_is_flushed_is_seen_by_who_has_the_file_open_elsewhere() {
    let sandbox = Sandbox::light("p5-open");
    let cluster = Cluster::start(&sandbox);
    let (here, there) = (cluster.mount(), cluster.mount());
    let mut writer = OpenOptions::new()
        .create(true)
        .append(true)
        .open(here.path("log"))
        .expect("open");
    let mut expected = String::new();
    for line in 0..30 {
        writeln!(writer, "line {line}").expect("append");
        writer.sync_all().expect("fsync");
        expected.push_str(&format!("line {line}\n"));
        // Close-to-open: a fresh open sees what was flushed before it.
        let mut text = String::new();
        File::open(there.path("log"))
            .expect("open")
            .read_to_string(&mut text)
            .expect("read");
        assert_eq!(text, expected);
        assert_eq!(
            there.path("log").metadata().expect("stat").len(),
            expected.len() as u64
        );
    }
    here.unmount();
    there.unmount();
}

#[test]
fn p5_a_file_that_stays_open_shows_what_another_mount_wrote() {
    let sandbox = Sandbox::light("p5-same-descriptor");
    let cluster = Cluster::start(&sandbox);
    let (here, there) = (cluster.mount(), cluster.mount());
    let mut expected = b"line 0\n".to_vec();
    fs::write(there.path("log"), &expected).expect("write");
    let reader = File::open(here.path("log")).expect("open");
    let seen_by = |reader: &File| {
        // The size first: as `tail -f` does, and so that the kernel knows it when it is asked for the bytes.
        let mut bytes = vec![b'?'; reader.metadata().expect("fstat").len() as usize];
        reader.read_exact_at(&mut bytes, 0).expect("read");
        String::from_utf8(bytes).expect("text")
    };
    assert_eq!(seen_by(&reader).as_bytes(), expected, "it is in the cache now");
    for line in 1..30 {
        let line = format!("line {line}\n");
        expected.extend_from_slice(line.as_bytes());
        let mut writer = OpenOptions::new()
            .append(true)
            .open(there.path("log"))
            .expect("open");
        assert_eq!(writer.write(line.as_bytes()).expect("append"), line.len());
        drop(writer);
        assert_eq!(seen_by(&reader).as_bytes(), expected);
    }
    // Of the same size: seen from the next open on (close-to-open), and then by who has it open as well.
    expected.make_ascii_uppercase();
    let writer = OpenOptions::new()
        .write(true)
        .open(there.path("log"))
        .expect("open");
    writer.write_all_at(&expected, 0).expect("overwrite");
    drop(writer);
    let fresh = File::open(here.path("log")).expect("open");
    assert_eq!(seen_by(&fresh).as_bytes(), expected);
    assert_eq!(seen_by(&reader).as_bytes(), expected);
    // Shorter, and longer again.
    fs::write(there.path("log"), "cut").expect("write");
    assert_eq!(seen_by(&reader), "cut");
    drop((reader, fresh));
    here.unmount();
    there.unmount();
}

#[test]
fn p5_a_listing_does_not_bring_back_what_was_before() {
    const FILES: usize = 1500;
    let sandbox = Sandbox::light("p5-listing");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let name = |number: usize| mount.path(format!("file-{number:04}"));
    (0..FILES).for_each(|number| fs::write(name(number), "x").expect("write"));
    let mut listing = fs::read_dir(mount.directory()).expect("list");
    // Looked at, so that the kernel asks for attributes with the names.
    let mut look = |count: usize| {
        let entries = listing.by_ref().take(count);
        entries.fold(0, |looked, entry| {
            let _may_be_gone = entry.expect("list").path().metadata();
            looked + 1
        })
    };
    assert_eq!(look(10), 10);
    for number in 0..FILES {
        if number % 2 == 0 {
            fs::remove_file(name(number)).expect("unlink");
        } else {
            fs::write(name(number), "longer").expect("write");
        }
    }
    while look(100) > 0 {
        for number in (0..FILES).step_by(7) {
            let found = fs::read(name(number)).ok();
            let expected = (number % 2 == 1).then(|| b"longer".to_vec());
            assert_eq!(found, expected, "file {number}");
        }
    }
    for number in 0..FILES {
        let size = name(number)
            .symlink_metadata()
            .map(|metadata| metadata.len())
            .ok();
        assert_eq!(size, (number % 2 == 1).then_some(6), "file {number}");
    }
    mount.unmount();
}

#[test]
fn p5_appends_of_two_mounts_are_all_kept_whole() {
    let sandbox = Sandbox::light("p5-append");
    let cluster = Cluster::start(&sandbox);
    let mounts = [cluster.mount(), cluster.mount()];
    std::thread::scope(|scope| {
        for (number, mount) in mounts.iter().enumerate() {
            scope.spawn(move || {
                let open = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(mount.path("log"));
                let mut file = open.expect("open");
                // One write for each line: `writeln!` makes several, and between those the other mount's may come.
                (0..100).for_each(|line| {
                    let line = format!("{number} {line:04}\n");
                    assert_eq!(file.write(line.as_bytes()).expect("append"), line.len());
                });
            });
        }
    });
    let text = fs::read_to_string(mounts[0].path("log")).expect("read");
    for number in 0..2 {
        let own: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with(&format!("{number} ")))
            .collect();
        let expected: Vec<String> = (0..100).map(|line| format!("{number} {line:04}")).collect();
        assert_eq!(own, expected, "every append of mount {number}, once and in order");
    }
    assert_eq!(text.lines().count(), 200);
    mounts.into_iter().for_each(|mount| mount.unmount());
}

#[test]
fn p5_every_node_answers_with_what_was_acknowledged_before() {
    let sandbox = Sandbox::light("p5-any-node");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    for round in 0..60usize {
        let text = format!("round {round}");
        let (writer, reader) = (round % 3 + 1, (round + 1 + round / 3 % 2) % 3 + 1);
        cluster
            .http(writer)
            .post("/upload/shared", text.clone())
            .expect(&[201]);
        assert_eq!(
            cluster.http(reader).get("/upload/shared").expect(&[200]).text(),
            text,
            "node {writer} to {reader}"
        );
        assert_eq!(
            fs::read_to_string(mount.path("shared")).expect("read"),
            text,
            "node {writer} to the mount"
        );
        fs::write(mount.path("back"), &text).expect("write");
        assert_eq!(
            cluster.http(reader).get("/upload/back").expect(&[200]).text(),
            text,
            "mount to node {reader}"
        );
    }
    mount.unmount();
}

/// Does `other`, again and again, in `threads` threads for as long as `calls` takes. Each is told how often it was done.
fn meanwhile(threads: usize, other: impl Fn(usize, usize) + Sync, calls: impl FnOnce()) {
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (stopped, other) = (&stopped, &other);
            scope.spawn(move || {
                let mut round = 0;
                while !stopped.load(Ordering::Relaxed) {
                    other(thread, round);
                    round += 1;
                }
            });
        }
        // The threads end even if it panics.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(calls));
        stopped.store(true, Ordering::Relaxed);
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn p3_a_growing_file_shows_only_what_was_written() {
    let sandbox = Sandbox::light("p3-growing");
    let cluster = Cluster::start(&sandbox);
    let mounts = [cluster.mount(), cluster.mount()];
    for (writer, append) in [(&mounts[0], true), (&mounts[0], false), (&mounts[1], true)] {
        let name = format!("log-{append}-{}", writer.process_id());
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .append(append)
            .open(writer.path(&name))
            .expect("create");
        let path = mounts[1].path(&name);
        let kept = File::open(&path).expect("open");
        let others = |thread, _| match thread {
            0 => {
                // `append` or not, the file's own offset is its end.
                (&file).write_all(&[b'1'; 199]).expect("write");
                file.sync_all().expect("fsync");
            }
            _ => {
                path.metadata().expect("stat");
            }
        };
        meanwhile(3, others, || {
            let (mut bytes, mut reads, mut at, mut at_anew) = (vec![0; 1 << 20], 0, 0, 0);
            let mut look = |file: &File, at: &mut u64| {
                let length = file.read_at(&mut bytes, *at).expect("read");
                if let Some(first) = bytes[..length].iter().position(|byte| *byte == 0) {
                    let zeros = bytes[first..length].iter().filter(|byte| **byte == 0).count();
                    let again = file.read_at(&mut bytes, *at).expect("read");
                    let still = bytes[..again].iter().filter(|byte| **byte == 0).count();
                    panic!(
                        "{name}: of {length} bytes behind {at} {zeros} from {first} on were written by nobody; \
                         read again {still} of {again}"
                    );
                }
                *at += length as u64;
                reads += usize::from(length > 0);
            };
            for _ in 0..60 {
                if kept.metadata().expect("fstat").len() > at {
                    look(&kept, &mut at);
                }
                look(&File::open(&path).expect("open"), &mut at_anew);
            }
            assert!(reads > 10, "{name} grew");
        });
    }
    mounts.into_iter().for_each(|mount| mount.unmount());
}

#[test]
fn p5_a_name_can_be_opened_whatever_others_do_with_it() {
    let sandbox = Sandbox::light("p5-names");
    let cluster = Cluster::start(&sandbox);
    let (here, there) = (cluster.mount(), cluster.mount());
    let put = |text: &str| {
        cluster.http(1).post("/upload/replaced", text).expect(&[201]);
    };
    put("version");
    meanwhile(
        6,
        |thread, round| put(&format!("version {thread}.{round}")),
        || {
            for _ in 0..150 {
                let text = fs::read_to_string(here.path("replaced")).expect("open by name");
                assert!(text.starts_with("version"), "{text}");
                here.path("replaced").metadata().expect("stat by name");
            }
        },
    );
    let make = |path: &Path| {
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.expect("open for creation").write_all(b"x").expect("append");
    };
    let remove = |path: &Path| match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("unlink: {error}"),
        _ => {}
    };
    meanwhile(
        4,
        |thread, _| match thread {
            0 => make(&there.path("churn")),
            1 => remove(&here.path("churn")),
            _ => remove(&there.path("churn")),
        },
        || (0..100).for_each(|_| make(&here.path("churn"))),
    );
    here.unmount();
    there.unmount();
}

#[test]
fn p5_a_directory_that_another_mount_moved_can_be_used() {
    let sandbox = Sandbox::light("p5-moved");
    let cluster = Cluster::start(&sandbox);
    let (here, there) = (cluster.mount(), cluster.mount());
    for name in ["incoming", "running", "elsewhere"] {
        fs::create_dir(there.path(name)).expect("mkdir");
    }
    // The kernel is busy with the old parent, and with renames.
    let busy = |thread, round| {
        let from = here.path(format!("incoming/{thread}-{round}"));
        let to = here.path(format!("elsewhere/{thread}-{round}"));
        fs::write(&from, "").expect("create");
        fs::rename(&from, &to).expect("rename");
        fs::remove_file(&to).expect("unlink");
    };
    meanwhile(2, busy, || {
        for round in 0..20 {
            let at = |place: &str, below: &str| format!("{place}/job-{round}{below}");
            fs::create_dir_all(there.path(at("incoming", "/below"))).expect("mkdir");
            let open = File::open(here.path(at("incoming", "/below"))).expect("open");
            fs::rename(there.path(at("incoming", "")), there.path(at("running", ""))).expect("move");
            match round % 3 {
                0 => {
                    fs::write(here.path(at("running", "/below/data")), "x").expect("create at the new place")
                }
                1 => fs::rename(here.path(at("running", "/below")), here.path(at("elsewhere", "")))
                    .expect("move what is below"),
                _ => fs::rename(here.path(at("running", "")), here.path(at("incoming", "")))
                    .expect("move back"),
            }
            let held = open.metadata().expect("fstat").ino();
            let new = [
                at("running", "/below"),
                at("elsewhere", ""),
                at("incoming", "/below"),
            ];
            let seen = here.path(&new[round % 3]).metadata().expect("stat").ino();
            assert_eq!(held, seen, "it is the same directory");
        }
    });
    here.unmount();
    there.unmount();
}
