//! Ordinary programs and system calls in the mount.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::time::Duration;

use nix::fcntl::RenameFlags;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use quorumfs_tests::environment::wait_for;
use quorumfs_tests::posix::errno;
use quorumfs_tests::random::Content;
use quorumfs_tests::shell::shell_fails;
use quorumfs_tests::tree::{self, TreeSize};
use quorumfs_tests::{Cluster, Random, Sandbox, posix, shell};

#[test]
fn a_real_tree_is_copied_compared_and_still_there_after_remounting() {
    let sandbox = Sandbox::heavy("posix-tree");
    let mut random = Random::announced();
    let original = sandbox.path("original");
    tree::make(&original, TreeSize::PROMISED, &mut random);
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    shell(&format!(
        "cp -a '{}' '{}'",
        original.display(),
        mount.path("copy").display()
    ));
    tree::assert_equal(&original, &mount.path("copy"));
    mount.unmount();
    let mount = cluster.mount();
    tree::assert_equal(&original, &mount.path("copy"));
    // And after everything was killed at once.
    let mut mount = mount;
    cluster.kill_all();
    mount.kill();
    drop(mount);
    cluster.start_all();
    cluster.wait_ready();
    posix::drop_caches();
    let mount = cluster.mount();
    tree::assert_equal(&original, &mount.path("copy"));
    shell(&format!("rm -r '{}'", mount.path("copy").display()));
    assert_eq!(fs::read_dir(mount.directory()).expect("list").count(), 0);
    mount.unmount();
}

#[test]
fn renames_replace_refuse_and_exchange() {
    let sandbox = Sandbox::light("posix-rename");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let at = |name: &str| mount.path(name);
    let write = |name: &str| fs::write(at(name), name).expect("write");
    let read = |name: &str| fs::read_to_string(at(name)).expect("read");
    ["a", "b", "c"].into_iter().for_each(write);
    fs::create_dir_all(at("full/inner")).expect("mkdir");
    fs::create_dir(at("empty")).expect("mkdir");
    assert_eq!(
        errno(posix::rename(&at("a"), &at("b"), RenameFlags::RENAME_NOREPLACE)),
        libc::EEXIST
    );
    posix::rename(&at("a"), &at("d"), RenameFlags::RENAME_NOREPLACE).expect("rename");
    assert_eq!(read("d"), "a");
    posix::rename(&at("b"), &at("c"), RenameFlags::RENAME_EXCHANGE).expect("exchange");
    assert_eq!((read("b"), read("c")), ("c".into(), "b".into()));
    posix::rename(&at("b"), &at("full"), RenameFlags::RENAME_EXCHANGE)
        .expect("exchange of a file and a directory");
    assert!(at("b/inner").is_dir() && read("full") == "c");
    assert_eq!(
        errno(posix::rename(
            &at("b"),
            &at("nothing"),
            RenameFlags::RENAME_EXCHANGE
        )),
        libc::ENOENT
    );
    // Open handles follow the file, not the name.
    let open = File::open(at("c")).expect("open");
    fs::rename(at("d"), at("c")).expect("replace");
    let mut text = String::new();
    (&open).read_to_string(&mut text).expect("read");
    assert_eq!((text.as_str(), read("c").as_str()), ("b", "a"));
    assert_eq!(open.metadata().expect("fstat").nlink(), 0);
    assert_eq!(errno(fs::rename(at("empty"), at("b"))), libc::ENOTEMPTY);
    fs::rename(at("b/inner"), at("empty")).expect("an empty directory is replaced");
    assert_eq!(errno(fs::rename(at("b"), at("b/below"))), libc::EINVAL);
    assert_eq!(errno(fs::rename(at("c"), at("b"))), libc::EISDIR);
    assert_eq!(errno(fs::rename(at("b"), at("c"))), libc::ENOTDIR);
    assert_eq!(
        mount.directory().metadata().expect("stat").nlink(),
        4,
        "two directories: b and empty"
    );
    mount.unmount();
}

#[test]
fn replacing_by_rename_never_shows_an_empty_file() {
    let sandbox = Sandbox::light("posix-replace");
    let cluster = Cluster::start(&sandbox);
    let (mount, other) = (cluster.mount(), cluster.mount());
    fs::write(mount.path("file"), "version 0").expect("write");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = std::collections::BTreeSet::new();
            while !seen.contains("version 50") {
                let text = fs::read_to_string(other.path("file")).expect("the file is always there");
                assert!(text.starts_with("version "), "read {text:?}");
                seen.insert(text);
            }
        });
        for version in 1..=50 {
            // As editors do: write another, not synced, then rename over it.
            fs::write(mount.path("new"), format!("version {version}")).expect("write");
            fs::rename(mount.path("new"), mount.path("file")).expect("rename");
            assert!(!reader.is_finished() || version == 50, "the reader has failed");
        }
    });
    other.unmount();
    mount.unmount();
}

