//! What a node keeps is for its own user alone: whoever can read its log, metadata or segments reads every file.
//!
//! The process makes nothing that others may read ([`keep_new_files_private`]), and what an earlier program left is taken back
//! when the data folder is opened ([`make_private`]).
//!
//! Knows nothing of what the files are.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::sys::stat::{Mode, umask};
use tracing::warn;

/// Of a folder.
pub const FOLDER_MODE: u32 = 0o700;
/// Of a file.
pub const FILE_MODE: u32 = 0o600;

/// How deep a data folder is looked at; it has two levels, and what was set aside one more.
const DEPTH_MAX: usize = 4;

/// From now on this process makes files and folders that only its user can open (umask(2)). Called before there are threads.
pub fn keep_new_files_private() {
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
}

/// Takes everybody else's permissions away from `folder` and all in it. What cannot be looked at or changed is said, and stays
/// as it is: a node starts on a disk that is damaged.
pub fn make_private(folder: &Path) {
    let mut failures = Failures::default();
    failures.note(folder, restrict(folder, FOLDER_MODE));
    failures.walk(folder, DEPTH_MAX);
    if let Some((path, error)) = failures.first {
        warn!(
            path, %error, failures = failures.count,
            "others on this machine may be able to read what this node keeps: the permissions cannot be changed"
        );
    }
}

/// What could not be done, to be said once.
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
                // There may be no end to it.
                Err(error) => return self.note(folder, Err(error)),
            };
            let path = entry.path();
            // Links are followed: content may be kept on another disk. What is gone meanwhile needs nothing.
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
