//! The log's files under faults: torn, damaged, missing, full.

use std::path::{Path, PathBuf};

use openraft::raft::AppendEntriesRequest;
use openraft::storage::{RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;

use super::{append, entry, log_id, vote};
use crate::consensus::fatal::FatalSignal;
use crate::consensus::intake::Intake;
use crate::consensus::log::LogStore;
use crate::consensus::types::{Entry, TypeConfig};
use crate::consensus::wal::{WalError, WalOptions};

fn small() -> WalOptions {
    WalOptions {
        file_bytes: 4 << 10,
        ..WalOptions::default()
    }
}

fn open(folder: &Path, options: &WalOptions) -> Result<LogStore, WalError> {
    LogStore::open(folder, options, FatalSignal::default())
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|item| item.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "wal"))
        .collect();
    files.sort();
    files
}

fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for item in std::fs::read_dir(from).unwrap() {
        let path = item.unwrap().path();
        std::fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
    }
    to
}

async fn entries(log: &LogStore) -> Vec<Entry> {
    log.clone().try_get_log_entries(..).await.unwrap()
}

fn indexes(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.log_id.index).collect()
}

/// Makes a log of one file with three batches, as a crash leaves it: not sealed. Also returns where in the file each
/// batch ends.
async fn three_batches(folder: &Path) -> (PathBuf, Vec<u64>) {
    let log = open(
        folder,
        &WalOptions {
            file_bytes: 64 << 10,
            ..small()
        },
    )
    .unwrap();
    let path = files(folder).pop().unwrap();
    let mut ends = Vec::new();
    for index in 0..3 {
        append(&log, vec![entry(1, index, format!("entry {index}"))]).await;
        ends.push(log.status().bytes);
    }
    let crashed = std::fs::read(&path).unwrap();
    drop(log);
    std::fs::write(&path, crashed).unwrap();
    (path, ends)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_flushed_is_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = open(folder.path(), &small()).unwrap();
    assert!(log.is_empty());
    log.save_vote(&vote(3, 2)).await.unwrap();
    for index in 0..100 {
        append(&log, vec![entry(3, index, "x".repeat(100))]).await;
    }
    assert!(
        files(folder.path()).len() > 3,
        "the files are small enough to be several"
    );
    log.truncate_after(Some(log_id(3, 89))).await.unwrap();
    append(&log, vec![entry(4, 90, "another")]).await;
    log.save_committed(Some(log_id(3, 80))).await.unwrap();
    log.purge(log_id(3, 40)).await.unwrap();
    append(&log, vec![entry(4, 91, "the last")]).await;
    let before = entries(&log).await;
    assert_eq!(indexes(&before), (41..92).collect::<Vec<_>>());
    drop(log);
    for _ in 0..3 {
        let mut log = open(folder.path(), &small()).unwrap();
        assert!(!log.is_empty());
        assert_eq!(entries(&log).await, before);
        assert_eq!(log.read_vote().await.unwrap(), Some(vote(3, 2)));
        assert_eq!(log.read_committed().await.unwrap(), Some(log_id(3, 80)));
        let state = log.get_log_state().await.unwrap();
        assert_eq!(
            (state.last_purged_log_id, state.last_log_id),
            (Some(log_id(3, 40)), Some(log_id(4, 91)))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn purging_removes_whole_files_and_reading_goes_to_disk() {
    let folder = tempfile::tempdir().unwrap();
    let options = WalOptions {
        cache_bytes_max: 500,
        ..small()
    };
    let mut log = open(folder.path(), &options).unwrap();
    for index in 0..200 {
        append(&log, vec![entry(1, index, "y".repeat(100))]).await;
    }
    let all = files(folder.path()).len();
    assert_eq!(indexes(&entries(&log).await), (0..200).collect::<Vec<_>>());
    let upto = log.purgeable(150, 8 << 10).unwrap();
    assert!(
        (50..150).contains(&upto),
        "some are kept before 150, some go: {upto}"
    );
    assert_eq!(log.purgeable(150, u64::MAX), None);
    log.purge(log_id(1, upto)).await.unwrap();
    append(&log, vec![entry(1, 200, "")]).await;
    log.close();
    assert!(files(folder.path()).len() < all);
    assert_eq!(indexes(&entries(&log).await), (upto + 1..201).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_is_cut_wherever_it_was_torn() {
    let folder = tempfile::tempdir().unwrap();
    let (path, ends) = three_batches(folder.path()).await;
    let whole = std::fs::read(&path).unwrap();
    for cut in ends[1]..=ends[2] {
        let mut torn = whole.clone();
        torn[cut as usize..].fill(0);
        std::fs::write(&path, &torn).unwrap();
        let copy = copy(folder.path());
        let log = open(copy.path(), &small()).unwrap();
        let expected: &[u64] = if cut == ends[2] { &[0, 1, 2] } else { &[0, 1] };
        assert_eq!(indexes(&entries(&log).await), expected, "cut at {cut}");
        // The log continues after them, and the torn part does not come back.
        let next = expected.len() as u64;
        append(&log, vec![entry(2, next, "again")]).await;
        drop(log);
        let log = open(copy.path(), &small()).unwrap();
        assert_eq!(entries(&log).await.last(), Some(&entry(2, next, "again")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_below_the_watermark_is_never_cut() {
    let folder = tempfile::tempdir().unwrap();
    let (path, ends) = three_batches(folder.path()).await;
    let whole = std::fs::read(&path).unwrap();
    for at in 0..ends[2] {
        let mut damaged = whole.clone();
        damaged[at as usize] ^= 0x10;
        std::fs::write(&path, &damaged).unwrap();
        let copy = copy(folder.path());
        match open(copy.path(), &small()) {
            Err(WalError::DamagedBelowWatermark { file, offset }) => {
                assert!(at < ends[1], "byte {at} is in the last batch");
                assert_eq!(file.file_name(), path.file_name());
                assert!(offset <= at, "byte {at} is reported at {offset}");
            }
            Err(other) => panic!("byte {at}: {other}"),
            Ok(log) => {
                assert!(at >= ends[1], "byte {at} had been flushed");
                assert_eq!(indexes(&entries(&log).await), [0, 1]);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_closed_has_no_byte_that_may_be_cut() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path(), &small()).unwrap();
    append(&log, vec![entry(1, 0, "only")]).await;
    let used = log.status().bytes as usize;
    drop(log);
    let path = files(folder.path()).pop().unwrap();
    let whole = std::fs::read(&path).unwrap();
    for at in 0..used {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        let copy = copy(folder.path());
        let opened = open(copy.path(), &small());
        assert!(
            matches!(opened, Err(WalError::DamagedBelowWatermark { .. })),
            "byte {at}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_missing_or_too_short_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path(), &small()).unwrap();
    for index in 0..100 {
        append(&log, vec![entry(1, index, "z".repeat(100))]).await;
    }
    drop(log);
    let names = files(folder.path());
    assert!(names.len() >= 4);

    let without = copy(folder.path());
    std::fs::remove_file(without.path().join(names[1].file_name().unwrap())).unwrap();
    assert!(matches!(
        open(without.path(), &small()),
        Err(WalError::Missing { .. })
    ));

    let without = copy(folder.path());
    std::fs::remove_file(without.path().join(names[0].file_name().unwrap())).unwrap();
    assert!(matches!(
        open(without.path(), &small()),
        Err(WalError::Inconsistent { .. })
    ));

    let short = copy(folder.path());
    let path = short.path().join(names[1].file_name().unwrap());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(
        open(short.path(), &small()),
        Err(WalError::DamagedBelowWatermark { .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_making_was_cut_short_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path(), &small()).unwrap();
    append(&log, vec![entry(1, 0, "kept")]).await;
    drop(log);
    let last = files(folder.path()).pop().unwrap();
    let next = last.with_file_name(format!("{:016x}.wal", 2));
    for bytes in [vec![], vec![0; 4096], b"QFSWALB".to_vec()] {
        let copy = copy(folder.path());
        std::fs::write(copy.path().join(next.file_name().unwrap()), &bytes).unwrap();
        let log = open(copy.path(), &small()).unwrap();
        assert_eq!(indexes(&entries(&log).await), [0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_that_wait_together_share_a_flush() {
    let folder = tempfile::tempdir().unwrap();
    let log = open(folder.path(), &WalOptions::default()).unwrap();
    let before = log.status();
    let mut waiting = Vec::new();
    for index in 0..1000 {
        let (sender, flushed) = TypeConfig::oneshot();
        let callback = openraft::storage::IOFlushed::signal(sender);
        log.clone()
            .append([entry(1, index, "grouped")], callback)
            .await
            .unwrap();
        waiting.push(flushed);
    }
    for flushed in waiting {
        flushed.await.unwrap().unwrap();
    }
    let after = log.status();
    assert_eq!(after.entries_flushed - before.entries_flushed, 1000);
    let flushes = after.flushes - before.flushes;
    assert!(flushes <= 200, "{flushes} flushes for 1000 entries");
    println!("1000 appends took {flushes} flushes");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_is_readable_before_it_is_flushed_and_only_the_next_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = open(folder.path(), &small()).unwrap();
    let noop = openraft::storage::IOFlushed::noop;
    log.append([entry(1, 0, "a"), entry(1, 1, "b")], noop())
        .await
        .unwrap();
    assert_eq!(indexes(&entries(&log).await), [0, 1]);
    assert!(log.append([entry(1, 3, "hole")], noop()).await.is_err());
    let one = log.limited_get_log_entries(0, 2).await.unwrap();
    assert_eq!(one.len(), 2);
    let large: Vec<Entry> = (2..5).map(|index| entry(1, index, "l".repeat(1 << 20))).collect();
    append(&log, large).await;
    let bounded = log.limited_get_log_entries(2, 5).await.unwrap();
    assert_eq!(
        indexes(&bounded),
        [2],
        "two megabytes at most, one entry at least"
    );
    log.purge(log_id(1, 0)).await.unwrap();
    let none = log.limited_get_log_entries(0, 3).await.unwrap();
    assert!(none.is_empty(), "none that would follow a hole: {none:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_write_is_fatal_and_nothing_is_acknowledged_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let fatal = FatalSignal::default();
    let mut log = LogStore::open(folder.path(), &small(), fatal.clone()).unwrap();
    append(&log, vec![entry(1, 0, "a")]).await;
    // The next file cannot be created if its name is taken.
    std::fs::create_dir(folder.path().join(format!("{:016x}.wal", 2))).unwrap();
    let (sender, flushed) = TypeConfig::oneshot();
    let large = entry(1, 1, "m".repeat(8 << 10));
    let callback = openraft::storage::IOFlushed::signal(sender);
    log.append([large], callback).await.unwrap();
    assert!(flushed.await.unwrap().is_err());
    let reason = fatal.wait().await;
    assert_eq!(reason.doing, "write the log");
    assert!(log.save_vote(&vote(9, 1)).await.is_err());
    assert!(log.wait_flushed(1).is_err());
}

/// A small filesystem, unmounted on drop; `None` if the tests may not mount.
pub struct SmallDisk(pub tempfile::TempDir);

impl SmallDisk {
    pub fn mount() -> Option<SmallDisk> {
        SmallDisk::of_kibibytes(256)
    }

    pub fn of_kibibytes(kibibytes: u32) -> Option<SmallDisk> {
        let folder = tempfile::tempdir().unwrap();
        let options = Some(format!("size={kibibytes}k"));
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(
            Some("tmpfs"),
            folder.path(),
            Some("tmpfs"),
            flags,
            options.as_deref(),
        )
        .ok()?;
        Some(SmallDisk(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_costs_the_reserve_then_waits_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount() else {
        println!("skipped: not allowed to mount");
        return;
    };
    let folder = disk.0.path().join("log");
    let options = WalOptions {
        file_bytes: 32 << 10,
        ..WalOptions::default()
    };
    let mut log = open(&folder, &options).unwrap();
    append(&log, vec![entry(1, 0, "first")]).await;
    assert!(log.status().reserve_held);
    let filler = disk.0.path().join("filler");
    let mut full = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut full, &[1; 4096]).is_ok() {}
    // More bytes than are left in the first file, so the reserve is used; then more than that.
    let mut index = 1;
    while log.status().reserve_held {
        append(&log, vec![entry(1, index, "r".repeat(8 << 10))]).await;
        index += 1;
        assert!(index < 20, "the reserve is used");
    }
    let mut waiting = Vec::new();
    for _ in 0..8 {
        let (sender, flushed) = TypeConfig::oneshot();
        let callback = openraft::storage::IOFlushed::signal(sender);
        let large = entry(1, index, "w".repeat(8 << 10));
        log.append([large], callback).await.unwrap();
        waiting.push(flushed);
        index += 1;
    }
    let began = std::time::Instant::now();
    while !log.status().disk_full {
        assert!(began.elapsed().as_secs() < 20, "it waits for room");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    std::fs::remove_file(&filler).unwrap();
    drop(full);
    for flushed in waiting {
        flushed.await.unwrap().unwrap();
    }
    assert!(!log.status().disk_full);
    log.close();
    drop(log);
    let log = open(&folder, &options).unwrap();
    assert_eq!(indexes(&entries(&log).await), (0..index).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_a_purge_makes_room_for_what_waits_before_it() {
    let Some(disk) = SmallDisk::mount() else {
        println!("skipped: not allowed to mount");
        return;
    };
    let folder = disk.0.path().join("log");
    let options = WalOptions {
        file_bytes: 32 << 10,
        ..WalOptions::default()
    };
    let mut log = open(&folder, &options).unwrap();
    let large = |index| entry(1, index, "l".repeat(8 << 10));
    for index in 0..10 {
        append(&log, vec![large(index)]).await;
    }
    let mut full = std::fs::File::create(disk.0.path().join("filler")).unwrap();
    while std::io::Write::write_all(&mut full, &[1; 4096]).is_ok() {}
    let mut index = 10;
    let last = loop {
        let (sender, flushed) = TypeConfig::oneshot();
        let callback = openraft::storage::IOFlushed::signal(sender);
        log.append([large(index)], callback).await.unwrap();
        index += 1;
        assert!(index < 30, "the disk is full");
        let flushed = tokio::time::timeout(std::time::Duration::from_secs(1), flushed);
        if flushed.await.is_err() {
            break index - 1;
        }
    };
    assert!(log.status().disk_full && log.is_pressed());
    assert!(log.is_flushed(last - 1) && !log.is_flushed(last));
    log.wait_flushed(last - 1).unwrap();
    // No more is taken from the leader, and nothing that waits is applied; requests that ask who leads are answered.
    let (stream, answers) = Intake::new(log.clone(), options.file_bytes).stream();
    let request = |entries| AppendEntriesRequest::<TypeConfig> {
        vote: vote(1, 0),
        prev_log_id: Some(log_id(1, last)),
        entries,
        leader_commit: Some(log_id(1, last + 1)),
    };
    let mut question = request(Vec::new());
    assert!(stream.admit(&question, 100).await);
    stream.hold_back(&mut question);
    assert_eq!(question.leader_commit, None);
    let mut more = request(vec![large(index)]);
    let taken = tokio::time::timeout(
        std::time::Duration::from_millis(100),
        stream.admit(&more, 8 << 10),
    );
    assert!(taken.await.is_err());
    let upto = log.purgeable(last - 1, 0).unwrap();
    // Purges beyond the waiting entries, as a node that continues would.
    log.purge(log_id(1, upto)).await.unwrap();
    append(&log, vec![large(index)]).await;
    assert!(!log.status().disk_full);
    answers.answered();
    assert!(stream.admit(&more, 8 << 10).await);
    stream.hold_back(&mut more);
    let said = if log.is_pressed() { last } else { last + 1 };
    assert_eq!(more.leader_commit, Some(log_id(1, said)));
    drop(answers);
    assert!(!stream.admit(&more, 8 << 10).await, "nobody waits for its answer");
    let left: Vec<u64> = (upto + 1..index + 1).collect();
    assert_eq!(indexes(&entries(&log).await), left);
    log.close();
    drop(log);
    let log = open(&folder, &options).unwrap();
    assert_eq!(indexes(&entries(&log).await), left);
}
