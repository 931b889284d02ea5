//! Sectors and folders that cannot be read: reads of them by this test process fail with EIO.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::*;

/// By path, because inode numbers are reused.
static BAD: Mutex<BTreeMap<PathBuf, Vec<Range<u64>>>> = Mutex::new(BTreeMap::new());
static BAD_FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn spoil(path: &Path, range: Range<u64>) {
    BAD.lock().entry(path.to_path_buf()).or_default().push(range);
}

/// Whether this range of `file` can be read.
pub(crate) fn check(file: &File, at: u64, bytes: u64) -> io::Result<()> {
    let bad = BAD.lock();
    if bad.is_empty() {
        return Ok(());
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let is_hit = |ranges: &Vec<Range<u64>>| {
        ranges
            .iter()
            .any(|range| at < range.end && at + bytes > range.start)
    };
    if bad.get(&path).is_some_and(is_hit) {
        Err(io::Error::from_raw_os_error(libc::EIO))
    } else {
        Ok(())
    }
}

/// Whether `directory` can be listed.
pub(crate) fn check_folder(directory: &Path) -> io::Result<()> {
    let mut bad = BAD_FOLDERS.lock();
    // A folder that was renamed is another folder.
    match bad.iter().position(|folder| folder == directory) {
        Some(at) if std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none()) => {
            bad.remove(at);
            Ok(())
        }
        Some(_) => Err(io::Error::from_raw_os_error(libc::EIO)),
        None => Ok(()),
    }
}

/// Makes a sealed segment with `count` chunks of 30,000 bytes.
fn sealed(folder: &Path, count: u64) -> (Vec<Chunk>, PathBuf) {
    let chunks: Vec<Chunk> = (0..count).map(|counter| chunk(counter, 30_000)).collect();
    let (store, _) = open(folder);
    chunks.iter().for_each(|chunk| store.append(chunk).unwrap());
    drop(store);
    // An open segment is sealed when it is opened.
    drop(open(folder));
    let segment = segment_files(folder).remove(0);
    (chunks, segment)
}

#[test]
fn a_segment_that_cannot_be_read_whole_is_set_aside_and_what_can_be_is_kept() {
    const PAGE: u64 = 4096;
    let end_of = |segment: &Path| std::fs::metadata(segment).unwrap().len();
    // The bad range of the segment, given the number of chunks that it may cost.
    type RecordLocation = fn(u64) -> Range<u64>;
    let places: [(&str, RecordLocation, usize); 4] = [
        ("the header", |_| 0..PAGE, 1),
        ("the trailer", |end| end - 1..end, 0),
        ("the footer's beginning", |end| end - 900..end - 800, 1),
        ("header, footer and the middle", |end| 0..PAGE.max(end / 1000), 1),
    ];
    for (what, place, lost_max) in places {
        let folder = tempfile::tempdir().unwrap();
        let (chunks, segment) = sealed(folder.path(), 40);
        let end = end_of(&segment);
        spoil(&segment, place(end));
        if what.ends_with("middle") {
            spoil(&segment, end / 2..end / 2 + 1);
            spoil(&segment, end - PAGE..end);
        }
        let lost_max = if what.ends_with("middle") { 3 } else { lost_max };
        let (store, report) = open(folder.path());
        assert_eq!(report.unreadable_segments, 1, "{what}: {report:?}");
        let held: Vec<&Chunk> = chunks.iter().filter(|chunk| store.holds(chunk.id())).collect();
        assert!(
            held.len() >= chunks.len() - lost_max,
            "{what}: {} are left",
            held.len()
        );
        held.iter().for_each(|chunk| assert_served(&store, chunk));
        let aside = store.files_set_aside();
        assert_eq!(aside.len(), 1, "{what}");
        assert!(!segment.exists() && aside[0].to_string_lossy().contains("unreadable-segment-"));
        // Missing chunks are put again, as recovery does.
        chunks.iter().for_each(|chunk| store.append(chunk).unwrap());
        drop(store);
        let (store, report) = open(folder.path());
        assert_eq!((report.unreadable_segments, report.chunks), (0, 40), "{what}");
        chunks.iter().for_each(|chunk| assert_served(&store, chunk));
        assert_eq!(
            store.files_set_aside(),
            aside,
            "it is named for as long as it is there"
        );
    }
}

