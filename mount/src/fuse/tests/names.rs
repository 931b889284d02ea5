//! A call by name never fails because another mount gave the name to another inode meanwhile.

use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use quorumfs_fs::OpenFlags;
use quorumfs_proto::command::RenameMode;

const ROOT: InodeNumber = InodeNumber::ROOT;

/// Makes `change` on another mount, without a kernel in between, and lets the cluster reclaim unused inodes, repeatedly
/// while `calls` runs.
fn meanwhile<Running: Future<Output = ()> + Send>(
    cluster: &Arc<MemoryCluster>,
    other: &Arc<Filesystem<Connection>>,
    runtime: &tokio::runtime::Runtime,
    change: impl Fn(Arc<Filesystem<Connection>>, u64) -> Running + Sync,
    calls: impl FnOnce(),
) {
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                runtime.block_on(change(Arc::clone(other), round));
                runtime.block_on(other.flush_all()).unwrap();
                cluster.reclaim();
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(calls));
        stopped.store(true, Ordering::Relaxed);
        done.unwrap();
    });
}

/// Makes `name` a file with `bytes`.
async fn put(fs: &Arc<Filesystem<Connection>>, name: &[u8], bytes: &[u8]) {
    let flags = OpenFlags::from(libc::O_RDWR);
    let Ok((_, opened)) = fs.create(ROOT, name, 0o644, 0, 0, flags).await else {
        return; // It exists.
    };
    let position = quorumfs_fs::WritePosition::At(0);
    let keep = quorumfs_proto::command::Privileges::Keep;
    let bytes = bytes::Bytes::copy_from_slice(bytes);
    fs.write(
        opened.handle,
        position,
        bytes,
        keep,
        quorumfs_fs::Order::default(),
    )
    .await
    .unwrap();
    fs.flush(opened.handle).await.unwrap();
    fs.release(opened.handle).await.unwrap();
}

#[test]
fn each_open_of_a_name_that_is_replaced_gives_a_whole_version() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    other
        .runtime
        .block_on(put(&other.filesystem, b"file", b"version"));
    meanwhile(
        &cluster,
        &other.filesystem,
        &other.runtime,
        |fs, round| async move {
            put(&fs, b"new", format!("version {round}").as_bytes()).await;
            fs.rename(ROOT, b"new", ROOT, b"file", RenameMode::Replace)
                .await
                .unwrap();
        },
        || {
            for round in 0..3000 {
                let text =
                    fs::read_to_string(one.path("file")).unwrap_or_else(|e| panic!("round {round}: {e}"));
                assert!(text.starts_with("version"), "{text}");
                fs::metadata(one.path("file")).unwrap();
            }
        },
    );
    one.unmount();
    other.unmount();
}

#[test]
fn a_name_that_comes_and_goes_can_be_opened_for_creation() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    meanwhile(
        &cluster,
        &other.filesystem,
        &other.runtime,
        |fs, _| async move {
            put(&fs, b"file", b"").await;
            let unlinked = fs.unlink(ROOT, b"file").await;
            assert!(matches!(
                unlinked,
                Ok(()) | Err(quorumfs_proto::FsError::NotFound)
            ));
        },
        || {
            for round in 0..3000 {
                let mut options = File::options();
                let options = options.create(true).write(true);
                let options = match round % 3 {
                    0 => options,
                    1 => options.append(true),
                    _ => options.truncate(true),
                };
                let mut file = options
                    .open(one.path("file"))
                    .unwrap_or_else(|error| panic!("round {round}: {error}"));
                file.write_all(b"x").unwrap();
                drop(file);
                let _ = fs::remove_file(one.path("file"));
            }
        },
    );
    one.unmount();
    other.unmount();
}

#[test]
fn a_name_that_a_creation_found_is_not_seen_after_its_removal() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    for round in 0..500 {
        let name = format!("{round}");
        let together = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                together.wait();
                other
                    .runtime
                    .block_on(put(&other.filesystem, name.as_bytes(), b""));
            });
            together.wait();
            let mut options = File::options();
            options.create(true).append(true).open(one.path(&name)).unwrap();
        });
        other
            .runtime
            .block_on(other.filesystem.unlink(ROOT, name.as_bytes()))
            .unwrap();
        assert!(!one.path(&name).exists(), "round {round}");
    }
    one.unmount();
    other.unmount();
}

/// Makes directories `p/sub` and `q`; the kernel of `one` knows the first, and then the other mount moves `sub` to `q`.
fn moved_elsewhere(one: &TestMount, other: &TestMount, round: &str, seen: impl Fn(&Path)) {
    fs::create_dir_all(other.path(&format!("{round}/p/sub/below"))).unwrap();
    fs::create_dir(other.path(&format!("{round}/q"))).unwrap();
    seen(&one.path(&format!("{round}/p/sub")));
    fs::rename(
        other.path(&format!("{round}/p/sub")),
        other.path(&format!("{round}/q/sub")),
    )
    .unwrap();
}

