//! A snapshot for which the disk has no space.

use std::io::Write as _;

use bytes::Bytes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use quorumfs_proto::command::{Operation, Target, XattrMode};
use quorumfs_proto::{InodeNumber, XattrName};

use super::super::*;
use super::support::*;

/// A tmpfs; unmounted when dropped, also by a panic.
struct SmallDisk(tempfile::TempDir);

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_snapshot_without_room_is_refused_and_the_next_is_taken() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root may mount a tmpfs");
        return;
    }
    let disk = SmallDisk(tempfile::tempdir().unwrap());
    let tmpfs = Some("tmpfs");
    mount(tmpfs, disk.0.path(), tmpfs, MsFlags::empty(), Some("size=24m")).unwrap();

    let mut source = Node::with_sessions(1);
    for n in 0..150 {
        let set = Operation::SetXattr {
            inode: Target::Inode(InodeNumber::ROOT),
            name: XattrName::new(format!("user.{n}").into_bytes()).unwrap(),
            value: Bytes::from(vec![n; 32 << 10]),
            mode: XattrMode::Set,
        };
        source.operate(set).unwrap();
    }
    source.store.freeze();
    source.store.flush().unwrap();
    let snapshot = source.store.snapshot().unwrap();
    let rows: Vec<Row> = snapshot.rows().collect::<Result<_, _>>().unwrap();

    let store = MetadataStore::open(&disk.0.path().join("metadata.redb"), SMALL).unwrap();
    let receive = || {
        let mut installation = store.begin_install()?;
        for some in rows.chunks(16) {
            installation.add(some)?;
        }
        installation.finish()
    };
    let before = store.position();
    let filler = disk.0.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    // Enough space to begin, too little for all of it.
    let room = |file: &mut std::fs::File, left: u64| {
        while nix::sys::statvfs::statvfs(disk.0.path())
            .unwrap()
            .blocks_available() as u64
            * 4096
            > left
        {
            file.write_all(&[1; 64 << 10]).unwrap();
        }
    };
    for left in [10 << 20, 5 << 20] {
        room(&mut file, left);
        assert!(
            matches!(receive(), Err(StorageFault::NoSpace { .. })),
            "with {left} bytes"
        );
        assert_eq!(store.position(), before);
    }
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    let received = receive().unwrap();
    // A received snapshot needs no further space.
    let mut file = std::fs::File::create(&filler).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    assert_eq!(&store.install(received).unwrap(), snapshot.position());
    assert_eq!(dump(&store.view().unwrap()), dump(&source.view()));
}
