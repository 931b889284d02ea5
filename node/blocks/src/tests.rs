//! Databases in block files: after damage, after crashes, and converted from plain files.

use std::path::Path;
use std::sync::atomic::AtomicU64;

use redb::{ReadableDatabase as _, ReadableTable as _, StorageBackend};

use super::*;

const TABLE: redb::TableDefinition<u64, &[u8]> = redb::TableDefinition::new("rows");
const ROWS: u64 = 2_000;

fn file(path: &Path) -> File {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

fn nobody() -> OnDamage {
    Arc::new(|_| {})
}

fn database(backend: impl StorageBackend) -> Result<redb::Database, redb::DatabaseError> {
    redb::Builder::new()
        .set_cache_size(1 << 20)
        .create_with_backend(backend)
}

fn value(row: u64, round: u64) -> Vec<u8> {
    let length = (row * 37 + round) % 700 + if row.is_multiple_of(100) { 20_000 } else { 0 };
    vec![(row + round) as u8; length as usize]
}

fn put(database: &redb::Database, rows: impl Iterator<Item = u64>, round: u64) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_quick_repair(true);
    {
        let mut table = transaction.open_table(TABLE)?;
        for row in rows {
            table.insert(row, &value(row, round)[..])?;
        }
    }
    transaction.commit()?;
    Ok(())
}

fn make(path: &Path) {
    let database = database(BlockFile::create(file(path), nobody())).unwrap();
    for round in 0..5 {
        put(&database, (0..ROWS).filter(|row| row % 5 >= round), round).unwrap();
    }
}

fn check(database: &redb::Database) -> Result<(), redb::Error> {
    let table = database.begin_read()?.open_table(TABLE)?;
    let mut rows = 0;
    for row in table.iter()? {
        let (row, found) = row?;
        let row = row.value();
        assert_eq!(found.value(), value(row, row % 5), "row {row}");
        rows += 1;
    }
    assert_eq!(rows, ROWS);
    Ok(())
}

fn flip(path: &Path, bit: u64) {
    let file = file(path);
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
}

#[test]
fn a_database_is_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("database");
    make(&path);
    assert_eq!(kind_of(&file(&path)).unwrap(), Kind::Blocks);
    let mut again = database(BlockFile::open(file(&path), nobody()).unwrap()).unwrap();
    check(&again).unwrap();
    assert!(again.check_integrity().unwrap());
    // Most blocks are removed: the file is cut, and grows again later.
    let transaction = again.begin_write().unwrap();
    transaction.delete_table(TABLE).unwrap();
    transaction.commit().unwrap();
    again.compact().unwrap();
    for round in 0..5 {
        put(&again, (0..ROWS).filter(|row| row % 5 >= round), round).unwrap();
    }
    check(&again).unwrap();
}

#[test]
fn a_flipped_bit_is_found_or_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let sound = folder.path().join("sound");
    make(&sound);
    let bits = sound.metadata().unwrap().len() * 8;
    let damaged = folder.path().join("damaged");
    let mut found = 0;
    // Bits all over the file, in steps that match no structure of it.
    for bit in (0..bits).step_by((bits as usize / 300) | 1) {
        std::fs::copy(&sound, &damaged).unwrap();
        flip(&damaged, bit);
        let reported = Arc::new(AtomicU64::new(0));
        let counter = reported.clone();
        let on_damage: OnDamage = Arc::new(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let checked = BlockFile::open(file(&damaged), on_damage)
            .map_err(|error| redb::Error::Io(error).to_string())
            .and_then(|backend| database(backend).map_err(|error| error.to_string()))
            .and_then(|database| check(&database).map_err(|error| error.to_string()));
        if let Err(reason) = checked {
            assert!(reason.contains("damaged"), "bit {bit}: {reason}");
            assert!(reported.load(Ordering::Relaxed) > 0, "bit {bit}: {reason}");
            found += 1;
        }
    }
    assert!(found > 100, "{found} found");
}

#[test]
fn either_copy_of_the_header_is_enough() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("database");
    make(&path);
    for slot in [0, 1] {
        // In the magic, the number, the content and the checksum.
        for byte in [3, 13, 100, 1035, 1041] {
            let damaged = folder.path().join("damaged");
            std::fs::copy(&path, &damaged).unwrap();
            flip(&damaged, (slot * BLOCK_BYTES + byte) * 8 + 2);
            check(&database(BlockFile::open(file(&damaged), nobody()).unwrap()).unwrap()).unwrap();
            flip(&damaged, ((1 - slot) * BLOCK_BYTES + byte) * 8 + 2);
        }
    }
    for slot in [0, 1] {
        flip(&path, (slot * BLOCK_BYTES + 50) * 8);
    }
    let refused = BlockFile::open(file(&path), nobody()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidData, "{refused}");
    let cut = file(&path);
    cut.set_len(cut.metadata().unwrap().len() - BLOCK_BYTES * 2 + 17)
        .unwrap();
    assert_eq!(
        BlockFile::open(cut, nobody()).unwrap_err().kind(),
        ErrorKind::InvalidData
    );
}