#[test]
fn extended_attributes_are_kept() {
    let sandbox = Sandbox::light("posix-xattr");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    fs::write(mount.path("file"), "").expect("write");
    fs::create_dir(mount.path("directory")).expect("mkdir");
    for name in ["file", "directory"] {
        let path = mount.path(name);
        posix::set_xattr(&path, "user.one", b"1", libc::XATTR_CREATE).expect("set");
        assert_eq!(
            errno(posix::set_xattr(&path, "user.one", b"2", libc::XATTR_CREATE)),
            libc::EEXIST
        );
        posix::set_xattr(&path, "user.one", b"\0two", libc::XATTR_REPLACE).expect("replace");
        assert_eq!(
            errno(posix::set_xattr(&path, "user.no", b"2", libc::XATTR_REPLACE)),
            libc::ENODATA
        );
        posix::set_xattr(&path, "trusted.large", &vec![7; 60_000], 0).expect("a large one");
        posix::set_xattr(&path, "user.empty", b"", 0).expect("an empty one");
        assert_eq!(posix::get_xattr(&path, "user.one").expect("get"), b"\0two");
        assert_eq!(
            posix::get_xattr(&path, "trusted.large").expect("get"),
            vec![7; 60_000]
        );
        assert_eq!(posix::get_xattr(&path, "user.empty").expect("get"), b"");
        assert_eq!(
            posix::list_xattrs(&path).expect("list"),
            ["trusted.large", "user.empty", "user.one"]
        );
        posix::remove_xattr(&path, "user.one").expect("remove");
        assert_eq!(errno(posix::remove_xattr(&path, "user.one")), libc::ENODATA);
        assert_eq!(errno(posix::get_xattr(&path, "user.one")), libc::ENODATA);
    }
    mount.unmount();
    let mount = cluster.mount();
    assert_eq!(
        posix::list_xattrs(&mount.path("file")).expect("list"),
        ["trusted.large", "user.empty"]
    );
    mount.unmount();
}

#[test]
fn an_unlinked_file_lives_as_long_as_it_is_open() {
    let sandbox = Sandbox::light("posix-unlinked");
    let cluster = Cluster::start(&sandbox);
    let (mount, other) = (cluster.mount(), cluster.mount());
    let content = |n: u64| Content::new(n, 2_000_000);
    for (number, remover) in [(0, &mount), (1, &other)] {
        let name = format!("file-{number}");
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(mount.path(&name));
        let mut file = open.expect("create");
        std::io::copy(&mut content(number), &mut file).expect("write");
        file.sync_all().expect("fsync");
        fs::remove_file(remover.path(&name)).expect("unlink");
        // Long enough for whoever reclaims too early; and the cluster may change its leader meanwhile.
        cluster.restart(cluster.leader());
        cluster.wait_ready();
        std::thread::sleep(Duration::from_secs(6));
        posix::drop_caches();
        file.write_all_at(b"still writable", 2_000_000).expect("write");
        file.sync_all().expect("fsync");
        file.seek(SeekFrom::Start(0)).expect("seek");
        content(number).assert_equals((&file).take(2_000_000), &name);
        let mut end = [0; 14];
        file.read_exact_at(&mut end, 2_000_000).expect("read");
        assert_eq!(&end, b"still writable");
        assert_eq!(file.metadata().expect("fstat").nlink(), 0);
    }
    other.unmount();
    mount.unmount();
}

