//! Files that are named last.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use quorumfs_proto::command::IfExists;
use quorumfs_proto::{FsError, InodeNumber, Name};

use super::support::{
    MIB, ROOT, close, contents, create, mount, mount_with, pattern, read_write, without_commits_by_age, write,
};
use crate::readahead::ReadaheadLimits;
use crate::{Destination, Filesystem, NewFile};
use quorumfs_memory::{Connection, MemoryCluster};

const NEW: NewFile = NewFile {
    mode: 0o600,
    uid: 7,
    gid: 8,
};

fn at(directory: InodeNumber, missing: &[&str], name: &str, existing: IfExists) -> Destination {
    let named = |name: &str| Name::new(name.as_bytes().to_vec()).unwrap();
    Destination {
        directory,
        missing: missing.iter().map(|name| named(name)).collect(),
        new_directory: NewFile { mode: 0o755, ..NEW },
        name: named(name),
        existing,
    }
}

async fn path(fs: &Arc<Filesystem<Connection>>, path: &[&str]) -> Result<InodeNumber, FsError> {
    let names: Vec<Name> = path
        .iter()
        .map(|name| Name::new(name.as_bytes().to_vec()).unwrap())
        .collect();
    fs.resolve(&names).await.map(|found| found.inode)
}

#[tokio::test]
async fn a_stored_file_is_one_command_with_its_directories() {
    let cluster = MemoryCluster::new();
    let fs = mount(&cluster, 1);
    for (name, length) in [("empty", 0), ("inline", 1000), ("chunk", MIB as usize)] {
        let before = cluster.commands.lock().len();
        let content = Bytes::from(pattern(length, 3));
        let destination = at(ROOT, &[name, "b"], "file", IfExists::Refuse);
        let stored = fs.store(NEW, content.clone(), destination).await.unwrap();
        assert_eq!(cluster.commands.lock().len(), before + 1);
        assert_eq!(stored.sha256, quorumfs_proto::Sha256::of(&content));
        let attributes = stored.attributes;
        assert_eq!(
            (attributes.size, attributes.mode, attributes.uid, attributes.gid),
            (length as u64, 0o600, 7, 8)
        );
        assert_eq!(path(&fs, &[name, "b", "file"]).await, Ok(attributes.inode));
    }
    let taken = at(ROOT, &["empty", "b"], "file", IfExists::Refuse);
    let refused = fs.store(NEW, Bytes::from_static(b"x"), taken.clone()).await;
    assert_eq!(refused.unwrap_err(), FsError::Exists);
    let replacing = Destination {
        existing: IfExists::Open,
        ..taken
    };
    let stored = fs.store(NEW, Bytes::from_static(b"x"), replacing).await.unwrap();
    assert_eq!(
        path(&fs, &["empty", "b", "file"]).await,
        Ok(stored.attributes.inode)
    );
}

#[tokio::test]
async fn more_directories_than_a_command_can_make_are_made() {
    let cluster = MemoryCluster::new();
    let fs = mount(&cluster, 1);
    let deep = vec!["d"; 500];
    let content = Bytes::from_static(b"deep");
    fs.store(NEW, content, at(ROOT, &deep, "file", IfExists::Refuse))
        .await
        .unwrap();
    assert!(path(&fs, &[&deep[..], &["file"]].concat()).await.is_ok());
    assert_eq!(cluster.commands.lock().len(), 3);
}

#[tokio::test]
async fn a_name_refers_to_a_whole_file_or_to_nothing() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (
        mount_with(&cluster, 1, without_commits_by_age()),
        mount(&cluster, 2),
    );
    let data = pattern(20 * MIB as usize + 5, 1);
    let handle = fs.create_unnamed(NEW).await.unwrap();
    for (n, part) in data.chunks(MIB as usize).enumerate() {
        write(&fs, handle, n as u64 * MIB, part).await;
    }
    assert_eq!(other.lookup(ROOT, b"whole").await.unwrap_err(), FsError::NotFound);
    let nowhere = at(InodeNumber(999), &[], "whole", IfExists::Refuse);
    assert!(fs.link_into(handle, NEW, nowhere).await.is_err());
    let owned = NewFile {
        mode: 0o640,
        uid: 9,
        gid: 10,
    };
    let linked = fs
        .link_into(handle, owned, at(ROOT, &[], "whole", IfExists::Refuse))
        .await
        .unwrap();
    assert_eq!(linked.size, data.len() as u64);
    assert_eq!((linked.mode, linked.uid, linked.gid), (0o640, 9, 10));
    assert!(contents(&other, "whole").await == data);
    fs.discard(handle).await.unwrap();
    assert!(contents(&other, "whole").await == data);
}

