//! The whole path from a program through the kernel to a cluster in memory. Needs root and `/dev/fuse`; without them
//! the tests are skipped and say so.

mod append;
mod coherence;
mod interrupt;
mod names;
mod sizes;

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, FileTimes};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::mount::{MntFlags, MsFlags};
use quorumfs_proto::InodeNumber;
use quorumfs_tasks::Tasks;

use super::{FuseEdge, serve_kernel};
use crate::mountpoint::{MountPoint, Mounted, Unmounting, Urgency};
use crate::options::{Access, Stacking};
use quorumfs_fs::{Filesystem, FsOptions};
use quorumfs_memory::{Connection, MemoryCluster};

/// A test that hangs in its own mount could never be ended: after this time the mount is torn down.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) struct TestMount {
    directory: tempfile::TempDir,
    pub(crate) mounted: Mounted,
    pub(crate) filesystem: Arc<Filesystem<Connection>>,
    pub(crate) runtime: tokio::runtime::Runtime,
    /// Resolves when fuser's threads have ended; a test may take it.
    pub(crate) ended: Option<tokio::sync::oneshot::Receiver<io::Result<()>>>,
    /// Dropping it stops the watchdog.
    _watchdog: mpsc::Sender<()>,
}

pub(crate) fn can_mount() -> bool {
    let can = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

pub(crate) fn mount(cluster: &Arc<MemoryCluster>, session: u64) -> TestMount {
    mount_with(cluster, session, MsFlags::empty(), InodeNumber::ROOT)
}

fn mount_with(cluster: &Arc<MemoryCluster>, session: u64, flags: MsFlags, root: InodeNumber) -> TestMount {
    let options = FsOptions {
        root,
        read_only: flags.contains(MsFlags::MS_RDONLY),
        ..FsOptions::default()
    };
    mount_as(cluster, session, flags, options)
}

fn mount_as(cluster: &Arc<MemoryCluster>, session: u64, flags: MsFlags, options: FsOptions) -> TestMount {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let root = options.root;
    let tasks = Arc::new(Tasks::default());
    let filesystem = {
        let _inside = runtime.enter();
        Filesystem::new(cluster.connect(session), options, &tasks)
    };
    let edge = FuseEdge::new(
        Arc::clone(&filesystem),
        root,
        Duration::ZERO,
        tasks,
        runtime.handle().clone(),
    );
    let point = MountPoint::find(directory.path(), Stacking::Refuse).unwrap();
    let (mounted, device) = point.mount("test", flags, Access::Everyone).unwrap();
    let ended = serve_kernel(edge, device, Access::Everyone).unwrap();
    mounted.raise_read_ahead().unwrap();
    let (watchdog, called_off) = mpsc::channel();
    let path = directory.path().to_owned();
    std::thread::spawn(move || {
        if called_off.recv_timeout(TEST_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("the test hangs: {} is torn down", path.display());
            let _ = nix::mount::umount2(&path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        }
    });
    TestMount {
        directory,
        mounted,
        filesystem,
        runtime,
        ended: Some(ended),
        _watchdog: watchdog,
    }
}

impl TestMount {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Unmounts as a stopping mount does, and waits for fuser's threads.
    pub(crate) fn unmount(mut self) {
        // A process that another test is starting holds copies of all open descriptors until it runs.
        let begin = std::time::Instant::now();
        while self.mounted.unmount(Urgency::Polite).unwrap() == Unmounting::Busy {
            assert!(begin.elapsed() < Duration::from_secs(10), "it stays busy");
            std::thread::sleep(Duration::from_millis(10));
        }
        let ended = self.ended.take().unwrap();
        self.runtime.block_on(ended).unwrap().unwrap();
        self.runtime.block_on(self.filesystem.flush_all()).unwrap();
    }
}

impl Drop for TestMount {
    fn drop(&mut self) {
        let _ = self.mounted.unmount(Urgency::Detach);
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Runs `work` in a child process and returns its result. It may only make system calls: the child is a copy of one
/// thread of many.
fn in_child(work: impl FnOnce() -> i32) -> i32 {
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => unsafe {
            libc::close_range(3, u32::MAX, 0);
            libc::_exit(work())
        },
        nix::unistd::ForkResult::Parent { child } => match nix::sys::wait::waitpid(child, None).unwrap() {
            nix::sys::wait::WaitStatus::Exited(_, code) => code,
            other => panic!("{other:?}"),
        },
    }
}

fn errno_of<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn rename2(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    let (from, to) = (c_path(from), c_path(to));
    check(unsafe { libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) })
}

fn names(directory: &Path) -> BTreeSet<String> {
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    fs::read_dir(directory).unwrap().map(name).collect()
}

#[test]
fn bytes_and_attributes_survive_a_remount() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let bytes = pattern((3 << 20) + 17);
    let modified = UNIX_EPOCH - Duration::from_millis(1500);
    {
        let mount = mount(&cluster, 1);
        fs::create_dir(mount.path("a")).unwrap();
        fs::write(mount.path("a/file"), &bytes).unwrap();
        assert_eq!(fs::read(mount.path("a/file")).unwrap(), bytes);
        fs::hard_link(mount.path("a/file"), mount.path("twin")).unwrap();
        symlink("a/file", mount.path("pointer")).unwrap();
        fs::set_permissions(mount.path("twin"), fs::Permissions::from_mode(0o4640)).unwrap();
        std::os::unix::fs::chown(mount.path("pointer"), Some(7), Some(8)).unwrap();
        let times = FileTimes::new()
            .set_modified(modified)
            .set_accessed(SystemTime::UNIX_EPOCH);
        File::open(mount.path("twin")).unwrap().set_times(times).unwrap();
        mount.unmount();
    }
    let mount = mount(&cluster, 2);
    assert_eq!(
        names(&mount.path("")),
        ["a", "pointer", "twin"].map(String::from).into()
    );
    let twin = fs::metadata(mount.path("twin")).unwrap();
    assert_eq!(twin.len(), bytes.len() as u64);
    assert_eq!(twin.nlink(), 2);
    assert_eq!(
        twin.mode(),
        libc::S_IFREG | 0o640,
        "chown through the link clears set-user-id"
    );
    assert_eq!((twin.uid(), twin.gid()), (7, 8));
    assert_eq!(twin.modified().unwrap(), modified, "before 1970");
    assert_eq!(twin.ino(), fs::metadata(mount.path("a/file")).unwrap().ino());
    assert_eq!(fs::read_link(mount.path("pointer")).unwrap(), Path::new("a/file"));
    assert_eq!(fs::read(mount.path("pointer")).unwrap(), bytes);
    mount.unmount();
}

#[test]
fn names_move_and_go_as_rename_and_unlink_say() {
    if !can_mount() {
        return;
    }
    let mount = mount(&MemoryCluster::new(), 1);
    for name in ["a", "b", "c"] {
        fs::write(mount.path(name), name).unwrap();
    }
    let (a, b, c) = (mount.path("a"), mount.path("b"), mount.path("c"));
    assert_eq!(errno_of(rename2(&a, &b, libc::RENAME_NOREPLACE)), libc::EEXIST);
    rename2(&a, &b, libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"b");
    assert_eq!(errno_of(rename2(&a, &b, libc::RENAME_WHITEOUT)), libc::EINVAL);
    // An open file exists without a name.
    let mut open = File::options().read(true).write(true).open(&c).unwrap();
    fs::rename(&a, &c).unwrap();
    open.write_all(b"still here").unwrap();
    open.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    drop(open);
    assert_eq!(names(&mount.path("")), ["b", "c"].map(String::from).into());
    fs::create_dir(mount.path("d")).unwrap();
    fs::write(mount.path("d/e"), "").unwrap();
    assert_eq!(errno_of(fs::remove_dir(mount.path("d"))), libc::ENOTEMPTY);
    assert_eq!(errno_of(fs::remove_file(mount.path("none"))), libc::ENOENT);
    fs::remove_file(mount.path("d/e")).unwrap();
    fs::remove_dir(mount.path("d")).unwrap();
    let long = "x".repeat(256);
    assert_eq!(errno_of(File::create(mount.path(&long))), libc::ENAMETOOLONG);
    assert_eq!(errno_of(fs::metadata(mount.path(&long))), libc::ENAMETOOLONG);
    mount.unmount();
}

#[test]
fn a_large_directory_is_listed_once_each_while_it_changes() {
    if !can_mount() {
        return;
    }
    const FILES: usize = 3000;
    let mount = mount(&MemoryCluster::new(), 1);
    for number in 0..FILES {
        File::create(mount.path(&format!("steady-{number:05}"))).unwrap();
    }
    let mut seen = Vec::new();
    for (count, entry) in fs::read_dir(mount.path("")).unwrap().enumerate() {
        seen.push(entry.unwrap().file_name().into_string().unwrap());
        if count % 10 == 0 {
            let passing = mount.path(&format!("passing-{count}"));
            File::create(&passing).unwrap();
            if count % 20 == 0 {
                fs::remove_file(&passing).unwrap();
            }
        }
    }
    let distinct: BTreeSet<&String> = seen.iter().collect();
    assert_eq!(distinct.len(), seen.len(), "an entry came twice");
    assert_eq!(
        seen.iter().filter(|name| name.starts_with("steady-")).count(),
        FILES
    );
    mount.unmount();
}

#[test]
fn extended_attributes() {
    if !can_mount() {
        return;
    }
    let mount = mount(&MemoryCluster::new(), 1);
    let file = mount.path("file");
    File::create(&file).unwrap();
    let path = c_path(&file);
    let set = |name: &std::ffi::CStr, value: &[u8], flags| {
        check(unsafe {
            libc::setxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                flags,
            )
        })
    };
    let get = |name: &std::ffi::CStr, room: usize| {
        let mut value = vec![0u8; room];
        let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
        if length < 0 {
            return Err(io::Error::last_os_error());
        }
        value.truncate(length as usize);
        Ok((length, value))
    };
    assert_eq!(errno_of(get(c"user.a", 10)), libc::ENODATA);
    assert_eq!(errno_of(set(c"user.a", b"1", libc::XATTR_REPLACE)), libc::ENODATA);
    set(c"user.a", b"first", 0).unwrap();
    assert_eq!(errno_of(set(c"user.a", b"1", libc::XATTR_CREATE)), libc::EEXIST);
    assert_eq!(get(c"user.a", 10).unwrap().1, b"first");
    assert_eq!(get(c"user.a", 0).unwrap().0, 5, "how much room it needs");
    assert_eq!(errno_of(get(c"user.a", 4)), libc::ERANGE);
    set(c"user.b", b"", 0).unwrap();
    let mut list = [0u8; 100];
    let length = unsafe { libc::listxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    assert_eq!(&list[..length as usize], b"user.a\0user.b\0");
    check(unsafe { libc::removexattr(path.as_ptr(), c"user.a".as_ptr()) }).unwrap();
    assert_eq!(errno_of(get(c"user.a", 10)), libc::ENODATA);
    assert_eq!(errno_of(get(c"system.posix_acl_access", 10)), libc::EOPNOTSUPP);
    // As acl(5) is encoded: version 2; rw- for the owner, r-- for user 7, nothing for group and others, mask
    // rw-.
    let everyone = u32::MAX;
    let entries = [
        (1u16, 6u16, everyone),
        (2, 4, 7),
        (4, 0, everyone),
        (16, 6, everyone),
        (32, 0, everyone),
    ];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    assert_eq!(
        errno_of(set(c"system.posix_acl_access", &acl, 0)),
        libc::EOPNOTSUPP
    );
    mount.unmount();
}

#[test]
fn two_mounts_see_each_others_closed_files() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    fs::write(one.path("file"), "old").unwrap();
    assert_eq!(fs::read_to_string(other.path("file")).unwrap(), "old");
    // The same length, so that only the content's version differs.
    fs::write(one.path("file"), "new").unwrap();
    assert_eq!(fs::read_to_string(other.path("file")).unwrap(), "new");
    let mut append = File::options().append(true).open(other.path("file")).unwrap();
    append.write_all(b"er").unwrap();
    let mut elsewhere = File::options().append(true).open(one.path("file")).unwrap();
    elsewhere.write_all(b"!").unwrap();
    append.write_all(b"?").unwrap();
    assert_eq!(fs::read_to_string(one.path("file")).unwrap(), "newer!?");
    drop((append, elsewhere));
    fs::remove_file(other.path("file")).unwrap();
    assert_eq!(errno_of(fs::metadata(one.path("file"))), libc::ENOENT);
    one.unmount();
    other.unmount();
}

