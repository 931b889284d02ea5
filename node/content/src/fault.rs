//! The first failed flush, or the first file found to be missing, remembered until the process ends.
//!
//! Invariant: after a failure no flush is retried and none is reported as successful. The kernel may have dropped the
//! pages that it could not write, and would report success the second time. The content of a file without a name is
//! lost when this process ends, so a flush of such a file is not reported as successful either.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::OnceLock;
#[cfg(test)]
use std::sync::atomic::{AtomicBool, Ordering};

use mea::latch::Latch;

use super::error::Stopped;

/// Flushes files, and remembers the first failure.
#[derive(Debug)]
pub struct Fault {
    first: OnceLock<Stopped>,
    /// Opens when `first` is set.
    failed: Latch,
    /// Set by tests to make flushes fail.
    #[cfg(test)]
    pub fail_flushes: AtomicBool,
}

impl Fault {
    /// Returns a state without a failure.
    pub fn new() -> Fault {
        Fault {
            first: OnceLock::new(),
            failed: Latch::new(1),
            #[cfg(test)]
            fail_flushes: AtomicBool::new(false),
        }
    }

    /// Returns an error if a flush has failed.
    pub fn check(&self) -> Result<(), Stopped> {
        match self.first.get() {
            None => Ok(()),
            Some(stopped) => Err(stopped.clone()),
        }
    }

    /// Waits for the first failure.
    pub async fn failure(&self) -> Stopped {
        self.failed.wait().await;
        self.first.get().expect("set before the latch opens").clone()
    }

    /// Flushes `file`.
    pub fn flush(&self, file: &File, path: &Path) -> Result<(), Stopped> {
        self.check()?;
        self.remember("flush", path, self.sync_data(file))?;
        match file.metadata() {
            Ok(metadata) if metadata.nlink() == 0 => Err(self.files_gone(path)),
            _ => Ok(()),
        }
    }

    /// Records that a file in use does not exist any more.
    pub fn files_gone(&self, path: &Path) -> Stopped {
        self.stop(|| Stopped::gone(path))
    }

    /// Flushes a folder whose entries have changed.
    pub fn flush_folder(&self, folder: &File, path: &Path) -> Result<(), Stopped> {
        self.check()?;
        self.remember("flush folder", path, folder.sync_all())
    }

    fn remember(&self, action: &str, path: &Path, result: io::Result<()>) -> Result<(), Stopped> {
        let Err(source) = result else {
            // Another thread's flush may have failed meanwhile; after that nothing is reported as successful.
            return self.check();
        };
        Err(self.stop(|| Stopped::because(action, path, &source)))
    }

    /// Records `reason` if it is the first, and returns the first one.
    fn stop(&self, reason: impl FnOnce() -> Stopped) -> Stopped {
        let first = self.first.get_or_init(reason).clone();
        self.failed.count_down();
        first
    }

    fn sync_data(&self, file: &File) -> io::Result<()> {
        #[cfg(test)]
        if self.fail_flushes.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        file.sync_data()
    }
}
