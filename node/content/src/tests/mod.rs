//! The content store as its callers see it, on a real disk, through crashes, damage and full disks.

pub(crate) mod bad_sectors;
mod damage;
mod disk_full;
mod model;
mod pace;
mod store;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use quorumfs_proto::{Chunk, ChunkId, SessionId};

use super::{ContentError, ContentOptions, ContentStore, OpenReport, Unlisted};

/// The id of the test chunk `counter`.
fn id(counter: u64) -> ChunkId {
    ChunkId {
        session: SessionId(7),
        counter,
    }
}

/// Makes a chunk whose bytes follow from its number.
fn chunk(counter: u64, length: usize) -> Chunk {
    let mut state = counter.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let payload: Bytes = (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect();
    Chunk::new(id(counter), payload).unwrap()
}

/// Small segments and almost no reserve.
fn options() -> ContentOptions {
    ContentOptions {
        segment_bytes: 4 << 20,
        reserve_bytes: 64 << 10,
        unlisted: Unlisted::SetAside,
    }
}

fn open(directory: &Path) -> (ContentStore, OpenReport) {
    ContentStore::open(directory, options()).unwrap()
}

fn assert_served(store: &ContentStore, chunk: &Chunk) {
    assert_eq!(&store.read_whole(chunk.id()).unwrap(), chunk);
}

/// The segment files, oldest first.
fn segment_files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("segment-")
        })
        .collect();
    files.sort();
    files
}

/// Returns the bytes that the segments occupy on disk.
fn disk_bytes(directory: &Path) -> u64 {
    segment_files(directory)
        .iter()
        .map(|path| std::fs::metadata(path).unwrap().blocks() * 512)
        .sum()
}

/// Returns the offset of `needle` in a file.
fn find(path: &Path, needle: &[u8]) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    bytes
        .windows(needle.len())
        .position(|window| window == needle)
        .unwrap() as u64
}

fn writable(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}