#[test]
fn a_shared_mapping_is_written_back_and_never_makes_the_file_longer() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let mount = mount(&cluster, 1);
    fs::write(mount.path("file"), pattern(10_000)).unwrap();
    let path = c_path(&mount.path("file"));
    // In a separate process: a thread that waits for a page holds the lock of its memory map, and this process may have
    // to change its own to serve the page.
    let failed_call = in_child(|| unsafe {
        let file = libc::open(path.as_ptr(), libc::O_RDWR);
        let length = 12_288;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let memory = libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            libc::MAP_SHARED,
            file,
            0,
        );
        if file < 0 || memory == libc::MAP_FAILED {
            return 1;
        }
        let bytes = memory.cast::<u8>();
        bytes.add(9_999).write(255);
        bytes.add(10_001).write(255);
        if libc::msync(memory, length, libc::MS_SYNC) != 0 {
            return 2;
        }
        // Written after the close's flush.
        if libc::close(file) != 0 {
            return 3;
        }
        bytes.write(254);
        libc::munmap(memory, length)
    });
    assert_eq!(failed_call, 0);
    mount.unmount();
    let mount = self::mount(&cluster, 2);
    let bytes = fs::read(mount.path("file")).unwrap();
    assert_eq!(bytes.len(), 10_000);
    assert_eq!((bytes[0], bytes[1], bytes[9_999]), (254, 1, 255));
    mount.unmount();
}

