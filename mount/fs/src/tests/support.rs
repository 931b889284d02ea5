//! What tests of the verbs do all the time.

use std::sync::Arc;

use bytes::Bytes;
use quorumfs_proto::InodeNumber;
use quorumfs_proto::command::Privileges;

use crate::{Filesystem, FsOptions, Handle, OpenFlags, Order, Place};
use quorumfs_memory::{Connection, MemoryCluster};

const ROOT: InodeNumber = InodeNumber::ROOT;

/// Where the kernel says that a write goes, as long as nobody changed the flags that the file was opened with.
pub fn place(fs: &Filesystem<Connection>, handle: Handle, offset: u64) -> Place {
    match fs.open.get(handle) {
        Ok(file) if file.flags.append => Place::End {
            offset,
            more_bytes: None,
        },
        _ => Place::At(offset),
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
    Filesystem::new(cluster.connect(session), options)
}

/// Nothing is committed by age.
pub(super) fn ageless() -> FsOptions {
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
            place(fs, handle, offset),
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
    fs.read(handle, offset, length, Order::default()).await.unwrap()
}

pub(super) async fn close(fs: &Arc<Filesystem<Connection>>, handle: Handle) {
    fs.flush(handle).await.unwrap();
    fs.release(handle).await.unwrap();
}
