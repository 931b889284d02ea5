//! Helpers of the tests.

use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::command::Privileges;
use quorumfs_proto::{InodeNumber, Operation};

use crate::{Filesystem, FsOptions, Handle, OpenFlags, Order, Reader, WritePosition};
use quorumfs_memory::{Connection, MemoryCluster};

pub(super) const ROOT: InodeNumber = InodeNumber::ROOT;
pub(super) const MIB: u64 = 1 << 20;

pub(super) async fn contents(fs: &Arc<Filesystem<Connection>>, name: &str) -> Vec<u8> {
    let found = fs.lookup(ROOT, name.as_bytes()).await.unwrap();
    let opened = fs
        .open(found.inode, OpenFlags::from(libc::O_RDONLY))
        .await
        .unwrap();
    let mut all = Vec::new();
    loop {
        let part = read(fs, opened.handle, all.len() as u64, 128 << 10).await;
        if part.is_empty() {
            break;
        }
        all.extend_from_slice(&part);
    }
    assert_eq!(all.len() as u64, found.size);
    close(fs, opened.handle).await;
    all
}

pub(super) fn pattern(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed as u8)
        .collect()
}

pub(super) fn written_operations(cluster: &MemoryCluster) -> Vec<Operation> {
    cluster
        .commands
        .lock()
        .iter()
        .flat_map(|command| command.operations.clone())
        .collect()
}

/// Returns the position of a write as the kernel states it if the flags have not changed since the open.
pub fn write_position(fs: &Filesystem<Connection>, handle: Handle, offset: u64) -> WritePosition {
    match fs.open.get(handle) {
        Ok(file) if file.flags.append => WritePosition::End {
            offset,
            more_bytes: None,
        },
        _ => WritePosition::At(offset),
    }
}

pub(super) fn mount(cluster: &Arc<MemoryCluster>, session: u64) -> Arc<Filesystem<Connection>> {
    mount_with(cluster, session, FsOptions::default())
}

pub(super) fn mount_with(
    cluster: &Arc<MemoryCluster>,
    session: u64,
    options: FsOptions,
) -> Arc<Filesystem<Connection>> {
    Filesystem::new(cluster.connect(session), options, &Arc::default())
}

/// Options without commits by age.
pub(super) fn without_commits_by_age() -> FsOptions {
    FsOptions {
        dirty_age_ms: 3_600_000,
        ..FsOptions::default()
    }
}

pub(super) fn read_write() -> OpenFlags {
    OpenFlags::from(libc::O_RDWR)
}

pub(super) async fn create(fs: &Arc<Filesystem<Connection>>, name: &str) -> (InodeNumber, Handle) {
    let flags = read_write();
    let (attributes, opened) = fs
        .create(ROOT, name.as_bytes(), 0o644, 0, 0, flags)
        .await
        .unwrap();
    (attributes.inode, opened.handle)
}

pub(super) async fn write(fs: &Arc<Filesystem<Connection>>, handle: Handle, offset: u64, data: &[u8]) {
    let written = fs
        .write(
            handle,
            write_position(fs, handle, offset),
            Bytes::copy_from_slice(data),
            Privileges::Keep,
            Order::default(),
        )
        .await;
    assert_eq!(written, Ok(data.len() as u32));
}

pub(super) async fn read(
    fs: &Arc<Filesystem<Connection>>,
    handle: Handle,
    offset: u64,
    length: u32,
) -> Bytes {
    fs.read(handle, offset, length, Order::default(), Reader::default())
        .await
        .unwrap()
}

pub(super) async fn close(fs: &Arc<Filesystem<Connection>>, handle: Handle) {
    fs.flush(handle).await.unwrap();
    fs.release(handle).await.unwrap();
}
