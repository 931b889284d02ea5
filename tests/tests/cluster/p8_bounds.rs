//! P8: memory does not grow with file size, directory size or time.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use quorumfs_proto::command::{IfExists, NewInode, NewKind, Privileges, Target};
use quorumfs_proto::limits::{COMMAND_EXTENTS_MAX, EXTENTS_ANSWER_MAX};
use quorumfs_proto::{
    Answer, Attributes, ClientResponse, Command, Extent, InodeNumber, Name, Operation, OperationResult,
    Outcome, Query,
};
use quorumfs_tests::environment::{Finally, wait_for};
use quorumfs_tests::process::resident_peak_bytes;
use quorumfs_tests::random::Content;
use quorumfs_tests::wire_client::WireClient;
use quorumfs_tests::{Cluster, Mount, Random, Sandbox, healing, posix, scaled};

/// As promised.
const RESIDENT_BYTES_MAX: u64 = 512 << 20;

fn assert_memory_is_bounded(cluster: &Cluster, mounts: &[&Mount]) {
    let nodes = cluster
        .running()
        .into_iter()
        .map(|slot| (format!("node {slot}"), cluster.process_id(slot)));
    let mounts = mounts
        .iter()
        .map(|mount| ("mount".to_string(), mount.process_id()));
    for (what, id) in nodes.chain(mounts) {
        let peak = resident_peak_bytes(id);
        eprintln!("measured: {what}: {} MiB resident at most", peak >> 20);
        assert!(peak < RESIDENT_BYTES_MAX, "{what}: {} MiB resident", peak >> 20);
    }
}

#[test]
fn p8_a_large_file_through_the_mount_and_by_rest_does_not_fill_memory() {
    let sandbox = Sandbox::heavy("p8-large-file");
    let mut random = Random::announced();
    let bytes = scaled(4 << 30);
    let (by_mount, by_rest) = (random.number(), random.number());
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let mut file = File::create(mount.path("by-mount")).expect("create");
    std::io::copy(&mut Content::new(by_mount, bytes), &mut file).expect("write");
    file.sync_all().expect("fsync");
    posix::close(file).expect("close");
    let follower = cluster.followers()[0];
    let reply =
        cluster
            .http(follower)
            .post_stream("/upload/by-rest", Content::new(by_rest, bytes), Some(bytes));
    reply.expect(&[201]);
    let reply = cluster
        .http(follower)
        .post_stream("/upload/chunked", Content::new(by_rest, bytes / 8), None);
    reply.expect(&[201]);
    posix::drop_caches();
    for (name, seed, bytes) in [
        ("by-mount", by_mount, bytes),
        ("by-rest", by_rest, bytes),
        ("chunked", by_rest, bytes / 8),
    ] {
        assert_eq!(mount.path(name).metadata().expect("stat").len(), bytes);
        Content::new(seed, bytes).assert_equals(File::open(mount.path(name)).expect("open"), name);
        let other = cluster.followers()[1];
        Content::new(seed, bytes)
            .assert_equals(cluster.http(other).get_stream(&format!("/upload/{name}")), name);
    }
    assert_memory_is_bounded(&cluster, &[&mount]);
    mount.unmount();
}

