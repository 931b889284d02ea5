//! A tree of files as users have them, with everything in it that a copy can get wrong; and the comparison.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;

use crate::Random;
use crate::posix;
use crate::shell::shell;

/// How large a tree is to be at least.
#[derive(Clone, Copy, Debug)]
pub struct TreeSize {
    /// Regular files.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
}

impl TreeSize {
    /// As promised: 5,000 files and 200 MiB.
    pub const PROMISED: TreeSize = TreeSize {
        files: 5_000,
        bytes: 200 << 20,
    };
    /// For tests that are about something else.
    pub const SMALL: TreeSize = TreeSize {
        files: 800,
        bytes: 20 << 20,
    };
}

/// Makes `folder` with a tree of at least this size in it: real sources from cargo's registry where there are enough
/// of them, else made up; then the oddities. Answers (regular files, bytes).
pub fn make(folder: &Path, size: TreeSize, random: &mut Random) -> (u64, u64) {
    fs::create_dir(folder).expect("make the folder of the tree");
    match chosen_crates(size) {
        Some(crates) => {
            for path in crates {
                shell(&format!("cp -a '{}' '{}/'", path.display(), folder.display()));
            }
        }
        None => make_up(folder, size, random),
    }
    add_oddities(&folder.join("oddities"), random);
    let (files, bytes) = measure(folder);
    assert!(
        files >= size.files && bytes >= size.bytes,
        "a tree of {files} files, {bytes} bytes"
    );
    eprintln!("tree: {files} files, {} MiB", bytes >> 20);
    (files, bytes)
}

/// (regular files, bytes) below `folder`.
fn measure(folder: &Path) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.path().symlink_metadata() else {
            continue;
        };
        if metadata.is_dir() {
            let below = measure(&entry.path());
            (files, bytes) = (files + below.0, bytes + below.1);
        } else if metadata.is_file() {
            (files, bytes) = (files + 1, bytes + metadata.len());
        }
    }
    (files, bytes)
}

/// Folders of cargo's registry that together are large enough, few and large ones first (so that a small tree stays
/// small: the largest that fits what is still wanted).
fn chosen_crates(size: TreeSize) -> Option<Vec<PathBuf>> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))?;
    let mut crates: Vec<(PathBuf, (u64, u64))> = fs::read_dir(home.join("registry/src"))
        .ok()?
        .flatten()
        .flat_map(|index| fs::read_dir(index.path()).into_iter().flatten().flatten())
        .map(|package| (package.path(), measure(&package.path())))
        .collect();
    crates.sort_by_key(|(path, (_, bytes))| (*bytes, path.clone()));
    let (mut files, mut bytes, mut chosen) = (0, 0, Vec::new());
    while files < size.files || bytes < size.bytes {
        let missing = size.bytes.saturating_sub(bytes).max(1 << 20);
        let fitting = crates.iter().rposition(|(_, (_, b))| *b <= missing).unwrap_or(0);
        if crates.is_empty() {
            return None;
        }
        let (path, (f, b)) = crates.remove(fitting);
        (files, bytes) = (files + f, bytes + b);
        chosen.push(path);
    }
    Some(chosen)
}

fn make_up(folder: &Path, size: TreeSize, random: &mut Random) {
    let average = size.bytes / size.files + 1;
    for number in 0..size.files {
        let directory = folder.join(format!("made-{}/deeper-{}", number / 400, number / 40 % 10));
        fs::create_dir_all(&directory).expect("make a directory");
        let length = if number % 2 == 0 { average / 4 } else { 2 * average };
        let name = directory.join(format!("file-{number}"));
        fs::write(&name, random.bytes(length as usize)).expect("write a file");
    }
}

