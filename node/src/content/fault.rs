//! The first failed flush, or the first file found to be gone: remembered for ever, told to who asks.
//!
//! Invariant: after a failure no flush is tried again and none is reported as done. The kernel may have dropped the
//! pages that it could not write, and would report success the second time. What is in a file without a name is gone
//! with this process, so a flush of such a file is no success either.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
#[cfg(test)]
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use super::error::Stopped;

/// Flushes files, and remembers the first failure.
#[derive(Debug)]
pub struct Fault {
    first: watch::Sender<Option<Stopped>>,
    /// Tests make flushes fail.
    #[cfg(test)]
    pub fail_flushes: AtomicBool,
}

impl Fault {
    /// Nothing has failed yet.
    pub fn new() -> Fault {
        Fault {
            first: watch::Sender::new(None),
            #[cfg(test)]
            fail_flushes: AtomicBool::new(false),
        }
    }

    /// An error once a flush has failed.
    pub fn check(&self) -> Result<(), Stopped> {
        match &*self.first.borrow() {
            None => Ok(()),
            Some(stopped) => Err(stopped.clone()),
        }
    }

    /// Who wants to be told.
    pub fn subscribe(&self) -> watch::Receiver<Option<Stopped>> {
        self.first.subscribe()
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

    /// A file in use is not there any more.
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
            // Another thread's flush may have failed meanwhile: nothing is reported as done after that.
            return self.check();
        };
        Err(self.stop(|| Stopped::because(action, path, &source)))
    }

    /// Stops for `reason`, if this is the first; answers what the first was.
    fn stop(&self, reason: impl FnOnce() -> Stopped) -> Stopped {
        let mut answer = None;
        self.first.send_if_modified(|first| {
            let is_first = first.is_none();
            answer = Some(first.get_or_insert_with(reason).clone());
            is_first
        });
        answer.expect("set by the closure, which is always called")
    }

    fn sync_data(&self, file: &File) -> io::Result<()> {
        #[cfg(test)]
        if self.fail_flushes.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        file.sync_data()
    }
}