#[test]
fn p8_a_large_directory_lists_completely_while_it_changes() {
    const THREADS: u64 = 8;
    let sandbox = Sandbox::heavy("p8-large-directory");
    let cluster = Cluster::start(&sandbox);
    let (mount, other) = (cluster.mount(), cluster.mount());
    let entries = scaled(100_000) / THREADS * THREADS;
    let folder = mount.path("large");
    fs::create_dir(&folder).expect("mkdir");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let folder = &folder;
            scope.spawn(move || {
                for number in (thread..entries).step_by(THREADS as usize) {
                    File::create_new(folder.join(format!("stays-{number:06}"))).expect("create");
                }
            });
        }
    });
    let expected: BTreeSet<String> = (0..entries).map(|number| format!("stays-{number:06}")).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Entries come and go meanwhile, in this mount and in the other.
        for (number, mount) in [&mount, &other].into_iter().enumerate() {
            let (folder, over) = (mount.path("large"), &over);
            scope.spawn(move || {
                for round in 0.. {
                    let name = |n: usize| folder.join(format!("comes-and-goes-{number}-{n}"));
                    File::create_new(name(round)).expect("create");
                    if round >= 50 {
                        fs::remove_file(name(round - 50)).expect("unlink");
                    }
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        let _stop = Finally(|| over.store(true, Ordering::Relaxed));
        for (round, mount) in [&mount, &other, &mount, &other].into_iter().enumerate() {
            let mut listed = BTreeSet::new();
            for entry in fs::read_dir(mount.path("large")).expect("list") {
                let name = entry.expect("list").file_name().into_string().expect("UTF-8");
                assert!(listed.insert(name.clone()), "listing {round}: {name} comes twice");
            }
            let missing: Vec<&String> = expected.difference(&listed).take(5).collect();
            assert!(missing.is_empty(), "listing {round}: missing {missing:?}, …");
        }
    });
    assert_memory_is_bounded(&cluster, &[&mount, &other]);
    other.unmount();
    mount.unmount();
}

/// A file of `extents` extents of one byte, made by few commands.
fn fragmented(client: &WireClient, name: &'static str, sequence: &mut u64, content: &[u8]) -> InodeNumber {
    let create = Operation::Create {
        parent: Target::Inode(InodeNumber::ROOT),
        name: Name::new(name.as_bytes()).expect("a name"),
        inode: NewInode {
            kind: NewKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
        },
        existing: IfExists::Refuse,
    };
    let outcome = decided(client, sequence, Command::single(create));
    let OperationResult::Entry { inode, .. } = outcome.results[0] else {
        panic!("a create was answered {outcome:?}");
    };
    for (number, part) in (0u64..).zip(content.chunks(COMMAND_EXTENTS_MAX)) {
        let chunk = client.put_chunk(1_000 * *sequence + number, part);
        let from = number * COMMAND_EXTENTS_MAX as u64;
        let extents = (0..part.len() as u32).map(|at| Extent {
            file_offset: from + u64::from(at),
            length: 1,
            chunk: chunk.id,
            chunk_offset: at,
        });
        let write = write(inode, extents.collect());
        let command = Command {
            chunks: vec![chunk],
            operations: vec![write],
        };
        decided(client, sequence, command);
    }
    inode
}

fn write(inode: InodeNumber, extents: Vec<Extent>) -> Operation {
    Operation::Write {
        inode: Target::Inode(inode),
        extents,
        mtime: None,
        privileges: Privileges::Keep,
    }
}

/// The next command of the client's lane 0.
fn decided(client: &WireClient, sequence: &mut u64, command: Command) -> Outcome {
    *sequence += 1;
    match client.mutate(&client.mutation(0, *sequence, command)) {
        ClientResponse::Outcome(Ok(outcome)) => outcome,
        other => panic!("refused: {other:?}"),
    }
}

fn extents(client: &WireClient, inode: InodeNumber) -> (Attributes, usize) {
    let query = Query::Extents {
        inode,
        from: 0,
        to: u64::MAX,
        extents_max: EXTENTS_ANSWER_MAX,
    };
    match client.query(query) {
        Answer::Extents(page) => (page.attributes, page.extents.len()),
        other => panic!("not extents: {other:?}"),
    }
}

#[test]
fn p8_small_extents_are_put_together_unnoticed_and_give_way_to_a_write() {
    let sandbox = Sandbox::light("p8-small-extents");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let client = WireClient::connect(&cluster.members());
    wait_for("everything is allowed", Duration::from_secs(60), || {
        cluster
            .slots()
            .any(|slot| cluster.log(slot).contains("feature level was raised"))
    });
    let mut sequence = 0;
    let bytes = random.bytes(3 * COMMAND_EXTENTS_MAX);

    let inode = fragmented(&client, "settled", &mut sequence, &bytes);
    let before = extents(&client, inode).0;
    let mut open = File::open(mount.path("settled")).expect("open");
    let start = Instant::now();
    let mut count = usize::MAX;
    while count > 8 {
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "{count} extents are left"
        );
        let mut read = Vec::new();
        open.seek(SeekFrom::Start(0)).expect("seek");
        open.read_to_end(&mut read).expect("read");
        assert!(read == bytes, "the content changed");
        count = extents(&client, inode).1;
    }
    assert_eq!(extents(&client, inode).0, before, "times, size and version stay");
    assert!(fs::read(mount.path("settled")).expect("read") == bytes);

    // A log that programs write line by line, each its own command.
    let mut log = File::options()
        .append(true)
        .create(true)
        .open(mount.path("log"))
        .expect("open");
    let mut lines = Vec::new();
    for number in 0..200 {
        let line = format!("{number:08} a line of a log\n");
        log.write_all(line.as_bytes()).expect("append");
        lines.extend_from_slice(line.as_bytes());
    }
    let number = fs::metadata(mount.path("log")).expect("stat").ino();
    let start = Instant::now();
    while extents(&client, InodeNumber(number)).1 > 100 {
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "the log stays in pieces"
        );
        assert!(fs::read(mount.path("log")).expect("read") == lines);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(fs::read(mount.path("log")).expect("read") == lines);

    // More extents than one command may replace.
    let inode = fragmented(&client, "overwritten", &mut sequence, &bytes);
    let over = random.bytes(bytes.len() - 2);
    let chunk = client.put_chunk(1, &over);
    let extent = Extent {
        file_offset: 1,
        length: over.len() as u32,
        chunk: chunk.id,
        chunk_offset: 0,
    };
    let command = Command {
        chunks: vec![chunk],
        operations: vec![write(inode, vec![extent])],
    };
    decided(&client, &mut sequence, command);
    assert_eq!(extents(&client, inode).1, 3);
    let expected = [&bytes[..1], &over, &bytes[bytes.len() - 1..]].concat();
    assert!(fs::read(mount.path("overwritten")).expect("read") == expected);
    healing::assert_same_metadata(&cluster);
}

