//! A segment that the disk does not give back whole: what can be read of it goes into other segments, and the file is set
//! aside.
//!
//! The file keeps its bad sectors, so that nothing else is laid there; its name says what it is. What could not be read is
//! missing from the index, so that it is fetched from other nodes. The file is set aside only when all that was found in it
//! is on disk elsewhere, and where that cannot be, it stays as it is and is tried again when the store is opened next.
//! Nothing is lost that was readable, but for one case: a file with too many unreadable pages is not looked at beyond
//! these. What lies there may be readable, so the file is to be kept until others hold its chunks.

use std::fs::File;
use std::path::{Path, PathBuf};

use quorumfs_proto::chunk::blocks_match;

use super::chunk::StoredChunk;
use super::error::ContentError;
use super::record::{Mark, RecordHeader};
use super::scan::{Tolerance, readable_records};
use super::segment::read_exact_at;
use super::store::ContentStore;

/// What the names of files that were set aside begin with.
const ASIDE_PREFIX: &str = "unreadable-";

/// Pages of a file that may be unreadable before the rest of it is not looked at any more: a failing disk takes seconds for
/// each.
const UNREADABLE_PAGES_MAX: u64 = 256;

/// A segment that could not be opened.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) path: PathBuf,
    pub(super) salt: u64,
    pub(super) error: ContentError,
}

/// What came of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Salvaged {
    /// Chunks that were written anew.
    pub(super) chunks: u64,
    /// Records that were found and could not be read whole.
    pub(super) lost_records: u64,
    /// Pages that were looked at and could not be read.
    pub(super) unreadable_pages: u64,
    /// From which offset on the file was not looked at, because of these.
    pub(super) not_looked_at_from: Option<u64>,
}

/// What salvaging came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SetAside {
    /// Files that were set aside.
    pub(super) files: u64,
    /// Of these, those that were not looked at to the end.
    pub(super) partly_read: u64,
}

impl ContentStore {
    /// Takes what can be read out of each of `unreadable`, and sets the files aside. Blocks.
    pub(super) fn salvage_all(&self, unreadable: Vec<Unreadable>) -> Result<SetAside, ContentError> {
        let mut set_aside = SetAside::default();
        for Unreadable { path, salt, error } in unreadable {
            match self.salvage(&path, salt) {
                Ok((salvaged, aside)) => {
                    set_aside.files += 1;
                    set_aside.partly_read += u64::from(salvaged.not_looked_at_from.is_some());
                    let advice = match salvaged.not_looked_at_from {
                        None => String::from("all of it was looked at: the file can be removed"),
                        Some(offset) => format!(
                            "it was not looked at beyond offset {offset}, and chunks that can be read may lie there: keep \
                             the file until no chunk is missing"
                        ),
                    };
                    tracing::error!(
                        %error,
                        chunks = salvaged.chunks,
                        lost_records = salvaged.lost_records,
                        unreadable_pages = salvaged.unreadable_pages,
                        set_aside = %aside.display(),
                        "a content segment cannot be read; what was found in it was written anew, the rest is fetched from \
                         other nodes. The disk fails; {advice}"
                    );
                }
                Err(failed @ ContentError::Fatal { .. }) => return Err(failed),
                Err(failed) => tracing::error!(
                    %error,
                    %failed,
                    path = %path.display(),
                    "a content segment cannot be read, nor what can be of it be written anew; it is left out, and tried \
                     again at the next start"
                ),
            }
        }
        Ok(set_aside)
    }

    fn salvage(&self, path: &Path, salt: u64) -> Result<(Salvaged, PathBuf), ContentError> {
        let mut salvaged = Salvaged::default();
        match File::open(path).and_then(|file| Ok((file.metadata()?.len(), file))) {
            Ok((file_bytes, file)) => self.copy_readable(&file, file_bytes, salt, &mut salvaged)?,
            Err(source) => {
                let failed = ContentError::io("open", path, source);
                if !failed.is_bad_copy() {
                    return Err(failed);
                }
            }
        }
        let aside = set_aside(path)?;
        self.writer
            .fault
            .flush_folder(&self.writer.folder, &self.writer.directory)?;
        Ok((salvaged, aside))
    }

    /// Writes the live records of `file` that are whole into the active segment; on disk when it returns.
    fn copy_readable(
        &self,
        file: &File,
        file_bytes: u64,
        salt: u64,
        salvaged: &mut Salvaged,
    ) -> Result<(), ContentError> {
        let mut tolerance = Tolerance::pages(UNREADABLE_PAGES_MAX);
        let records = readable_records(file, salt, file_bytes, &mut tolerance)
            .map_err(|source| ContentError::io("scan a segment in", &self.writer.directory, source))?;
        salvaged.unreadable_pages = tolerance.unreadable_pages();
        salvaged.not_looked_at_from = tolerance.gave_up_at();
        for header in records {
            if header.mark == Mark::Dead || self.contains(header.id) {
                continue;
            }
            match whole_record(file, &header, salt) {
                Some(chunk) => {
                    self.append(&chunk)?;
                    salvaged.chunks += 1;
                }
                None => salvaged.lost_records += 1,
            }
        }
        self.sync()
    }
}

/// The chunk of a record, if all of it can be read and is what was written.
fn whole_record(file: &File, header: &RecordHeader, salt: u64) -> Option<StoredChunk> {
    let layout = header.layout;
    let mut head = vec![0; layout.head_bytes()];
    read_exact_at(file, &mut head, layout.position).ok()?;
    let (header, block_crcs) = RecordHeader::decode(&head, salt, layout.position)?;
    let mut payload = vec![0; layout.length as usize];
    read_exact_at(file, &mut payload, layout.payload_at()).ok()?;
    blocks_match(&payload, &block_crcs).then(|| StoredChunk {
        id: header.id,
        sha256: header.sha256,
        payload: payload.into(),
        block_crcs,
    })
}

/// Gives `path` a name that no store takes for its own.
fn set_aside(path: &Path) -> Result<PathBuf, ContentError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{ASIDE_PREFIX}{name}"));
    std::fs::rename(path, &aside).map_err(|source| ContentError::io("set aside", path, source))?;
    Ok(aside)
}

/// The files in `directory` that were set aside, now or by an earlier process; by name.
pub(super) fn files_set_aside(directory: &Path) -> Vec<PathBuf> {
    let is_aside = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with(ASIDE_PREFIX)
    };
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_aside).collect();
    files.sort();
    files
}

/// Sets a whole folder aside that cannot be listed, so that the store begins with an empty one, and says where it is now.
pub(super) fn set_folder_aside(directory: &Path) -> Result<PathBuf, ContentError> {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let number = (1..).find(|number| {
        let aside = directory.with_file_name(format!("{ASIDE_PREFIX}{name}-{number}"));
        !aside.exists()
    });
    let number: u32 = number.unwrap_or(u32::MAX);
    let aside = directory.with_file_name(format!("{ASIDE_PREFIX}{name}-{number}"));
    std::fs::rename(directory, &aside)
        .map_err(|source| ContentError::io("set aside the folder", directory, source))?;
    Ok(aside)
}