#[test]
fn special_files_modes_and_the_umask() {
    if !can_mount() {
        return;
    }
    let mount = mount(&MemoryCluster::new(), 1);
    let shell = |script: &str| {
        let output = Command::new("sh")
            .args(["-ec", script])
            .current_dir(mount.directory.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    shell("umask 027; mkdir d; : > f; mkfifo p; mknod n c 1 3; mknod b b 7 5; ln -s x s");
    assert_eq!(
        shell("stat -c '%n %A %t:%T' b d f n p s"),
        "b brw-r----- 7:5\nd drwxr-x--- 0:0\nf -rw-r----- 0:0\nn crw-r----- 1:3\np prw-r----- 0:0\ns lrwxrwxrwx 0:0\n"
    );
    assert_eq!(shell("echo gone > n; cat n"), "", "the device is the kernel's");
    assert_eq!(shell("stat -f -c '%T %l' ."), "fuseblk 255\n");
    // A write by a program without privileges drops them from the file.
    shell("echo x > suid; chmod 6777 suid; chmod 777 .");
    let file = mount.path("suid");
    let write = Command::new("sh")
        .args(["-ec", "echo y >> \"$0\""])
        .arg(&file)
        .uid(65_534)
        .status();
    assert!(write.unwrap().success());
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o777);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o4777)).unwrap();
    let cut = Command::new("sh")
        .args(["-ec", ": > \"$0\""])
        .arg(&file)
        .uid(65_534)
        .status();
    assert!(cut.unwrap().success());
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o777);
    // The kernel checks permissions.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let read = Command::new("cat").arg(&file).uid(65_534).output().unwrap();
    assert!(String::from_utf8_lossy(&read.stderr).contains("Permission denied"));
    mount.unmount();
}

