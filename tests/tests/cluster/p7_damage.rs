//! P3, P7: metadata and logs that are damaged on the disk. Nobody sees a wrong answer, a node that is damaged is made
//! anew as soon as the others can do without it, and it gives nothing up before.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use quorumfs_tests::damage::{find_bytes, flip, try_open_metadata};
use quorumfs_tests::environment::wait_for;
use quorumfs_tests::healing::assert_same_metadata;
use quorumfs_tests::{Cluster, Mount, Random, Sandbox};
use redb::{ReadableDatabase as _, ReadableTable as _, TableHandle as _};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(90);
const FOLDERS: u64 = 8;
const FILES: u64 = 40;

fn content(folder: u64, file: u64) -> Vec<u8> {
    vec![(folder * 31 + file) as u8; (file * 997 % 9_000) as usize]
}

fn write_tree(mount: &Mount) {
    for folder in 0..FOLDERS {
        std::fs::create_dir(mount.path(format!("folder-{folder}"))).expect("mkdir");
        for file in 0..FILES {
            let path = mount.path(format!("folder-{folder}/file-{file:04}"));
            std::fs::write(path, content(folder, file)).expect("write");
        }
    }
}

/// Every name is there, no other is, and every byte is right.
fn assert_tree(mount: &Mount) {
    for folder in 0..FOLDERS {
        let path = mount.path(format!("folder-{folder}"));
        let mut names: Vec<_> = std::fs::read_dir(&path)
            .expect("list")
            .map(|entry| entry.expect("list").file_name().into_string().expect("a name"))
            .collect();
        names.sort();
        let expected: Vec<_> = (0..FILES).map(|file| format!("file-{file:04}")).collect();
        assert_eq!(names, expected, "in folder {folder}");
        for file in 0..FILES {
            let path = path.join(format!("file-{file:04}"));
            let read = std::fs::read(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
            assert!(read == content(folder, file), "{}", path.display());
        }
    }
}

fn incarnation(cluster: &Cluster, slot: usize) -> Option<String> {
    let incarnation = &json(cluster, slot, "/status")["node"]["incarnation"];
    incarnation.as_str().map(str::to_string)
}

fn json(cluster: &Cluster, slot: usize, path: &str) -> Value {
    match cluster.http(slot).try_get(path) {
        Ok(answer) if answer.status == 200 => answer.json(),
        _ => Value::Null,
    }
}

/// A bit of the file, in a block that holds something.
fn random_bit(random: &mut Random, file: &Path) -> (u64, u8) {
    let bytes = std::fs::read(file).expect("read the metadata of a node that is down");
    loop {
        let at = random.below(bytes.len() as u64) as usize;
        let block = at / 4096 * 4096;
        if bytes[block..(block + 4096).min(bytes.len())]
            .iter()
            .any(|byte| *byte != 0)
        {
            return (at as u64, 1 << random.below(8));
        }
    }
}

fn flip_bit(file: &Path, at: u64, bit: u8) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ bit], at).expect("write");
    file.sync_all().expect("sync");
}

/// Flips bits, one in each round, in the metadata of a node that is down for a moment, alone or with all others.
fn flip_bits(sandbox: &Sandbox, rounds: u64) {
    let mut random = Random::announced();
    let cluster = Cluster::start(sandbox);
    let mount = cluster.mount();
    write_tree(&mount);
    assert_same_metadata(&cluster);
    std::thread::sleep(Duration::from_secs(3));
    let (mut healed, mut slowest) = (0, Duration::ZERO);
    for round in 0..rounds {
        let slot = random.below(3) as usize + 1;
        let leads = cluster.leader() == slot;
        let all = random.below(2) == 0;
        let before = incarnation(&cluster, slot);
        match all {
            true => cluster.kill_all(),
            false => cluster.kill(slot),
        }
        let file = cluster.data_folder(slot).join("metadata.redb");
        let (at, bit) = random_bit(&mut random, &file);
        flip_bit(&file, at, bit);
        let began = Instant::now();
        match all {
            true => cluster.start_all(),
            false => cluster.start_node(slot),
        }
        assert_tree(&mount);
        wait_for("the node is made anew, or finds nothing", LIMIT, || {
            incarnation(&cluster, slot) != before
                || !json(&cluster, slot, "/repair/status")["metadata_check"].is_null()
        });
        cluster.wait_voters(&[1, 2, 3], LIMIT);
        let anew = incarnation(&cluster, slot) != before;
        let took = began.elapsed();
        if anew {
            healed += 1;
            slowest = slowest.max(took);
        }
        eprintln!(
            "round {round}: node {slot}, led before: {leads}, all down: {all}, byte {at}: {} after {} ms",
            if anew {
                "made anew"
            } else {
                "nothing that counts was hit"
            },
            took.as_millis()
        );
        assert_tree(&mount);
        cluster.wait_at_rest();
    }
    eprintln!(
        "{healed} of {rounds} flips cost an incarnation, the slowest {} ms",
        slowest.as_millis()
    );
    assert_tree(&mount);
    assert_same_metadata(&cluster);
    for slot in cluster.slots() {
        assert!(json(&cluster, slot, "/repair/status")["trouble"].is_null());
        assert!(!cluster.log(slot).contains("panicked"), "{}", cluster.log(slot));
    }
    mount.unmount();
}

