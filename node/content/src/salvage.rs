//! Segments that the disk cannot read whole: their readable records are copied to other segments, and the files are set
//! aside.
//!
//! A file that is set aside keeps its bad sectors, so that nothing else is stored there; its name says what it is.
//! Records that could not be read are missing from the index, so recovery fetches their chunks from other nodes. A file
//! is set aside only when all records found in it are on disk elsewhere. If that fails, the file stays as it is, and
//! the next opening of the store tries again. No readable record is lost, with one exception: a file with too many
//! unreadable pages is not read beyond them. Records there may be readable, so the file must be kept until other nodes
//! hold its chunks.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::aside::{SetAside, Unreadable, set_aside};
use super::error::ContentError;
use super::record::{Mark, RecordHeader};
use super::scan::{Tolerance, readable_records};
use super::segment::read_exact_at;
use super::store::ContentStore;
use quorumfs_proto::Chunk;

/// Most unreadable pages of a file before the rest of it is skipped: a failing disk takes seconds for each.
const UNREADABLE_PAGES_MAX: u64 = 256;

/// The result of salvaging one segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Salvaged {
    /// Chunks that were copied.
    pub(super) chunks: u64,
    /// Records that were found but could not be read whole.
    pub(super) lost_records: u64,
    /// Pages that could not be read.
    pub(super) unreadable_pages: u64,
    /// Offset from which the file was not read, because of too many unreadable pages.
    pub(super) not_looked_at_from: Option<u64>,
}

impl ContentStore {
    /// Copies the readable records of each of `unreadable`, and sets the files aside. Blocks.
    pub(super) fn salvage_all(&self, unreadable: Vec<Unreadable>) -> Result<SetAside, ContentError> {
        let mut set_aside = SetAside::default();
        for Unreadable { path, salt, error } in unreadable {
            match self.salvage(&path, salt) {
                Ok((salvaged, aside)) => {
                    set_aside.files += 1;
                    set_aside.partly_read += u64::from(salvaged.not_looked_at_from.is_some());
                    let advice = match salvaged.not_looked_at_from {
                        None => String::from("all of it was read: remove the file"),
                        Some(offset) => format!(
                            "it was not read beyond offset {offset}, where readable chunks may be: keep \
                             the file until no chunk is missing"
                        ),
                    };
                    tracing::error!(
                        %error,
                        chunks = salvaged.chunks,
                        lost_records = salvaged.lost_records,
                        unreadable_pages = salvaged.unreadable_pages,
                        set_aside = %aside.display(),
                        "a content segment cannot be read whole; its readable chunks were copied, the others are fetched from \
                         other nodes. The disk fails; {advice}"
                    );
                }
                Err(failed @ ContentError::Fatal { .. }) => return Err(failed),
                Err(failed) => tracing::error!(
                    %error,
                    %failed,
                    path = %path.display(),
                    "a content segment cannot be read whole, and its readable chunks cannot be copied; it is not used, and tried \
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

    /// Writes the live, whole records of `file` to the active segment; they are on disk when this returns.
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

/// Returns the chunk of a record; `None` if it cannot be read whole or does not match its checksums.
fn whole_record(file: &File, header: &RecordHeader, salt: u64) -> Option<Chunk> {
    let layout = header.layout;
    let mut head = vec![0; layout.head_bytes()];
    read_exact_at(file, &mut head, layout.position).ok()?;
    let (header, block_crcs) = RecordHeader::decode(&head, salt, layout.position)?;
    let mut payload = vec![0; layout.length as usize];
    read_exact_at(file, &mut payload, layout.payload_at()).ok()?;
    Chunk::checked(header.id, header.sha256, payload.into(), block_crcs).ok()
}
