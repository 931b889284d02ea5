//! Files beside the database: files that are being created, and the syncs that make a rename durable.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::fault::StorageFault;

/// Prefix of the suffix of files into which snapshots are received; a number follows.
pub(super) const INSTALLATION: &str = "install-";

/// A file that is removed on drop, if it still has its name.
pub(super) struct TemporaryFile(PathBuf);

impl TemporaryFile {
    /// Makes the guard for a file of this name that is about to be created.
    pub(super) fn new(path: PathBuf) -> TemporaryFile {
        TemporaryFile(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // A file that cannot be removed now is removed when the store is opened next.
        let _ = remove_leftover(&self.0);
    }
}

pub(super) fn path_beside(path: &Path, purpose: &str) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".");
    beside.push(purpose);
    PathBuf::from(beside)
}

pub(super) fn remove_unfinished_installations(path: &Path) -> Result<(), StorageFault> {
    let prefix = path_beside(path, INSTALLATION);
    let doing = "list the metadata folder";
    for entry in std::fs::read_dir(directory_of(path)).map_err(StorageFault::io(doing))? {
        let found = directory_of(path).join(entry.map_err(StorageFault::io(doing))?.file_name());
        let is_one = match (found.file_name(), prefix.file_name()) {
            (Some(found), Some(prefix)) => found.as_encoded_bytes().starts_with(prefix.as_encoded_bytes()),
            _ => false,
        };
        if is_one {
            remove_leftover(&found)?;
        }
    }
    Ok(())
}

pub(super) fn remove_leftover(path: &Path) -> Result<(), StorageFault> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(StorageFault::io("remove an unfinished metadata file")(error))
        }
        _ => Ok(()),
    }
}

pub(super) fn sync_file(path: &Path) -> Result<(), StorageFault> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(StorageFault::io("sync a metadata file"))
}

pub(super) fn sync_directory_of(path: &Path) -> Result<(), StorageFault> {
    File::open(directory_of(path))
        .and_then(|directory| directory.sync_all())
        .map_err(StorageFault::io("sync the metadata folder"))
}

/// Returns the free space on the disk of `path`.
pub(super) fn available_bytes(path: &Path) -> Result<u64, StorageFault> {
    let space = nix::sys::statvfs::statvfs(directory_of(path))
        .map_err(|errno| StorageFault::io("get the free space of the metadata disk")(errno.into()))?;
    Ok(space.blocks_available() as u64 * space.fragment_size() as u64)
}

pub(super) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