/// Hard links, symbolic links, odd modes and times, special files, holes, names that are not UTF-8, extended attributes.
fn add_oddities(folder: &Path, random: &mut Random) {
    fs::create_dir(folder).expect("make the folder of oddities");
    let at = |name: &str| folder.join(name);
    fs::create_dir_all(at("empty/nested/empty")).expect("make directories");
    for (number, length) in [
        0usize,
        1,
        4095,
        4096,
        4097,
        32768,
        32769,
        1 << 20,
        (1 << 20) + 1,
        3_333_333,
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(at(&format!("length-{number}")), random.bytes(length)).expect("write a file");
    }
    for name in ["hard-1", "hard-2", "empty/hard-3"] {
        fs::hard_link(at("length-6"), at(name)).expect("make a hard link");
    }
    symlink("length-6", at("link-to-file")).expect("make a link");
    symlink("../oddities/empty", at("link-to-directory")).expect("make a link");
    symlink("/nowhere/at/all", at("link-to-nothing")).expect("make a link");
    symlink("x".repeat(4095), at("link-of-4095-bytes")).expect("make a link");
    symlink("link-loop", at("link-loop")).expect("make a link");
    for mode in [0o000, 0o400, 0o777, 0o4755, 0o2755, 0o6711, 0o1644] {
        let name = at(&format!("mode-{mode:o}"));
        fs::write(&name, format!("mode {mode:o}")).expect("write a file");
        fs::set_permissions(&name, fs::Permissions::from_mode(mode)).expect("chmod");
    }
    for mode in [0o1777, 0o2775, 0o500] {
        let name = at(&format!("directory-mode-{mode:o}"));
        fs::create_dir(&name).expect("make a directory");
        fs::set_permissions(&name, fs::Permissions::from_mode(mode)).expect("chmod");
    }
    std::os::unix::fs::lchown(at("length-3"), Some(1234), Some(4321)).expect("chown");
    std::os::unix::fs::lchown(at("link-to-nothing"), Some(4_000_000_000), Some(12)).expect("chown of a link");
    let node = |name: &str, kind, device| {
        mknod(&at(name), kind, Mode::from_bits_truncate(0o640), device)
            .unwrap_or_else(|e| panic!("mknod {name}: {e}"));
    };
    node("special-fifo", SFlag::S_IFIFO, 0);
    node("special-socket", SFlag::S_IFSOCK, 0);
    node("special-character-device", SFlag::S_IFCHR, makedev(1, 3));
    node("special-block-device", SFlag::S_IFBLK, makedev(7, 200));
    let mut sparse = File::create(at("sparse")).expect("make a file");
    for offset in [5 << 20, 17 << 20] {
        sparse.seek(SeekFrom::Start(offset)).expect("seek");
        sparse.write_all(&random.bytes(10_000)).expect("write");
    }
    sparse.set_len(40 << 20).expect("truncate");
    let bytes_name = |bytes: &[u8]| folder.join(OsStr::from_bytes(bytes));
    for name in [
        &b"\xff\xfe not utf-8 \x80"[..],
        b"new\nline",
        b"tab\tand \"quotes\" 'too'",
        b"-rf",
        b"\\ *?[$(x)",
    ] {
        fs::write(bytes_name(name), name).expect("write a file");
    }
    fs::write(bytes_name(&[b'n'; 255]), "a name of 255 bytes").expect("write a file");
    for (name, value) in [
        ("user.short", &b"value"[..]),
        ("user.binary", b"\0\xff\0"),
        ("user.empty", b""),
    ] {
        posix::set_xattr(&at("length-4"), name, value, 0).expect("set an extended attribute");
    }
    posix::set_xattr(&at("empty"), "user.directory", b"too", 0).expect("set an extended attribute");
    // Last, because making the others touches the directory. Within what every filesystem of Linux can keep.
    for (name, seconds, nanoseconds) in [
        ("length-0", 0, 1),
        ("length-1", 86_400, 999_999_999),
        ("length-2", 4_102_444_800, 123_456_789),
        ("empty", 1_000_000_000, 5),
    ] {
        let time = TimeSpec::new(seconds, nanoseconds);
        utimensat(
            nix::fcntl::AT_FDCWD,
            &at(name),
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
        .expect("set times");
    }
}

/// What a copy must keep of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of what is not a directory.
    pub links: u64,
    /// Of a regular file.
    pub size: u64,
    /// Seconds and nanoseconds.
    pub modified: (i64, i64),
    /// Of device files.
    pub device: u64,
    /// Of a symbolic link.
    pub target: Option<PathBuf>,
    /// `user.*`.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// Every file below `root` by its path from there; `root` itself has the empty path.
pub fn entries(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(below) = waiting.pop() {
        let path = if below.as_os_str().is_empty() {
            root.to_path_buf()
        } else {
            root.join(&below)
        };
        let metadata = path
            .symlink_metadata()
            .unwrap_or_else(|e| panic!("stat {}: {e}", path.display()));
        let kind = metadata.file_type();
        if kind.is_dir() {
            let listing = fs::read_dir(&path).unwrap_or_else(|e| panic!("list {}: {e}", path.display()));
            waiting.extend(listing.map(|entry| below.join(entry.expect("list a directory").file_name())));
        }
        let names = posix::list_xattrs(&path).unwrap_or_default();
        let xattrs = names
            .into_iter()
            .filter(|name| name.starts_with("user."))
            .map(|name| {
                (
                    name.clone(),
                    posix::get_xattr(&path, &name).expect("a listed attribute exists"),
                )
            })
            .collect();
        let entry = Entry {
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            links: if kind.is_dir() { 0 } else { metadata.nlink() },
            size: if kind.is_file() { metadata.len() } else { 0 },
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            device: if kind.is_char_device() || kind.is_block_device() {
                metadata.rdev()
            } else {
                0
            },
            target: kind
                .is_symlink()
                .then(|| fs::read_link(&path).expect("read a link")),
            xattrs,
        };
        found.insert(below, entry);
    }
    found
}

/// Panics where `copy` is not just what `original` is: by names, content, modes, owners, times, links, attributes; in
/// our own eyes, in those of `diff -r` and of `rsync -anci`.
#[track_caller]
pub fn assert_equal(original: &Path, copy: &Path) {
    let (left, right) = (entries(original), entries(copy));
    let mut differences: Vec<String> = Vec::new();
    for (path, entry) in &left {
        match right.get(path) {
            None => differences.push(format!("{} is missing", path.display())),
            Some(other) if other != entry => {
                differences.push(format!("{}: {entry:?}\n  became {other:?}", path.display()))
            }
            Some(_) => {}
        }
    }
    differences.extend(
        right
            .keys()
            .filter(|path| !left.contains_key(*path))
            .map(|path| format!("{} is new", path.display())),
    );
    let shown = differences.len().min(10);
    assert!(
        differences.is_empty(),
        "{} differences, such as\n{}",
        differences.len(),
        differences[..shown].join("\n")
    );
    let (a, b) = (original.display(), copy.display());
    // diff reports special files even where both sides have them; `entries` compared those.
    shell(&format!("diff -r --no-dereference -x 'special-*' '{a}' '{b}'"));
    let changes = shell(&format!("rsync -anciHX --delete '{a}/' '{b}/'"));
    assert!(changes.is_empty(), "rsync would change:\n{changes}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sandbox;

    #[test]
    fn a_copy_is_equal_and_each_change_to_it_is_found() {
        let sandbox = Sandbox::light("tree");
        let mut random = Random::announced();
        let (original, copy) = (sandbox.path("original"), sandbox.path("copy"));
        make(
            &original,
            TreeSize {
                files: 30,
                bytes: 1 << 20,
            },
            &mut random,
        );
        shell(&format!("cp -a '{}' '{}'", original.display(), copy.display()));
        assert_equal(&original, &copy);
        for change in [
            "chmod 600 oddities/length-1",
            "touch oddities/length-1",
            "rm oddities/hard-1",
            "rm oddities/special-fifo",
            "printf x | dd of=oddities/length-7 bs=1 seek=77 conv=notrunc status=none; touch -r ../original/oddities/length-7 oddities/length-7",
            "setfattr -n user.short -v other oddities/length-4",
            "touch oddities/directory-mode-500/new; touch -r ../original/oddities/directory-mode-500 oddities/directory-mode-500",
            "chown -h 1 oddities/link-loop",
        ] {
            let changed = sandbox.path("changed");
            shell(&format!(
                "cp -a '{}' '{}'; cd '{}'; {change}",
                copy.display(),
                changed.display(),
                changed.display()
            ));
            let found = std::panic::catch_unwind(|| assert_equal(&original, &changed));
            assert!(found.is_err(), "not found: {change}");
            shell(&format!("rm -rf '{}'", changed.display()));
        }
    }

    #[test]
    fn a_made_up_tree_is_large_enough() {
        let sandbox = Sandbox::light("made-up");
        let folder = sandbox.make_folder("tree");
        make_up(
            &folder,
            TreeSize {
                files: 100,
                bytes: 1 << 20,
            },
            &mut Random::seeded(1),
        );
        let (files, bytes) = measure(&folder);
        assert!(files >= 100 && bytes >= 1 << 20, "{files} files, {bytes} bytes");
    }
}
