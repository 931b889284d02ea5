//! A file for redb in which every block has a checksum, verified whenever the block is read.
//!
//! redb verifies its own checksums only when it repairs a database. It takes a flipped bit in a page that it reads for
//! valid data: rows vanish, or redb panics. With [`BlockFile`] below it such a read is an error
//! ([`std::io::ErrorKind::InvalidData`]) before redb sees one byte of the block, and the owner of the file is notified
//! ([`BlockFile::open`]). redb caches the pages that it uses above this layer, so a page costs one checksum when it is
//! read from the file.
//!
//! Invariants:
//!
//! - A checksum covers the block's bytes, its number, and the number of the header that it belongs to. So a block that
//!   was written to the place of another is detected, and so is one that is newer than the header.
//! - A crash loses nothing that was synced. redb never writes in place a block that the last synced header refers to,
//!   so a torn block is one that is not read. Its checksum shares a sector with others, and a write that is cut short
//!   leaves each sector either old or new (disks promise this). The header is stored twice ([`header`]).
//!
//! Not detected: a block that has, whole, its content of an earlier time, because the disk lost a later write without
//! an error.
//!
//! This crate does not know what redb stores in the blocks.

mod header;
mod layout;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use self::header::{Found, Header};
use self::layout::{BLOCK_BYTES, Run, SUM_BYTES};

/// Called with a description of the damage, once for each read that finds damage.
pub type OnDamage = Arc<dyn Fn(&str) + Send + Sync>;

/// The first bytes of a plain redb file.
const REDB_MAGIC: [u8; 9] = *b"redb\x1a\n\xa9\r\n";
/// Bytes that [`convert`] copies per step.
const CONVERT_BYTES: usize = 1 << 20;

/// The kind of a file, judged by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Made by [`BlockFile`], or damaged beyond recognition.
    Blocks,
    /// Made by redb itself, without checksums of blocks.
    Plain,
}

/// Reads the beginning of a file and returns its kind.
///
/// # Errors
/// Those of the read.
pub fn kind_of(file: &File) -> io::Result<Kind> {
    let mut begins = [0; REDB_MAGIC.len()];
    match file.read_exact_at(&mut begins, 0) {
        Ok(()) if begins == REDB_MAGIC => Ok(Kind::Plain),
        Ok(()) => Ok(Kind::Blocks),
        Err(error) if is_unreadable(&error) => Ok(Kind::Blocks),
        Err(error) => Err(error),
    }
}

/// Copies `plain`, an intact plain redb file that no process has open, to the empty file `into`. The copy is durable
/// when the function returns.
///
/// # Errors
/// Those of reading and writing the files.
pub fn convert(plain: &File, into: File) -> io::Result<()> {
    use redb::StorageBackend as _;
    let bytes = plain.metadata()?.len();
    let blocks = BlockFile::create(into, Arc::new(|_| {}));
    blocks.set_len(bytes)?;
    let mut at = BLOCK_BYTES;
    let mut buffer = vec![0; CONVERT_BYTES];
    while at < bytes {
        let piece = &mut buffer[..CONVERT_BYTES.min((bytes - at) as usize)];
        plain.read_exact_at(piece, at)?;
        blocks.write(at, piece)?;
        at += piece.len() as u64;
    }
    blocks.sync_data()?;
    // The header is written last, so that an incomplete copy has none.
    let mut first = vec![0; BLOCK_BYTES as usize];
    plain.read_exact_at(&mut first, 0)?;
    let used = first
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    blocks.write(0, &first[..used])?;
    blocks.sync_data()
}

/// The file; see the crate documentation.
pub struct BlockFile {
    file: File,
    header: Mutex<Header>,
    /// [`Header::number`], for readers that must not wait while `header` is locked for a sync.
    header_number: AtomicU32,
    on_damage: OnDamage,
}

impl std::fmt::Debug for BlockFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockFile").field("file", &self.file).finish()
    }
}

/// The entry of a block of sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sum {
    /// The number of the header that the block belongs to; 0 if the block was never written.
    header: u32,
    crc: u32,
}