#[test]
fn p7_flipped_bits_in_the_metadata_are_healed_and_never_seen() {
    flip_bits(&Sandbox::light("flips"), 4);
}

#[test]
#[ignore = "takes some minutes: run by hand"]
fn p7_a_hundred_flipped_bits_in_the_metadata_are_healed_and_never_seen() {
    flip_bits(&Sandbox::heavy("hundred-flips"), 100);
}

/// Damages a block of a node's metadata that holds names, and that is not needed to open it.
fn damage_names(sandbox: &Sandbox, cluster: &Cluster, slot: usize) {
    const DIRENTS: redb::TableDefinition<&[u8], &[u8]> = redb::TableDefinition::new("dirents");
    let file = cluster.data_folder(slot).join("metadata.redb");
    let copy = sandbox.path("copy");
    let places = find_bytes(cluster.data_folder(slot), b"file-0007");
    let found = places
        .into_iter()
        .filter(|(found, _)| *found == file)
        .find(|(_, at)| {
            std::fs::copy(&file, &copy).expect("copy");
            flip(&copy, *at);
            let Ok(database) = try_open_metadata(&copy) else {
                return false;
            };
            let transaction = database.begin_read().expect("read");
            let readable = transaction.list_tables().expect("tables").all(|table| {
                table.name() == "dirents" || {
                    let definition: redb::TableDefinition<&[u8], &[u8]> =
                        redb::TableDefinition::new(table.name());
                    let table = transaction.open_table(definition);
                    table.is_ok_and(|table| table.iter().is_ok_and(|mut rows| rows.all(|row| row.is_ok())))
                }
            });
            let names = transaction.open_table(DIRENTS);
            readable
                && names.is_ok_and(|names| names.iter().is_ok_and(|mut rows| rows.any(|row| row.is_err())))
        });
    let (_, at) = found.expect("the names are on disk");
    flip(&file, at);
}

/// Starts all, of which nodes 1 and 3 were damaged: both are made anew without a wrong answer, and node 2 is who it was.
fn assert_both_are_made_anew(cluster: &Cluster, mount: &Mount, before: &[Option<String>]) {
    let began = Instant::now();
    cluster.start_all();
    assert_tree(mount);
    for slot in [1, 3] {
        wait_for("it is made anew", LIMIT, || {
            incarnation(cluster, slot).is_some_and(|now| Some(now) != before[slot - 1])
        });
    }
    cluster.wait_voters(&[1, 2, 3], LIMIT);
    eprintln!("both after {} ms", began.elapsed().as_millis());
    assert_eq!(incarnation(cluster, 2), before[1]);
    assert_tree(mount);
    cluster.wait_at_rest();
    assert_same_metadata(cluster);
}

#[test]
fn p7_two_nodes_with_damaged_metadata_are_made_anew_one_after_the_other() {
    let sandbox = Sandbox::light("two-damaged");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    write_tree(&mount);
    assert_same_metadata(&cluster);
    std::thread::sleep(Duration::from_secs(3));
    let before: Vec<_> = cluster.slots().map(|slot| incarnation(&cluster, slot)).collect();
    cluster.kill_all();
    damage_names(&sandbox, &cluster, 1);
    damage_names(&sandbox, &cluster, 3);
    assert_both_are_made_anew(&cluster, &mount, &before);
    mount.unmount();
}

