//! A growing file shows what was written, or less of it; never zeros that were not written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;

/// Time for which each way of following a file is tested.
const FOLLOWED: Duration = Duration::from_secs(2);

/// How a file is followed.
#[derive(Clone, Copy, Debug)]
enum Follow {
    /// Through one descriptor.
    KeptOpen,
    /// Opened again for each read.
    OpenedAnew,
}

/// Lets `writer` append to a file while `reader` follows it, with others that stat it. Returns how many reads returned
/// bytes, and how many of these returned bytes that were not written.
fn follow(reader: &TestMount, mut writer: File, name: &str, how: Follow) -> (u32, u32) {
    let path = reader.path(name);
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stopped.load(Ordering::Relaxed) {
                writer.write_all(&[b'1'; 200]).unwrap();
                writer.sync_all().unwrap();
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                while !stopped.load(Ordering::Relaxed) {
                    fs::metadata(&path).unwrap();
                }
            });
        }
        let (mut reads, mut with_zeros, mut at) = (0, 0, 0);
        let mut file = File::open(&path).unwrap();
        let mut buffer = vec![0; 1 << 20];
        let end = Instant::now() + FOLLOWED;
        while Instant::now() < end {
            match how {
                Follow::OpenedAnew => file = File::open(&path).unwrap(),
                Follow::KeptOpen if file.metadata().unwrap().len() <= at => continue,
                Follow::KeptOpen => {}
            }
            let length = file.read_at(&mut buffer, at).unwrap();
            at += length as u64;
            reads += u32::from(length > 0);
            with_zeros += u32::from(buffer[..length].contains(&0));
        }
        stopped.store(true, Ordering::Relaxed);
        (reads, with_zeros)
    })
}

/// Follows files to which `writer` appends and which it overwrites at the end, in both ways.
fn follow_each_way(reader: &TestMount, writer: &TestMount) -> (u32, u32) {
    let (mut reads_total, mut with_zeros_total) = (0, 0);
    for append in [true, false] {
        for how in [Follow::KeptOpen, Follow::OpenedAnew] {
            let name = format!("{append}-{how:?}");
            let mut options = File::options();
            let file = options.create(true).write(true).append(append);
            let file = file.open(writer.path(&name)).unwrap();
            let (reads, with_zeros) = follow(reader, file, &name, how);
            eprintln!("{name}: {reads} reads, {with_zeros} with bytes that no program wrote");
            assert!(reads > 0);
            reads_total += reads;
            with_zeros_total += with_zeros;
        }
    }
    (reads_total, with_zeros_total)
}

#[test]
fn a_file_that_another_mount_makes_longer_shows_no_zeros() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (reads, with_zeros) = follow_each_way(&one, &other);
    assert_eq!(with_zeros, 0, "of {reads} reads");
    one.unmount();
    other.unmount();
}

#[test]
fn a_file_that_its_own_mount_makes_longer_shows_no_zeros() {
    if !can_mount() {
        return;
    }
    let mount = mount(&MemoryCluster::new(), 1);
    let (reads, with_zeros) = follow_each_way(&mount, &mount);
    assert_eq!(with_zeros, 0, "of {reads} reads");
    mount.unmount();
}

#[test]
fn the_kernel_knows_the_new_end_once_it_was_reported() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let mut writer = File::options()
        .create(true)
        .append(true)
        .open(other.path("log"))
        .unwrap();
    let mut expected = Vec::new();
    let mut reader = None;
    for round in 0..50u64 {
        // Across the ends of pages, and up to them.
        let line = vec![b'a' + (round % 26) as u8; [100, 4096, 3996, 5000][round as usize % 4]];
        writer.write_all(&line).unwrap();
        let before = expected.len() as u64;
        expected.extend(line);
        let file = reader.get_or_insert_with(|| File::open(one.path("log")).unwrap());
        let mut bytes = vec![0; 16 << 10];
        match round % 3 {
            // A read at the former end returns the new bytes, although no stat was made.
            0 => {}
            1 => assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), expected.len() as u64),
            _ => assert_eq!(file.metadata().unwrap().len(), expected.len() as u64),
        }
        let length = file.read_at(&mut bytes, before).unwrap();
        assert_eq!(&bytes[..length], &expected[before as usize..], "round {round}");
    }
    assert_eq!(fs::read(one.path("log")).unwrap(), expected);
    drop((reader, writer));
    one.unmount();
    other.unmount();
}