impl Sum {
    fn of(block: u64, header: u32, bytes: &[u8]) -> Sum {
        let crc = crc32c::crc32c_append(crc32c::crc32c(&block.to_le_bytes()), &header.to_le_bytes());
        Sum {
            header,
            crc: crc32c::crc32c_append(crc, bytes),
        }
    }

    fn from_bytes(bytes: &[u8]) -> Sum {
        let number = |bytes: &[u8]| {
            bytes
                .iter()
                .rev()
                .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
        };
        Sum {
            header: number(&bytes[..4]),
            crc: number(&bytes[4..8]),
        }
    }

    fn put(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.header.to_le_bytes());
        out.extend_from_slice(&self.crc.to_le_bytes());
    }
}

impl BlockFile {
    /// Creates a database in an empty file.
    pub fn create(file: File, on_damage: OnDamage) -> BlockFile {
        BlockFile::with(file, Header::new(), on_damage)
    }

    fn with(file: File, header: Header, on_damage: OnDamage) -> BlockFile {
        BlockFile {
            file,
            header_number: AtomicU32::new(header.number()),
            header: Mutex::new(header),
            on_damage,
        }
    }

    /// Opens a file made by [`BlockFile::create`]. `on_damage` is called before a read returns the error that a block
    /// is damaged.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidData`] if the file is damaged; `on_damage` is not called. [`ErrorKind::Unsupported`] if a
    /// newer program made the file.
    pub fn open(file: File, on_damage: OnDamage) -> io::Result<BlockFile> {
        BlockFile::open_with(file, on_damage, File::sync_data)
    }

    /// [`BlockFile::open`] with a parameter for the function that syncs the file.
    fn open_with(
        file: File,
        on_damage: OnDamage,
        sync: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<BlockFile> {
        let bytes = file.metadata()?.len();
        // An empty file was never completed.
        if layout::logical_bytes(bytes).is_none_or(|logical| logical == 0) {
            return Err(damaged(&format!("a file of {bytes} bytes was cut or lengthened")));
        }
        match Header::read(&file)? {
            Found::Header(header) => {
                // A process that was killed may have written the newest header without a sync. It is treated as synced
                // from here on, so it must be: the next header overwrites the other slot, which may be the only one on
                // the disk.
                match sync(&file) {
                    // A file on a read-only filesystem is never written.
                    Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {}
                    synced => synced?,
                }
                Ok(BlockFile::with(file, *header, on_damage))
            }
            Found::UnknownVersion(version) => Err(io::Error::new(
                ErrorKind::Unsupported,
                format!("layout {version} of the database file is not known; use a newer program"),
            )),
            Found::Damaged => Err(damaged("both copies of the header are damaged")),
        }
    }

    fn read_run(&self, run: Run, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, run.data_at)?;
        let mut sums = vec![0; (run.count * SUM_BYTES) as usize];
        self.file.read_exact_at(&mut sums, run.sums_at)?;
        let newest = self.header_number.load(Ordering::Acquire) + 1;
        let blocks = out.chunks_exact(BLOCK_BYTES as usize);
        for ((block, bytes), sum) in (run.block..)
            .zip(blocks)
            .zip(sums.chunks_exact(SUM_BYTES as usize))
        {
            let sum = Sum::from_bytes(sum);
            if sum.header == 0 {
                return Err(damaged(&format!("block {block} was never written")));
            }
            if sum.header > newest {
                return Err(damaged(&format!("block {block} is newer than the header")));
            }
            if Sum::of(block, sum.header, bytes) != sum {
                return Err(damaged(&format!("block {block} does not match its checksum")));
            }
        }
        Ok(())
    }