/// Not only open files: what the kernel uses without asking the filesystem must not be taken from under it either.
#[test]
fn what_is_removed_while_it_is_in_use_lives_on_and_no_longer() {
    let sandbox = Sandbox::light("posix-removed");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let inodes_used = || {
        shell(&format!(
            "df --output=iused '{}' | tail -1",
            mount.directory().display()
        ))
    };
    let before = inodes_used();
    fs::write(mount.path("path"), "content").expect("write");
    let path = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(mount.path("path"))
        .expect("open");
    fs::remove_file(mount.path("path")).expect("unlink");
    // The sleep is long enough for whoever reclaims too early: the cluster asks every few seconds.
    shell(&format!(
        r#"cd '{}'
        mkfifo fifo; exec 3<>fifo; rm fifo
        mkdir opened; exec 4<opened; rmdir opened
        mkdir working; cd working; rmdir ../working
        sleep 8
        stat . >/dev/null
        stat -L /proc/self/fd/3 /proc/self/fd/4 >/dev/null
        echo through >&3; read -r line <&3; [ "$line" = through ]"#,
        mount.directory().display()
    ));
    assert_eq!(path.metadata().expect("fstat").nlink(), 0);
    let again = fs::read(format!("/proc/self/fd/{}", path.as_raw_fd())).expect("open and read");
    assert_eq!(again, b"content");
    drop(path);
    wait_for("the space comes back", Duration::from_secs(10), || {
        inodes_used() == before
    });
    mount.unmount();
}

#[test]
fn holes_take_no_space_and_read_as_zeros() {
    let sandbox = Sandbox::light("posix-sparse");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(mount.path("sparse"))
        .expect("create");
    file.write_all_at(b"middle", 1 << 40).expect("write");
    file.sync_all().expect("fsync");
    let metadata = file.metadata().expect("fstat");
    assert_eq!(metadata.len(), (1 << 40) + 6);
    assert!(
        metadata.blocks() * 512 <= 1 << 20,
        "{} blocks for six bytes",
        metadata.blocks()
    );
    let mut hole = vec![1; 10_000];
    file.read_exact_at(&mut hole, 1 << 39).expect("read");
    assert!(hole.iter().all(|byte| *byte == 0));
    // Cut and grown again: what was there must not come back.
    file.set_len((1 << 40) + 3).expect("truncate");
    file.set_len((1 << 40) + 6).expect("truncate");
    let mut end = [1; 6];
    file.read_exact_at(&mut end, 1 << 40).expect("read");
    assert_eq!(&end, b"mid\0\0\0");
    drop(file);
    mount.unmount();
}

#[test]
fn times_are_kept_to_the_nanosecond() {
    let sandbox = Sandbox::light("posix-times");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let path = mount.path("file");
    for (seconds, nanoseconds) in [
        (0, 1),
        (-1, 999_999_999),
        (-3_000_000_000, 5),
        (1_700_000_000, 123_456_789),
        (9_000_000_000, 0),
    ] {
        let mut file = File::create(&path).expect("create");
        file.write_all(b"dirty bytes must not bring their own time later")
            .expect("write");
        let time = TimeSpec::new(seconds, nanoseconds);
        utimensat(
            nix::fcntl::AT_FDCWD,
            &path,
            &time,
            &time,
            UtimensatFlags::FollowSymlink,
        )
        .expect("set times");
        file.sync_all().expect("fsync");
        drop(file);
        let metadata = path.metadata().expect("stat");
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (seconds, nanoseconds));
        assert_eq!((metadata.atime(), metadata.atime_nsec()), (seconds, nanoseconds));
    }
    mount.unmount();
}

#[test]
fn statfs_tells_what_the_disks_have() {
    let sandbox = Sandbox::light("posix-statfs");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let before = nix::sys::statvfs::statvfs(mount.directory()).expect("statfs");
    let disk = nix::sys::statvfs::statvfs(sandbox.folder()).expect("statfs");
    let bytes = |blocks: u64, unit: u64| blocks * unit;
    let capacity = bytes(before.blocks(), before.fragment_size());
    assert!(
        capacity > 0 && capacity <= bytes(disk.blocks(), disk.fragment_size()),
        "{capacity} bytes"
    );
    assert!(before.blocks_available() > 0 && before.blocks_available() <= before.blocks());
    assert_eq!(before.name_max(), 255);
    let output = shell(&format!("df -T '{}'", mount.directory().display()));
    assert!(output.contains("fuse.quorumfs"), "{output}");
    mount.unmount();
}

