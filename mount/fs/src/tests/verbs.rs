//! The operations of the filesystem, one rule per test.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quorumfs_proto::command::{AttributeChanges, NewInode, NewKind, RenameMode, SetTime, XattrMode};
use quorumfs_proto::query::EntryDetail;
use quorumfs_proto::{FileKind, FsError, Operation, SymlinkTarget, Timestamp};

use super::support::{
    MIB, ROOT, close, contents, create, mount, mount_with, pattern, read, read_write, without_commits_by_age,
    write,
};
use crate::{Durability, Filesystem, FsOptions, OpenFlags};
use quorumfs_memory::{Connection, MemoryCluster};

#[tokio::test]
async fn a_small_file_costs_two_commands_and_no_put() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (_, handle) = create(&fs, "small").await;
    write(&fs, handle, 0, b"hello ").await;
    write(&fs, handle, 6, b"world").await;
    assert_eq!(cluster.queries.load(Ordering::Relaxed), 0);
    close(&fs, handle).await;
    assert_eq!(cluster.commands.lock().len(), 2);
    assert_eq!(cluster.puts.load(Ordering::Relaxed), 0);
    assert_eq!(contents(&mount(&cluster, 2), "small").await, b"hello world");
}

#[tokio::test]
async fn a_large_file_is_put_in_whole_chunks_while_it_is_written() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (inode, handle) = create(&fs, "large").await;
    let data = pattern(20 * MIB as usize + 100, 1);
    for (at, part) in data.chunks(128 << 10).enumerate() {
        write(&fs, handle, at as u64 * (128 << 10), part).await;
        tokio::task::yield_now().await;
    }
    assert!(
        cluster.puts.load(Ordering::Relaxed) > 10,
        "puts continue in the background"
    );
    close(&fs, handle).await;
    let extents = cluster.extents_of(inode);
    assert_eq!(extents.len(), 21);
    assert!(extents[..20].iter().all(|extent| u64::from(extent.length) == MIB));
    assert!(cluster.commands.lock().len() <= 6, "many chunks share a command");
    assert!(contents(&mount(&cluster, 2), "large").await == data);
}

#[tokio::test]
async fn random_small_writes_of_one_flush_become_one_chunk_and_one_command() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (_, handle) = create(&fs, "database").await;
    for at in 0..200u64 {
        write(&fs, handle, (at * 7919 % 1000) * 8192, &pattern(4096, at)).await;
    }
    let before = cluster.commands.lock().len();
    fs.fsync(handle).await.unwrap();
    assert_eq!(cluster.commands.lock().len() - before, 1);
    assert_eq!(cluster.puts.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn attributes_are_set_in_one_command_with_earlier_writes() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (inode, handle) = create(&fs, "copied").await;
    write(&fs, handle, 0, b"content").await;
    let wanted = Timestamp {
        seconds: 1_000_000,
        nanoseconds: 5,
    };
    let changes = AttributeChanges {
        mtime: Some(SetTime::At(wanted)),
        ..AttributeChanges::default()
    };
    let attributes = fs.set_attributes(inode, Some(handle), changes).await.unwrap();
    assert_eq!((attributes.mtime, attributes.size), (wanted, 7));
    let last = cluster.commands.lock().last().cloned().unwrap();
    assert!(
        matches!(
            last.operations[..],
            [Operation::Write { .. }, Operation::SetAttributes { .. }]
        ),
        "{last:?}"
    );
    close(&fs, handle).await;
    let seen = mount(&cluster, 2).lookup(ROOT, b"copied").await.unwrap();
    assert_eq!((seen.mtime, seen.size), (wanted, 7), "the flush did not touch it");
}