/// A file that from a given moment on loses some or all of the writes that were not synced.
#[derive(Debug)]
struct Crashing {
    blocks: BlockFile,
    writes_left: AtomicU64,
}

impl StorageBackend for Crashing {
    fn len(&self) -> io::Result<u64> {
        self.blocks.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.blocks.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.blocks.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        match self.writes_left.load(Ordering::Relaxed) {
            0 => Err(io::Error::other("crashed")),
            _ => self.blocks.sync_data(),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let left = self
            .writes_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if left.is_err() {
            return Err(io::Error::other("crashed"));
        }
        if left != Ok(1) {
            return self.blocks.write(offset, data);
        }
        // The last write is torn: half of the bytes are new, and the sums are the old ones.
        if offset < BLOCK_BYTES {
            let slot = self.blocks.header.lock().next_slot();
            return self
                .blocks
                .file
                .write_all_at(&data[..data.len() / 2], slot * BLOCK_BYTES);
        }
        let mut at = offset;
        for run in layout::runs(blocks_of(offset, data.len())?) {
            let from = (at - offset) as usize;
            self.blocks
                .file
                .write_all_at(&data[from..from + 2048], run.data_at)?;
            at += run.count * BLOCK_BYTES;
        }
        Ok(())
    }
}

#[test]
fn a_crash_in_a_commit_leaves_the_state_before_or_after() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("database");
    let one = database(BlockFile::create(file(&path), nobody())).unwrap();
    put(&one, 0..ROWS, 0).unwrap();
    drop(one);
    let copy = folder.path().join("copy");
    let mut rounds_kept = [0, 0];
    for writes in (1..400).step_by(7) {
        std::fs::copy(&path, &copy).unwrap();
        let crashing = Crashing {
            blocks: BlockFile::open(file(&copy), nobody()).unwrap(),
            writes_left: AtomicU64::new(writes),
        };
        if let Ok(crashing) = database(crashing) {
            let _ = put(&crashing, 0..ROWS / 4, 1);
        }
        let again = database(BlockFile::open(file(&copy), nobody()).unwrap())
            .unwrap_or_else(|error| panic!("after {writes} writes: {error}"));
        let table = again.begin_read().unwrap().open_table(TABLE).unwrap();
        let round = u64::from(table.get(0).unwrap().unwrap().value() != value(0, 0));
        for row in table.iter().unwrap() {
            let (row, found) = row.unwrap_or_else(|error| panic!("after {writes} writes: {error}"));
            let row = row.value();
            let round = if row < ROWS / 4 { round } else { 0 };
            assert_eq!(
                found.value(),
                value(row, round),
                "after {writes} writes, row {row}"
            );
        }
        rounds_kept[round as usize] += 1;
        put(&again, 0..ROWS, 2).unwrap();
    }
    assert!(rounds_kept[0] > 0, "{rounds_kept:?}");
}

#[test]
fn a_plain_database_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, blocks) = (folder.path().join("plain"), folder.path().join("blocks"));
    let one = redb::Database::create(&plain).unwrap();
    for round in 0..5 {
        put(&one, (0..ROWS).filter(|row| row % 5 >= round), round).unwrap();
    }
    drop(one);
    assert_eq!(kind_of(&file(&plain)).unwrap(), Kind::Plain);
    convert(&file(&plain), file(&blocks)).unwrap();
    let mut again = database(BlockFile::open(file(&blocks), nobody()).unwrap()).unwrap();
    check(&again).unwrap();
    assert!(again.check_integrity().unwrap());
}

#[test]
fn what_disks_and_filesystems_say_of_data_that_they_cannot_give_is_damage() {
    // EIO, EUCLEAN, EBADMSG, ENODATA, EILSEQ, EREMOTEIO.
    for errno in [5, 117, 74, 61, 84, 121] {
        let folder = tempfile::tempdir().unwrap();
        let reported = Arc::new(AtomicU64::new(0));
        let hears = reported.clone();
        let on_damage: OnDamage = Arc::new(move |_| {
            hears.fetch_add(1, Ordering::Relaxed);
        });
        let blocks = BlockFile::create(file(&folder.path().join("blocks")), on_damage);
        let error = blocks.reported(io::Error::from_raw_os_error(errno));
        assert_eq!(error.kind(), ErrorKind::InvalidData, "errno {errno}");
        assert_eq!(reported.load(Ordering::Relaxed), 1, "errno {errno}");
    }
}

#[test]
fn what_a_killed_process_wrote_last_is_synced_before_it_counts_as_synced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks");
    make(&path);
    let synced = AtomicU64::new(0);
    let counted = |file: &File| {
        synced.fetch_add(1, Ordering::Relaxed);
        file.sync_data()
    };
    drop(BlockFile::open_with(file(&path), nobody(), counted).unwrap());
    assert_eq!(synced.load(Ordering::Relaxed), 1);
    // After a failed sync the content of the disk is unknown.
    let failing = |_: &File| Err(io::Error::from_raw_os_error(libc::EIO));
    let refused = BlockFile::open_with(file(&path), nobody(), failing).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    check(&database(BlockFile::open(file(&path), nobody()).unwrap()).unwrap()).unwrap();
}