#[test]
fn a_segment_with_too_much_that_is_unreadable_is_said_not_to_be_looked_at_to_the_end() {
    const PAGE: u64 = 4096;
    const BAD_PAGES: u64 = 300;
    let folder = tempfile::tempdir().unwrap();
    let (chunks, segment) = sealed(folder.path(), 120);
    let end = std::fs::metadata(&segment).unwrap().len();
    spoil(&segment, end - PAGE..end);
    spoil(&segment, 20 * PAGE..(20 + BAD_PAGES) * PAGE);
    let (store, report) = open(folder.path());
    assert_eq!(
        (report.unreadable_segments, report.partly_read_segments),
        (1, 1),
        "{report:?}"
    );
    // The records behind it are still readable in the file that was set aside.
    assert!(!store.holds(chunks[119].id()));
    let aside = &store.files_set_aside()[0];
    find(aside, &chunks[119].payload()[..64]);

    let folder = tempfile::tempdir().unwrap();
    let (_, segment) = sealed(folder.path(), 40);
    spoil(&segment, 0..PAGE);
    let (_, report) = open(folder.path());
    assert_eq!((report.unreadable_segments, report.partly_read_segments), (1, 0));
}

#[test]
fn what_was_discarded_does_not_come_back_from_an_unreadable_segment() {
    let folder = tempfile::tempdir().unwrap();
    let (chunks, segment) = sealed(folder.path(), 40);
    let (store, _) = open(folder.path());
    store.discard(&(10..20).map(id).collect::<Vec<_>>()).unwrap();
    drop(store);
    let end = std::fs::metadata(&segment).unwrap().len();
    spoil(&segment, end - 1..end);
    let (store, report) = open(folder.path());
    assert_eq!((report.unreadable_segments, report.chunks), (1, 30));
    for chunk in &chunks {
        assert_eq!(store.holds(chunk.id()), !(10..20).contains(&chunk.id().counter));
    }
}

#[test]
fn a_torn_segment_with_a_bad_sector_is_salvaged_too() {
    let folder = tempfile::tempdir().unwrap();
    let chunks: Vec<Chunk> = (0..40).map(|counter| chunk(counter, 30_000)).collect();
    let (store, _) = open(folder.path());
    chunks.iter().for_each(|chunk| store.append(chunk).unwrap());
    drop(store);
    // In a payload that must be read, because no watermark says that it is on disk.
    let segment = segment_files(folder.path()).remove(0);
    let at = find(&segment, &chunks[7].payload()[..64]);
    spoil(&segment, at + 9_000..at + 9_001);
    let (store, report) = open(folder.path());
    assert_eq!((report.unreadable_segments, report.chunks), (1, 39));
    assert!(!store.holds(id(7)));
}

#[test]
fn a_folder_that_cannot_be_listed_is_set_aside_where_others_have_its_content() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("content");
    sealed(&folder, 3);
    BAD_FOLDERS.lock().push(folder.clone());
    let alone = ContentOptions {
        unlisted: Unlisted::Refuse,
        ..options()
    };
    let refused = ContentStore::open(&folder, alone).unwrap_err();
    assert!(matches!(refused, ContentError::Unlisted { .. }), "{refused}");
    assert_eq!(segment_files(&folder).len(), 1, "it stays where it is");

    let (store, report) = open(&folder);
    assert_eq!((report.segments, report.chunks), (0, 0));
    store.append(&chunk(1, 100)).unwrap();
    let aside = parent.path().join("unreadable-content-1");
    assert_eq!(segment_files(&aside).len(), 1, "nothing is lost of it");
}