    fn read_blocks(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut rest = out;
        for run in layout::runs(blocks_of(offset, rest.len())?) {
            let (now, later) = rest.split_at_mut((run.count * BLOCK_BYTES) as usize);
            self.read_run(run, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Calls `on_damage` if the error says that the data on disk is not what was written or cannot be read, and returns
    /// the error.
    fn reported(&self, error: io::Error) -> io::Error {
        let error = match is_unreadable(&error) {
            true => damaged(&error.to_string()),
            false => error,
        };
        if error.kind() == ErrorKind::InvalidData {
            (self.on_damage)(&error.to_string());
        }
        error
    }
}

impl redb::StorageBackend for BlockFile {
    fn len(&self) -> io::Result<u64> {
        let bytes = self.file.metadata()?.len();
        if bytes == 0 {
            return Ok(0);
        }
        let reported = |()| self.reported(damaged(&format!("a file of {bytes} bytes was cut or lengthened")));
        layout::logical_bytes(bytes).ok_or(()).map_err(reported)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset < BLOCK_BYTES {
            self.header.lock().copy_to(offset as usize, out);
            return Ok(());
        }
        self.read_blocks(offset, out)
            .map_err(|error| self.reported(error))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let bytes = layout::physical_bytes(len)
            .ok_or_else(|| invalid("the length of a database must be a multiple of the block size"))?;
        let before = self.len()?;
        self.file.set_len(bytes)?;
        // Blocks that are cut off now must leave no sums behind: the file may grow again.
        if len < before {
            for run in layout::runs((len / BLOCK_BYTES).max(1)..before / BLOCK_BYTES) {
                if run.sums_at < bytes {
                    let sums = vec![0; (run.count * SUM_BYTES) as usize];
                    self.file.write_all_at(&sums, run.sums_at)?;
                }
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        // Held throughout: a header written meanwhile would be recorded as synced.
        let mut header = self.header.lock();
        self.file.sync_data()?;
        header.synced(&self.file)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset < BLOCK_BYTES {
            let mut header = self.header.lock();
            let written = header.write(&self.file, offset as usize, data);
            self.header_number.store(header.number(), Ordering::Release);
            return written;
        }
        let header = self.header_number.load(Ordering::Acquire) + 1;
        let mut rest = data;
        for run in layout::runs(blocks_of(offset, data.len())?) {
            let (now, later) = rest.split_at((run.count * BLOCK_BYTES) as usize);
            let mut sums = Vec::with_capacity((run.count * SUM_BYTES) as usize);
            for (block, bytes) in (run.block..).zip(now.chunks_exact(BLOCK_BYTES as usize)) {
                Sum::of(block, header, bytes).put(&mut sums);
            }
            self.file.write_all_at(now, run.data_at)?;
            self.file.write_all_at(&sums, run.sums_at)?;
            rest = later;
        }
        Ok(())
    }
}

fn blocks_of(offset: u64, bytes: usize) -> io::Result<std::ops::Range<u64>> {
    let end = offset + bytes as u64;
    match offset.is_multiple_of(BLOCK_BYTES) && end.is_multiple_of(BLOCK_BYTES) {
        true => Ok(offset / BLOCK_BYTES..end / BLOCK_BYTES),
        false => Err(invalid(
            "offset and length of a read or write must be multiples of the block size",
        )),
    }
}

/// Errors with which a disk or a filesystem reports data that it cannot return: EUCLEAN and EBADMSG are checksums of
/// ext4, XFS and btrfs that do not match, ENODATA and EILSEQ a sector that the medium does not return (errno(3), Linux
/// block/blk-core.c).
const MEDIUM_ERRORS: [i32; 6] = [
    libc::EIO,
    libc::EUCLEAN,
    libc::EBADMSG,
    libc::ENODATA,
    libc::EILSEQ,
    libc::EREMOTEIO,
];

/// Whether the error says that the disk or the filesystem cannot return data. Meaningful for reads only: after a failed
/// write or flush the content of the disk is unknown.
pub fn is_medium_error(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|errno| MEDIUM_ERRORS.contains(&errno))
}

/// Whether the disk does not have the data: an unreadable sector, or the end of a file that was cut.
fn is_unreadable(error: &io::Error) -> bool {
    is_medium_error(error) || error.kind() == ErrorKind::UnexpectedEof
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the database is damaged: {what}"))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests;
