//! A database that is damaged on disk, and one made by an earlier version.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use quorumfs_proto::command::NewKind;
use quorumfs_proto::{InodeNumber, Name, SessionId};

use super::support::{Node, create, name};
use crate::database::{DamageSignal, Database};
use crate::tables::Table;
use crate::{Failure, LogBody, MetadataOptions, MetadataStore, StorageFault};

const FILES: u64 = 3_000;

fn open(path: &Path) -> Result<MetadataStore, StorageFault> {
    MetadataStore::open(path, MetadataOptions::default())
}

fn name_of(file: u64) -> Name {
    name(&format!("file {file} {}", "x".repeat(100)))
}

/// Makes a durable state of about a hundred blocks.
fn make(path: &Path) {
    let mut node = Node::with_sessions(1);
    for file in 1..=FILES {
        node.entry(create(
            InodeNumber::ROOT,
            std::str::from_utf8(name_of(file).as_bytes()).unwrap(),
            NewKind::File,
        ));
    }
    node.store.freeze();
    node.store.flush().unwrap();
    let Node { folder, store, .. } = node;
    drop(store);
    std::fs::copy(folder.path().join("metadata.redb"), path).unwrap();
}

fn check_all(store: &MetadataStore) -> Result<u64, StorageFault> {
    let (mut rows, mut from) = (0, None);
    loop {
        let checked = store.check(from, 10_000)?;
        rows += checked.rows;
        from = checked.next;
        if from.is_none() {
            return Ok(rows);
        }
    }
}

#[test]
fn damage_is_told_whoever_meets_it_and_never_answered() {
    let folder = tempfile::tempdir().unwrap();
    let (sound, path) = (folder.path().join("sound"), folder.path().join("metadata.redb"));
    make(&sound);
    let rows = check_all(&open(&sound).unwrap()).unwrap();
    assert!(rows > 2 * FILES);
    let bytes = sound.metadata().unwrap().len();
    let (mut at_open, mut later) = (0, 0);
    for at in (20..bytes).step_by(bytes as usize / 150) {
        std::fs::copy(&sound, &path).unwrap();
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        let store = match open(&path) {
            Ok(store) => store,
            Err(fault) => {
                assert!(fault.is_damage(), "byte {at}: {fault}");
                at_open += 1;
                continue;
            }
        };
        let told = Arc::new(Mutex::new(Vec::new()));
        let hears = told.clone();
        store.on_damage(move |fault| hears.lock().push(fault));
        let view = store.view().unwrap();
        let looked_up = |file: u64| match view.lookup(InodeNumber::ROOT, &name_of(file)) {
            Ok(_) => None,
            Err(Failure::Verdict(verdict)) => panic!("byte {at}: file {file}: {verdict}"),
            Err(Failure::Fault(fault)) => Some(fault),
        };
        let read = (1..=FILES).find_map(looked_up);
        let checked = check_all(&store);
        if let Ok(found) = &checked {
            assert_eq!(*found, rows, "byte {at}");
        }
        if read.is_some() || checked.is_err() {
            assert_eq!(told.lock().len(), 1, "byte {at}");
            assert!(told.lock()[0].is_damage());
            later += 1;
        }
    }
    assert!(later > 50, "{at_open} at open, {later} later");
}

#[test]
fn a_database_of_an_earlier_version_is_taken_over_if_it_is_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (sound, plain) = (folder.path().join("sound"), folder.path().join("plain"));
    make(&sound);
    let store = open(&sound).unwrap();
    let digest = store.view().unwrap().digest(|| ()).unwrap();
    let database = redb::Database::create(&plain).unwrap();
    let transaction = database.begin_write().unwrap();
    for row in store.snapshot().unwrap().rows() {
        let row = row.unwrap();
        let table = Table::from_number(row.table).unwrap();
        let mut table = transaction.open_table(table.definition()).unwrap();
        table.insert(&row.key[..], &row.value[..]).unwrap();
    }
    transaction.commit().unwrap();
    drop(database);
    let damaged = folder.path().join("damaged");
    std::fs::copy(&plain, &damaged).unwrap();

    for _ in 0..2 {
        let taken_over = open(&plain).unwrap();
        assert_eq!(taken_over.position().index, FILES + 1);
        assert_eq!(taken_over.view().unwrap().digest(|| ()).unwrap(), digest);
        drop(taken_over);
        assert!(!std::fs::read(&plain).unwrap().starts_with(b"redb"));
    }

    // Damaged rows do not get valid checksums.
    let mut bytes = std::fs::read(&damaged).unwrap();
    let needle = format!("file {} ", FILES / 2);
    let places: Vec<usize> = bytes
        .windows(needle.len())
        .enumerate()
        .filter(|(_, window)| *window == needle.as_bytes())
        .map(|(at, _)| at)
        .collect();
    assert!(!places.is_empty());
    places.iter().for_each(|at| bytes[*at] ^= 1);
    std::fs::write(&damaged, bytes).unwrap();
    let refused = open(&damaged).err().unwrap();
    assert!(refused.is_damage(), "{refused}");
}

