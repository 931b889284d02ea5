//! The kernel's caches match the file: pages, names and attributes under changes of this mount and others.

use quorumfs_proto::statistics::ClientStatistics;

use super::*;
use crate::statistics::Verb;

/// Returns how many requests of this kind `mount` has answered, and how many of them with an error.
fn requests(mount: &TestMount, verb: Verb) -> (u64, u64) {
    let mut value = vec![0u8; 64 << 10];
    let (path, room) = (c_path(&mount.path("")), value.len());
    let name = c"user.quorumfs.statistics";
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
    value.truncate(usize::try_from(length).unwrap());
    let statistics: ClientStatistics = serde_json::from_slice(&value).unwrap();
    let of_verb = statistics.verbs.iter().find(|row| row.verb == verb.name());
    of_verb.map_or((0, 0), |row| (row.count, row.failures))
}

/// Reads all of `file`, according to its own size.
fn whole(file: &File) -> Vec<u8> {
    let mut bytes = vec![b'?'; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn pages_are_dropped_when_another_mount_changed_the_size() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    fs::write(other.path("log"), "0123456789").unwrap();
    let open = File::open(one.path("log")).unwrap();
    assert_eq!(whole(&open), b"0123456789");
    let mut append = File::options().append(true).open(other.path("log")).unwrap();
    append.write_all(b"abcdefghij").unwrap();
    assert_eq!(whole(&open), b"0123456789abcdefghij");
    append.set_len(3).unwrap();
    append.write_all(b"xyz").unwrap();
    assert_eq!(whole(&open), b"012xyz");
    drop((open, append));
    one.unmount();
    other.unmount();
}

#[test]
fn own_writes_do_not_cost_the_kernel_its_pages() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let mount = mount(&cluster, 1);
    fs::write(mount.path("file"), pattern(1 << 20)).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(mount.path("file"))
        .unwrap();
    assert_eq!(whole(&file).len(), 1 << 20);
    let before = requests(&mount, Verb::Read);
    // Longer by whole pages, so that none must be read first.
    for round in 0..10u64 {
        file.write_all_at(&pattern(4096), (1 << 20) + round * 4096)
            .unwrap();
        file.metadata().unwrap();
        file.sync_all().unwrap();
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 8192).unwrap();
        assert_eq!(page[..], pattern(1 << 20)[8192..12_288]);
    }
    assert_eq!(requests(&mount, Verb::Read), before);
    drop(file);
    mount.unmount();
}

#[test]
fn appending_can_be_set_and_cleared_while_a_file_is_open() {
    if !can_mount() {
        return;
    }
    use std::os::fd::AsRawFd;
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let open = |append: bool| {
        let mut options = File::options();
        options.read(true).write(true).append(append).create(true);
        options.open(one.path("log")).unwrap()
    };
    let set = |file: &File, flags: i32| {
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }).unwrap()
    };
    let (mut append, mut plain) = (open(true), open(false));
    append.write_all(b"0123").unwrap();
    set(&append, 0);
    append.write_all_at(b"x", 1).unwrap();
    assert_eq!(whole(&plain), b"0x23");
    let mut elsewhere = File::options().append(true).open(other.path("log")).unwrap();
    elsewhere.write_all(b"45").unwrap();
    set(&plain, libc::O_APPEND);
    plain.write_all(b"67").unwrap();
    plain.sync_all().unwrap();
    assert_eq!(whole(&plain), b"0x234567");
    assert_eq!(fs::read(other.path("log")).unwrap(), b"0x234567");
    drop((append, plain, elsewhere));
    one.unmount();
    other.unmount();
}

#[test]
fn a_file_that_is_open_for_appending_can_be_mapped() {
    if !can_mount() {
        return;
    }
    let mount = mount(&MemoryCluster::new(), 1);
    fs::write(mount.path("file"), pattern(5000)).unwrap();
    let path = c_path(&mount.path("file"));
    // In a separate process, see `a_shared_mapping_is_written_back_and_never_makes_the_file_longer`.
    let failed_call = in_child(|| unsafe {
        let file = libc::open(path.as_ptr(), libc::O_RDWR | libc::O_APPEND);
        let memory = libc::mmap(
            std::ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file,
            0,
        );
        if file < 0 || memory == libc::MAP_FAILED {
            return 1;
        }
        let bytes = memory.cast::<u8>();
        if bytes.add(4999).read() != (4999 % 251) as u8 {
            return 2;
        }
        if libc::write(file, c"new".as_ptr().cast(), 3) != 3 {
            return 3;
        }
        if bytes.add(5000).read() != b'n' || bytes.add(5002).read() != b'w' {
            return 4;
        }
        bytes.write(254);
        libc::munmap(memory, 8192)
    });
    assert_eq!(failed_call, 0);
    let bytes = fs::read(mount.path("file")).unwrap();
    assert_eq!(bytes.len(), 5003);
    assert_eq!((bytes[0], bytes[1], &bytes[5000..]), (254, 1, &b"new"[..]));
    mount.unmount();
}

#[test]
fn a_file_that_another_mount_makes_meanwhile_is_opened() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let (one, other) = (mount(&cluster, 1), mount(&cluster, 2));
    let rounds: u64 = 200;
    // Both create each file at about the same moment. The second one opens the first one's.
    let together = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        for mount in [&one, &other] {
            let together = &together;
            scope.spawn(move || {
                for round in 0..rounds {
                    together.wait();
                    let name = mount.path(&format!("{round}"));
                    let mut file = File::options().append(true).create(true).open(name).unwrap();
                    file.write_all(b"x").unwrap();
                }
            });
        }
    });
    let raced: u64 = [&one, &other]
        .map(|mount| requests(mount, Verb::Create).1)
        .iter()
        .sum();
    eprintln!("{raced} of {rounds} creations found a file");
    for round in 0..rounds {
        assert_eq!(fs::read(one.path(&format!("{round}"))).unwrap(), b"xx");
    }
    one.unmount();
    other.unmount();
}
