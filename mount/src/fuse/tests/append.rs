//! The size up to which a write to the end of a file is atomic, and the buffers for which that holds.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use quorumfs_fs::Durability;

const MIB: usize = 1 << 20;
/// Records of each of four writers.
const RECORDS: usize = 6;

/// Writes records of `bytes` from two writers on each of two mounts, each by a single call of `append(file, record)`.
/// Returns how many of them contain bytes of others.
fn torn(bytes: usize, append: fn(&File, &[u8])) -> usize {
    let cluster = MemoryCluster::new();
    let mounts = [mount(&cluster, 1), mount(&cluster, 2)];
    let torn = torn_on(&mounts, RECORDS, bytes, append);
    mounts.into_iter().for_each(TestMount::unmount);
    torn
}

/// Like [`torn`], on these mounts and with `records` from each writer.
fn torn_on(mounts: &[TestMount; 2], records: usize, bytes: usize, append: fn(&File, &[u8])) -> usize {
    File::create(mounts[0].path("log")).unwrap();
    std::thread::scope(|scope| {
        for (mount, letter) in [(0, b'a'), (1, b'b'), (0, b'c'), (1, b'd')] {
            let file = File::options()
                .append(true)
                .open(mounts[mount].path("log"))
                .unwrap();
            scope.spawn(move || (0..records).for_each(|_| append(&file, &vec![letter; bytes])));
        }
    });
    let all = fs::read(mounts[1].path("log")).unwrap();
    assert_eq!(all.len(), 4 * records * bytes, "records are lost");
    for letter in b'a'..=b'd' {
        let own = all.iter().filter(|byte| **byte == letter).count();
        assert_eq!(own, records * bytes, "bytes of a writer are lost");
    }
    all.chunks(bytes)
        .filter(|record| record.iter().any(|byte| *byte != record[0]))
        .count()
}

/// One write(2) from a buffer that begins `misalignment` bytes after the start of a page.
fn write_from(misalignment: usize, file: &File, record: &[u8]) {
    let mut room = vec![0u8; record.len() + 2 * 4096];
    let at = room.as_ptr().align_offset(4096) + misalignment;
    room[at..at + record.len()].copy_from_slice(record);
    let mut file = file;
    assert_eq!(file.write(&room[at..at + record.len()]).unwrap(), record.len());
}

/// The same with one writev(2), whose length the mount cannot know.
fn write_in_eight(file: &File, record: &[u8]) {
    let parts: Vec<libc::iovec> = record
        .chunks(record.len().div_ceil(8))
        .map(|part| libc::iovec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        })
        .collect();
    let written = unsafe { libc::writev(file.as_raw_fd(), parts.as_ptr(), parts.len() as i32) };
    assert_eq!(written, record.len() as isize);
}

/// The whole of `record` in one request, which the mount must take for a possible first part.
fn write_in_one(file: &File, record: &[u8]) {
    let mut room = vec![0u8; record.len() + 4096];
    let at = room.as_ptr().align_offset(4096);
    room[at..at + record.len()].copy_from_slice(record);
    let part = libc::iovec {
        iov_base: room[at..].as_mut_ptr().cast(),
        iov_len: record.len(),
    };
    let written = unsafe { libc::writev(file.as_raw_fd(), &raw const part, 1) };
    assert_eq!(written, record.len() as isize);
}

#[test]
fn appends_of_up_to_one_mib_are_whole_from_any_buffer() {
    if !can_mount() {
        return;
    }
    assert_eq!(torn(MIB, |file, record| write_from(0, file, record)), 0);
    assert_eq!(torn(MIB, |file, record| write_from(1, file, record)), 0);
    assert_eq!(torn(MIB, |file, record| write_from(4095, file, record)), 0);
    // One request that looks like the first of two.
    assert_eq!(torn(MIB - 100, |file, record| write_from(0, file, record)), 0);
    assert_eq!(torn(MIB - 100, |file, record| write_from(200, file, record)), 0);
    assert_eq!(torn(MIB, write_in_eight), 0);
}