#[test]
fn a_panic_inside_the_database_is_damage() {
    let folder = tempfile::tempdir().unwrap();
    let signal = DamageSignal::default();
    let database = Database::create(&folder.path().join("metadata.redb"), 1 << 20, signal.clone()).unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = told.clone();
    for _ in 0..2 {
        let panicked: Result<(), StorageFault> =
            database.guarded(|| panic!("range end index 5000 out of range for slice of length 4096"));
        assert!(panicked.unwrap_err().is_damage());
    }
    // A hook that is set later is called too.
    signal.listen(move |fault| hears.lock().push(fault.to_string()));
    assert_eq!(told.lock().len(), 1);
    assert!(told.lock()[0].contains("5000"), "{:?}", told.lock());
}

#[test]
fn damage_of_a_snapshot_that_is_being_received_does_not_cost_the_state() {
    let folder = tempfile::tempdir().unwrap();
    let (sound, path) = (folder.path().join("sound"), folder.path().join("metadata.redb"));
    make(&sound);
    std::fs::copy(&sound, &path).unwrap();
    let options = MetadataOptions {
        // Too little to keep what was written.
        cache_bytes: 64 << 10,
        ..MetadataOptions::default()
    };
    let (source, store) = (
        open(&sound).unwrap(),
        MetadataStore::open(&path, options).unwrap(),
    );
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = told.clone();
    store.on_damage(move |fault| hears.lock().push(fault.to_string()));
    let receive = || {
        let before: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        let mut installation = store.begin_install().unwrap();
        for row in source.snapshot().unwrap().rows() {
            installation.add(&[row.unwrap()]).unwrap();
        }
        let received = installation.finish().unwrap();
        let mut files = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        (received, files.find(|file| !before.contains(file)).unwrap())
    };
    let spoil = |file: &Path| {
        let bytes = file.metadata().unwrap().len();
        let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
        (64 << 10..bytes - 4096)
            .step_by(4096)
            .for_each(|at| file.write_all_at(&[0x5a; 64], at).unwrap());
    };
    let finds = |view: &crate::View| {
        (1..=FILES).any(|file| {
            matches!(
                view.lookup(InodeNumber::ROOT, &name_of(file)),
                Err(Failure::Fault(_))
            )
        })
    };

    let (received, file) = receive();
    spoil(&file);
    assert!(finds(&received.view()), "the damage is found");
    assert!(told.lock().is_empty(), "{:?}", told.lock());
    assert_eq!(check_all(&store).unwrap(), check_all(&source).unwrap());
    drop(received);

    let (received, _) = receive();
    store.install(received).unwrap();
    spoil(&path);
    assert!(finds(&store.view().unwrap()), "the damage is found");
    assert_eq!(told.lock().len(), 1, "now it is this node's state");
}

#[test]
fn what_a_check_has_passed_a_flush_does_not_stumble_over() {
    let folder = tempfile::tempdir().unwrap();
    let sound = folder.path().join("sound");
    let mut node = Node::with_sessions(1);
    for round in 0..6 {
        for file in 0..200 {
            node.entry(create(
                InodeNumber::ROOT,
                &format!("{round} {file}"),
                NewKind::File,
            ));
        }
        node.store.freeze();
        node.store.flush().unwrap();
    }
    // As a killed process leaves it.
    std::fs::copy(node.folder.path().join("metadata.redb"), &sound).unwrap();
    let bytes = std::fs::read(&sound).unwrap();
    let mut missed = Vec::new();
    let (mut found, mut harmless) = (0, 0);
    for block in (0..bytes.len()).step_by(4096) {
        let Some(at) = bytes[block..bytes.len().min(block + 4096)]
            .iter()
            .position(|byte| *byte != 0)
        else {
            continue;
        };
        let mut damaged = bytes.clone();
        damaged[block + at] ^= 0x10;
        let path = folder.path().join(format!("block {block}"));
        std::fs::write(&path, &damaged).unwrap();
        let checked = open(&path).and_then(|store| check_all(&store).map(|_| store));
        let Ok(store) = checked else {
            found += 1;
            continue;
        };
        node.store = store;
        node.index = node.store.position().index;
        let flushed = (0..3).try_for_each(|round| {
            node.apply(LogBody::OpenSession {
                session: SessionId(100 + round),
                description: String::new(),
            });
            node.store.freeze();
            node.store.flush().map(|_| ())
        });
        match flushed {
            Ok(()) => harmless += 1,
            Err(fault) => missed.push((block / 4096, fault.to_string())),
        }
    }
    println!(
        "{found} found, {harmless} harmless, {} missed: {missed:#?}",
        missed.len()
    );
    assert!(missed.is_empty());
}