#[test]
fn modes_owners_and_umask_are_respected() {
    let sandbox = Sandbox::light("posix-modes");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let folder = mount.directory().display().to_string();
    let modes = shell(&format!(
        "cd '{folder}'; umask 027; mkdir d; echo x >f; ln -s f l; mkfifo p
         mkdir g; chgrp 1234 g; chmod 2775 g; mkdir g/inner; echo x >g/file
         stat -c '%n %a %u %g' d f p g/inner g/file"
    ));
    assert_eq!(
        modes,
        "d 750 0 0\nf 640 0 0\np 640 0 0\ng/inner 2750 0 1234\ng/file 640 0 1234\n"
    );
    let as_nobody = |script: &str| {
        format!("cd '{folder}'; setpriv --reuid 65534 --regid 65534 --clear-groups sh -c '{script}'")
    };
    shell(&format!(
        "cd '{folder}'; mkdir -m 1777 shared; chmod 755 .; echo own >shared/roots"
    ));
    shell(&as_nobody("echo mine >shared/mine"));
    shell_fails(&as_nobody("cat f"));
    shell_fails(&as_nobody("rm -f shared/roots"));
    shell_fails(&as_nobody("mkdir not-here"));
    assert_eq!(
        shell(&format!("cd '{folder}'; stat -c '%u %g' shared/mine")),
        "65534 65534\n"
    );
    // A write by somebody else takes set-user-id away.
    shell(&format!(
        "cd '{folder}'; cp /bin/true shared/program; chown 0:0 shared/program; chmod 4777 shared/program"
    ));
    shell(&as_nobody("echo more >>shared/program"));
    assert_eq!(
        shell(&format!("cd '{folder}'; stat -c %a shared/program")),
        "777\n"
    );
    mount.unmount();
}

#[test]
fn appends_and_exclusive_creates_are_atomic() {
    let sandbox = Sandbox::light("posix-append");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let mount = &mount;
            scope.spawn(move || {
                let open = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(mount.path("log"));
                let mut log = open.expect("open");
                (0..50).for_each(|line| {
                    log.write_all(format!("{thread} {line}\n").as_bytes())
                        .expect("append")
                });
            });
        }
    });
    let log = fs::read_to_string(mount.path("log")).expect("read");
    let lines: std::collections::BTreeSet<&str> = log.lines().collect();
    assert_eq!((lines.len(), log.lines().count()), (400, 400));
    let path = mount.path("exclusive");
    let winners: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| usize::from(File::create_new(&path).is_ok())))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .sum()
    });
    assert_eq!(winners, 1);
    mount.unmount();
}

#[test]
fn shared_mappings_and_sqlite_work() {
    let sandbox = Sandbox::light("posix-mmap");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let folder = mount.directory().display().to_string();
    let rows = shell(&format!(
        "cd '{folder}'; python3 - <<'END'
import mmap, sqlite3
with open('mapped', 'wb') as f: f.truncate(100000)
with open('mapped', 'r+b') as f:
    m = mmap.mmap(f.fileno(), 0); m[50000:50006] = b'mapped'; m.flush(); m.close()
for mode in ('delete', 'truncate'):
    db = sqlite3.connect('db-' + mode); db.execute('pragma journal_mode=' + mode)
    db.execute('create table t(n integer primary key, s text)')
    for n in range(100):
        with db: db.execute('insert into t values(?, ?)', (n, 'x' * n))
    db.close()
    db = sqlite3.connect('db-' + mode)
    print(db.execute('select count(*), sum(length(s)) from t').fetchone(), db.execute('pragma integrity_check').fetchone())
END"
    ));
    assert_eq!(rows, "(100, 4950) ('ok',)\n(100, 4950) ('ok',)\n");
    assert_eq!(
        &fs::read(mount.path("mapped")).expect("read")[49_999..50_007],
        b"\0mapped\0"
    );
    mount.unmount();
}

#[test]
fn long_names_and_paths_have_the_limits_of_linux() {
    let sandbox = Sandbox::light("posix-names");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    fs::write(mount.path("n".repeat(255)), "").expect("255 bytes are a name");
    assert_eq!(
        errno(fs::write(mount.path("n".repeat(256)), "")),
        libc::ENAMETOOLONG
    );
    let mut deep = mount.directory().to_path_buf();
    for _ in 0..60 {
        deep.push("d".repeat(50));
    }
    fs::create_dir_all(&deep).expect("a deep path");
    fs::write(deep.join("file"), "deep").expect("write");
    assert_eq!(fs::read_to_string(deep.join("file")).expect("read"), "deep");
    let target = CString::new("t".repeat(4095)).expect("no NUL");
    std::os::unix::fs::symlink(target.to_str().expect("ASCII"), mount.path("link"))
        .expect("a target of 4095 bytes");
    assert_eq!(
        fs::read_link(mount.path("link"))
            .expect("readlink")
            .as_os_str()
            .len(),
        4095
    );
    mount.unmount();
}
