//! The names of the files that some chunks belong to, for a status that is asked for again and again: found by a
//! bounded walk of the metadata, at most every few seconds, by one at a time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::ChunkId;
use tracing::warn;

use quorumfs_metadata::MetadataStore;

/// Rows of extents and of directories that are read for one answer: a second's work or two.
const ROWS_MAX: u64 = 1_000_000;
/// Chunks whose files are looked for.
pub const CHUNKS_MAX: usize = 4096;
/// Files found at most.
pub const FILES_MAX: usize = 1000;
/// For how long an answer serves.
const FRESH_MS: u64 = 5_000;

/// The files that hold some chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileNames {
    /// Paths from the root without a slash in front; what is not UTF-8 is replaced.
    pub paths: Vec<String>,
    /// Whether these are all the files; else a bound was reached.
    pub complete: bool,
}

/// Finds and remembers them.
pub struct NameFinder {
    metadata: Arc<MetadataStore>,
    // Held while they are found: others get the last answer meanwhile.
    finding: Mutex<()>,
    found: Mutex<Option<(Instant, FileNames)>>,
}

impl NameFinder {
    /// Nothing is looked for yet.
    pub fn new(metadata: Arc<MetadataStore>) -> NameFinder {
        NameFinder {
            metadata,
            finding: Mutex::new(()),
            found: Mutex::new(None),
        }
    }

    /// The files that hold some of the chunks that `chunks` answers, as they were a few seconds ago at the most. None
    /// are looked for where there are no chunks. Blocking.
    pub fn files_of(&self, chunks: impl FnOnce() -> BTreeSet<ChunkId>) -> FileNames {
        let chunks = chunks();
        if chunks.is_empty() {
            *self.found.lock() = None;
            return FileNames {
                paths: Vec::new(),
                complete: true,
            };
        }
        if let Some((at, names)) = &*self.found.lock()
            && at.elapsed() < Duration::from_millis(FRESH_MS)
        {
            return names.clone();
        }
        let Some(_finding) = self.finding.try_lock() else {
            let last = self.found.lock();
            return last.as_ref().map(|(_, names)| names.clone()).unwrap_or_default();
        };
        let names = self.find(&chunks);
        *self.found.lock() = Some((Instant::now(), names.clone()));
        names
    }

    fn find(&self, chunks: &BTreeSet<ChunkId>) -> FileNames {
        let found = self
            .metadata
            .view()
            .and_then(|view| view.files_of_chunks(chunks, FILES_MAX, ROWS_MAX));
        match found {
            Ok(found) => FileNames {
                paths: found
                    .files
                    .into_iter()
                    .map(|file| match file.path {
                        Some(path) => String::from_utf8_lossy(&path).into_owned(),
                        None => format!("(inode {} without a name)", file.inode),
                    })
                    .collect(),
                complete: found.complete && chunks.len() < CHUNKS_MAX,
            },
            Err(fault) => {
                warn!(%fault, "the names of files cannot be looked up");
                FileNames::default()
            }
        }
    }
}
