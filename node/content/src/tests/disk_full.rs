//! A full disk: the writer gets an error, and nothing else happens.

use std::io::Write;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::super::ContentError;
use super::*;

/// A tmpfs of a few mebibytes; unmounted when dropped, also by a panic.
struct TinyDisk {
    folder: tempfile::TempDir,
}

impl TinyDisk {
    /// `None` where the test may not mount.
    fn new(megabytes: u32) -> Option<TinyDisk> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root may mount a tmpfs");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let data = format!("size={megabytes}m");
        mount(
            Some("tmpfs"),
            folder.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(data.as_str()),
        )
        .unwrap();
        Some(TinyDisk { folder })
    }

    fn content(&self) -> PathBuf {
        self.folder.path().join("content")
    }

    /// Fills the remaining space.
    fn fill(&self) -> PathBuf {
        let path = self.folder.path().join("filler");
        let mut file = File::create(&path).unwrap();
        while file.write_all(&[1; 64 << 10]).is_ok() {}
        while file.write_all(&[1; 64]).is_ok() {}
        path
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        let _ = umount2(self.folder.path(), MntFlags::MNT_DETACH);
    }
}

/// Puts chunks until there is no space; returns those that were stored.
async fn put_until_full(store: &ContentStore, first: u64, length: usize) -> Vec<Chunk> {
    let mut stored = Vec::new();
    for counter in first.. {
        let chunk = chunk(counter, length);
        match store.put(chunk.clone()).await {
            Ok(()) => stored.push(chunk),
            Err(ContentError::NoSpace) => {
                assert!(!store.holds(chunk.id()));
                assert!(matches!(store.append(&chunk), Err(ContentError::NoSpace)));
                return stored;
            }
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!("the disk is finite");
}

#[tokio::test]
async fn a_full_disk_is_an_error_to_the_writer_and_the_store_goes_on() {
    for length in [1 << 20, 20_000] {
        let Some(disk) = TinyDisk::new(64) else { return };
        let (store, _) = ContentStore::open(&disk.content(), ContentOptions::default()).unwrap();
        let stored = put_until_full(&store, 0, length).await;
        let payload_bytes = (stored.len() * length) as u64;
        assert!(payload_bytes > 52 << 20, "{payload_bytes} of 64 MiB were used");
        let space = store.space().unwrap();
        assert!(space.available_bytes > 3 << 20, "the reserve is left: {space:?}");
        assert!(space.room_bytes < 2 << 20, "{space:?}");
        stored.iter().for_each(|chunk| assert_served(&store, chunk));

        // Deleting frees space.
        let dead: Vec<ChunkId> = stored.iter().step_by(2).map(|chunk| chunk.id()).collect();
        let freed = store.discard(&dead).unwrap();
        assert!(freed > payload_bytes / 3, "{freed}");
        let more = put_until_full(&store, 100_000, length).await;
        assert!(more.len() * length > freed as usize / 2, "{} more", more.len());
        drop(store);
        let (store, report) = ContentStore::open(&disk.content(), ContentOptions::default()).unwrap();
        assert_eq!(report.chunks as usize, stored.len() - dead.len() + more.len());
        more.iter()
            .chain(stored.iter().skip(1).step_by(2))
            .for_each(|chunk| assert_served(&store, chunk));
    }
}

#[tokio::test]
async fn on_a_disk_without_a_free_byte_chunks_are_read_and_deleted_and_the_store_opens() {
    let Some(disk) = TinyDisk::new(24) else { return };
    let (store, _) = ContentStore::open(&disk.content(), options()).unwrap();
    let chunks: Vec<Chunk> = (0..12).map(|counter| chunk(counter, 1 << 20)).collect();
    for chunk in &chunks {
        store.put(chunk.clone()).await.unwrap();
    }
    let filler = disk.fill();
    chunks.iter().for_each(|chunk| assert_served(&store, chunk));
    drop(store);
    let (store, report) = ContentStore::open(&disk.content(), options()).unwrap();
    assert_eq!(report.chunks, 12);
    // Opening sealed a segment and so freed space.
    std::fs::remove_file(filler).unwrap();
    let filler = disk.fill();
    assert!(matches!(
        store.put(chunk(100, 1 << 20)).await,
        Err(ContentError::NoSpace)
    ));
    let freed = store.discard(&[id(0), id(5)]).unwrap();
    assert!(freed >= 2 << 20, "{freed}");
    for at in [1, 11] {
        assert_served(&store, &chunks[at]);
    }
    std::fs::remove_file(filler).unwrap();
    store.put(chunk(100, 1 << 20)).await.unwrap();
}
