//! Damage to what lies on disk, as a failing disk does it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Sandbox;

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

/// Preloaded (ld.so(8)), it makes reads of the ranges that the file `QUORUMFS_TEST_BAD_SECTORS` names at the start fail with
/// EIO, as a disk does whose sectors cannot be read. Each line: path, first offset, offset after the last.
const BAD_SECTORS: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct { char path[512]; long long from, to; } bad[16];
static int count;

__attribute__((constructor)) static void load(void) {
    const char *name = getenv("QUORUMFS_TEST_BAD_SECTORS");
    FILE *list = name ? fopen(name, "r") : NULL;
    while (list && count < 16 && fscanf(list, "%511s %lld %lld", bad[count].path, &bad[count].from, &bad[count].to) == 3) count++;
    if (list) fclose(list);
}

static int is_bad(int fd, long long at, size_t bytes) {
    char link[64], path[512];
    if (!count) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    for (int i = 0; i < count; i++)
        if (!strcmp(path, bad[i].path) && at < bad[i].to && at + (long long)bytes > bad[i].from) return 1;
    return 0;
}

ssize_t pread64(int fd, void *to, size_t bytes, off64_t at) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (!real) real = (ssize_t (*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    if (is_bad(fd, at, bytes)) { errno = EIO; return -1; }
    return real(fd, to, bytes, at);
}
ssize_t pread(int fd, void *to, size_t bytes, off_t at) { return pread64(fd, to, bytes, at); }
"#;

/// Compiles the library that makes sectors unreadable; for `LD_PRELOAD`.
pub fn bad_sectors_library(sandbox: &Sandbox) -> PathBuf {
    let (source, library) = (sandbox.path("bad_sectors.c"), sandbox.path("bad_sectors.so"));
    std::fs::write(&source, BAD_SECTORS).expect("write the source");
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(&source)
        .arg("-ldl")
        .status()
        .expect("run cc");
    assert!(status.success(), "the library does not compile");
    library
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