#[test]
fn a_read_only_mount_refuses_changes() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let writable = mount(&cluster, 1);
    fs::write(writable.path("file"), "x").unwrap();
    let mount = mount_with(&cluster, 2, MsFlags::MS_RDONLY, InodeNumber::ROOT);
    assert_eq!(fs::read(mount.path("file")).unwrap(), b"x");
    assert_eq!(errno_of(fs::create_dir(mount.path("d"))), libc::EROFS);
    assert_eq!(errno_of(fs::write(mount.path("file"), "y")), libc::EROFS);
    mount.unmount();
    writable.unmount();
}

#[test]
fn a_sub_directory_is_the_root_of_its_mount() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let whole = mount(&cluster, 1);
    fs::create_dir_all(whole.path("a/b/c")).unwrap();
    fs::write(whole.path("a/b/file"), "here").unwrap();
    let inode = InodeNumber(fs::metadata(whole.path("a/b")).unwrap().ino());
    let part = mount_with(&cluster, 2, MsFlags::empty(), inode);
    assert_eq!(fs::metadata(part.path("")).unwrap().ino(), 1);
    assert_eq!(names(&part.path("")), ["c", "file"].map(String::from).into());
    assert_eq!(fs::read(part.path("c/../file")).unwrap(), b"here");
    fs::rename(part.path("file"), part.path("c/moved")).unwrap();
    assert_eq!(fs::read(whole.path("a/b/c/moved")).unwrap(), b"here");
    part.unmount();
    whole.unmount();
}