#[test]
fn a_directory_that_another_mount_moved_can_be_used_and_moved_on() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let at = |name: &str| one.path(name);
    let look = |path: &Path| {
        fs::metadata(path.join("below")).unwrap();
    };
    for round in 0..10 {
        let r = format!("{round}");
        moved_elsewhere(&one, &other, &r, look);
        match round % 5 {
            0 => fs::rename(at(&format!("{r}/q/sub")), at(&format!("{r}/p/sub"))).unwrap(),
            1 => fs::rename(at(&format!("{r}/q/sub")), at(&format!("{r}/p/x"))).unwrap(),
            2 => fs::rename(at(&format!("{r}/q/sub/below")), at(&format!("{r}/p/below"))).unwrap(),
            3 => {
                fs::write(at(&format!("{r}/q/sub/file")), "x").unwrap();
                fs::remove_file(at(&format!("{r}/q/sub/file"))).unwrap();
                fs::remove_dir(at(&format!("{r}/q/sub/below"))).unwrap();
            }
            // Moved there and back, by one mount and by the other.
            _ => {
                for _ in 0..5 {
                    fs::rename(at(&format!("{r}/q/sub")), at(&format!("{r}/p/sub"))).unwrap();
                    assert!(at(&format!("{r}/p/sub/below")).is_dir());
                    let back = other.path(&format!("{r}/q/sub"));
                    fs::rename(other.path(&format!("{r}/p/sub")), back).unwrap();
                }
            }
        }
    }
    // While it is open.
    for round in 10..13 {
        let r = format!("{round}");
        let open = std::cell::RefCell::new(None);
        moved_elsewhere(&one, &other, &r, |path| {
            *open.borrow_mut() = Some(File::open(path).unwrap());
        });
        fs::rename(at(&format!("{r}/q/sub")), at(&format!("{r}/p/sub"))).unwrap();
        let open = open.into_inner().unwrap();
        let (held, named) = (
            open.metadata().unwrap(),
            fs::metadata(at(&format!("{r}/p/sub"))).unwrap(),
        );
        assert_eq!((held.ino(), held.dev()), (named.ino(), named.dev()));
        let there = fs::metadata(other.path(&format!("{r}/p/sub"))).unwrap();
        assert_eq!(there.ino(), named.ino(), "one directory has one number");
    }
    one.unmount();
    other.unmount();
}

#[test]
fn a_directory_and_its_parent_can_change_places() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    for round in 0..5 {
        let (one, other) = (
            |name: &str| one.path(&format!("{round}/{name}")),
            |name: &str| other.path(&format!("{round}/{name}")),
        );
        fs::create_dir_all(other("a/b")).unwrap();
        fs::metadata(one("a/b")).unwrap();
        fs::rename(other("a/b"), other("b")).unwrap();
        fs::rename(other("a"), other("b/a")).unwrap();
        fs::metadata(one("b/a")).unwrap();
        fs::rename(one("b/a"), one("c")).unwrap();
        assert!(other("c").is_dir());
    }
    one.unmount();
    other.unmount();
}

#[test]
fn a_directory_that_this_mount_moves_stays_the_same_to_its_kernel() {
    if !can_mount() {
        return;
    }
    let mount = mount(&MemoryCluster::new(), 1);
    fs::create_dir_all(mount.path("p/sub/below")).unwrap();
    fs::create_dir(mount.path("q")).unwrap();
    let (inside, from, to) = (
        c_path(&mount.path("p/sub/below")),
        c_path(&mount.path("p/sub")),
        c_path(&mount.path("q/sub")),
    );
    let expected = c_path(&mount.path("q/sub/below"));
    let failed_call = in_child(|| unsafe {
        let mut path = [0u8; 4096];
        if libc::chdir(inside.as_ptr()) != 0 || libc::rename(from.as_ptr(), to.as_ptr()) != 0 {
            return 1;
        }
        let mut status = std::mem::zeroed();
        if libc::stat(to.as_ptr(), &mut status) != 0 || libc::stat(expected.as_ptr(), &mut status) != 0 {
            return 2;
        }
        if libc::getcwd(path.as_mut_ptr().cast(), path.len()).is_null() {
            return 3;
        }
        i32::from(libc::strcmp(path.as_ptr().cast(), expected.as_ptr()) != 0) * 4
    });
    assert_eq!(failed_call, 0);
    mount.unmount();
}

#[test]
fn a_removed_working_directory_answers_stat_although_another_mount_moved_it_before() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    // The other mount does not cache its look-ups.
    let forgetful = FsOptions {
        lookup_grace_ms: 0,
        ..FsOptions::default()
    };
    let (one, other) = (
        mount(&cluster, 1),
        mount_as(&cluster, 2, MsFlags::empty(), forgetful),
    );
    // Moved once, and moved there, back and on: the kernel then knows it by several numbers.
    for (round, places) in [&["q"][..], &["q", "p", "q"]].into_iter().enumerate() {
        let at = |place: &str| format!("{round}/{place}/sub");
        fs::create_dir_all(other.path(&at("p"))).unwrap();
        fs::create_dir(other.path(&format!("{round}/q"))).unwrap();
        let used = |place: &str| {
            let mut options = File::options();
            let options = options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY);
            options.open(one.path(&at(place))).unwrap()
        };
        let mut place = "p";
        let mut working = vec![used(place)];
        let number = working[0].metadata().unwrap().ino();
        for next in places {
            fs::rename(other.path(&at(place)), other.path(&at(next))).unwrap();
            place = next;
            working.push(used(place));
        }
        // The newest number is not used; each earlier one is at some time the last in use.
        drop(working.pop());
        fs::remove_dir(one.path(&at(place))).unwrap();
        while let Some(newest) = working.pop() {
            // It would be released within that time if it were seen to be unused.
            std::thread::sleep(Duration::from_millis(700));
            cluster.reclaim();
            let metadata = newest.metadata().unwrap();
            assert_eq!(
                (metadata.ino(), metadata.nlink()),
                (number, 0),
                "round {round}, of {}",
                working.len() + 1
            );
        }
    }
    let begin = std::time::Instant::now();
    while cluster.inode_count() != 7 {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "they are never released"
        );
        std::thread::sleep(Duration::from_millis(50));
        cluster.reclaim();
    }
    one.unmount();
    other.unmount();
}
