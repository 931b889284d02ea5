//! What the kernel relies on: answers are as new as their requests, and tasks it leaves to the filesystem are done.

use bytes::Bytes;
use quorumfs_proto::command::{AttributeChanges, Privileges};
use quorumfs_proto::query::EntryDetail;
use quorumfs_proto::{FsError, InodeNumber};

use super::support::{close, create, mount, mount_with, read_write, without_commits_by_age, write};
use crate::{OpenFlags, Order, PageCache, Reader, WritePosition};
use quorumfs_memory::MemoryCluster;

const ROOT: InodeNumber = InodeNumber::ROOT;

#[tokio::test]
async fn attributes_of_a_listing_are_as_new_as_the_request() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let mut handles = Vec::new();
    for at in 0..400 {
        handles.push(create(&fs, &format!("{at:03}")).await.1);
    }
    let directory = fs.open_directory(ROOT).await.unwrap();
    let detail = EntryDetail::Attributes;
    let first = fs.read_directory(directory, 0, detail, 8 << 10).await.unwrap();
    let listed: Vec<&[u8]> = first.iter().map(|item| item.name.as_ref()).collect();
    let (mut removed, mut grown) = (0, 0);
    for (at, handle) in handles.iter().enumerate() {
        let name = format!("{at:03}");
        if listed.contains(&name.as_bytes()) {
            continue;
        }
        if at % 2 == 0 {
            // Either mount may remove it.
            let by = [&fs, &other][at / 2 % 2];
            by.unlink(ROOT, name.as_bytes()).await.unwrap();
            removed += 1;
        } else {
            write(&fs, *handle, 0, b"grown").await;
            close(&fs, *handle).await;
            grown += 1;
        }
    }
    assert!(removed > 50 && grown > 50, "{removed} and {grown}");
    let mut rest = Vec::new();
    let mut offset = first.last().unwrap().cookie;
    loop {
        let page = fs
            .read_directory(directory, offset, detail, 8 << 10)
            .await
            .unwrap();
        let Some(last) = page.last() else { break };
        offset = last.cookie;
        rest.extend(page);
    }
    assert_eq!(rest.len(), grown);
    for item in rest {
        assert_eq!(item.attributes.unwrap().size, 5, "{:?}", item.name);
    }
}

#[tokio::test]
async fn an_existing_file_is_not_opened_by_a_create() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (_, handle) = create(&other, "file").await;
    write(&other, handle, 0, b"precious").await;
    close(&other, handle).await;
    let before = cluster.commands.lock().len();
    for (flags, expected) in [
        (libc::O_CREAT | libc::O_RDWR | libc::O_TRUNC, FsError::Stale),
        (libc::O_CREAT | libc::O_RDWR | libc::O_EXCL, FsError::Exists),
    ] {
        let created = fs
            .create(ROOT, b"file", 0o644, 0, 0, OpenFlags::from(flags))
            .await;
        assert_eq!(created.map(|_| ()), Err(expected));
    }
    assert_eq!(cluster.commands.lock().len(), before, "nothing was truncated");
    assert_eq!(fs.lookup(ROOT, b"file").await.unwrap().size, 8);
}

#[tokio::test]
async fn pages_are_kept_only_after_older_ones_are_known_to_be_dropped() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (inode, handle) = create(&fs, "file").await;
    write(&fs, handle, 0, b"one").await;
    close(&fs, handle).await;
    let older = fs.open(inode, read_write()).await.unwrap();
    assert!(older.keep_cache);
    let writer = other.open(inode, read_write()).await.unwrap().handle;
    write(&other, writer, 0, b"two").await;
    close(&other, writer).await;
    let first = fs.open(inode, read_write()).await.unwrap();
    assert!(!first.keep_cache);
    // The kernel may not have received the first answer, and still have the old pages.
    let second = fs.open(inode, read_write()).await.unwrap();
    assert!(!second.keep_cache);
    fs.read(older.handle, 0, 10, Order::default(), Reader::default())
        .await
        .unwrap();
    let third = fs.open(inode, read_write()).await.unwrap();
    assert!(!third.keep_cache, "a request of an older handle confirms nothing");
    fs.read(second.handle, 0, 10, Order::default(), Reader::default())
        .await
        .unwrap();
    let fourth = fs.open(inode, read_write()).await.unwrap();
    assert!(
        fourth.keep_cache,
        "the kernel has received the second open and dropped its pages"
    );
    for opened in [older, first, second, third, fourth] {
        close(&fs, opened.handle).await;
    }
}

