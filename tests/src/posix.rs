//! System calls that std does not offer.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

fn c_string(text: &OsStr) -> CString {
    CString::new(text.as_bytes()).expect("paths and names have no NUL")
}

fn checked(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The error number of a call that must have failed.
#[track_caller]
pub fn errno<T>(result: io::Result<T>) -> i32 {
    result
        .err()
        .and_then(|error| error.raw_os_error())
        .expect("an error of the system")
}

/// renameat2(2).
pub fn rename(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)?)
}

/// lsetxattr(2).
pub fn set_xattr(path: &Path, name: &str, value: &[u8], flags: libc::c_int) -> io::Result<()> {
    let (path, name) = (c_string(path.as_os_str()), c_string(OsStr::new(name)));
    // SAFETY: both strings end in NUL and the value is as long as said.
    let result = unsafe {
        libc::lsetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    };
    checked(result as libc::ssize_t).map(drop)
}

/// lgetxattr(2).
pub fn get_xattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let (path, name) = (c_string(path.as_os_str()), c_string(OsStr::new(name)));
    let mut value = vec![0; 64 << 10];
    // SAFETY: both strings end in NUL and the buffer is as long as said.
    let result = unsafe {
        libc::lgetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(checked(result)?);
    Ok(value)
}

/// llistxattr(2), sorted.
pub fn list_xattrs(path: &Path) -> io::Result<Vec<String>> {
    let path = c_string(path.as_os_str());
    let mut names = vec![0u8; 64 << 10];
    // SAFETY: the string ends in NUL and the buffer is as long as said.
    let result = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(checked(result)?);
    let mut names: Vec<String> = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    names.sort();
    Ok(names)
}

/// lremovexattr(2).
pub fn remove_xattr(path: &Path, name: &str) -> io::Result<()> {
    let (path, name) = (c_string(path.as_os_str()), c_string(OsStr::new(name)));
    // SAFETY: both strings end in NUL.
    checked(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) } as libc::ssize_t).map(drop)
}

/// fsync(2) of a directory.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// close(2), whose error std drops.
pub fn close(file: File) -> io::Result<()> {
    use std::os::fd::IntoRawFd as _;
    // SAFETY: the descriptor was the file's, and nobody else's now.
    checked(unsafe { libc::close(file.into_raw_fd()) } as libc::ssize_t).map(drop)
}

/// Empties the kernel's caches of pages, names and inodes (clean ones: what is dirty is synced first).
pub fn drop_caches() {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").expect("dropping caches needs root");
}