#[test]
fn a_busy_mount_is_detached_and_served_until_it_is_let_go() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let mut mount = mount(&cluster, 1);
    let mut open = File::create(mount.path("file")).unwrap();
    assert_eq!(mount.mounted.unmount(Urgency::Polite).unwrap(), Unmounting::Busy);
    assert_eq!(mount.mounted.unmount(Urgency::Detach).unwrap(), Unmounting::Done);
    assert!(!mount.path("file").exists());
    open.write_all(b"late").unwrap();
    open.sync_all().unwrap();
    let mut ended = mount.ended.take().unwrap();
    assert!(ended.try_recv().is_err(), "it ended under an open file");
    drop(open);
    let ended = mount
        .runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(10), ended).await });
    ended.unwrap().unwrap().unwrap();
    let again = self::mount(&cluster, 2);
    assert_eq!(fs::read(again.path("file")).unwrap(), b"late");
    again.unmount();
}

#[test]
fn sparse_files_direct_writes_and_kernel_locks() {
    if !can_mount() {
        return;
    }
    let mount = mount(&MemoryCluster::new(), 1);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mount.path("f"))
        .unwrap();
    file.write_all_at(b"end", 5 << 20).unwrap();
    file.write_all_at(b"middle", (2 << 20) + 1).unwrap();
    let mut bytes = [1; 8];
    file.read_exact_at(&mut bytes, 2 << 20).unwrap();
    assert_eq!(&bytes, b"\0middle\0");
    assert_eq!(file.metadata().unwrap().len(), (5 << 20) + 3);
    file.set_len(3 << 20).unwrap();
    file.set_len(6 << 20).unwrap();
    let mut end = [1; 3];
    file.read_exact_at(&mut end, 5 << 20).unwrap();
    assert_eq!(end, [0; 3], "what was cut off does not come back");
    file.lock().unwrap();
    let other = File::open(mount.path("f")).unwrap();
    assert!(
        other.try_lock().is_err(),
        "the kernel keeps locks between programs of this mount"
    );
    drop((file, other));
    mount.unmount();
}
