//! The names of the files that refer to given chunks, for status requests. They are found by a bounded walk of the
//! metadata, at most every few seconds and one at a time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::ChunkId;
use tracing::warn;

use quorumfs_metadata::MetadataStore;

/// Most rows of extents and directories that one walk reads: one to two seconds of work.
const ROWS_MAX: u64 = 1_000_000;
/// Most chunks whose files are looked up.
pub const CHUNKS_MAX: usize = 4096;
/// Most files found by one walk.
pub const FILES_MAX: usize = 1000;
/// Time for which a result is reused.
const CACHE_MS: u64 = 5_000;

/// Names of files that refer to given chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileNames {
    /// Paths from the root without a leading slash; bytes that are not UTF-8 are replaced.
    pub paths: Vec<String>,
    /// Whether these are all files; `false` if a bound was reached.
    pub complete: bool,
}

/// Finds the files of chunks and caches the last result.
pub struct FileNameCache {
    metadata: Arc<MetadataStore>,
    // Held during a walk; concurrent callers get the last result.
    lookup: Mutex<()>,
    cached: Mutex<Option<(Instant, FileNames)>>,
}

impl FileNameCache {
    /// Creates an empty cache.
    pub fn new(metadata: Arc<MetadataStore>) -> FileNameCache {
        FileNameCache {
            metadata,
            lookup: Mutex::new(()),
            cached: Mutex::new(None),
        }
    }

    /// Returns the files that refer to the chunks that `chunks` returns, at most a few seconds old. Blocking.
    pub fn files_of(&self, chunks: impl FnOnce() -> BTreeSet<ChunkId>) -> FileNames {
        let chunks = chunks();
        if chunks.is_empty() {
            *self.cached.lock() = None;
            return FileNames {
                paths: Vec::new(),
                complete: true,
            };
        }
        if let Some((at, names)) = &*self.cached.lock()
            && at.elapsed() < Duration::from_millis(CACHE_MS)
        {
            return names.clone();
        }
        let Some(_guard) = self.lookup.try_lock() else {
            let last = self.cached.lock();
            return last.as_ref().map(|(_, names)| names.clone()).unwrap_or_default();
        };
        let names = self.find(&chunks);
        *self.cached.lock() = Some((Instant::now(), names.clone()));
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
                warn!(%fault, "cannot look up the files of missing chunks");
                FileNames::default()
            }
        }
    }
}