#[test]
fn appends_are_whole_while_other_files_fill_the_room_of_dirty_bytes() {
    if !can_mount() {
        return;
    }
    for durability in [Durability::Close, Durability::Fsync] {
        let cluster = MemoryCluster::new();
        let mounts = [1, 2].map(|session| {
            let options = FsOptions {
                durability,
                // Always full: all dirty data must be committed with each write.
                dirty_bytes_max: 2 << 20,
                ..FsOptions::default()
            };
            mount_as(&cluster, session, MsFlags::empty(), options)
        });
        let stopped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for mount in &mounts {
                let (stopped, bytes) = (&stopped, pattern(MIB - 1));
                scope.spawn(move || {
                    while !stopped.load(Ordering::Relaxed) {
                        let data = File::create(mount.path("data")).unwrap();
                        (0..16).for_each(|at| data.write_all_at(&bytes, at * MIB as u64).unwrap());
                    }
                });
            }
            let torn = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                torn_on(&mounts, 4 * RECORDS, MIB, |file, record| {
                    write_from(1, file, record)
                })
            }));
            stopped.store(true, Ordering::Relaxed);
            assert_eq!(torn.unwrap(), 0, "{durability:?}");
        });
        mounts.into_iter().for_each(TestMount::unmount);
    }
}

#[test]
fn larger_appends_are_all_there_and_whole_by_the_mib_from_aligned_buffers() {
    if !can_mount() {
        return;
    }
    // No bytes are lost, wherever the writes are split.
    torn(3 * MIB + 5, |file, record| write_from(1, file, record));
    let split = torn(3 * MIB, |file, record| write_from(0, file, record));
    eprintln!("{split} of {} records of 3 MiB were split", 4 * RECORDS);
}

#[test]
fn an_append_is_seen_and_kept_although_more_of_it_may_follow() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let bytes = pattern(MIB - 1);
    let log = File::options()
        .create(true)
        .append(true)
        .read(true)
        .open(one.path("log"))
        .unwrap();
    write_in_one(&log, &bytes);
    assert_eq!(fs::metadata(one.path("log")).unwrap().len(), bytes.len() as u64);
    let mut seen = vec![0; bytes.len()];
    log.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == bytes, "read through its own handle");
    write_in_one(&log, &bytes);
    assert!(
        fs::read(one.path("log")).unwrap() == [&bytes[..], &bytes[..]].concat(),
        "read by another"
    );
    write_in_one(&log, &bytes);
    log.sync_all().unwrap();
    assert_eq!(
        fs::metadata(other.path("log")).unwrap().len(),
        3 * bytes.len() as u64
    );
    write_in_one(&log, &bytes);
    log.set_len(2).unwrap();
    assert_eq!(fs::read(other.path("log")).unwrap(), bytes[..2]);
    write_in_one(&log, &bytes);
    drop(log);
    assert_eq!(
        fs::metadata(other.path("log")).unwrap().len(),
        2 + bytes.len() as u64,
        "closed"
    );
    // Committed by age alone.
    let log = File::options().append(true).open(one.path("log")).unwrap();
    write_in_one(&log, &bytes);
    let begin = std::time::Instant::now();
    while fs::metadata(other.path("log")).unwrap().len() != 2 + 2 * bytes.len() as u64 {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "it never reaches the cluster"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(log);
    one.unmount();
    other.unmount();
}

#[test]
fn an_append_that_fails_after_its_answer_is_reported() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let mount = mount(&cluster, 1);
    let log = File::options()
        .create(true)
        .append(true)
        .open(mount.path("log"))
        .unwrap();
    *cluster.put_fault.lock() = Some(quorumfs_proto::FsError::NoSpace);
    let is_reported = || {
        write_in_one(&log, &pattern(MIB - 1));
        let synced = log.sync_all();
        synced.is_err_and(|error| error.raw_os_error() == Some(libc::ENOSPC))
    };
    // A process that another test starts meanwhile closes its copy of the file, and gets the error instead.
    assert!((0..5).any(|_| is_reported()));
    log.sync_all().unwrap();
    assert_eq!(fs::metadata(mount.path("log")).unwrap().len(), 0);
    drop(log);
    mount.unmount();
}
