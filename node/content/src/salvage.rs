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

use super::aside::{SetAside, Unreadable, set_aside};
use super::error::ContentError;
use super::record::{Mark, RecordHeader};
use super::scan::{Tolerance, readable_records};
use super::segment::read_exact_at;
use super::store::ContentStore;
use quorumfs_proto::Chunk;

/// Pages of a file that may be unreadable before the rest of it is not looked at any more: a failing disk takes seconds for
/// each.
const UNREADABLE_PAGES_MAX: u64 = 256;

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
fn whole_record(file: &File, header: &RecordHeader, salt: u64) -> Option<Chunk> {
    let layout = header.layout;
    let mut head = vec![0; layout.head_bytes()];
    read_exact_at(file, &mut head, layout.position).ok()?;
    let (header, block_crcs) = RecordHeader::decode(&head, salt, layout.position)?;
    let mut payload = vec![0; layout.length as usize];
    read_exact_at(file, &mut payload, layout.payload_at()).ok()?;
    Chunk::checked(header.id, header.sha256, payload.into(), block_crcs).ok()
}