#[tokio::test]
async fn mtime_is_that_of_the_write_and_is_seen_before_the_flush() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (inode, handle) = create(&fs, "file").await;
    write(&fs, handle, 100, b"x").await;
    let dirty = fs.attributes(inode, None).await.unwrap();
    assert_eq!(dirty.size, 101);
    tokio::time::sleep(Duration::from_millis(5)).await;
    close(&fs, handle).await;
    let clean = fs.attributes(inode, None).await.unwrap();
    assert_eq!((clean.size, clean.mtime), (101, dirty.mtime));
}

#[tokio::test]
async fn a_failed_flush_is_reported_once_to_each_handle() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (inode, first) = create(&fs, "full").await;
    let second = fs.open(inode, read_write()).await.unwrap().handle;
    *cluster.put_fault.lock() = Some(FsError::NoSpace);
    write(&fs, first, 0, &pattern(100_000, 1)).await;
    assert_eq!(fs.fsync(first).await, Err(FsError::NoSpace));
    assert_eq!(fs.fsync(first).await, Ok(()));
    assert_eq!(fs.flush(second).await, Err(FsError::NoSpace));
    assert_eq!(fs.flush(second).await, Ok(()));
    let later = fs.open(inode, read_write()).await.unwrap().handle;
    assert_eq!(fs.fsync(later).await, Ok(()), "opened after the failure");
    *cluster.put_fault.lock() = None;
    write(&fs, first, 0, b"there is room again").await;
    close(&fs, first).await;
    assert_eq!(contents(&fs, "full").await, b"there is room again");
    assert_eq!(fs.dirty.bytes(), 0);
}