#[tokio::test]
async fn each_write_says_whether_it_appends() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (inode, handle) = create(&fs, "log").await;
    write(&fs, handle, 0, b"0123").await;
    close(&fs, handle).await;
    let appending = OpenFlags::from(libc::O_RDWR | libc::O_APPEND);
    let append = fs.open(inode, appending).await.unwrap();
    let plain = fs.open(inode, read_write()).await.unwrap();
    assert!(append.direct_io && !plain.direct_io);
    let elsewhere = other.open(inode, appending).await.unwrap().handle;
    write(&other, elsewhere, 0, b"45").await;
    for (handle, position, bytes) in [
        (append.handle, WritePosition::At(1), &b"x"[..]),
        (
            plain.handle,
            WritePosition::End {
                offset: 4,
                more_bytes: None,
            },
            b"67",
        ),
        (
            append.handle,
            WritePosition::End {
                offset: 4,
                more_bytes: None,
            },
            b"8",
        ),
    ] {
        let bytes = Bytes::from_static(bytes);
        let length = bytes.len() as u32;
        let written = fs
            .write(handle, position, bytes, Privileges::Keep, Order::default())
            .await;
        assert_eq!(written, Ok(length));
    }
    let all = fs
        .read(plain.handle, 0, 100, Order::default(), Reader::default())
        .await
        .unwrap();
    assert_eq!(all, b"0x2345678"[..]);
    close(&fs, append.handle).await;
    close(&fs, plain.handle).await;
}

#[tokio::test]
async fn privileges_dropped_by_a_write_are_not_seen_again() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let (inode, handle) = create(&fs, "program").await;
    let set = AttributeChanges {
        mode: Some(0o6755),
        ..AttributeChanges::default()
    };
    fs.set_attributes(inode, None, set.clone()).await.unwrap();
    let mode = async || fs.attributes(inode, None).await.unwrap().mode;
    fs.write(
        handle,
        WritePosition::At(0),
        Bytes::from_static(b"by root"),
        Privileges::Keep,
        Order::default(),
    )
    .await
    .unwrap();
    assert_eq!(mode().await, 0o6755);
    let other = Bytes::from_static(b"by a user");
    fs.write(
        handle,
        WritePosition::At(0),
        other,
        Privileges::Drop,
        Order::default(),
    )
    .await
    .unwrap();
    assert_eq!(mode().await, 0o755, "not committed yet");
    let flush = tokio::spawn({
        let fs = fs.clone();
        async move { fs.flush(handle).await }
    });
    while !flush.is_finished() {
        assert_eq!(mode().await, 0o755, "in flight");
        tokio::task::yield_now().await;
    }
    flush.await.unwrap().unwrap();
    assert_eq!(mode().await, 0o755);
    fs.set_attributes(inode, None, set).await.unwrap();
    assert_eq!(mode().await, 0o6755, "set again");
    fs.release(handle).await.unwrap();
}

#[tokio::test]
async fn the_pages_of_all_open_directories_are_bounded() {
    let cluster = MemoryCluster::new();
    let fs = mount(&cluster, 1);
    for number in 0..30 {
        create(&fs, &format!("file-{number:02}")).await;
    }
    let root = ROOT;
    let detail = EntryDetail::Name;
    let mut listings = Vec::new();
    for _ in 0..100 {
        let handle = fs.open_directory(root).await.unwrap();
        let first = fs.read_directory(handle, 0, detail, 320).await.unwrap();
        listings.push((handle, first));
        assert!(fs.directories.pages() <= 64);
    }
    assert_eq!(fs.directories.pages(), 64);
    for (handle, mut listed) in listings {
        loop {
            let after = listed.last().unwrap().cookie;
            let more = fs.read_directory(handle, after, detail, 320).await.unwrap();
            if more.is_empty() {
                break;
            }
            listed.extend(more);
        }
        assert_eq!(listed.len(), 32, "dots too");
        fs.release_directory(handle).unwrap();
    }
    assert_eq!(fs.directories.pages(), 0);
}

/// Records the calls of the page cache, in order.
#[derive(Default)]
struct RecordedCalls(parking_lot::Mutex<Vec<String>>);

impl PageCache for RecordedCalls {
    fn drop_from(&self, _inode: InodeNumber, from: u64) {
        self.0.lock().push(format!("drop from {from}"));
    }

    fn drop_page_at(&self, _inode: InodeNumber, at: u64) {
        self.0.lock().push(format!("drop the page of {at}"));
    }

    fn wait_for_readers(&self, readers: &[Reader]) {
        self.0.lock().push(format!("wait for {readers:?}"));
    }

    fn store_last_byte(&self, _inode: InodeNumber, at: u64, byte: u8) {
        self.0
            .lock()
            .push(format!("end with {} at {at}", char::from(byte)));
    }
}

#[tokio::test]
async fn p3_a_larger_size_is_reported_after_readers_have_copied_the_dropped_pages() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (
        mount_with(&cluster, 1, without_commits_by_age()),
        mount_with(&cluster, 2, without_commits_by_age()),
    );
    let calls = std::sync::Arc::new(RecordedCalls::default());
    fs.set_page_cache(calls.clone());
    let (inode, handle) = create(&other, "log").await;
    write(&other, handle, 0, b"one").await;
    other.fsync(handle).await.unwrap();
    let reader = fs.open(inode, read_write()).await.unwrap().handle;
    let read = fs.read(reader, 0, 100, Order(1), Reader(7)).await.unwrap();
    assert_eq!(read, b"one"[..]);
    write(&other, handle, 3, b"two").await;
    other.fsync(handle).await.unwrap();
    assert_eq!(fs.attributes(inode, None).await.unwrap().size, 6);
    let expected = ["drop from 3", "wait for [Reader(7)]"];
    assert_eq!(*calls.0.lock(), expected);
    close(&fs, reader).await;
    close(&other, handle).await;
}