#[tokio::test]
async fn a_file_with_lost_bytes_is_not_linked() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let handle = fs.create_unnamed(NEW).await.unwrap();
    *cluster.put_fault.lock() = Some(FsError::NoSpace);
    write(&fs, handle, 0, &pattern(3 * MIB as usize, 1)).await;
    assert_eq!(fs.flush_all().await, Err(FsError::NoSpace));
    *cluster.put_fault.lock() = None;
    assert_eq!(fs.failure(handle), Err(FsError::NoSpace));
    // More directories than one command can create, so some would be created before the file is linked.
    for missing in [vec![], vec!["d"; 500]] {
        let linked = fs
            .link_into(handle, NEW, at(ROOT, &missing, "part", IfExists::Refuse))
            .await;
        assert_eq!(linked, Err(FsError::NoSpace));
    }
    for name in [&b"part"[..], b"d"] {
        assert_eq!(fs.lookup(ROOT, name).await.unwrap_err(), FsError::NotFound);
    }
    fs.discard(handle).await.unwrap();
}

#[tokio::test]
async fn a_file_whose_last_bytes_fail_is_not_linked() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let handle = fs.create_unnamed(NEW).await.unwrap();
    write(&fs, handle, 0, &pattern(2 * MIB as usize, 1)).await;
    fs.fsync(handle).await.unwrap();
    *cluster.put_fault.lock() = Some(FsError::NoSpace);
    write(&fs, handle, 2 * MIB, &pattern(100_000, 1)).await;
    let linked = fs
        .link_into(handle, NEW, at(ROOT, &[], "part", IfExists::Refuse))
        .await;
    assert_eq!(linked, Err(FsError::NoSpace));
    assert_eq!(fs.lookup(ROOT, b"part").await.unwrap_err(), FsError::NotFound);
}

#[tokio::test]
async fn a_discarded_file_is_not_committed_and_is_removed() {
    let cluster = MemoryCluster::new();
    let fs = mount_with(&cluster, 1, without_commits_by_age());
    let inodes = cluster.inode_count();
    let handle = fs.create_unnamed(NEW).await.unwrap();
    write(&fs, handle, 0, &pattern(3 * MIB as usize, 1)).await;
    let before = cluster.commands.lock().len();
    fs.discard(handle).await.unwrap();
    assert_eq!(fs.dirty_bytes(), 0);
    fs.flush_all().await.unwrap();
    let written = cluster.commands.lock().len() - before;
    assert_eq!(written, 1, "only the release");
    cluster.reclaim();
    assert_eq!(cluster.inode_count(), inodes);
    assert!(fs.open.is_empty());
}

#[tokio::test]
async fn a_version_is_read_whole_or_not_at_all() {
    let cluster = MemoryCluster::new();
    let (fs, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let (inode, writer) = create(&other, "file").await;
    let old = pattern(3 * MIB as usize, 1);
    write(&other, writer, 0, &old).await;
    other.fsync(writer).await.unwrap();
    let reader = fs.open(inode, read_write()).await.unwrap().handle;
    let version = fs.known_attributes(reader).unwrap().content_version;
    let read = async |offset: u64| {
        fs.read_version(reader, version, offset, 1000, ReadaheadLimits::default())
            .await
    };
    assert_eq!(read(0).await.unwrap(), old[..1000]);
    write(&other, writer, 0, &pattern(3 * MIB as usize, 2)).await;
    other.fsync(writer).await.unwrap();
    cluster.reclaim();
    fs.attributes(inode, None).await.unwrap();
    assert_eq!(read(MIB).await, Err(FsError::Stale), "another version is known");
    assert!(cluster.gets.load(Ordering::Relaxed) > 0);
    close(&other, writer).await;
}
