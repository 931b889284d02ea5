//! Damage to what lies on disk, as a failing disk does it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// How much of a file is searched at a time.
const WINDOW_BYTES: usize = 8 << 20;

/// Every regular file below `folder`, sorted.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("list {}: {e}", folder.display())) {
        let path = entry.expect("list a folder").path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Every place below `folder` where `needle` lies: (file, offset).
pub fn find_bytes(folder: &Path, needle: &[u8]) -> Vec<(PathBuf, u64)> {
    let find_in = |path: PathBuf| {
        let file = File::open(&path).unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        let mut places = Vec::new();
        let mut start = 0u64;
        let mut window = vec![0; WINDOW_BYTES + needle.len()];
        loop {
            // Windows overlap by the needle's length, so that one across a border is found.
            let length = read_at_full(&file, &mut window, start);
            if length < needle.len() {
                return places;
            }
            for at in 0..=(length - needle.len()).min(WINDOW_BYTES - 1) {
                if window[at] == needle[0] && window[at..at + needle.len()] == *needle {
                    places.push((path.clone(), start + at as u64));
                }
            }
            start += WINDOW_BYTES as u64;
        }
    };
    files_below(folder).into_iter().flat_map(find_in).collect()
}

/// Opens the metadata of a node that is down.
pub fn open_metadata(path: &Path) -> redb::Database {
    try_open_metadata(path).expect("open the metadata of a node that is down")
}

/// As [`open_metadata`], where they may be damaged.
pub fn try_open_metadata(path: &Path) -> Result<redb::Database, redb::DatabaseError> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
    let nobody = std::sync::Arc::new(|_: &str| {});
    let blocks = quorumfs_blocks::BlockFile::open(file, nobody).map_err(redb::StorageError::Io)?;
    redb::Builder::new().create_with_backend(blocks)
}

/// Changes one byte.
pub fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("open a file to damage it");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read the byte");
    file.write_all_at(&[byte[0] ^ 0x55], offset)
        .expect("write the byte");
    file.sync_all().expect("sync the damage");
}

/// The offset of the last byte that is not zero: where a preallocated file's content ends.
pub fn last_used_byte(path: &Path) -> Option<u64> {
    let file = File::open(path).expect("open a file");
    let mut last = None;
    let mut start = 0;
    let mut window = vec![0; WINDOW_BYTES];
    loop {
        let length = read_at_full(&file, &mut window, start);
        if length == 0 {
            return last;
        }
        if let Some(at) = window[..length].iter().rposition(|byte| *byte != 0) {
            last = Some(start + at as u64);
        }
        start += length as u64;
    }
}

fn read_at_full(file: &File, buffer: &mut [u8], offset: u64) -> usize {
    let mut length = 0;
    while length < buffer.len() {
        match file
            .read_at(&mut buffer[length..], offset + length as u64)
            .expect("read a file")
        {
            0 => break,
            more => length += more,
        }
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_found_across_windows_and_flipped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut content = vec![0; WINDOW_BYTES + 1000];
        let across = WINDOW_BYTES - 3;
        content[across..across + 6].copy_from_slice(b"needle");
        content[5..11].copy_from_slice(b"needle");
        std::fs::write(&path, &content).unwrap();
        let places = find_bytes(folder.path(), b"needle");
        assert_eq!(places, [(path.clone(), 5), (path.clone(), across as u64)]);
        assert_eq!(last_used_byte(&path), Some(across as u64 + 5));
        flip(&path, 5);
        assert_eq!(find_bytes(folder.path(), b"needle"), [(path, across as u64)]);
    }
}