#[tokio::test]
async fn dead_chunks_are_replaced() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (_, handle) = create(&fs, "again").await;
    let data = pattern(300_000, 3);
    write(&fs, handle, 0, &data).await;
    cluster.kill_chunks.store(true, Ordering::SeqCst);
    close(&fs, handle).await;
    assert!(contents(&mount(&cluster, 2), "again").await == data);
    assert_eq!(cluster.puts.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn writers_wait_while_too_many_bytes_are_dirty() {
    let cluster = MemoryCluster::new();
    let options = FsOptions {
        dirty_bytes_max: 4 * MIB,
        ..without_commits_by_age()
    };
    let fs = mount_with(&cluster, 1, options);
    let (_, handle) = create(&fs, "stream").await;
    let closed_gate = cluster.put_gate.write().await;
    let writer = tokio::spawn({
        let fs = Arc::clone(&fs);
        async move {
            for at in 0..32 {
                write(&fs, handle, at * MIB, &pattern(MIB as usize, at)).await;
                assert!(fs.dirty.bytes() <= 6 * MIB);
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!writer.is_finished(), "it waits");
    assert!(fs.dirty.bytes() >= 4 * MIB);
    drop(closed_gate);
    writer.await.unwrap();
    close(&fs, handle).await;
    assert_eq!(fs.dirty.bytes(), 0);
    assert_eq!(contents(&fs, "stream").await.len() as u64, 32 * MIB);
}

#[tokio::test]
async fn old_dirty_bytes_are_committed_in_the_background() {
    let cluster = MemoryCluster::new();
    let options = FsOptions {
        dirty_age_ms: 40,
        ..FsOptions::default()
    };
    let fs = mount_with(&cluster, 1, options);
    let (_, handle) = create(&fs, "log").await;
    write(&fs, handle, 0, b"line").await;
    tokio::time::timeout(Duration::from_secs(10), async {
        while mount(&cluster, 2).lookup(ROOT, b"log").await.unwrap().size != 4 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn with_durability_fsync_close_does_not_wait_but_rename_does() {
    let cluster = MemoryCluster::new();
    let options = FsOptions {
        durability: Durability::Fsync,
        ..without_commits_by_age()
    };
    let fs = mount_with(&cluster, 1, options);
    let (_, handle) = create(&fs, "new").await;
    write(&fs, handle, 0, &pattern(100_000, 1)).await;
    let closed_gate = cluster.put_gate.write().await;
    close(&fs, handle).await;
    let rename = tokio::spawn({
        let fs = Arc::clone(&fs);
        async move { fs.rename(ROOT, b"new", ROOT, b"final", RenameMode::Replace).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(
        !rename.is_finished(),
        "the name must not refer to a file without its bytes"
    );
    assert_eq!(
        fs.lookup(ROOT, b"new").await.unwrap().size,
        100_000,
        "visible on this mount at once"
    );
    drop(closed_gate);
    rename.await.unwrap().unwrap();
    assert!(contents(&mount(&cluster, 2), "final").await == pattern(100_000, 1));
    assert!(fs.open.is_empty(), "forgotten once it was clean");
}

#[tokio::test]
async fn rename_commits_writes_of_an_open_handle() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (_, handle) = create(&fs, "temporary").await;
    write(&fs, handle, 0, b"bytes").await;
    fs.rename(ROOT, b"temporary", ROOT, b"final", RenameMode::Replace)
        .await
        .unwrap();
    assert_eq!(contents(&mount(&cluster, 2), "final").await, b"bytes");
}

#[tokio::test]
async fn a_reader_looks_extents_up_again_when_a_chunk_is_gone() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (inode, handle) = create(&fs, "shared").await;
    write(&fs, handle, 0, &pattern(200_000, 1)).await;
    close(&fs, handle).await;
    let reader = fs.open(inode, read_write()).await.unwrap().handle;
    let writer = other.open(inode, read_write()).await.unwrap().handle;
    write(&other, writer, 0, &pattern(200_000, 2)).await;
    close(&other, writer).await;
    assert!(read(&fs, reader, 0, 200_000).await == pattern(200_000, 2));
}

#[tokio::test]
async fn pages_are_kept_over_own_changes_and_dropped_over_others() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (inode, handle) = create(&fs, "file").await;
    write(&fs, handle, 0, b"one").await;
    close(&fs, handle).await;
    for (by, kept) in [
        (None, true),
        (Some(&fs), true),
        (Some(&other), false),
        (None, true),
    ] {
        if let Some(by) = by {
            let handle = by.open(inode, read_write()).await.unwrap().handle;
            write(by, handle, 0, b"two").await;
            close(by, handle).await;
        }
        let opened = fs.open(inode, read_write()).await.unwrap();
        assert_eq!(opened.keep_cache, kept);
        close(&fs, opened.handle).await;
    }
}

#[tokio::test]
async fn a_sequential_reader_fetches_each_chunk_once_and_ahead() {
    let cluster = MemoryCluster::new();
    let (fs, reader) = (mount(&cluster, 1), mount(&cluster, 2));
    let (inode, handle) = create(&fs, "film").await;
    let data = pattern(24 * MIB as usize, 9);
    for (at, part) in data.chunks(MIB as usize).enumerate() {
        write(&fs, handle, at as u64 * MIB, part).await;
    }
    close(&fs, handle).await;
    let opened = reader.open(inode, OpenFlags::from(libc::O_RDONLY)).await.unwrap();
    let first = read(&reader, opened.handle, 0, 128 << 10).await;
    assert!(first == data[..128 << 10]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(
        cluster.gets.load(Ordering::Relaxed) >= 2,
        "the next chunk is in flight"
    );
    assert!(contents(&reader, "film").await == data);
    assert_eq!(cluster.gets.load(Ordering::Relaxed), 24);
}

#[tokio::test]
async fn a_chunk_of_many_extents_is_not_fetched_for_each() {
    let cluster = MemoryCluster::new();
    let (fs, reader) = (
        mount_with(&cluster, 1, without_commits_by_age()),
        mount(&cluster, 2),
    );
    let (_, handle) = create(&fs, "database").await;
    let mut data = vec![0; 249 * 8192 + 4096];
    for at in 0..250usize {
        let offset = at * 7919 % 250 * 8192;
        data[offset..offset + 4096].copy_from_slice(&pattern(4096, at as u64));
        write(&fs, handle, offset as u64, &pattern(4096, at as u64)).await;
    }
    close(&fs, handle).await;
    assert!(contents(&reader, "database").await == data);
    // Once up to the end known from the first extents answer, once whole; and the reader and its read-ahead may both
    // fetch.
    let gets = cluster.gets.load(Ordering::Relaxed);
    assert!(gets <= 4, "{gets} fetches for 250 extents of one chunk");
}

#[tokio::test]
async fn appends_of_two_mounts_never_overwrite_each_other() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (inode, handle) = create(&fs, "log").await;
    write(&fs, handle, 0, b"head\n").await;
    let append = OpenFlags::from(libc::O_WRONLY | libc::O_APPEND);
    let here = fs.open(inode, append).await.unwrap();
    assert!(here.direct_io);
    let there = other.open(inode, append).await.unwrap();
    // Earlier writes of this mount are committed first, although none was synced.
    write(&fs, here.handle, 0, b"here 0\n").await;
    let lines = |fs: &Arc<Filesystem<Connection>>, handle, who: &'static str| {
        let fs = Arc::clone(fs);
        tokio::spawn(async move {
            for at in 1..50 {
                write(&fs, handle, 0, format!("{who} {at}\n").as_bytes()).await;
            }
        })
    };
    let (a, b) = (
        lines(&fs, here.handle, "here"),
        lines(&other, there.handle, "there"),
    );
    a.await.unwrap();
    b.await.unwrap();
    let text = String::from_utf8(contents(&fs, "log").await).unwrap();
    assert!(text.starts_with("head\nhere 0\n"));
    for who in ["here", "there"] {
        let seen: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with(&format!("{who} ")))
            .collect();
        let from = if who == "here" { 0 } else { 1 };
        assert_eq!(
            seen,
            (from..50).map(|at| format!("{who} {at}")).collect::<Vec<_>>()
        );
    }
    assert_eq!(
        cluster.puts.load(Ordering::Relaxed),
        0,
        "small appends are sent inside their command"
    );
}

#[tokio::test]
async fn a_listing_returns_every_entry_once_from_any_offset() {
    let cluster = MemoryCluster::new();
    let fs = mount(&cluster, 1);
    for at in 0..2500 {
        let (_, handle) = create(&fs, &format!("entry {at}")).await;
        fs.release(handle).await.unwrap();
    }
    for (detail, bytes_max) in [(EntryDetail::Name, 1000), (EntryDetail::Attributes, 4096)] {
        let handle = fs.open_directory(ROOT).await.unwrap();
        let mut all = Vec::new();
        loop {
            let offset = all.last().map_or(0, |item: &crate::DirectoryItem| item.cookie);
            let page = fs
                .read_directory(handle, offset, detail, bytes_max)
                .await
                .unwrap();
            if page.is_empty() {
                break;
            }
            all.extend(page);
        }
        assert_eq!(all.len(), 2502);
        let names: std::collections::BTreeSet<&[u8]> = all.iter().map(|item| item.name.as_ref()).collect();
        assert_eq!(names.len(), 2502);
        assert_eq!((all[0].name.as_ref(), all[0].cookie), (&b"."[..], 1));
        assert_eq!((all[1].name.as_ref(), all[1].cookie), (&b".."[..], 2));
        assert!(
            all[2..]
                .iter()
                .all(|item| item.attributes.is_some() == (detail == EntryDetail::Attributes))
        );
        // Back to the middle, and to the start.
        let middle = all[1200].cookie;
        let again = fs
            .read_directory(handle, middle, detail, bytes_max)
            .await
            .unwrap();
        let next = all.iter().find(|item| item.cookie > middle).unwrap();
        assert_eq!(again[0].name, next.name);
        create(&fs, "new").await;
        let mut names = Vec::new();
        let mut offset = 0;
        while let Some(last) = {
            let page = fs.read_directory(handle, offset, detail, 1 << 20).await.unwrap();
            names.extend(page.iter().map(|item| item.name.clone()));
            page.last().map(|item| item.cookie)
        } {
            offset = last;
        }
        assert!(
            names.iter().any(|name| name.as_ref() == b"new"),
            "a rewound listing has the new entries"
        );
        fs.unlink(ROOT, b"new").await.unwrap();
        fs.release_directory(handle).unwrap();
    }
}

#[tokio::test]
async fn names_directories_links_and_xattrs() {
    let cluster = MemoryCluster::new();
    let fs = mount(&cluster, 1);
    let new = |kind| NewInode {
        kind,
        mode: 0o755,
        uid: 1,
        gid: 2,
    };
    let directory = fs.make_node(ROOT, b"dir", new(NewKind::Directory)).await.unwrap();
    let target = SymlinkTarget::new(&b"somewhere"[..]).unwrap();
    let symlink = fs
        .make_node(directory.inode, b"sym", new(NewKind::Symlink(target.clone())))
        .await
        .unwrap();
    assert_eq!(symlink.kind, FileKind::Symlink);
    assert_eq!(fs.read_link(symlink.inode).await, Ok(target));
    assert_eq!(fs.lookup(directory.inode, b"..").await.unwrap().inode, ROOT);
    assert_eq!(
        fs.lookup(directory.inode, b".").await.unwrap().inode,
        directory.inode
    );
    assert_eq!(fs.lookup(ROOT, b"..").await.unwrap().inode, ROOT);
    assert_eq!(fs.lookup(ROOT, b"none").await, Err(FsError::NotFound));
    assert_eq!(
        fs.make_node(ROOT, b"dir", new(NewKind::Directory)).await,
        Err(FsError::Exists)
    );
    let (inode, handle) = create(&fs, "file").await;
    write(&fs, handle, 0, b"12").await;
    let linked = fs.link(inode, directory.inode, b"other name").await.unwrap();
    assert_eq!((linked.links, linked.size), (2, 2));
    assert_eq!(fs.remove_directory(ROOT, b"dir").await, Err(FsError::NotEmpty));
    let value = Bytes::from_static(b"value");
    fs.set_xattr(inode, b"user.key", value.clone(), XattrMode::Set)
        .await
        .unwrap();
    assert_eq!(fs.get_xattr(inode, b"user.key").await, Ok(value));
    assert_eq!(fs.list_xattrs(inode).await.unwrap().len(), 1);
    fs.remove_xattr(inode, b"user.key").await.unwrap();
    assert_eq!(fs.get_xattr(inode, b"user.key").await, Err(FsError::NoAttribute));
    let opened = fs.open(directory.inode, read_write()).await;
    assert_eq!(opened, Err(FsError::IsDirectory));
}

#[tokio::test]
async fn a_read_only_mount_changes_nothing() {
    let cluster = MemoryCluster::new();
    let (inode, _) = create(&mount(&cluster, 1), "file").await;
    let options = FsOptions {
        read_only: true,
        ..FsOptions::default()
    };
    let fs = mount_with(&cluster, 2, options);
    let before = cluster.commands.lock().len();
    let refused = Err(FsError::ReadOnly);
    assert_eq!(fs.unlink(ROOT, b"file").await, refused);
    let renamed = fs.rename(ROOT, b"file", ROOT, b"b", RenameMode::Replace).await;
    assert_eq!(renamed.map(|_| ()), refused);
    assert_eq!(fs.open(inode, read_write()).await.map(|_| ()), refused);
    assert_eq!(
        fs.open(inode, OpenFlags::from(libc::O_TRUNC)).await.map(|_| ()),
        refused
    );
    let created = fs.create(ROOT, b"x", 0o644, 0, 0, read_write()).await;
    assert_eq!(created.map(|_| ()), refused);
    let reader = fs.open(inode, OpenFlags::from(libc::O_RDONLY)).await.unwrap();
    assert_eq!(read(&fs, reader.handle, 0, 10).await.len(), 0);
    assert_eq!(cluster.commands.lock().len(), before);
}

#[tokio::test]
async fn holes_and_truncated_ranges_read_as_zeros() {
    let cluster = MemoryCluster::new();
    let fs = mount(&cluster, 1);
    let (inode, handle) = create(&fs, "sparse").await;
    write(&fs, handle, 3 * MIB, b"end").await;
    let mut expected = vec![0; 3 * MIB as usize];
    expected.extend_from_slice(b"end");
    assert!(contents(&fs, "sparse").await == expected);
    let size = |size| AttributeChanges {
        size: Some(size),
        ..AttributeChanges::default()
    };
    fs.set_attributes(inode, None, size(3 * MIB + 1)).await.unwrap();
    fs.set_attributes(inode, None, size(3 * MIB + 3)).await.unwrap();
    let end = read(&fs, handle, 3 * MIB, 100).await;
    assert_eq!(end, &b"e\0\0"[..]);
    let cut = fs
        .open(inode, OpenFlags::from(libc::O_RDWR | libc::O_TRUNC))
        .await
        .unwrap();
    assert_eq!(read(&fs, cut.handle, 0, 100).await.len(), 0);
    assert_eq!(fs.attributes(inode, None).await.unwrap().size, 0);
}

/// Readers concurrent with a writer and its commits see every byte that was written before the read began, whatever
/// stage it is in.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_reader_never_sees_less_than_was_written_before() {
    const BLOCKS: u64 = 48;
    const BLOCK: u64 = 24_000;
    let cluster = MemoryCluster::new();
    let options = FsOptions {
        dirty_bytes_max: 2 * MIB,
        dirty_age_ms: 4,
        ..FsOptions::default()
    };
    let fs = mount_with(&cluster, 1, options);
    let (_, handle) = create(&fs, "file").await;
    let published: Arc<Vec<AtomicU64>> = Arc::new((0..BLOCKS).map(|_| AtomicU64::new(0)).collect());
    write(&fs, handle, 0, &vec![0; (BLOCKS * BLOCK) as usize]).await;
    let writer = tokio::spawn({
        let (fs, published) = (Arc::clone(&fs), Arc::clone(&published));
        async move {
            for generation in 1..3000u64 {
                let block = generation * 31 % BLOCKS;
                let data: Vec<u8> = generation.to_le_bytes().repeat(BLOCK as usize / 8);
                write(&fs, handle, block * BLOCK, &data).await;
                published[block as usize].store(generation, Ordering::SeqCst);
                if generation % 97 == 0 {
                    fs.fsync(handle).await.unwrap();
                }
            }
        }
    });
    let readers = (0..2u64).map(|seed| {
        let (fs, published) = (Arc::clone(&fs), Arc::clone(&published));
        tokio::spawn(async move {
            let mut at = seed;
            while published
                .iter()
                .all(|generation| generation.load(Ordering::SeqCst) < 2900)
            {
                at = at
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let block = (at >> 33) % BLOCKS;
                let least = published[block as usize].load(Ordering::SeqCst);
                let read = read(&fs, handle, block * BLOCK, BLOCK as u32).await;
                let (words, rest) = read.as_chunks::<8>();
                assert!(rest.is_empty() && words.len() as u64 == BLOCK / 8);
                for word in words {
                    assert!(
                        u64::from_le_bytes(*word) >= least,
                        "older bytes than the last write"
                    );
                }
                // A read answered from memory does not yield, and a task it woke may wait for this thread.
                tokio::task::yield_now().await;
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    writer.await.unwrap();
    close(&fs, handle).await;
    let seen = contents(&mount(&cluster, 2), "file").await;
    for (block, generation) in published.iter().enumerate() {
        let generation = generation.load(Ordering::SeqCst);
        let expected = generation.to_le_bytes().repeat(BLOCK as usize / 8);
        assert!(seen[block * BLOCK as usize..][..BLOCK as usize] == expected);
    }
}
