//! Files and folders that the disk cannot read, renamed so that no store uses them.

use std::path::{Path, PathBuf};

use super::error::ContentError;

/// Prefix of the names of files that were set aside.
const ASIDE_PREFIX: &str = "unreadable-";

/// A segment that could not be opened.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) path: PathBuf,
    pub(super) salt: u64,
    pub(super) error: ContentError,
}

/// The result of salvaging.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SetAside {
    /// Files that were set aside.
    pub(super) files: u64,
    /// Files among them that were not read to the end.
    pub(super) partly_read: u64,
}

/// Renames `path` so that no store uses it, and returns the new path.
pub(super) fn set_aside(path: &Path) -> Result<PathBuf, ContentError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{ASIDE_PREFIX}{name}"));
    std::fs::rename(path, &aside).map_err(|source| ContentError::io("set aside", path, source))?;
    Ok(aside)
}

/// Returns the files in `directory` that were set aside, now or by an earlier process, by name.
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

/// Sets aside a folder that cannot be listed, so that the store starts with an empty one. Returns the new path.
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
