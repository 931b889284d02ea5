//! Keeps a node's files private to its user: a reader of its log, metadata or segments can read every file.
//!
//! The process creates no file that others may read ([`keep_new_files_private`]); the permissions of files made by an
//! earlier program are corrected when the data folder is opened ([`make_private`]).
//!
//! This module does not know what the files are.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::sys::stat::{Mode, umask};
use tracing::warn;

/// Mode of a folder.
pub const FOLDER_MODE: u32 = 0o700;
/// Mode of a file.
pub const FILE_MODE: u32 = 0o600;

/// Most levels of a data folder that are visited; it has two, and files that were set aside are one deeper.
const DEPTH_MAX: usize = 4;

/// From now on this process creates only files and folders that its user alone can open (umask(2)). Must be called
/// before threads exist.
pub fn keep_new_files_private() {
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
}

/// Removes the permissions of other users from `folder` and everything in it. A file that cannot be examined or changed
/// is logged and left unchanged: a node must start on a damaged disk too.
pub fn make_private(folder: &Path) {
    let mut failures = Failures::default();
    failures.note(folder, restrict(folder, FOLDER_MODE));
    failures.walk(folder, DEPTH_MAX);
    if let Some((path, error)) = failures.first {
        warn!(
            path, %error, failures = failures.count,
            "cannot change permissions in the data folder: other users of this machine may be able to read the files of this cluster"
        );
    }
}

/// The failures, to be logged once.
#[derive(Debug, Default)]
struct Failures {
    count: u64,
    first: Option<(String, io::Error)>,
}

impl Failures {
    fn note(&mut self, path: &Path, result: io::Result<()>) {
        let Err(error) = result else { return };
        self.count += 1;
        self.first.get_or_insert((path.display().to_string(), error));
    }

    fn walk(&mut self, folder: &Path, depth: usize) {
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) => return self.note(folder, Err(error)),
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                // A failing listing may never end.
                Err(error) => return self.note(folder, Err(error)),
            };
            let path = entry.path();
            // Links are followed, because content may be on another disk. A file that has been removed needs nothing.
            let kind = match fs::metadata(&path) {
                Ok(metadata) => metadata.file_type(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    self.note(&path, Err(error));
                    continue;
                }
            };
            if kind.is_dir() {
                self.note(&path, restrict(&path, FOLDER_MODE));
                if depth > 1 {
                    self.walk(&path, depth - 1);
                }
            } else if kind.is_file() {
                self.note(&path, restrict(&path, FILE_MODE));
            }
        }
    }
}

fn restrict(path: &Path, mode: u32) -> io::Result<()> {
    const OTHERS: u32 = 0o077;
    if fs::metadata(path)?.permissions().mode() & OTHERS == 0 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn what_others_could_read_is_taken_back() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("data");
        let elsewhere = parent.path().join("other-disk");
        for (path, mode) in [
            (folder.join("wal"), 0o755),
            (folder.join("damaged-1/wal"), 0o775),
            (elsewhere.clone(), 0o777),
        ] {
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("file"), "content").unwrap();
            fs::set_permissions(path.join("file"), Permissions::from_mode(0o644)).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        }
        std::os::unix::fs::symlink(&elsewhere, folder.join("content")).unwrap();
        std::os::unix::fs::symlink("nowhere", folder.join("dangling")).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        make_private(&folder);
        for path in ["", "wal", "damaged-1", "damaged-1/wal", "content"] {
            assert_eq!(mode(&folder.join(path)), FOLDER_MODE, "{path}");
        }
        for path in ["wal/file", "damaged-1/wal/file", "content/file"] {
            assert_eq!(mode(&folder.join(path)), FILE_MODE, "{path}");
        }
    }
}