/// Programs that write at once, a MiB each.
const BLOCKED_WRITERS: usize = 400;
/// What the mount may take for them: 64 MiB of dirty bytes, 32 MiB of waiting ones, 32 MiB on their way, and itself.
const BLOCKED_RESIDENT_BYTES_MAX: u64 = 224 << 20;

#[test]
fn p8_many_writers_that_are_blocked_do_not_fill_the_mounts_memory() {
    let sandbox = Sandbox::light("p8-blocked-writers");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let path = |number: usize| mount.path(format!("file-{number}"));
    let files: Vec<File> = (0..BLOCKED_WRITERS)
        .map(|number| {
            let mut file = File::create(path(number)).expect("create");
            // The kernel asks once for each file whether it has capabilities. Nobody could answer later.
            file.write_all(b"first").expect("write");
            file
        })
        .collect();
    for slot in cluster.followers() {
        cluster.kill(slot);
    }
    let content = |number: usize| vec![number as u8; 1 << 20];
    let written = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (number, file) in files.into_iter().enumerate() {
            let (written, content) = (&written, &content);
            scope.spawn(move || {
                if file.write_all_at(&content(number), 0).is_ok() {
                    written.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        // It lets them go. (A process with threads in such a write cannot fork to start nodes.)
        let _in_the_end = Finally(|| mount.signal(Signal::SIGKILL));
        // Those that have room return, the others wait in the mount; then nothing moves any more.
        let mut before = (0, 0);
        wait_for("the mount comes to rest", Duration::from_secs(120), || {
            std::thread::sleep(Duration::from_secs(1));
            let now = (
                written.load(Ordering::SeqCst),
                resident_peak_bytes(mount.process_id()),
            );
            std::mem::replace(&mut before, now) == now && now.0 > 0
        });
        let (returned, peak) = before;
        eprintln!(
            "measured: {returned} writes returned; {} MiB resident at most",
            peak >> 20
        );
        assert!(
            returned < BLOCKED_WRITERS / 2,
            "{returned} returned: they are not blocked"
        );
        assert!(peak < BLOCKED_RESIDENT_BYTES_MAX, "{} MiB resident", peak >> 20);
    });
}

/// Bytes that the log of a node grows by in [`LOG_TIME`].
fn log_growth(cluster: &Cluster, slots: &[usize]) -> Vec<usize> {
    const LOG_TIME: Duration = Duration::from_secs(15);
    let lengths = || -> Vec<usize> { slots.iter().map(|slot| cluster.log(*slot).len()).collect() };
    let before = lengths();
    std::thread::sleep(LOG_TIME);
    lengths()
        .iter()
        .zip(before)
        .map(|(now, before)| now - before)
        .collect()
}

#[test]
fn p8_a_node_that_is_away_does_not_fill_the_logs_of_the_others() {
    // Each warning of the consensus library once, and one line of ours; not two lines a second.
    const GROWTH_BYTES_MAX: usize = 6_000;
    let sandbox = Sandbox::light("log-away");
    let cluster = Cluster::start(&sandbox);
    let away = cluster.followers()[0];
    cluster.kill(away);
    let left = cluster.running();
    let growth = log_growth(&cluster, &left);
    println!("with a node away the logs grow by {growth:?} bytes");
    assert!(growth.iter().all(|bytes| *bytes < GROWTH_BYTES_MAX), "{growth:?}");
}

#[test]
fn p8_nodes_that_wait_for_each_other_do_not_quote_each_other_for_ever() {
    const GROWTH_BYTES_MAX: usize = 10_000;
    let sandbox = Sandbox::light("log-waiting");
    let cluster = Cluster::start(&sandbox);
    cluster.kill_all();
    for slot in [1, 2] {
        std::fs::remove_dir_all(cluster.data_folder(slot)).expect("wipe");
    }
    cluster.start_all();
    cluster.wait_log(1, &["not serving yet"], Duration::from_secs(30));
    cluster.wait_log(2, &["not serving yet"], Duration::from_secs(30));
    let growth = log_growth(&cluster, &[1, 2, 3]);
    println!("while nodes wait the logs grow by {growth:?} bytes");
    assert!(growth.iter().all(|bytes| *bytes < GROWTH_BYTES_MAX), "{growth:?}");
}