/// Damages a node's metadata so that they cannot be opened: both copies of the header.
fn damage_header(cluster: &Cluster, slot: usize) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(cluster.data_folder(slot).join("metadata.redb"))
        .expect("open");
    file.write_all_at(&[0x5a; 2 * 4096], 0).expect("write");
    file.sync_all().expect("sync");
}

#[test]
fn p7_two_nodes_whose_metadata_cannot_be_opened_are_made_anew_one_after_the_other() {
    let sandbox = Sandbox::light("two-unopened");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    write_tree(&mount);
    assert_same_metadata(&cluster);
    cluster.wait_at_rest();
    let before: Vec<_> = cluster.slots().map(|slot| incarnation(&cluster, slot)).collect();
    cluster.kill_all();
    damage_header(&cluster, 1);
    damage_header(&cluster, 3);
    assert_both_are_made_anew(&cluster, &mount, &before);
    mount.unmount();
}

/// `quorumfs-node recover` for a node that is down: whether it did, and what it says.
fn recover(cluster: &Cluster, slot: usize, more: &[&str]) -> (bool, String) {
    let node = cluster.command(slot);
    let mut command = Command::new(node.get_program());
    command.arg("recover").args(node.get_args()).args(more);
    for (name, value) in node.get_envs() {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    let output = command.output().expect("run recover");
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[test]
fn p7_two_nodes_with_damaged_logs_wait_and_say_so_until_somebody_decides() {
    let sandbox = Sandbox::light("two-logs");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    write_tree(&mount);
    (0..100).for_each(|n| std::fs::create_dir(mount.path(format!("last-{n}"))).expect("mkdir"));
    assert_same_metadata(&cluster);
    mount.unmount();
    // While the others are a majority there is nothing to decide.
    cluster.terminate(2);
    let (done, said) = recover(&cluster, 2, &["--accept-loss"]);
    assert!(!done && said.contains("a majority"), "{said}");
    cluster.start_node(2);
    cluster.wait_ready();
    cluster.wait_at_rest();

    let before: Vec<_> = cluster.slots().map(|slot| incarnation(&cluster, slot)).collect();
    cluster.kill_all();
    for slot in [1, 3] {
        let places = find_bytes(&cluster.data_folder(slot).join("wal"), b"file-0017");
        assert!(!places.is_empty(), "the log holds what was logged");
        places.iter().for_each(|(file, at)| flip(file, *at));
    }
    cluster.start_all();
    let waits = |slot: usize| {
        let status = json(&cluster, slot, "/status");
        let reason = status["reason"].as_str().unwrap_or_default();
        reason.contains("until a majority is intact without it") && reason.contains("recover")
    };
    for slot in [1, 3] {
        wait_for("it says what it waits for", LIMIT, || waits(slot));
    }
    std::thread::sleep(Duration::from_secs(5));
    for slot in [1, 3] {
        assert!(waits(slot));
        assert_eq!(incarnation(&cluster, slot), before[slot - 1]);
        assert!(cluster.data_folder(slot).join("wal").exists());
        let said = cluster
            .log(slot)
            .matches("until a majority is intact without it")
            .count();
        assert!(said < 5, "said {said} times");
    }

    // By hand, from the one that has everything.
    let (done, said) = recover(&cluster, 2, &[]);
    assert!(!done && said.contains("in use"), "{said}");
    cluster.terminate(2);
    let (done, said) = recover(&cluster, 2, &[]);
    assert!(
        done && said.contains("Nothing was changed") && said.contains("may be missing"),
        "{said}"
    );
    let (done, said) = recover(&cluster, 2, &["--accept-loss"]);
    assert!(done && said.contains("only voter"), "{said}");
    cluster.start_node(2);
    cluster.wait_voters(&[1, 2, 3], LIMIT);
    for slot in [1, 3] {
        assert_ne!(incarnation(&cluster, slot), before[slot - 1]);
    }
    cluster.wait_ready();
    let mount = cluster.mount();
    assert_tree(&mount);
    assert_eq!(
        std::fs::read_dir(mount.directory()).expect("list").count(),
        100 + FOLDERS as usize
    );
    std::fs::write(mount.path("after"), "after").expect("write");
    mount.unmount();
    cluster.wait_at_rest();
    assert_same_metadata(&cluster);
}
